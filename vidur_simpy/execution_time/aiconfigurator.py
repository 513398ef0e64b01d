"""Execution time from NVIDIA's measured kernels, looked up in tables made once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vidur_simpy.errors import ProfileError
from vidur_simpy.execution_time import kernel_database
from vidur_simpy.execution_time.cache import Arrays, cached
from vidur_simpy.execution_time.kernel_tables import GRIDS, tabulated
from vidur_simpy.execution_time.lookup import Lookup
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.interface import BatchCounts

__all__ = ["AIConfigurator", "AIConfiguratorStageTime"]

Line: TypeAlias = tuple[list[float], list[float]]
"""Values at the points of a grid, and slopes from each to the next."""

FEW = 16
"""So many iterations are computed sooner one by one than as arrays."""


@configuration
class AIConfigurator:
    """Stage times from the kernels that NVIDIA measured, as published in aiconfigurator-core 0.12.

    Needs ``pip install 'vidur-simpy[aiconfigurator]'`` (Linux on x86-64). The package composes
    iterations from measured kernels; they are tabulated once per system, backend, model, split and
    precision, in two to four seconds, and kept on disk (``$VIDUR_SIMPY_CACHE``, or the user's cache
    directory). Tables are 0.01 to 0.6 % off the package on average for batches of equal sequences,
    0.5 to 1.4 % for others (``tests/benchmarks/aiconfigurator_accuracy.py``). What was not measured
    at that size the package extrapolates, without a word; beyond `max_num_seqs` and `max_context`
    there is a ProfileError.

    A batch takes: all but attention at its number of tokens; attention of its decodes at their
    mean context; attention of its chunks at their mean length, after the prefix at which equal
    chunks would attend to as many tokens; the LM head for each of its sequences.

    Parameters
    ----------
    system, model : str or None
        The package's names; by default what the deployment's device and model are called there. A
        model it does not hold is described to it, if it is a decoder with gated MLPs and full
        attention over keys and values.
    backend : str
        Whose kernels: vllm, trtllm or sglang.
    backend_version : str or None
        One of those the package holds for the system; None takes its current one.
    gemm_quant_mode, moe_quant_mode : str or None
        The package's name of how products, of experts, are quantized. By default the
        deployment's: ``bfloat16``, ``fp8`` (scales found at run time; checkpoints may bring them,
        ``fp8_static``, or one per block of weights, ``fp8_block``), ``sq`` for int8, ``int4_wo``.
    cpu_overhead : float
        Seconds of CPU time per iteration, spent in the first stage. 108 vLLM servers that NVIDIA
        measured took 1.35 ms and 31 us for each sequence
        (``tests/benchmarks/nvidia_rows.py --fit``).
    max_num_seqs, max_context : int
        The largest batch, in sequences, and the longest context and chunk that tables hold.
    grid : {"fine", "coarse"}
        How many points; see ``tests/benchmarks/aiconfigurator_accuracy.py``.

    Examples
    --------
    >>> AIConfigurator(backend="sglang").backend
    'sglang'
    """

    system: str | None = None
    model: str | None = None
    backend: str = "vllm"
    backend_version: str | None = None
    gemm_quant_mode: str | None = None
    moe_quant_mode: str | None = None
    cpu_overhead: float = Field(default=0.002, ge=0)
    max_num_seqs: int = Field(default=1024, ge=1)
    max_context: int = Field(default=131_072, ge=16)
    grid: Literal["fine", "coarse"] = "fine"

    def for_replica(self, deployment: Deployment) -> AIConfiguratorStageTime:
        """Return the stage times of a replica, from disk or from the package.

        Raises
        ------
        ConfigError
            If the package is not installed, or does not know the device, the model, the backend,
            its version or a mode; the message lists its own names, nearest first.
        ProfileError
            If it has no measurements for the combination.
        """
        version = kernel_database.package_version()
        request = self.request(deployment)
        key: dict[str, Any] = {
            "package": version,
            **request._asdict(),
            "grid": GRIDS[self.grid],
            "max_num_seqs": self.max_num_seqs,
            "max_context": self.max_context,
            "format": 1,
        }

        def compute() -> Arrays:
            engine = kernel_database.compiled(request)
            return tabulated(engine, GRIDS[self.grid], self.max_num_seqs, self.max_context)

        tables = cached(f"aiconfigurator-{request.system}", key, compute)
        return AIConfiguratorStageTime(tables, deployment.pipeline_parallel_size, self.cpu_overhead)

    def request(self, deployment: Deployment) -> kernel_database.Request:
        """Return what the package is asked for, in its own names.

        Raises
        ------
        ConfigError
            As `for_replica`, for the device and the model.
        """
        system = self.system or kernel_database.system_of(deployment.device.name)
        model, config = kernel_database.measured_model(deployment.model, self.model)
        modes = kernel_database.product_modes(deployment)
        if self.gemm_quant_mode is not None:
            modes["gemm_quant_mode"] = self.gemm_quant_mode
        if self.moe_quant_mode is not None:
            modes["moe_quant_mode"] = self.moe_quant_mode
        is_whole, devices = deployment.enable_expert_parallel, deployment.expert_devices
        experts = (1, devices) if is_whole else (devices, 1)
        settings = {
            "tp_size": deployment.tensor_parallel_size,
            "pp_size": deployment.pipeline_parallel_size,
            "attention_dp_size": deployment.data_parallel_size,
            "moe_tp_size": experts[0] if deployment.model.num_experts else 1,
            "moe_ep_size": experts[1] if deployment.model.num_experts else 1,
            **modes,
        }
        return kernel_database.Request(
            system, self.backend, self.backend_version, model, config, settings
        )


class AIConfiguratorStageTime:
    """The measured times of one replica: call it with a batch and a stage for the seconds.

    Layers are shared evenly among the stages; the first one also has the CPU overhead, the last
    one the LM head, all but the last one the transfer to the next.

    Parameters
    ----------
    tables : mapping of arrays
        As :func:`vidur_simpy.execution_time.kernel_tables.tabulated` gives them.
    num_stages : int
    cpu_overhead : float
        Seconds per iteration.
    """

    def __init__(
        self, tables: Mapping[str, NDArray[Any]], num_stages: int, cpu_overhead: float
    ) -> None:
        self._tables = tables
        self._num_stages = num_stages
        self._cpu_overhead = cpu_overhead
        self._max_num_seqs = int(tables["num_decodes"][-1])
        self._max_tokens = int(tables["num_tokens"][-1])
        stages = range(num_stages)
        self._token_times = tables["token_times"].sum(axis=0) / num_stages
        self._decode_token_times = tables["decode_token_times"].sum(axis=0) / num_stages
        self._decode_starts = [Lookup(self._decode_start_of(stage)) for stage in stages]
        self._starts = [Lookup(self._start_of(stage)) for stage in stages]
        self._lm_heads = Lookup(self._lm_head_time)
        self._contexts: list[float] = tables["contexts"].astype(float).tolist()
        self._context_array = tables["contexts"].astype(float)
        self._decode_lines: dict[int, Line] = {}
        self._decode_arrays: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._num_chunks: list[int] = tables["num_chunks"].tolist()
        self._chunks: list[float] = tables["chunks"].astype(float).tolist()
        self._prefixes: list[float] = tables["prefixes"].astype(float).tolist()
        self._prefill_times: list[list[list[float]]] = (
            tables["prefill_times"] / num_stages
        ).tolist()

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch.

        Raises
        ------
        ProfileError
            If the batch is beyond the tables.
        """
        num_decodes, context, prefills = batch.num_decodes, batch.decode_context, batch.prefills
        if not prefills:
            return self._decode_starts[stage_id][num_decodes] + self._decode_attention(
                num_decodes, context
            )
        num_tokens = batch.num_tokens
        time = self._starts[stage_id][num_tokens] + self._prefill_attention(
            len(prefills), num_tokens - num_decodes, batch.num_attention_pairs - context
        )
        if num_decodes:
            time += self._decode_attention(num_decodes, context)
        if stage_id == self._num_stages - 1:
            time += self._lm_heads[num_decodes + len(prefills)]
        return time

    def decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of each of the next iterations of the same decodes.

        The i-th is that of a batch without prefill chunks whose context is ``decode_context +
        i * num_decodes``, to the last bit.
        """
        start = self._decode_starts[stage_id][num_decodes]
        last = decode_context + num_decodes * num_iterations
        totals = range(decode_context, last, num_decodes)
        if num_iterations < FEW:
            return [start + self._decode_attention(num_decodes, total) for total in totals]
        # Raises the error if the last one is beyond the table.
        self._decode_attention(num_decodes, totals[-1])
        values, slopes = self._decode_arrays[num_decodes]
        grid = self._context_array
        contexts = np.arange(decode_context, last, num_decodes) / num_decodes
        cells = np.searchsorted(grid, contexts, side="right") - 1
        times: NDArray[np.float64] = values[cells] + (contexts - grid[cells]) * slopes[cells]
        return start + times

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""
        tables, prefills, num_decodes = self._tables, batch.prefills, batch.num_decodes
        points, rows, number = "num_tokens", "token_times", batch.num_tokens
        if not prefills:
            points, rows = "num_decodes", "decode_token_times"
        times = {
            str(name): float(np.interp(number, tables[points], row)) / self._num_stages
            for name, row in zip(tables["operators"], tables[rows], strict=True)
        }
        if stage_id == 0:
            times["cpu_overhead"] = self._cpu_overhead
        if num_decodes:
            times["decode_attention"] = self._decode_attention(num_decodes, batch.decode_context)
        if prefills:
            pairs = batch.num_attention_pairs - batch.decode_context
            times["prefill_attention"] = self._prefill_attention(
                len(prefills), batch.num_tokens - num_decodes, pairs
            )
        if stage_id == self._num_stages - 1:
            times["lm_head"] = self._lm_head_time(num_decodes + len(prefills))
        else:
            times["send"] = self._send_time(batch.num_tokens)
        return {name: seconds for name, seconds in times.items() if seconds}

    # -- what depends on a number alone ---------------------------------------------------------

    def _decode_start_of(self, stage_id: int) -> Callable[[int], float]:
        def start(num_decodes: int) -> float:
            self._check("sequences", num_decodes, self._max_num_seqs)
            points = self._tables["num_decodes"]
            time = float(np.interp(num_decodes, points, self._decode_token_times))
            if stage_id == self._num_stages - 1:
                time += self._lm_head_time(num_decodes)
            return time + self._end_times(num_decodes, stage_id)

        return start

    def _start_of(self, stage_id: int) -> Callable[[int], float]:
        def start(num_tokens: int) -> float:
            self._check("tokens", num_tokens, self._max_tokens)
            time = float(np.interp(num_tokens, self._tables["num_tokens"], self._token_times))
            return time + self._end_times(num_tokens, stage_id)

        return start

    def _end_times(self, num_tokens: int, stage_id: int) -> float:
        """Return what the first stage spends before, and all but the last one afterwards."""
        time = self._cpu_overhead if stage_id == 0 else 0.0
        return time + (self._send_time(num_tokens) if stage_id < self._num_stages - 1 else 0.0)

    def _send_time(self, num_tokens: int) -> float:
        if self._num_stages == 1:
            return 0.0
        tables = self._tables
        time = np.interp(num_tokens, tables["num_tokens"], tables["send_times"])
        return float(time) / (self._num_stages - 1)

    def _lm_head_time(self, num_sequences: int) -> float:
        # Rows beyond the table are chunks that do not end their prompt.
        return float(
            np.interp(num_sequences, self._tables["num_decodes"], self._tables["lm_head_times"])
        )

    def _check(self, what: str, number: int, largest: int) -> None:
        if number > largest:
            setting = "max_num_seqs" if what == "sequences" else "max_context"
            raise ProfileError(
                f"AIConfigurator: a batch of {number} {what}: tables hold up to {largest}; raise "
                f"{setting}."
            )

    # -- attention ------------------------------------------------------------------------------

    def _decode_attention(self, num_decodes: int, context: int) -> float:
        """Return the attention of decodes, at their mean context."""
        line = self._decode_lines.get(num_decodes)
        if line is None:
            line = self._decode_line(num_decodes)
        values, slopes = line
        mean = context / num_decodes
        cell = bisect_right(self._contexts, mean) - 1
        try:
            return values[cell] + (mean - self._contexts[cell]) * slopes[cell]
        except IndexError:
            raise self._too_long("decodes", mean) from None

    def _decode_line(self, num_decodes: int) -> Line:
        self._check("sequences", num_decodes, self._max_num_seqs)
        tables = self._tables
        # Between two numbers of decodes, so far on the way from one's times to the other's.
        points, rows = tables["num_decodes"], tables["decode_times"]
        above = int(np.searchsorted(points, num_decodes))
        below = above if points[above] == num_decodes else above - 1
        gap = points[above] - points[below]
        share = (num_decodes - points[below]) / gap if gap else 0.0
        values = ((1 - share) * rows[below] + share * rows[above]) / self._num_stages
        slopes = np.diff(values) / np.diff(self._context_array)
        self._decode_arrays[num_decodes] = values, slopes
        line = self._decode_lines[num_decodes] = values.tolist(), slopes.tolist()
        return line

    def _prefill_attention(self, num_chunks: int, num_tokens: int, num_pairs: int) -> float:
        """Return the attention of chunks as if they were equal, and attended to as much."""
        length = num_tokens / num_chunks
        prefix = num_pairs / num_tokens - (length + 1) / 2
        above = bisect_right(self._num_chunks, num_chunks)
        try:
            time = self._equal_chunks(above - 1, length, prefix)
            below = self._num_chunks[above - 1]
            if below != num_chunks:
                share = (num_chunks - below) / (self._num_chunks[above] - below)
                time += share * (self._equal_chunks(above, length, prefix) - time)
        except IndexError:
            self._check("sequences", num_chunks, self._max_num_seqs)
            raise self._too_long("chunks", max(length, prefix)) from None
        return time

    def _equal_chunks(self, level: int, length: float, prefix: float) -> float:
        row = bisect_right(self._chunks, length)
        column = bisect_right(self._prefixes, prefix) if prefix > 0 else 1
        below, above = self._prefill_times[level][row - 1], self._prefill_times[level][row]
        low, high = self._chunks[row - 1], self._chunks[row]
        left, right = self._prefixes[column - 1], self._prefixes[column]
        across = (prefix - left) / (right - left) if prefix > 0 else 0.0
        start = below[column - 1] + across * (below[column] - below[column - 1])
        end = above[column - 1] + across * (above[column] - above[column - 1])
        return start + (length - low) / (high - low) * (end - start)

    def _too_long(self, what: str, tokens: float) -> ProfileError:
        largest = int(self._contexts[-1]) // 2
        return ProfileError(
            f"AIConfigurator: {what} of {tokens:.0f} tokens of context on average: tables hold up "
            f"to {largest}; raise max_context."
        )
