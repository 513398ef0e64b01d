"""Execution time from the sheets of model and device: a roofline with fitted efficiencies."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.hardware import BYTES_PER_VALUE
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time import BatchCounts
    from vidur_simpy.hardware import Device

__all__ = ["Roofline", "RooflineFactors", "RooflineStageTime"]

SEND_LATENCY = 10e-6
"""Seconds to start sending a batch's hidden states to the next stage; assumed, not measured."""


@configuration
class RooflineFactors:
    """How much of its sheet a device delivers, and what each step costs besides.

    Shares are of the sheet's peak, in (0, 1] as a rule; above 1 where caches serve what the
    formula charges to memory.

    Parameters
    ----------
    gemm_compute, gemm_memory : float
        Shares of peak FLOP/s and of bandwidth in matrix products.
    prefill_compute, prefill_memory, decode_memory : float
        Shares in attention.
    elementwise_memory : float
        Share of bandwidth in norms, residuals and activations.
    kernel_time, attention_time : float
        Seconds that each kernel, each attention call takes at least.
    all_reduce_time : float
        Seconds that each all-reduce takes at least.
    all_reduce_link : float
        Share of the link's bandwidth in an all-reduce.
    smoothness : float
        Exponent of the smooth maximum of compute and memory time; the larger, the sharper.
    gemm_half_efficiency_rows : float
        Rows (tokens) at which a matrix product reaches half of its share of peak FLOP/s.
    name : str
        What the set is called.

    Examples
    --------
    >>> RooflineFactors.from_name("hopper").gemm_compute
    0.7919
    """

    gemm_compute: float = Field(gt=0)
    gemm_memory: float = Field(gt=0)
    prefill_compute: float = Field(gt=0)
    prefill_memory: float = Field(gt=0)
    decode_memory: float = Field(gt=0)
    elementwise_memory: float = Field(gt=0)
    kernel_time: float = Field(ge=0)
    attention_time: float = Field(ge=0)
    all_reduce_time: float = Field(ge=0)
    all_reduce_link: float = Field(gt=0)
    smoothness: float = Field(ge=1)
    gemm_half_efficiency_rows: float = Field(default=0.0, ge=0)
    name: str = "custom"

    @classmethod
    def from_name(cls, name: str) -> RooflineFactors:
        """Return a fitted set: a100, b200, h100, h200, hopper, l40s or rtx-pro-6000.

        Raises
        ------
        ConfigError
            If there is no such set, with the nearest.
        """
        sets = _fitted()["sets"]
        if name not in sets:
            raise unknown_name("roofline factors", name, sets)
        return cls(name=name, **sets[name])

    @classmethod
    def of_device(cls, device: Device) -> RooflineFactors:
        """Return the set fitted to a device, else that of the nearest architecture.

        The 80 GB A100, H100, H200, B200 (all SXM), L40S and RTX PRO 6000 were fitted themselves.
        Other Hopper devices take the common fit of H100 and H200 (``hopper``), other Blackwell
        data-centre devices ``b200``, Ada devices ``l40s``, and Ampere, Turing and Volta ``a100``.
        Whatever else, of other vendors or not in the catalogue, takes ``hopper``: its shares are
        of the device's own sheet, but nobody has measured them there.
        """
        fitted = _fitted()
        return cls.from_name(fitted["devices"].get(device.name, fitted["default"]))


@configuration
class Roofline:
    """Stage times of dense models from model and device sheets, without any profile.

    Each kernel takes the smooth maximum of its compute time and its memory time at fitted shares
    of the device's peaks, plus a constant; see `RooflineStageTime` for the terms. Weights,
    activations and KV cache are bf16. The fit (on A100, H100, H200 and B200) was 2 to 6 % off on
    average for the Llama iterations it was made of, 4 to 7 % for other dense models. Pipeline
    transfers, tensor parallelism over PCIe and devices that were not fitted are extrapolated.

    Parameters
    ----------
    cpu_overhead : float
        Seconds of CPU time per iteration, spent in the first stage. Servers were measured between
        0 and 3 ms; with the default of 2 ms the formula was 7 % off on average in the time per
        output token of 56 published vLLM runs of a 70B model, without it 15 %.
    factors : RooflineFactors, str or None
        The fitted shares, or the name of a set; by default those of the device.

    Examples
    --------
    >>> from vidur_simpy.hardware import Device
    >>> Roofline().factors_name(Device.from_name("h100-pcie"))
    'hopper'
    """

    cpu_overhead: float = Field(default=0.002, ge=0)
    factors: RooflineFactors | str | None = None

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
        """Return the stage times of a replica.

        Raises
        ------
        ConfigError
            If the model is a mixture of experts or has latent attention.
        """
        model = deployment.model
        if not model.is_dense:
            kind = "a mixture of experts" if model.num_experts else "a model with latent attention"
            raise ConfigError(
                f"execution_time roofline: {model.name} is {kind}: expected a dense model with "
                "ordinary attention."
            )
        factors = self.factors_for(deployment.device)
        return RooflineStageTime(deployment, factors, self.cpu_overhead)


