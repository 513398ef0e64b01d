"""vLLM V1: one token budget for all, blocks as they are needed, prefixes shared."""

from __future__ import annotations

from pydantic import Field

from vidur_simpy.errors import CapacityError, ConfigError
from vidur_simpy.replica_scheduler.interface import ReplicaResources
from vidur_simpy.replica_scheduler.ordering import Ordering
from vidur_simpy.replica_scheduler.vllm_v1_release import release_of
from vidur_simpy.replica_scheduler.vllm_v1_scheduler import VllmV1Scheduler
from vidur_simpy.validation import configuration

__all__ = ["VllmV1", "VllmV1Scheduler"]


@configuration
class VllmV1:
    """Running requests first, then waiting ones, each a part of the token budget.

    All names and defaults are vLLM's, except that `async_scheduling` is off unless asked for:
    vLLM has had it on by default since 0.15. The block size and the number of blocks
    (vLLM's ``num_gpu_blocks``) are those of the cluster's `KVCache`, whose own watermark has
    no effect here.

    Attributes
    ----------
    max_num_seqs : int
        Most requests that run at a time. vLLM's server sets 256, on devices of 70 GiB or more 1024.
    max_num_batched_tokens : int
        Most tokens of a step. vLLM's server sets 8192 on devices of 70 GiB or more.
    policy : {"fcfs", "priority"}, another name of an ordering, or a key function
        Who is admitted next. Under ``"priority"`` also who gives way when blocks run short: the
        least urgent running request, otherwise the one admitted last.
    enable_prefix_caching : bool
        Reuse the blocks of equal prefixes, which requests with ``hash_ids`` may share. A request
        that was preempted finds its own blocks again.
    enable_chunked_prefill : bool
        Let a prompt that exceeds the budget be computed in several steps.
    long_prefill_token_threshold : int
        Most tokens of one request in a step; 0 is no limit.
    long_prefill_token_threshold_adaptive : bool
        Raise that limit to an equal share of the budget.
    max_num_active_seqs : int or None
        A lower limit in place of `max_num_seqs`.
    watermark : float
        Share of the blocks that admission leaves free, unless nothing runs.
    scheduler_reserve_full_isl : bool
        Admit a request only if blocks for all its known tokens are free. None are set aside.
    async_scheduling : bool
        Plan a step while the one before it is computed, without its tokens.
    vllm_version : str
        Release whose rules to follow, of those in ``vllm_v1_release.VLLM_VERSIONS``.

    Raises
    ------
    ConfigError
        A setting that is unknown, out of range, or that the release does not have.

    Notes
    -----
    Decides as the scheduler of vLLM does, for a decoder with full attention, on one pipeline stage,
    without speculative decoding, adapters or KV transfer. A request whose prompt and output pass
    `max_model_len` ends there, with fewer output tokens.
    """

    max_num_seqs: int = Field(default=128, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    policy: Ordering = "fcfs"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    long_prefill_token_threshold_adaptive: bool = False
    max_num_active_seqs: int | None = Field(default=None, ge=1)
    watermark: float = Field(default=0.0, ge=0, lt=1)
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = False
    vllm_version: str = "0.32.0"

    def __post_init__(self) -> None:
        release = release_of(self.vllm_version)
        for name, is_known in (
            ("watermark", release.has_watermark),
            ("long_prefill_token_threshold_adaptive", release.has_adaptive_cap),
            ("max_num_active_seqs", release.has_max_num_active_seqs),
        ):
            if getattr(self, name) and not is_known:
                raise ConfigError(
                    f"VllmV1.{name} = {getattr(self, name)!r}: vLLM {self.vllm_version} does not "
                    f"have it; expected a later vllm_version."
                )

    def for_replica(self, resources: ReplicaResources) -> VllmV1Scheduler:
        """Make the scheduler of one replica.

        Raises
        ------
        ConfigError, CapacityError
            A replica on which vLLM would not start, or of several pipeline stages.
        """
        _check(self, resources)
        return VllmV1Scheduler(self, resources)


def _check(policy: VllmV1, resources: ReplicaResources) -> None:
    """Raise an error where vLLM would not start."""
    stages, max_model_len = resources.pipeline_parallel_size, resources.max_model_len
    if stages > 1:
        raise ConfigError(
            f"vllm_v1 with pipeline_parallel_size = {stages}: expected 1; its scheduler is "
            f"modelled for one pipeline stage."
        )
    max_num_batched_tokens = policy.max_num_batched_tokens
    if not policy.enable_chunked_prefill and max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"VllmV1.max_num_batched_tokens = {max_num_batched_tokens} with "
            f"enable_chunked_prefill=False: expected at least max_model_len = {max_model_len}."
        )
    pool = resources.pool
    needed, usable = pool.blocks_of(max_model_len), pool.num_blocks - 1
    if needed > usable:
        raise CapacityError(
            f"one request of max_model_len = {max_model_len} tokens needs {needed} KV-cache blocks "
            f"of {pool.block_size} tokens, vLLM can use {usable} of {pool.num_blocks}; use "
            f"max_model_len <= {usable * pool.block_size}."
        )
