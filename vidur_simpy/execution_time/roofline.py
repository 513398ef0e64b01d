"""Execution time from the sheets of model and device, at fitted efficiencies."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import Field

from vidur_simpy.execution_time.factors import RooflineFactors
from vidur_simpy.execution_time.links import Links
from vidur_simpy.execution_time.lookup import Lookup
from vidur_simpy.execution_time.operators import (
    Kernels,
    Mixture,
    Mlp,
    attended,
    attention_of,
)
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time.interface import BatchCounts, StageTime
    from vidur_simpy.hardware import Device

__all__ = ["Roofline", "RooflineFactors", "RooflineStageTime", "RooflineStages"]


# Below so many iterations plain Python is faster than numpy.
_FEW = 32
# Contexts that a table keeps; some 6 MB.
_MANY = 65_536


@configuration
class Roofline:
    """Stage times of any model from model and device sheets, without any profile.

    Each kernel takes the smooth maximum of its compute time and its memory time at fitted shares
    of the device's peaks, plus a constant; `RooflineStageTime` names the operators. Weights and
    KV cache have the precisions of the deployment. A set of fitted factors was 2 to 4 % off on
    average for the Llama iterations it was made of on A100, H100, H200 and L40S (RTX PRO 6000 and
    B200: 2 to 5 %), 5 to 8 % for mixtures of experts on A100, H100 and H200 (B200: 15 %), 2 to 6 %
    for dense models that it had not seen (``tests/benchmarks/roofline_accuracy.py``), and 5 to 11 %
    for weights in fp8. Weights of 4 bits, int8, pipeline transfers, expert parallelism and devices
    that were not fitted are extrapolated; caches in fp8 are read slower by Hopper than said here
    (attention of decodes by up to a quarter).

    Parameters
    ----------
    cpu_overhead : float
        Seconds of CPU time per iteration, spent in the first stage. Servers were measured between
        0 and 3 ms. With the default of 2 ms a steady state of even batches was 5 to 9 % off on
        average in the time per output token of 98 vLLM runs that NVIDIA published with
        aiconfigurator-core 0.12 (Llama-70B in fp8 on H100 and H200, Qwen3-32B on H100), without it
        8 to 15 %.
    factors : RooflineFactors, str or None
        The fitted shares, or the name of a set; by default those of the device.
    expert_imbalance : float
        With expert parallelism, the load of the busiest device as a multiple of the mean. It is
        that of the routing, which nobody but the user knows; 1 is perfectly even.

    Examples
    --------
    >>> from vidur_simpy.hardware import Device
    >>> Roofline().factors_name(Device.from_name("h100-pcie"))
    'hopper'
    """

    cpu_overhead: float = Field(default=0.002, ge=0)
    factors: RooflineFactors | str | None = None
    expert_imbalance: float = Field(default=1.0, ge=1)

    def __post_init__(self) -> None:
        if isinstance(self.factors, str):
            RooflineFactors.from_name(self.factors)

    def factors_for(self, device: Device) -> RooflineFactors:
        """Return the factors used on a device."""
        if self.factors is None:
            return RooflineFactors.of_device(device)
        if isinstance(self.factors, str):
            return RooflineFactors.from_name(self.factors)
        return self.factors

    def factors_name(self, device: Device) -> str:
        """Return the name of the set of factors used on a device."""
        return self.factors_for(device).name

    def for_replica(self, deployment: Deployment) -> RooflineStageTime:
        """Return the stage times of a replica."""
        factors = self.factors_for(deployment.device)
        stages = RooflineStages(deployment, factors, self.cpu_overhead, self.expert_imbalance)
        return stages.stage_time()


class RooflineStageTime(Protocol):
    """The roofline of one replica: call it with a batch and a stage for the seconds."""

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes."""


