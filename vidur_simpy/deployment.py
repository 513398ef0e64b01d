"""A model on devices: how it is split, and whether it fits into their memory."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pydantic import Field

from vidur_simpy.errors import CapacityError, ConfigError
from vidur_simpy.hardware import GIB, Device, Model
from vidur_simpy.precision import (
    BF16_BYTES,
    PRECISIONS,
    Precision,
    kv_cache_bytes,
    precision,
)
from vidur_simpy.splits import check_size, data_parallel_sizes, divisors, tensor_parallel_sizes
from vidur_simpy.validation import configuration

__all__ = ["Deployment"]

DEVICES_PER_NODE = 8
"""Wider tensor parallelism is suggested only where pipeline parallelism takes more nodes."""


@configuration
class Deployment:
    """One replica: a model split over the devices that hold it.

    Heads, MLPs and the vocabulary are split over `tensor_parallel_size` devices, layers over
    `pipeline_parallel_size` stages. Experts are split over the tensor parallel devices of
    `data_parallel_size` replicas together, as vLLM does it: each expert cut in as many pieces, or
    whole experts on each device with `enable_expert_parallel`. Embeddings, LM head, norms and
    routers stay in bf16 whatever the quantization.

    Parameters
    ----------
    model : Model
    device : Device
    tensor_parallel_size, pipeline_parallel_size : int
    data_parallel_size : int
        Replicas that share one set of experts; each schedules and caches on its own.
    enable_expert_parallel : bool
        Give each device whole experts.
    quantization : str or None
        What the layers' weights are quantized with, by vLLM's name: fp8 and int8 (multiplied as
        such where the device can), int4, awq, gptq and mxfp4 (experts only; all four multiplied in
        bf16); bf16 for none. None takes the model as it was published.
    kv_cache_dtype : str
        fp8 (also fp8_e4m3, fp8_e5m2) or bf16 (also bfloat16, auto).

    Raises
    ------
    ConfigError
        If the heads, layers or experts cannot be split so, with the sizes that can, nearest first;
        or if a precision is not known.

    Examples
    --------
    >>> model, device = Model.from_name("llama-3.1-8b"), Device.from_name("h100")
    >>> Deployment(model, device).plan_num_blocks(16, 0.9, max_model_len=8192)
    28161
    >>> Deployment(model, device, quantization="fp8").plan_num_blocks(16, 0.9, max_model_len=8192)
    31489
    """

    model: Model
    device: Device
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1)
    enable_expert_parallel: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        model = self.model
        self._check_experts()
        mlps = f"{model.num_experts} experts" if self.enable_expert_parallel else "MLPs"
        parts = f"{model.num_heads} heads and {model.num_kv_heads} KV heads (and the {mlps})"
        check_size(self, "tensor_parallel_size", parts, tensor_parallel_sizes(self))
        layers = f"{model.num_layers} layers"
        check_size(self, "pipeline_parallel_size", layers, divisors(model.num_layers))
        kv_cache_bytes(self.kv_cache_dtype, "Deployment.kv_cache_dtype")
        if self.quantization is not None:
            precision(self.quantization, "Deployment.quantization")
        if self.precision.is_experts_only and not model.num_experts:
            self._refuse("quantization", "which quantizes experts")

    def _check_experts(self) -> None:
        if not self.model.num_experts:
            if self.data_parallel_size > 1:
                self._refuse("data_parallel_size", "replicas that share experts; use num_replicas")
            if self.enable_expert_parallel:
                self._refuse("enable_expert_parallel", "which gives devices whole experts")
        what = "experts" if self.enable_expert_parallel else "columns of each expert"
        parts = f"{self.expert_parts} {what}"
        check_size(self, "data_parallel_size", parts, data_parallel_sizes(self))

    def _refuse(self, field: str, meaning: str) -> None:
        raise ConfigError(
            f"Deployment.{field} = {getattr(self, field)!r}, {meaning}: {self.model.name} has no "
            "experts."
        )

    @property
    def num_devices(self) -> int:
        """Devices of the replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def layers_per_stage(self) -> int:
        """Layers of one pipeline stage."""
        return self.model.num_layers // self.pipeline_parallel_size

    @property
    def kv_heads_per_device(self) -> int:
        """KV heads on one device; beyond one device a head, heads are held several times."""
        return max(self.model.num_kv_heads // self.tensor_parallel_size, 1)

    @property
    def expert_devices(self) -> int:
        """Devices that share the experts of a layer."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def experts_per_device(self) -> int:
        """Experts of a layer of which a device holds something."""
        num_experts = self.model.num_experts
        return num_experts // self.expert_devices if self.enable_expert_parallel else num_experts

    @property
    def expert_width_per_device(self) -> int:
        """Columns of each such expert that a device holds."""
        width = self.model.moe_intermediate_size
        return width if self.enable_expert_parallel else width // self.expert_devices

    @property
    def expert_parts(self) -> int:
        """What the devices share of a layer's experts: the experts, or the columns of each."""
        model = self.model
        return model.num_experts if self.enable_expert_parallel else model.moe_intermediate_size

    @property
    def precision(self) -> Precision:
        """How the weights of experts, and of what else is quantized, are kept and multiplied."""
        return PRECISIONS[self.quantization or self.model.quantization or "bf16"]

    @property
    def dense_precision(self) -> Precision:
        """How all other matrices in the layers are kept and multiplied."""
        return PRECISIONS["bf16"] if self.precision.is_experts_only else self.precision

    @property
    def weight_bytes_per_device(self) -> int:
        """Weights on one device of the fullest stage.

        The first stage holds the embeddings, the last one the LM head; the few dense layers of a
        mixture of experts are averaged over the stages. Norms, routers and projections into
        latent spaces are on every device.
        """
        model, tp = self.model, self.tensor_parallel_size
        is_one_table = model.tied_embeddings or self.pipeline_parallel_size > 1
        tables = (1 if is_one_table else 2) * model.embedding_parameters / tp
        return round(self._layer_bytes() / self.pipeline_parallel_size + tables * BF16_BYTES)

    def _layer_bytes(self, share_of_experts: float = 1.0) -> float:
        """Weights of all layers on one device of each stage, with such a share of its experts."""
        model, tp = self.model, self.tensor_parallel_size
        copies = 0 if model.kv_latent_size else self.kv_heads_per_device * tp - model.num_kv_heads
        split = model.attention_parameters - model.latent_parameters
        split += 2 * model.hidden_size * model.head_dim * copies
        attention = model.num_layers * (split / tp + model.latent_parameters)
        plain = model.num_plain_layers * model.mlp_parameters / tp
        num_mixtures, expert = model.num_mixture_layers, model.expert_parameters
        shared = num_mixtures * model.num_shared_experts * expert / tp
        experts = num_mixtures * model.num_experts * expert / self.expert_devices
        experts *= share_of_experts
        kept = num_mixtures * model.router_parameters + model.norm_parameters
        layers = (attention + plain + shared) * self.dense_precision.weight_bytes
        return layers + experts * self.precision.weight_bytes + kept * BF16_BYTES

    @property
    def kv_bytes_per_value(self) -> int:
        """Bytes of one value in the KV cache."""
        return kv_cache_bytes(self.kv_cache_dtype)

    @property
    def kv_bytes_per_token_per_device(self) -> int:
        """Bytes of KV cache that one token takes on one device.

        A latent cache is not split; layers with a sliding window are taken to keep all tokens.
        """
        model = self.model
        values = model.kv_latent_size or 2 * self.kv_heads_per_device * model.head_dim
        return self.kv_bytes_per_value * self.layers_per_stage * values

    @property
    def peak_flops(self) -> float:
        """Operations per second of one device in the format of most weights: the ceiling of MFU."""
        return self.device.peak_flops(self.precision.format)

    def flops(self, num_tokens: int, attention_pairs: int) -> int:
        """Return the operations of a batch on all devices of the replica.

        ``2 * num_tokens * active_parameters`` (LM head included, embedding lookup not) for the
        matrices, ``2 * layers * heads * (head_dim + value_head_dim) * attention_pairs`` for
        attention, as if every layer attended to all tokens.

        Parameters
        ----------
        num_tokens : int
            Tokens computed.
        attention_pairs : int
            Tokens attended to, summed over the tokens computed.
        """
        model = self.model
        matrices = 2 * num_tokens * model.active_parameters
        return matrices + model.attended_operations * attention_pairs

    def bytes_read(self, num_batches: int, num_tokens: int, context_tokens: int) -> float:
        """Return the bytes that batches read on all devices of the replica.

        Each batch reads the weights once (LM head included, embedding lookup not) and the KV cache
        of its requests once, as if every layer attended to all tokens. Of the ``E`` experts in a
        layer it reads those that its tokens choose, ``k`` each and evenly: a share of ``1 - (1 - k
        / E)**T``. All batches are taken to have the mean ``T`` tokens; if they differ, that is a
        little too much.

        Parameters
        ----------
        num_batches, num_tokens : int
            Batches, and tokens computed in all of them.
        context_tokens : int
            Tokens in the KV cache, summed over the requests of each batch.
        """
        if not num_batches:
            return 0.0
        model, share = self.model, 1.0
        if model.num_experts:
            chosen = model.experts_per_token / model.num_experts
            mean_tokens = num_tokens / num_batches * self.data_parallel_size
            share = 1.0 - float((1.0 - chosen) ** mean_tokens)
        weights = self.tensor_parallel_size * self._layer_bytes(share)
        weights += model.embedding_parameters * BF16_BYTES
        cache = self.kv_bytes_per_token_per_device * self.num_devices
        return num_batches * weights + context_tokens * cache

    def working_bytes(self, max_num_batched_tokens: int = 2048) -> int:
        """Return the memory that one device keeps for activations and the runtime.

        Whichever is larger: the hidden states of `max_num_batched_tokens` tokens (four of the
        model's width, and the MLP's up, gate and output), or ten 32-bit copies of the logits of 256
        sequences, which the sampler's sort needs; and 0.5 GiB for graphs and communication. vLLM
        measured a peak of 1.26 GiB for Llama-3-8B at tensor parallelism 1 and 2 alike
        (github.com/vllm-project/vllm/pull/10511): its logits, 10 x 256 x 128256 x 4 bytes.
        """
        model = self.model
        num_experts = model.experts_per_token + model.num_shared_experts
        width = max(model.intermediate_size, num_experts * model.moe_intermediate_size)
        values = 4 * model.hidden_size + 3 * width // self.tensor_parallel_size
        hidden = BF16_BYTES * max_num_batched_tokens * values
        logits = 10 * 256 * model.vocab_size * 4
        return max(hidden, logits) + GIB // 2

    def plan_num_blocks(
        self,
        block_size: int,
        gpu_memory_utilization: float,
        max_model_len: int,
        *,
        max_num_batched_tokens: int = 2048,
    ) -> int:
        """Return how many KV-cache blocks fit beside the weights on every device.

        Parameters
        ----------
        block_size : int
            Tokens per block.
        gpu_memory_utilization : float
            Share of the device's memory to use, in (0, 1].
        max_model_len : int
            Longest request in tokens, of which at least one must fit.
        max_num_batched_tokens : int
            Largest batch, for the memory of its activations (`working_bytes`).

        Raises
        ------
        ConfigError
            If an argument is out of range.
        CapacityError
            If the weights, or one longest request, do not fit; it says what would.
        """
        if min(block_size, max_model_len, max_num_batched_tokens) < 1:
            raise ConfigError(
                f"Deployment: block_size = {block_size}, max_model_len = {max_model_len}, "
                f"max_num_batched_tokens = {max_num_batched_tokens}: expected at least 1 each."
            )
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"Deployment: gpu_memory_utilization = {gpu_memory_utilization}: expected more "
                "than 0 and at most 1."
            )
        plan = _Plan(block_size, gpu_memory_utilization, max_model_len, max_num_batched_tokens)
        if not plan.fits(self):
            raise plan.refusal(self)
        return plan.num_blocks(self)


