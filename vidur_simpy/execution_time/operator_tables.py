"""Stage times from operator tables in LLMServingSim's format."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ProfileError
from vidur_simpy.execution_time.factors import RooflineFactors
from vidur_simpy.execution_time.interpolation import Grid, leave_one_out_error
from vidur_simpy.execution_time.links import Links
from vidur_simpy.execution_time.lookup import Lookup
from vidur_simpy.execution_time.operator_attention import MeasuredAttention, Range, curve, nested
from vidur_simpy.execution_time.operator_files import Measured, OperatorFiles, read_operator_files
from vidur_simpy.precision import BF16_BYTES

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.interface import BatchCounts
    from vidur_simpy.execution_time.profile import Profile

__all__ = ["TableStageTime", "llmservingsim_stage_time"]

EVERY_LAYER = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1}
"""How often an operator is in a layer."""

MLP = ("gate_up_proj", "act_fn", "down_proj")
NEEDED = ("layernorm", "qkv_proj", "o_proj")
ENDS = ("embedding", "final_layernorm")

GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Tokens of the CUDA graphs that vLLM captures: a batch of decodes is filled up to the next one."""

SLOWEST_READ, FASTEST_READ = 1 / 50, 3.0
"""Bounds on the bandwidth at which a product of one row reads its weights, as multiples of the
device's: beyond them times cannot be microseconds."""


def llmservingsim_stage_time(profile: Profile, deployment: Deployment) -> TableStageTime:
    """Return the stage times of a replica from tables in LLMServingSim's format.

    Raises
    ------
    ProfileError
        If tables, columns or operators are missing, or a value cannot be.
    """
    moe_size = None
    if deployment.model.num_experts:
        moe_size = 1 if deployment.enable_expert_parallel else deployment.expert_devices
    files = read_operator_files(profile.path, deployment.tensor_parallel_size, moe_size)
    return TableStageTime(files, deployment, profile)


