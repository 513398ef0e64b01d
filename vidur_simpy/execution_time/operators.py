"""The operators of a transformer layer on one device: what each takes, in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vidur_simpy.precision import BF16_BYTES, PRECISIONS, Format, Precision

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time.factors import RooflineFactors
    from vidur_simpy.hardware import Device

__all__ = [
    "Attention",
    "GroupedQueryAttention",
    "Kernels",
    "LatentAttention",
    "Mixture",
    "Mlp",
    "PrefillAttention",
    "attended",
    "attention_of",
    "prefill_attention",
    "smooth_max",
]

BF16 = PRECISIONS["bf16"]
FORMATS: tuple[Format, ...] = ("bf16", "fp8", "int8")


def smooth_max(a: float, b: float, smoothness: float) -> float:
    """Return ``(a**p + b**p) ** (1 / p)``: the larger of two times where they differ much.

    Where they are close it is more, as kernels overlap compute and memory traffic only in part.

    >>> smooth_max(3.0, 4.0, 2.0)
    5.0
    """
    if a < b:
        a, b = b, a
    if not a:
        return 0.0
    larger: float = a * (1 + (b / a) ** smoothness) ** (1 / smoothness)
    return larger


class Kernels:
    """The kernels that layers are made of, on one device.

    Weights in a format that the device does not multiply become bf16 on the way.
    """

    def __init__(self, device: Device, factors: RooflineFactors) -> None:
        self.device = device
        self.factors = factors
        self.bandwidth = device.memory_bandwidth_gbps * 1e9
        # Operations per second that large matrix products reach.
        self.flops = {kind: device.peak_flops(kind) * factors.gemm_compute for kind in FORMATS}
        for kind in FORMATS:
            if device.peak_flops(kind) > device.peak_flops():
                self.flops[kind] *= factors.quantized_compute

    def product_time(
        self, rows: float, columns: float, depth: float, precision: Precision = BF16
    ) -> float:
        """Return the time of ``(rows, depth) @ (depth, columns)``.

        Compute is ``2 * rows * columns * depth`` operations, at half efficiency where so many
        rows are as the factors say; memory moves both operands and the result once. The second
        operand is the weights; where they are multiplied in a format of 8 bits, the kernel before
        is taken to turn the first into it, as vLLM's compiler arranges.
        """
        factors = self.factors
        efficient_rows = rows + factors.gemm_half_efficiency_rows
        compute = 2 * efficient_rows * columns * depth / self.flops[precision.format]
        num_bytes = rows * (depth + columns) * BF16_BYTES
        num_bytes += columns * depth * precision.weight_bytes
        memory = num_bytes / (self.bandwidth * factors.gemm_memory)
        return smooth_max(compute, memory, factors.smoothness) + factors.kernel_time

    def grouped_product_time(
        self, rows: float, columns: float, depth: float, num_groups: float, precision: Precision
    ) -> float:
        """Return the time to multiply rows in groups, each with weights of its own.

        As `product_time`, but the start is not counted; see `Mixture`.
        """
        factors = self.factors
        flops = self.flops[precision.format] * factors.expert_compute
        compute = 2 * rows * columns * depth / flops
        num_bytes = rows * (depth + columns) * BF16_BYTES
        num_bytes += num_groups * columns * depth * precision.weight_bytes
        memory = num_bytes / (self.bandwidth * factors.gemm_memory)
        return smooth_max(compute, memory, factors.smoothness)

    def elementwise_time(self, num_values: float) -> float:
        """Return the time of a kernel that reads or writes so many bf16 values."""
        bandwidth = self.bandwidth * self.factors.elementwise_memory
        return num_values * BF16_BYTES / bandwidth + self.factors.kernel_time

    def routed_time(self, num_values: float) -> float:
        """Return the time to move so many bf16 values to experts and back, with all starts."""
        factors = self.factors
        bandwidth = self.bandwidth * factors.elementwise_memory * factors.expert_memory
        return num_values * BF16_BYTES / bandwidth + factors.expert_time


def attended(prefills: Iterable[PrefillChunk], window: int = 0) -> tuple[int, int, int]:
    """Sum up what prefill chunks attend to: pairs, tokens computed, and tokens read.

    A chunk of ``c`` tokens after a prefix of ``p`` attends to ``c * p + c * (c + 1) / 2`` pairs.
    With a window of ``w`` tokens (0: without), a token attends to at most so many.
    """
    num_pairs = num_tokens = context = 0
    for chunk in prefills:
        length, end = chunk.num_tokens, chunk.context
        prefix = end - length
        num_tokens += length
        if window == 0 or end <= window:
            num_pairs += length * prefix + length * (length + 1) // 2
            context += end
        elif prefix < window:
            growing = window - prefix  # tokens that still see everything
            num_pairs += growing * prefix + growing * (growing + 1) // 2
            num_pairs += (length - growing) * window
            context += end
        else:
            num_pairs += length * window
            context += length + window
    return num_pairs, num_tokens, context


class PrefillAttention(NamedTuple):
    """Attention of one layer over all prefill chunks, which run as one kernel; its start is apart.

    Compute and memory time, in seconds, are sums of what `attended` counts.
    """

    compute_per_pair: float
    compute_per_token: float
    memory_per_context: float
    memory_per_token: float
    smoothness: float

    def time(self, num_pairs: int, num_tokens: int, context: int) -> float:
        """Return the smooth maximum of compute and memory time."""
        compute = self.compute_per_pair * num_pairs + self.compute_per_token * num_tokens
        memory = self.memory_per_context * context + self.memory_per_token * num_tokens
        return smooth_max(compute, memory, self.smoothness)


def prefill_attention(
    kernels: Kernels,
    operations_per_pair: float,
    bytes_per_context: float,
    bytes_per_token: float,
) -> PrefillAttention:
    """Return the attention over prefill chunks on one device."""
    factors = kernels.factors
    flops = kernels.device.peak_flops() * factors.prefill_compute
    bandwidth = kernels.bandwidth * factors.prefill_memory
    compute_per_pair = operations_per_pair / flops
    return PrefillAttention(
        compute_per_pair,
        factors.prefill_extra_context * compute_per_pair,
        bytes_per_context / bandwidth,
        bytes_per_token / bandwidth,
        factors.smoothness,
    )


class Attention(Protocol):
    """The attention of one layer.

    Attributes
    ----------
    per_decode_context : float
        Seconds per token in the KV cache of the sequences that decode.
    prefill : PrefillAttention
        Attending in prefill chunks.
    """

    per_decode_context: float
    prefill: PrefillAttention

    def projections_time(self, num_tokens: int) -> float:
        """Return the time of the products before and after attention itself."""

    def decode_time(self, num_decodes: int) -> float:
        """Return what decoding takes besides `per_decode_context`."""

    def expansion_time(self, context: int) -> float:
        """Return the time that prefill chunks take before they attend to so much KV cache."""


def attention_of(deployment: Deployment, kernels: Kernels) -> Attention:
    """Return the attention of a deployment's model."""
    is_latent = deployment.model.kv_latent_size
    return (LatentAttention if is_latent else GroupedQueryAttention)(deployment, kernels)


