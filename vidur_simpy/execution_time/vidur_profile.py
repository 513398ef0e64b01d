"""Stage times from operator tables in Vidur's formats, composed by Vidur's rules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vidur_simpy.errors import ProfileError
from vidur_simpy.execution_time.lookup import Lookup
from vidur_simpy.execution_time.vidur_operators import (
    CHUNK_STEP,
    CONTEXT_STEP,
    CPU_OPERATORS,
    MLP_OPERATORS,
    TOKEN_STEP,
    Feature,
    MeasuredOperator,
    read_measured,
)

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time.interface import BatchCounts
    from vidur_simpy.execution_time.profile import Profile

__all__ = ["Operator", "PrefillOperator", "VidurStageTime", "vidur_stage_time"]

SEVERAL_REQUESTS = 1.1
"""Factor on the attention of several requests, where heads share keys and values."""

ALL_REDUCE_LAUNCH = 0.02e-3
"""Seconds that launching an all-reduce takes; Vidur's further term for skew is 0."""


class Operator:
    """The time of one operator by its sizes, within what was measured.

    Less than the least size that was measured takes as long as that. More is refused, or with
    `extrapolate` grows in proportion to each size.

    Parameters
    ----------
    measured : MeasuredOperator
    extrapolate : bool

    Attributes
    ----------
    outside : dict of str to (float, float)
        The least and the largest size asked for outside what was measured, by feature.
    """

    def __init__(self, measured: MeasuredOperator, extrapolate: bool) -> None:
        self.name, self.features, self.fit = measured
        self.outside: dict[str, tuple[float, float]] = {}
        self._extrapolate = extrapolate
        self._is_extrapolated = False

    def __call__(self, *sizes: float) -> float:
        """Return the seconds for these sizes, one per feature."""
        factor = 1.0
        for feature, size in zip(self.features, sizes, strict=True):
            if self._is_beyond(feature, size):
                factor *= size / feature.high
        return factor * self._predicted(sizes)

    @property
    def extrapolation(self) -> str:
        """What was asked for outside what was measured, in words; empty if nothing was."""
        return "; ".join(
            f"{feature.name} from {low:g} to {high:g}, measured from {feature.low:g} to "
            f"{feature.high:g}"
            for feature in self.features
            if feature.name in self.outside
            for low, high in [self.outside[feature.name]]
        )

    def _predicted(self, sizes: Sequence[float]) -> float:
        """Return the fit at the nearest sizes that were measured."""
        return self.fit().predict(
            [
                min(max(size, feature.low), feature.high)
                for feature, size in zip(self.features, sizes, strict=False)
            ]
        )

    def _is_beyond(self, feature: Feature, size: float) -> bool:
        """Whether a size is more than was measured; note what is outside, or refuse it."""
        is_beyond = feature.is_beyond(size)
        if is_beyond:
            self._check_may_extrapolate(feature, size)
        if is_beyond or size < feature.low:
            low, high = self.outside.get(feature.name, (size, size))
            self.outside[feature.name] = min(low, size), max(high, size)
        return is_beyond

    def _check_may_extrapolate(self, feature: Feature, size: float) -> None:
        message = (
            f"{self.name} was measured for {feature.name} from {feature.low:g} to "
            f"{feature.high:g}, a batch asks for {size:g}"
        )
        if not (self._extrapolate and feature.high):
            raise ProfileError(
                f"{message}; measure further, keep batches and contexts within what was measured, "
                "or set Profile.extrapolate."
            )
        if not self._is_extrapolated:
            self._is_extrapolated = True
            warnings.warn(f"{message}: extrapolating.", stacklevel=4)


class PrefillOperator(Operator):
    """Attention of prefill chunks, by tokens in the KV cache before and tokens of the chunk.

    The third feature is their sum, the context. More than was measured is a smaller chunk and
    prefix in the same proportion, times as many query-key pairs.
    """

    def __call__(self, *sizes: float) -> float:
        """Return the seconds for a prefix and a chunk."""
        share = 1.0
        for feature, size in zip(self.features, (*sizes, sum(sizes)), strict=True):
            if self._is_beyond(feature, size):
                share = min(share, feature.high / size)
        return self._predicted([size * share for size in sizes]) / share**2