class TableStageTime:
    """The measured operators of one replica: call it with a batch and a stage for the seconds.

    A layer is two norms, the projections of attention with their norms and rotation, attention
    itself, and an MLP or a mixture of experts; the first stage has the embedding and the CPU's
    part, the last one the final norm, the LM head and the sampler. Operators other than attention
    are looked up by tokens, in batches of decodes by those of the CUDA graph they run in (512 and
    fewer); LM head and sampler by sequences.

    What devices send each other is not in the tables. In a ring of ``n``, gathering ``B`` bytes
    takes ``n - 1`` hops and ``(n - 1) / n * B`` over the link; scattering sums as much, an
    all-reduce is both. Tensor parallel devices all-reduce twice a layer, once after the embedding,
    and gather the logits. Where no link is given, it is that of the roofline.

    Experts are looked up by tokens and by how many distinct ones are hit: ``E * (1 - (1 - k /
    E)**T)``, if all are as likely. With whole experts on ``n`` devices, each has ``1 / n`` of them
    and works on as many rows as ``T / n`` tokens have. Data parallel replicas gather all hidden
    states and router logits, and scatter the sums, in each layer. A replica alone takes the others
    to have as many tokens; `together` is the time of a step that they take in step, as in vLLM.
    """

    def __init__(self, files: OperatorFiles, deployment: Deployment, profile: Profile) -> None:
        model, num_stages = deployment.model, deployment.pipeline_parallel_size
        _check(files, deployment)
        self._range = Range(profile.extrapolate)
        self._dense = {name: curve(measured) for name, measured in files.dense.items()}
        self._heads = {name: curve(measured) for name, measured in files.per_sequence.items()}
        self._attention = MeasuredAttention(
            files.attention, files.skew, profile.longest_decode, self._range
        )
        by_experts: Measured = {(hit, tokens): time for (tokens, hit), time in files.moe.items()}
        self._experts = Grid(nested(by_experts, curve)) if by_experts else None
        self._files = files
        self._num_layers = deployment.layers_per_stage
        self._num_plain = model.num_plain_layers / num_stages
        self._num_mixtures = model.num_mixture_layers / num_stages
        self._last_stage = num_stages - 1
        self._links = _Links(deployment, profile)
        self._num_replicas = deployment.data_parallel_size
        ways = deployment.expert_devices if deployment.enable_expert_parallel else 1
        self._num_experts = model.num_experts // ways
        self._experts_per_token = model.experts_per_token
        self._ways = ways
        self._cpu_overhead = profile.cpu_overhead
        self._prefill_overhead = profile.prefill_overhead
        self._with_prefill = [Lookup(self._fixed(stage, True)) for stage in range(num_stages)]
        self._decodes_only = [Lookup(self._fixed(stage, False)) for stage in range(num_stages)]
        self._head_times: Lookup[int, float] = Lookup(
            lambda sequences: sum(self._head_operators(sequences).values())
        )

    @functools.cached_property
    def errors(self) -> dict[str, float]:
        """The cross-validated mean relative error of each operator: each point from others.

        See :func:`leave_one_out_error`.
        """
        files = self._files
        tables = files.dense | files.per_sequence | ({"moe": files.moe} if files.moe else {})
        errors = {name: leave_one_out_error(measured) for name, measured in tables.items()}
        return errors | self._attention.errors

    @property
    def extrapolations(self) -> dict[str, str]:
        """What batches asked for beyond what was measured so far, by operator."""
        said: dict[str, list[str]] = {}
        for (operator, size), (value, limit) in self._range.beyond.items():
            words = f"{size} up to {value:.6g}, measured up to {limit:g}"
            said.setdefault(operator, []).append(words)
        return {operator: "; ".join(words) for operator, words in said.items()}

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""
        num_decodes, prefills = batch.num_decodes, batch.prefills
        if prefills:
            time = self._with_prefill[stage_id][batch.num_tokens]
            if stage_id == self._last_stage:
                time += self._head_times[num_decodes + len(prefills)]
            return time + self._num_layers * self._attention.time(batch)
        time = self._decodes_only[stage_id][num_decodes]
        if stage_id == self._last_stage:
            time += self._head_times[num_decodes]
        attention = self._attention.decode_time(num_decodes, batch.decode_context)
        return time + self._num_layers * attention

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes."""
        time = self._decodes_only[stage_id][num_decodes]
        if stage_id == self._last_stage:
            time += self._head_times[num_decodes]
        contexts = decode_context + num_decodes * np.arange(num_iterations)
        return time + self._num_layers * self._attention.decode_times(num_decodes, contexts)

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""
        has_prefill = bool(batch.prefills)
        num_tokens = batch.num_tokens if has_prefill else in_graph(batch.num_tokens)
        times = self._token_operators(num_tokens, stage_id)
        times |= self._overheads(stage_id, has_prefill)
        times |= self._mixture_operators(num_tokens * self._num_replicas)
        times["attention"] = self._num_layers * self._attention_time(batch)
        if stage_id == self._last_stage:
            times |= self._head_operators(batch.num_decodes + len(batch.prefills))
        return times

    def together(self, batches: Sequence[BatchCounts | None]) -> float:
        """Return the seconds of one step of the replicas that share experts, in step.

        Each layer waits for the slowest before and after its experts. If all decode, all run in
        the CUDA graph of the largest.

        Parameters
        ----------
        batches : sequence of BatchCounts or None
            One per replica; None for one with nothing to do, which takes part with one token.

        Raises
        ------
        ProfileError
            If there are several pipeline stages.
        """
        if self._last_stage:
            raise ProfileError("replicas in step with several pipeline stages are not modelled.")
        busy = [batch for batch in batches if batch is not None]
        has_prefill = any(batch.prefills for batch in busy)
        tokens = [1 if batch is None else batch.num_tokens for batch in batches]
        if not has_prefill:
            tokens = [in_graph(max(tokens))] * len(tokens)
        own = []
        for batch, num_tokens in zip(batches, tokens, strict=True):
            if batch is not None:
                time = sum(self._token_operators(num_tokens, 0).values())
                time += self._num_layers * self._attention_time(batch)
                own.append(time + self._head_times[batch.num_decodes + len(batch.prefills)])
        common = self._mixture_operators(sum(tokens)) | self._overheads(0, has_prefill)
        return max(own, default=0.0) + sum(common.values())

    def _fixed(self, stage_id: int, has_prefill: bool) -> Callable[[int], float]:
        """Return the function of tokens that gives what depends on nothing else."""

        def fixed(num_tokens: int) -> float:
            if not has_prefill:
                num_tokens = in_graph(num_tokens)
            times = self._token_operators(num_tokens, stage_id)
            times |= self._overheads(stage_id, has_prefill)
            times |= self._mixture_operators(num_tokens * self._num_replicas)
            return sum(times.values())

        return fixed

    def _attention_time(self, batch: BatchCounts) -> float:
        if batch.prefills:
            return self._attention.time(batch)
        return self._attention.decode_time(batch.num_decodes, batch.decode_context)

    def _overheads(self, stage_id: int, has_prefill: bool) -> dict[str, float]:
        times = {}
        if stage_id == 0:
            times["cpu_overhead"] = self._cpu_overhead
            if has_prefill:
                times["prefill_overhead"] = self._prefill_overhead
        return times

    def _token_operators(self, num_tokens: int, stage_id: int) -> dict[str, float]:
        """Return what a replica computes by itself for so many tokens, but for attention."""
        look_up, num_layers = self._by_tokens, self._num_layers
        times = {
            name: number * num_layers * look_up(name, num_tokens)
            for name, number in EVERY_LAYER.items()
            if name in self._dense
        }
        if self._num_plain:
            times |= {name: self._num_plain * look_up(name, num_tokens) for name in MLP}
        all_reduce = self._links.all_reduce_time(num_tokens)
        times["all_reduce"] = 2 * num_layers * all_reduce
        if stage_id == 0 and "embedding" in self._dense:
            times["embedding"] = look_up("embedding", num_tokens)
            times["all_reduce"] += all_reduce
        if stage_id < self._last_stage:
            times["send"] = self._links.send_time(num_tokens)
        elif "final_layernorm" in self._dense:
            times["final_layernorm"] = look_up("final_layernorm", num_tokens)
        return times

    def _by_tokens(self, name: str, num_tokens: int) -> float:
        times = self._dense[name]
        self._range.check(name, "tokens", num_tokens, times.limit)
        return times(num_tokens)

    def _head_operators(self, num_sequences: int) -> dict[str, float]:
        times = {}
        for name, of_sequences in self._heads.items():
            self._range.check(name, "sequences", num_sequences, of_sequences.limit)
            times[name] = of_sequences(num_sequences)
        times["logits_gather"] = self._links.logits_time(num_sequences)
        return times

    def _mixture_operators(self, num_tokens: int) -> dict[str, float]:
        """Return experts and exchange of a stage's mixtures, by the tokens of all replicas."""
        if self._experts is None:
            return {}
        chosen = self._experts_per_token / (self._num_experts * self._ways)
        hit = self._num_experts * (1 - (1 - chosen) ** num_tokens)
        rows = num_tokens / self._ways
        self._range.check("moe", "activated_experts", hit, self._experts.limit)
        self._range.check("moe", "tokens", rows, self._experts.rows[0].limit)
        times = {"moe": self._num_mixtures * self._experts(hit, rows)}
        if self._num_replicas > 1:
            times["exchange"] = self._num_mixtures * self._links.exchange_time(num_tokens)
        return times