class RooflineStages:
    """The pipeline stages of one replica: what they execute, and in what time.

    Every stage takes its share of the layers; the first one also the CPU overhead, the last one
    the LM head, all but the last one the transfer to the next. The embedding lookup, the final
    norm and the sampling are not counted.

    What depends on the number of tokens, or of sequences, alone is computed once and kept.
    """

    def __init__(
        self,
        deployment: Deployment,
        factors: RooflineFactors,
        cpu_overhead: float,
        expert_imbalance: float = 1.0,
    ) -> None:
        model, num_stages = deployment.model, deployment.pipeline_parallel_size
        self._kernels = Kernels(deployment.device, factors)
        self._links = Links(deployment, factors)
        self._attention = attention_of(deployment, self._kernels)
        self._mlp = Mlp(deployment, self._kernels, model.intermediate_size)
        shared = model.num_shared_experts * model.moe_intermediate_size
        self._shared_experts = Mlp(deployment, self._kernels, shared)
        self._mixture = Mixture(deployment, self._kernels, expert_imbalance)
        self._last_stage = num_stages - 1
        self._num_layers = deployment.layers_per_stage
        self._num_sliding = model.num_sliding_layers / num_stages
        self._num_full = self._num_layers - self._num_sliding
        self._num_plain = model.num_plain_layers / num_stages
        self._num_mixtures = model.num_mixture_layers / num_stages
        self._window = model.sliding_window
        self._is_latent = bool(model.kv_latent_size)
        self._hidden_size = model.hidden_size
        self._vocabulary = model.vocab_size / deployment.tensor_parallel_size
        self._cpu_overhead = cpu_overhead
        self._attention_time = factors.attention_time
        per_context = self._attention.per_decode_context
        self._per_context = self._num_full * per_context
        self._per_window = self._num_sliding * per_context
        stages = range(num_stages)
        # By stage, then by number of tokens; by prefill chunks and decodes; by decodes. Plain
        # lists and dictionaries are the fastest to look up.
        self._fixed_times: list[dict[int, float]] = [{} for _ in stages]
        self._sequence_times: list[list[list[float]]] = [[] for _ in stages]
        self._decode_starts = [Lookup(functools.partial(self._start, stage)) for stage in stages]
        self._chunk_times: dict[int, tuple[float, float]] = {}
        self._expansion_times = Lookup(self._attention.expansion_time, _MANY)

    def stage_time(self) -> RooflineStageTime:
        """Return the stage times, as a function: it is called faster than an object is."""
        # As few variables as possible: all of them are copied at each call.
        fixed_times, sequence_times = self._fixed_times, self._sequence_times
        decode_starts, chunk_times = self._decode_starts, self._chunk_times
        prefill, per_context = self._attention.prefill, self._per_context
        compute_per_pair = self._num_full * prefill.compute_per_pair
        memory_per_context = self._num_full * prefill.memory_per_context
        smoothness, root, keep = prefill.smoothness, 1 / prefill.smoothness, self._keep

        def stage_time(batch: BatchCounts, stage_id: int) -> float:
            prefills, num_decodes = batch.prefills, batch.num_decodes
            context = batch.decode_context
            if not prefills:
                return decode_starts[stage_id][num_decodes] + per_context * context
            num_tokens = batch.num_tokens
            try:
                time = (
                    fixed_times[stage_id][num_tokens]
                    + sequence_times[stage_id][len(prefills)][num_decodes]
                    + per_context * context
                )
                compute, memory = chunk_times[num_tokens - num_decodes]
            except (KeyError, IndexError):
                keep(stage_id, num_tokens, num_decodes, len(prefills))
                return stage_time(batch, stage_id)
            # As PrefillAttention.time, written out: iterations spend most of their time here.
            compute += compute_per_pair * (batch.num_attention_pairs - context)
            memory += memory_per_context * (batch.total_context - context)
            if compute < memory:
                compute, memory = memory, compute
            if compute:
                time += compute * (1.0 + (memory / compute) ** smoothness) ** root
            return time

        function: Any = stage_time
        if self._is_latent:
            function = self._with_expansion(function)
        if self._num_sliding:
            function = self._with_windows(function)
        function.operators, function.decode_times = self.operators, self.decode_times
        return function  # type: ignore[no-any-return]

    def _with_expansion(self, stage_time: StageTime) -> StageTime:
        """Return stage times with the time to expand latent caches for prefill chunks."""
        num_full, expansion_times = self._num_full, self._expansion_times

        def with_expansion(batch: BatchCounts, stage_id: int) -> float:
            time = stage_time(batch, stage_id)
            if not batch.prefills:
                return time
            return time + num_full * expansion_times[batch.total_context - batch.decode_context]

        return with_expansion

    def _with_windows(self, stage_time: StageTime) -> StageTime:
        """Return stage times with the layers that attend in sliding windows."""
        num_sliding, per_window, window = self._num_sliding, self._per_window, self._window

        def with_windows(batch: BatchCounts, stage_id: int) -> float:
            context, most = batch.decode_context, batch.num_decodes * window
            in_window = context if context < most else most
            time = stage_time(batch, stage_id) + per_window * in_window
            if batch.prefills:
                time += num_sliding * self._window_time(batch.prefills)
            return time

        return with_windows

    def _keep(self, stage_id: int, num_tokens: int, num_decodes: int, num_prefills: int) -> None:
        """Compute what `stage_time` needs to know of a batch with prefill chunks."""
        by_prefills = self._sequence_times[stage_id]
        while len(by_prefills) <= num_prefills:
            by_prefills.append([])
        by_decodes = by_prefills[num_prefills]
        for number in range(len(by_decodes), num_decodes + 1):
            by_decodes.append(self.sequence_time(stage_id, num_prefills, number))
        self._fixed_times[stage_id][num_tokens] = self.fixed_time(stage_id, num_tokens)
        prefill, num_chunk_tokens = self._attention.prefill, num_tokens - num_decodes
        self._chunk_times[num_chunk_tokens] = (
            self._num_full * prefill.compute_per_token * num_chunk_tokens,
            self._num_full * prefill.memory_per_token * num_chunk_tokens,
        )

    def _start(self, stage_id: int, num_decodes: int) -> float:
        """Return the time of decodes alone, but for reading the KV cache."""
        return self.fixed_time(stage_id, num_decodes) + self.sequence_time(stage_id, 0, num_decodes)

    def _window_time(self, prefills: Sequence[PrefillChunk]) -> float:
        """Return the attention of one layer with a sliding window over all prefill chunks."""
        seen = attended(prefills, self._window)
        return self._attention.expansion_time(seen[2]) + self._attention.prefill.time(*seen)

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes."""
        last = decode_context + num_decodes * num_iterations
        start, slope = self._decode_starts[stage_id][num_decodes], self._per_context
        per_window, most = self._per_window, num_decodes * self._window
        if num_iterations >= _FEW:
            contexts = np.arange(decode_context, last, num_decodes, dtype=np.float64)
            times: NDArray[np.float64] = start + slope * contexts
            if per_window:
                times += per_window * np.minimum(contexts, most)
            return times
        few = range(decode_context, last, num_decodes)
        if not per_window:
            return [start + slope * context for context in few]
        return [start + slope * context + per_window * min(context, most) for context in few]

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""
        times = self.token_operators(batch.num_tokens)
        if stage_id == 0:
            times["cpu_overhead"] = self._cpu_overhead
        if batch.num_decodes:
            times["decode_attention"] = self.decode_time(batch.num_decodes, batch.decode_context)
        if batch.prefills:
            times["prefill_attention"] = self.prefill_time(batch.prefills)
        if stage_id < self._last_stage:
            times["send"] = self._links.send_time(batch.num_tokens)
        else:
            times["lm_head"] = self.lm_head_time(batch.num_decodes + len(batch.prefills))
        return times

    def fixed_time(self, stage_id: int, num_tokens: int) -> float:
        """Return the part of a stage's time that depends on the number of tokens alone."""
        time = sum(self.token_operators(num_tokens).values())
        if stage_id == 0:
            time += self._cpu_overhead
        if stage_id < self._last_stage:
            time += self._links.send_time(num_tokens)
        return time

    def token_operators(self, num_tokens: int) -> dict[str, float]:
        """Return the operators of a stage's layers that depend on the number of tokens alone."""
        kernels, links = self._kernels, self._links
        # A norm reads and writes the hidden and the residual state.
        norm = kernels.elementwise_time(4 * num_tokens * self._hidden_size)
        times = {
            "attention_projections": self._num_layers
            * self._attention.projections_time(num_tokens),
            "norms": self._num_layers * 2 * norm,
            "mlp": self._num_plain * self._mlp.time(num_tokens),
            "all_reduce": self._num_layers * 2 * links.all_reduce_time(num_tokens),
        }
        if self._num_mixtures:
            shared = self._shared_experts.time(num_tokens)
            times["mlp"] += self._num_mixtures * shared
            times["router"] = self._num_mixtures * self._mixture.router_time(num_tokens)
            times["experts"] = self._num_mixtures * self._mixture.time(num_tokens)
            times["all_to_all"] = self._num_mixtures * links.all_to_all_time(num_tokens)
        return times

    def sequence_time(self, stage_id: int, num_prefills: int, num_decodes: int) -> float:
        """Return the part of a stage's time that depends on the number of sequences alone."""
        time = self.decode_time(num_decodes, 0) if num_decodes else 0.0
        if num_prefills:
            time += self._num_layers * self._attention_time
        if stage_id == self._last_stage:
            time += self.lm_head_time(num_decodes + num_prefills)
        return time

    def decode_time(self, num_decodes: int, context: int) -> float:
        """Return the attention of a stage's layers over all decodes.

        With a sliding window, the sequences are taken to be equally long.
        """
        start = self._num_layers * self._attention.decode_time(num_decodes)
        in_window = min(context, num_decodes * self._window)
        return start + self._per_context * context + self._per_window * in_window

    def prefill_time(self, prefills: Sequence[PrefillChunk]) -> float:
        """Return the attention of a stage's layers over all prefill chunks."""
        seen = attended(prefills)
        time = self._num_layers * self._attention_time
        expansion = self._attention.expansion_time(seen[2])
        time += self._num_full * (expansion + self._attention.prefill.time(*seen))
        if self._num_sliding:
            time += self._num_sliding * self._window_time(prefills)
        return time

    def lm_head_time(self, num_sequences: int) -> float:
        """Return the time of the LM head, for one row per decode and per prefill chunk.

        A chunk that does not end its prompt needs none; the product is bound by reading its
        weights, so that a row more costs next to nothing.
        """
        return self._kernels.product_time(num_sequences, self._vocabulary, self._hidden_size)