def vidur_stage_time(profile: Profile, deployment: Deployment) -> VidurStageTime:
    """Return the stage times of a replica from tables in Vidur's formats.

    Files are read and checked at once; regressions are fitted when first needed.

    Raises
    ------
    ProfileError
        As `read_measured` raises it.
    """
    return VidurStageTime(profile, deployment)


class VidurStageTime:
    """The measured operators of one replica: call it with a batch and a stage for the seconds.

    The rules are Vidur's (github.com/microsoft/vidur). By the number of tokens, rounded up to a
    multiple of 8: projections, MLP, norms, rotation, all-reduce (twice a layer, each with 0.02 ms
    to launch) and the transfer to the next stage; by the exact number: saving the KV cache. By the
    number of decodes and their mean context before the step, rounded up to a multiple of 64:
    attention of decodes. By the prefixes, rounded up to 64 and summed, and the root of the sum of
    squares of the chunks: attention of prefills; with ``rules="0.0.26"`` each prefill by itself,
    its chunk rounded up to 32. Attention of several decodes, and of several prefills, takes 1.1
    times as long where heads share keys and values. Embedding, last norm, LM head and sampling
    are not counted, the CPU's part only if tables are given.

    Attributes
    ----------
    absent : list of str
        Operators that were not measured and are taken to need no time.
    num_skipped : dict of str to int
        Rows that were left out, by operator.
    """

    def __init__(self, profile: Profile, deployment: Deployment) -> None:
        measured = read_measured(profile, deployment)
        self.absent = measured.absent
        self.num_skipped = measured.num_skipped
        self._operators = {
            name: (PrefillOperator if name == "attn_prefill" else Operator)(
                operator, profile.extrapolate
            )
            for name, operator in measured.operators.items()
        }
        model, num_stages = deployment.model, deployment.pipeline_parallel_size
        self._num_layers = deployment.layers_per_stage
        self._last_stage = num_stages - 1
        self._several = SEVERAL_REQUESTS if model.num_heads > model.num_kv_heads else 1.0
        self._adds_prefills = profile.rules == "0.0.26"
        self._cpu_overhead = profile.cpu_overhead
        self._has_cpu = CPU_OPERATORS[0] in self._operators
        self._fixed = [Lookup(self._fixed_times(stage_id)) for stage_id in range(num_stages)]
        self._decodes = Lookup(self._decodes_of)
        self._prefills = Lookup(self._prefills_after)
        self._cpu: Lookup[int, float] = Lookup(
            lambda num_requests: sum(self._cpu_operators(num_requests).values(), 0.0)
        )

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""
        num_decodes, prefills = batch.num_decodes, batch.prefills
        time = self._fixed[stage_id][batch.num_tokens]
        if num_decodes:
            # The mean context before the step is rounded down, then up to a multiple of 64.
            mean = batch.decode_context // num_decodes - 1
            time += self._decodes[num_decodes][-(-mean // CONTEXT_STEP)]
        if prefills:
            time += self._prefill_time(prefills)
        if self._has_cpu:
            time += self._cpu[num_decodes + len(prefills)]
        return time

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float]:
        """Return the seconds of each of the next iterations of the same decodes.

        The mean context grows by one token each time, so that 64 in a row take equally long.
        """
        fixed, decodes = self._fixed[stage_id][num_decodes], self._decodes[num_decodes]
        cpu = self._cpu[num_decodes] if self._has_cpu else 0.0
        mean = decode_context // num_decodes - 1
        last = mean + num_iterations
        times: list[float] = []
        while mean < last:
            key = -(-mean // CONTEXT_STEP)
            end = min(key * CONTEXT_STEP + 1, last)
            times += [fixed + decodes[key] + cpu] * (end - mean)
            mean = end
        return times

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""
        num_decodes, prefills = batch.num_decodes, batch.prefills
        times = self._token_operators(batch.num_tokens, stage_id)
        if num_decodes:
            mean = batch.decode_context // num_decodes - 1
            times["attn_decode"] = self._decodes[num_decodes][-(-mean // CONTEXT_STEP)]
        if prefills:
            times["attn_prefill"] = self._prefill_time(prefills)
        if self._has_cpu:
            times |= self._cpu_operators(num_decodes + len(prefills))
        return times

    @property
    def errors(self) -> dict[str, float]:
        """The cross-validated mean absolute percentage error of each operator, as a fraction.

        Asking for it fits all regressions.
        """
        return {name: operator.fit().error for name, operator in self._operators.items()}

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What cross-validation chose for each operator; asking for it fits all regressions."""
        return {name: operator.fit().settings for name, operator in self._operators.items()}

    @property
    def extrapolations(self) -> dict[str, str]:
        """What batches asked for outside what was measured so far, by operator.

        Sizes less than the least that was measured are noted, too: they take as long as that.
        """
        said = {name: operator.extrapolation for name, operator in self._operators.items()}
        return {name: words for name, words in said.items() if words}

    def _prefill_time(self, prefills: Sequence[PrefillChunk]) -> float:
        """Return the attention of a stage's layers over all prefill chunks."""
        if len(prefills) == 1:
            chunk = prefills[0]
            length = chunk.num_tokens
            prefix = -((length - chunk.context) // CONTEXT_STEP)
            return self._prefills[prefix][length]
        prefixes = [-((chunk.num_tokens - chunk.context) // CONTEXT_STEP) for chunk in prefills]
        lengths = [chunk.num_tokens for chunk in prefills]
        if self._adds_prefills:
            each = zip(prefixes, lengths, strict=True)
            time = sum(self._prefills[prefix][length] for prefix, length in each)
        else:
            root = round(math.sqrt(sum(length * length for length in lengths)))
            time = self._prefills[sum(prefixes)][root]
        return self._several * time

    def _prefills_after(self, prefix: int) -> Lookup[int, float]:
        """Return the attention of a stage's layers after so many steps of prefix, by chunk."""
        operator, num_layers = self._operators["attn_prefill"], self._num_layers
        step = CHUNK_STEP if self._adds_prefills else 1
        return Lookup(
            lambda chunk: num_layers * operator(prefix * CONTEXT_STEP, -(-chunk // step) * step)
        )

    def _decodes_of(self, num_decodes: int) -> Lookup[int, float]:
        """Return the attention of a stage's layers over so many decodes, by steps of context."""
        operator = self._operators["attn_decode"]
        factor = self._num_layers * (self._several if num_decodes > 1 else 1.0)
        return Lookup(lambda steps: factor * operator(num_decodes, steps * CONTEXT_STEP))

    def _fixed_times(self, stage_id: int) -> Callable[[int], float]:
        return lambda num_tokens: sum(self._token_operators(num_tokens, stage_id).values())

    def _token_operators(self, num_tokens: int, stage_id: int) -> dict[str, float]:
        """Return what depends on the number of tokens alone, by operator."""
        operators, num_layers = self._operators, self._num_layers
        rounded = -(-num_tokens // TOKEN_STEP) * TOKEN_STEP
        times = {
            name: num_layers * operators[name](rounded)
            for name in MLP_OPERATORS
            if name in operators
        }
        if "attn_kv_cache_save" in operators:
            times["attn_kv_cache_save"] = num_layers * operators["attn_kv_cache_save"](num_tokens)
        if "all_reduce" in operators:
            each = operators["all_reduce"](rounded) + ALL_REDUCE_LAUNCH
            times["all_reduce"] = 2 * num_layers * each
        if stage_id < self._last_stage:
            times["send_recv"] = operators["send_recv"](rounded)
        if stage_id == 0 and self._cpu_overhead:
            times["cpu_overhead"] = self._cpu_overhead
        return times

    def _cpu_operators(self, num_requests: int) -> dict[str, float]:
        return {name: self._operators[name](num_requests) for name in CPU_OPERATORS}