class _Plan(NamedTuple):
    """What a deployment's memory is to hold."""

    block_size: int
    gpu_memory_utilization: float
    max_model_len: int
    max_num_batched_tokens: int

    def free_bytes(self, deployment: Deployment) -> float:
        """Memory of one device that is left for the KV cache; below 0 if the weights are more."""
        taken = deployment.weight_bytes_per_device
        taken += deployment.working_bytes(self.max_num_batched_tokens)
        return deployment.device.memory_bytes * self.gpu_memory_utilization - taken

    def num_blocks(self, deployment: Deployment) -> int:
        """Blocks that fit."""
        block_bytes = self.block_size * deployment.kv_bytes_per_token_per_device
        return int(self.free_bytes(deployment) // block_bytes)

    def fits(self, deployment: Deployment) -> bool:
        """Whether one longest request fits."""
        return self.num_blocks(deployment) * self.block_size >= self.max_model_len

    def refusal(self, deployment: Deployment) -> CapacityError:
        """Say what does not fit and what would."""
        model, device = deployment.model, deployment.device
        each = "each of " if deployment.num_devices > 1 else ""
        devices = f"{each}{deployment.num_devices} x {device.name}"
        share = f"at gpu_memory_utilization={self.gpu_memory_utilization}"
        free = self.free_bytes(deployment)
        num_tokens = max(self.num_blocks(deployment), 0) * self.block_size
        shorter = f"max_model_len <= {num_tokens} or " if num_tokens else ""
        advice = f"use {shorter}{self.larger(deployment)}"
        if free <= 0:
            weights = deployment.weight_bytes_per_device / GIB
            working = deployment.working_bytes(self.max_num_batched_tokens) / GIB
            offered = device.memory_bytes * self.gpu_memory_utilization / GIB
            return CapacityError(
                f"{model.name} needs {weights:.1f} GiB of weights and {working:.1f} GiB of "
                f"working memory, {devices} offers {offered:.1f} GiB {share}; {advice}."
            )
        request = self.max_model_len * deployment.kv_bytes_per_token_per_device
        return CapacityError(
            f"{model.name} needs {request / GIB:.1f} GiB of KV cache for a request of "
            f"max_model_len={self.max_model_len}, {devices} has {free / GIB:.1f} GiB left for it "
            f"{share}; {advice}."
        )

    def larger(self, deployment: Deployment) -> str:
        """Name the split that would do on the fewest nodes, within a node if it can."""
        depths = divisors(deployment.model.num_layers)
        widths = tensor_parallel_sizes(deployment)
        here = deployment.pipeline_parallel_size
        splits = [(width, depth) for width in widths for depth in depths if depth >= here]

        def effort(split: tuple[int, int]) -> tuple[int, bool, int, int]:
            width, depth = split
            num_nodes = -(-width * depth // DEVICES_PER_NODE)
            return num_nodes, width > DEVICES_PER_NODE, depth, width

        for width, depth in sorted(splits, key=effort):
            larger = dataclasses.replace(
                deployment, tensor_parallel_size=width, pipeline_parallel_size=depth
            )
            if self.fits(larger):
                if depth == here:
                    return f"tensor_parallel_size >= {width}"
                return f"tensor_parallel_size={width} with pipeline_parallel_size={depth}"
        return "a device with more memory"