class GroupedQueryAttention:
    """Heads that share keys and values in groups; multi-head attention is groups of one."""

    def __init__(self, deployment: Deployment, kernels: Kernels) -> None:
        model = deployment.model
        self._kernels = kernels
        self._precision = deployment.dense_precision
        self._hidden_size = model.hidden_size
        self._query_size = model.num_heads * model.head_dim / deployment.tensor_parallel_size
        self._kv_size = deployment.kv_heads_per_device * model.head_dim
        kv_bytes = 2 * self._kv_size * deployment.kv_bytes_per_value
        self.per_decode_context = kv_bytes / (kernels.bandwidth * kernels.factors.decode_memory)
        # Four operations per pair and value of the queries; queries and outputs are moved once.
        query_bytes = 2 * self._query_size * BF16_BYTES
        self.prefill = prefill_attention(kernels, 4 * self._query_size, kv_bytes, query_bytes)

    def projections_time(self, num_tokens: int) -> float:
        """Return the time of the products for queries, keys and values, and for the output."""
        hidden, query, product = self._hidden_size, self._query_size, self._kernels.product_time
        inputs = product(num_tokens, query + 2 * self._kv_size, hidden, self._precision)
        return inputs + product(num_tokens, hidden, query, self._precision)

    def decode_time(self, num_decodes: int) -> float:
        """Return the least time; all the rest is reading the KV cache once."""
        return self._kernels.factors.attention_time

    def expansion_time(self, context: int) -> float:
        """Return 0: the cache holds keys and values."""
        return 0.0


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Prefills compute keys and values of every head from the latent cache, of the prefix too;
    decodes multiply that projection into their queries and results, and attend in latent space.
    """

    def __init__(self, deployment: Deployment, kernels: Kernels) -> None:
        model, factors = deployment.model, kernels.factors
        self._kernels = kernels
        self._precision = deployment.dense_precision
        self._hidden_size = model.hidden_size
        self._num_heads = model.num_heads / deployment.tensor_parallel_size
        self._key_size = model.head_dim
        self._value_size = model.value_head_dim
        self._query_latent_size = model.query_latent_size
        self._kv_latent_size = model.kv_latent_size
        self._rank = model.latent_rank
        self._head_width = model.latent_head_width
        width = self._num_heads * (model.head_dim + model.value_head_dim)
        width_bytes = width * BF16_BYTES
        self.prefill = prefill_attention(kernels, 2 * width, width_bytes, width_bytes)
        kv_bytes = model.kv_latent_size * deployment.kv_bytes_per_value
        operations = 2 * self._num_heads * (model.kv_latent_size + model.latent_rank)
        compute = operations / (deployment.device.peak_flops() * factors.prefill_compute)
        memory = kv_bytes / (kernels.bandwidth * factors.latent_memory)
        self.per_decode_context = smooth_max(compute, memory, factors.smoothness)

    def projections_time(self, num_tokens: int) -> float:
        """Return the time of the products into latent space, for the queries and the output."""
        hidden, latent = self._hidden_size, self._query_latent_size
        queries = self._num_heads * self._key_size
        inputs = latent + self._kv_latent_size if latent else self._kv_latent_size + queries
        time = self._product_time(num_tokens, inputs, hidden)
        if latent:
            time += self._product_time(num_tokens, queries, latent)
        time += self._product_time(num_tokens, hidden, self._num_heads * self._value_size)
        return time + self._kernels.factors.latent_time

    def decode_time(self, num_decodes: int) -> float:
        """Return the time to take queries into latent space and results out of it, and to start."""
        in_and_out = self._product_time(num_decodes, self._num_heads * self._head_width, self._rank)
        return in_and_out + self._kernels.factors.attention_time

    def expansion_time(self, context: int) -> float:
        """Return the time to compute the keys and values of every head from the latent cache."""
        return self._product_time(context, self._num_heads * self._head_width, self._rank)

    def _product_time(self, rows: float, columns: float, depth: float) -> float:
        return self._kernels.product_time(rows, columns, depth, self._precision)


class Mlp:
    """A plain MLP, or the shared experts of a mixture, of one layer."""

    def __init__(self, deployment: Deployment, kernels: Kernels, width: int) -> None:
        self._kernels = kernels
        self._precision = deployment.dense_precision
        self._hidden_size = deployment.model.hidden_size
        self._width = width / deployment.tensor_parallel_size
        self._num_inputs = 2 if deployment.model.gated_mlp else 1

    def time(self, num_tokens: int) -> float:
        """Return the time of the products up (with the gate, if any) and down, and between."""
        hidden, width, kernels = self._hidden_size, self._width, self._kernels
        if not width:
            return 0.0
        up = kernels.product_time(num_tokens, self._num_inputs * width, hidden, self._precision)
        activation = kernels.elementwise_time((self._num_inputs + 1) * num_tokens * width)
        return up + activation + kernels.product_time(num_tokens, hidden, width, self._precision)


class Mixture:
    """The routed experts of one layer, as far as one device holds them.

    Tokens are taken to choose their experts evenly and independently: ``T`` tokens that choose
    ``k`` of ``E`` experts hit ``E * (1 - (1 - k / E)**T)`` different ones, whose weights are read
    once. With whole experts on each device, the busiest has `imbalance` times the mean load.
    Replicas that share experts are taken to run batches of equal size at the same time.
    """

    def __init__(self, deployment: Deployment, kernels: Kernels, imbalance: float) -> None:
        model = deployment.model
        self._kernels = kernels
        self._precision = deployment.precision
        self._hidden_size = model.hidden_size
        self._num_experts = model.num_experts
        self._experts_per_token = model.experts_per_token
        self._num_inputs = 2 if model.gated_mlp else 1
        self._num_replicas = deployment.data_parallel_size
        self._experts_per_device = deployment.experts_per_device
        self._imbalance = imbalance if deployment.enable_expert_parallel else 1.0
        self._width = deployment.expert_width_per_device

    def router_time(self, num_tokens: int) -> float:
        """Return the time of the router's product."""
        return self._kernels.product_time(num_tokens, self._num_experts, self._hidden_size)

    def time(self, num_tokens: int) -> float:
        """Return the time of the experts' products, and to gather and scatter their rows.

        Each row is gathered, activated, scattered and added: the hidden state is moved four
        times, the inputs of the activation and its output once.
        """
        kernels, hidden, width = self._kernels, self._hidden_size, self._width
        num_tokens *= self._num_replicas
        share = self._experts_per_device / self._num_experts
        rows = num_tokens * self._experts_per_token * share * self._imbalance
        chosen = self._experts_per_token / self._num_experts
        hit = self._experts_per_device * (1 - (1 - chosen) ** num_tokens)
        columns = self._num_inputs * width
        up = kernels.grouped_product_time(rows, columns, hidden, hit, self._precision)
        down = kernels.grouped_product_time(rows, hidden, width, hit, self._precision)
        moved = rows * (4 * hidden + columns + width)
        return up + down + kernels.routed_time(moved)