class _Links:
    """What devices send each other: the link that is given, else the roofline's."""

    def __init__(self, deployment: Deployment, profile: Profile) -> None:
        factors, device = RooflineFactors.of_device(deployment.device), deployment.device
        self._model = deployment.model
        self._width = deployment.tensor_parallel_size
        self._num_replicas = deployment.data_parallel_size
        self._fitted = None if profile.link_gbps else Links(deployment, factors)
        self._latency = factors.all_reduce_time
        if profile.link_latency is not None:
            self._latency = profile.link_latency
        fitted = device.scaleup_bidir_gbps / 2 * factors.all_reduce_link
        self._link = (profile.link_gbps or fitted) * 1e9

    def all_reduce_time(self, num_tokens: int) -> float:
        """Return the time to sum hidden states over the tensor parallel devices."""
        if self._fitted is not None:
            return self._fitted.all_reduce_time(num_tokens)
        return 2 * self._gather_time(self._width, num_tokens * self._model.hidden_size)

    def logits_time(self, num_sequences: int) -> float:
        """Return the time to gather logits, of which each device has a part of the vocabulary."""
        return self._gather_time(self._width, num_sequences * self._model.vocab_size)

    def exchange_time(self, num_tokens: int) -> float:
        """Return the time to gather hidden states and router logits, and to scatter the sums."""
        gathered = num_tokens * (self._model.hidden_size + self._model.num_experts)
        scattered = num_tokens * self._model.hidden_size
        return sum(self._gather_time(self._num_replicas, n) for n in (gathered, scattered))

    def send_time(self, num_tokens: int) -> float:
        """Return the time to send hidden states to the next pipeline stage."""
        return self._latency + num_tokens * self._model.hidden_size * BF16_BYTES / self._link

    def _gather_time(self, num_devices: int, num_values: int) -> float:
        num_hops = num_devices - 1
        transfer = num_hops / num_devices * num_values * BF16_BYTES / self._link
        return num_hops * self._latency + transfer