class RooflineStageTime:
    """The roofline of one replica: call it with a batch and a stage for the seconds.

    Every stage takes its share of the layers; the first one also the CPU overhead, the last one
    the LM head, all but the last one the transfer to the next. The embedding lookup, the final
    norm and the sampling are not counted.

    What depends on the number of tokens alone is computed once per number and kept.

    Attributes
    ----------
    factors_name : str
        The set of fitted factors in use.
    """

    def __init__(
        self, deployment: Deployment, factors: RooflineFactors, cpu_overhead: float
    ) -> None:
        model, device = deployment.model, deployment.device
        width = deployment.tensor_parallel_size
        self.factors_name = factors.name
        self._factors = factors
        self._width = width
        self._last_stage = deployment.pipeline_parallel_size - 1
        self._num_layers = deployment.layers_per_stage
        self._hidden_size = model.hidden_size
        self._vocabulary = model.vocab_size / width
        self._intermediate = model.intermediate_size / width
        self._num_gates = 2 if model.gated_mlp else 1
        self._query_size = model.num_heads * model.head_dim / width
        self._kv_size = deployment.kv_heads_per_device * model.head_dim
        self._flops = deployment.peak_flops
        self._bandwidth = device.memory_bandwidth_gbps * 1e9
        self._link = device.scaleup_bidir_gbps * 1e9 / 2
        self._cpu_overhead = cpu_overhead
        kv_bytes = 2 * self._kv_size * BYTES_PER_VALUE
        prefill_bandwidth = self._bandwidth * factors.prefill_memory
        self._attention_time = factors.attention_time
        self._smoothness = factors.smoothness
        self._per_pair = 4 * self._query_size / (self._flops * factors.prefill_compute)
        self._per_prefill_context = kv_bytes / prefill_bandwidth
        self._per_prefill_token = 2 * self._query_size * BYTES_PER_VALUE / prefill_bandwidth
        self._per_decode_context = kv_bytes / (self._bandwidth * factors.decode_memory)
        self._token_times: dict[int, float] = {}
        self._lm_head_times: dict[int, float] = {}

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""
        num_tokens = batch.num_tokens
        time = self._token_times.get(num_tokens)
        if time is None:
            time = self._token_times[num_tokens] = self.token_time(num_tokens)
        prefills, num_decodes = batch.prefills, batch.num_decodes
        if num_decodes:
            time += self.decode_attention_time(batch.decode_context)
        if prefills:
            time += self.prefill_attention_time(prefills)
        time *= self._num_layers
        if stage_id == 0:
            time += self._cpu_overhead
        if stage_id < self._last_stage:
            return time + self.send_time(num_tokens)
        num_sequences = num_decodes + len(prefills)
        lm_head = self._lm_head_times.get(num_sequences)
        if lm_head is None:
            lm_head = self._lm_head_times[num_sequences] = self.lm_head_time(num_sequences)
        return time + lm_head

    def token_time(self, num_tokens: int) -> float:
        """Return the part of a layer that depends on the number of tokens alone.

        The four products (query, key and value; output; up and gate; down), norms and activation,
        and the two all-reduces.
        """
        hidden, query, intermediate = self._hidden_size, self._query_size, self._intermediate
        return (
            self.gemm_time(num_tokens, query + 2 * self._kv_size, hidden)
            + self.gemm_time(num_tokens, hidden, query)
            + self.gemm_time(num_tokens, self._num_gates * intermediate, hidden)
            + self.gemm_time(num_tokens, hidden, intermediate)
            + self.elementwise_time(num_tokens)
            + self.all_reduce_time(num_tokens)
        )

    def gemm_time(self, rows: float, columns: float, depth: float) -> float:
        """Return the time of ``(rows, depth) @ (depth, columns)``.

        Compute is ``2 * rows * columns * depth`` operations, at half efficiency where so many
        rows are as the factors say; memory moves both operands and the result once.
        """
        factors = self._factors
        efficient_rows = rows + factors.gemm_half_efficiency_rows
        compute = 2 * efficient_rows * columns * depth / (self._flops * factors.gemm_compute)
        values = rows * depth + rows * columns + columns * depth
        memory = values * BYTES_PER_VALUE / (self._bandwidth * factors.gemm_memory)
        return smooth_max(compute, memory, factors.smoothness) + factors.kernel_time

    def elementwise_time(self, num_tokens: int) -> float:
        """Return the time of a layer's two norms with their residuals, and of its activation.

        A norm reads and writes the hidden and the residual state; the activation reads every
        input of the MLP (gate and up) and writes one output.
        """
        values = 8 * self._hidden_size + (self._num_gates + 1) * self._intermediate
        bandwidth = self._bandwidth * self._factors.elementwise_memory
        return num_tokens * values * BYTES_PER_VALUE / bandwidth + 3 * self._factors.kernel_time

    def all_reduce_time(self, num_tokens: int) -> float:
        """Return the time of a layer's two ring all-reduces of the hidden states.

        Over ``n`` devices, each sends ``2 * (n - 1) / n`` of the message one way over its link.
        """
        if self._width == 1:
            return 0.0
        message = num_tokens * self._hidden_size * BYTES_PER_VALUE
        sent = 2 * (self._width - 1) / self._width * message
        one = self._factors.all_reduce_time + sent / (self._link * self._factors.all_reduce_link)
        return 2 * one

    def decode_attention_time(self, context: int) -> float:
        """Return the attention of one layer over all decodes, which read their KV cache once."""
        return context * self._per_decode_context + self._attention_time

    def prefill_attention_time(self, prefills: Sequence[PrefillChunk]) -> float:
        """Return the attention of one layer over all prefill chunks, which run as one kernel.

        A chunk of ``c`` tokens after a prefix of ``p`` attends to ``c * p + c * (c + 1) / 2``
        pairs, of four operations per value of the queries; memory moves the keys and values of
        the whole context, the queries and the outputs.
        """
        pairs, num_tokens, context = 0.0, 0, 0
        for chunk in prefills:
            length = chunk.num_tokens
            pairs += length * (chunk.context - length) + length * (length + 1) / 2
            num_tokens += length
            context += chunk.context
        compute = pairs * self._per_pair
        memory = context * self._per_prefill_context + num_tokens * self._per_prefill_token
        return smooth_max(compute, memory, self._smoothness) + self._attention_time

    def lm_head_time(self, num_sequences: int) -> float:
        """Return the time of the LM head, for one row per decode and per prefill chunk.

        A chunk that does not end its prompt needs none; the product is bound by reading its
        weights, so that a row more costs next to nothing.
        """
        return self.gemm_time(num_sequences, self._vocabulary, self._hidden_size)

    def send_time(self, num_tokens: int) -> float:
        """Return the time to send the hidden states to the next stage over the scale-up link."""
        message = num_tokens * self._hidden_size * BYTES_PER_VALUE
        return SEND_LATENCY + message / self._link


def smooth_max(a: float, b: float, smoothness: float) -> float:
    """Return ``(a**p + b**p) ** (1 / p)``: the larger of two times where they differ much.

    Where they are close it is more, as kernels overlap compute and memory traffic only in part.

    >>> smooth_max(3.0, 4.0, 2.0)
    5.0
    """
    larger, smaller = (a, b) if a > b else (b, a)
    if larger == 0:
        return 0.0
    return float(larger * (1 + (smaller / larger) ** smoothness) ** (1 / smoothness))


@functools.cache
def _fitted() -> dict[str, Any]:
    """Read the sheet of fitted factors: the sets, which device uses which, and the default."""
    sheet = resources.files("vidur_simpy") / "data" / "roofline_factors.json"
    fitted: dict[str, Any] = json.loads(sheet.read_text(encoding="utf-8"))
    return fitted