def in_graph(num_tokens: int) -> int:
    """Return the tokens of the CUDA graph in which a batch of decodes runs.

    >>> in_graph(9), in_graph(256), in_graph(600)
    (16, 256, 600)
    """
    index = bisect_left(GRAPH_SIZES, num_tokens)
    return GRAPH_SIZES[index] if index < len(GRAPH_SIZES) else num_tokens


def _check(files: OperatorFiles, deployment: Deployment) -> None:
    """Raise an error if the tables lack an operator of the model, or cannot be microseconds."""
    model = deployment.model
    needed = NEEDED + (MLP if model.num_plain_layers else ())
    missing = [name for name in needed if name not in files.dense]
    unknown = sorted(files.dense.keys() - {*EVERY_LAYER, *MLP, *ENDS})
    if missing or unknown:
        what = f"no {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise ProfileError(
            f"{files.folder / 'dense.csv'} has {what}: {model.name} needs {', '.join(needed)}, and "
            f"may have {', '.join(sorted({*EVERY_LAYER, *ENDS} - {*NEEDED}))}."
        )
    if "lm_head" not in files.per_sequence:
        raise ProfileError(f"{files.folder / 'per_sequence.csv'} has no lm_head.")
    _check_unit(files, deployment)


def _check_unit(files: OperatorFiles, deployment: Deployment) -> None:
    """Raise an error if the LM head reads its weights at a bandwidth that cannot be."""
    sequences, time = min(files.per_sequence["lm_head"].items())
    num_bytes = deployment.model.embedding_parameters / deployment.tensor_parallel_size * BF16_BYTES
    bandwidth = deployment.device.memory_bandwidth_gbps * 1e9
    if not SLOWEST_READ <= num_bytes / time / bandwidth <= FASTEST_READ:
        raise ProfileError(
            f"{files.folder / 'per_sequence.csv'}: lm_head takes {time * 1e6:g} us for "
            f"{sequences[0]} sequences, in which {deployment.device.name} reads its "
            f"{num_bytes / 1e6:.0f} MB at {num_bytes / time / 1e9:.0f} of "
            f"{bandwidth / 1e9:.0f} GB/s: expected times in microseconds, of this model on this "
            "device."
        )
