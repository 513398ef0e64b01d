"""A model on devices: how it is split, and whether it fits into their memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pydantic import Field

from vidur_simpy.errors import CapacityError, ConfigError
from vidur_simpy.hardware import BYTES_PER_VALUE, GIB, Device, Model
from vidur_simpy.validation import configuration

__all__ = ["Deployment"]

DEVICES_PER_NODE = 8
"""The widest tensor parallelism that an error message suggests."""


@configuration
class Deployment:
    """One replica: a model split over the devices that hold it.

    Heads, MLPs and the vocabulary are split over `tensor_parallel_size` devices, layers over
    `pipeline_parallel_size` stages. Weights and KV cache are bf16.

    Raises
    ------
    ConfigError
        If the heads or layers cannot be split so, with the sizes that can, nearest first.

    Examples
    --------
    >>> model, device = Model.from_name("llama-3.1-8b"), Device.from_name("h100")
    >>> Deployment(model, device).plan_num_blocks(16, 0.9, max_model_len=8192)
    28161
    """

    model: Model
    device: Device
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)

    def __post_init__(self) -> None:
        model = self.model
        heads = f"{model.num_heads} heads and {model.num_kv_heads} KV heads"
        _check_size(self, "tensor_parallel_size", heads, _tensor_parallel_sizes(model))
        layers = f"{model.num_layers} layers"
        _check_size(self, "pipeline_parallel_size", layers, _divisors(model.num_layers))

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
    def weight_bytes_per_device(self) -> int:
        """Weights on one device of the fullest stage.

        The first stage holds the embeddings, the last one the LM head; mixtures of experts are
        split like any other MLP, and their few dense layers are averaged over the stages.
        """
        model, tp = self.model, self.tensor_parallel_size
        is_one_table = model.tied_embeddings or self.pipeline_parallel_size > 1
        tables = (1 if is_one_table else 2) * model.embedding_parameters
        split = model.layer_parameters / self.pipeline_parallel_size + tables
        copies = self.kv_heads_per_device * tp - model.num_kv_heads
        copied = 2 * model.hidden_size * model.head_dim * copies * self.layers_per_stage
        return round(BYTES_PER_VALUE * (split + copied) / tp)

    @property
    def kv_bytes_per_token_per_device(self) -> int:
        """Bytes of KV cache that one token takes on one device; a latent cache is not split."""
        model = self.model
        values = model.kv_latent_size or 2 * self.kv_heads_per_device * model.head_dim
        return BYTES_PER_VALUE * self.layers_per_stage * values

    @property
    def peak_flops(self) -> float:
        """Operations per second of one device, bf16 without sparsity: the ceiling of MFU."""
        return self.device.bf16_dense_tflops * 1e12

    def flops(self, num_tokens: int, attention_pairs: int) -> int:
        """Return the operations of a batch on all devices of the replica.

        ``2 * num_tokens * active_parameters`` (LM head included, embedding lookup not) for the
        matrices, ``4 * layers * heads * head_dim * attention_pairs`` for attention.

        Parameters
        ----------
        num_tokens : int
            Tokens computed.
        attention_pairs : int
            Tokens attended to, summed over the tokens computed.
        """
        model = self.model
        pair = 4 * model.num_layers * model.num_heads * model.head_dim
        return 2 * num_tokens * model.active_parameters + pair * attention_pairs

    def working_bytes(self, max_num_batched_tokens: int = 2048) -> int:
        """Return the memory that one device keeps for activations and the runtime.

        Whichever is larger: the hidden states of a batch (four of the model's width, and the
        MLP's up, gate and output), or ten 32-bit copies of the logits of 256 sequences, which
        the sampler's sort needs; and 0.5 GiB for graphs and communication. vLLM measured a peak
        of 1.26 GiB for Llama-3-8B at tensor parallelism 1 and 2 alike
        (github.com/vllm-project/vllm/pull/10511): its logits, 10 x 256 x 128256 x 4 bytes.
        """
        model = self.model
        num_experts = model.experts_per_token + model.num_shared_experts
        width = max(model.intermediate_size, num_experts * model.moe_intermediate_size)
        values = 4 * model.hidden_size + 3 * width // self.tensor_parallel_size
        hidden = BYTES_PER_VALUE * max_num_batched_tokens * values
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
        """Name the smallest tensor, then pipeline parallelism that would do."""
        model, device = deployment.model, deployment.device
        widest = max(DEVICES_PER_NODE, deployment.tensor_parallel_size)
        widths = [size for size in _tensor_parallel_sizes(model) if size <= widest]
        depths = _divisors(model.num_layers)
        for depth in depths[depths.index(deployment.pipeline_parallel_size) :]:
            for width in widths:
                if self.fits(Deployment(model, device, width, depth)):
                    if depth == deployment.pipeline_parallel_size:
                        return f"tensor_parallel_size >= {width}"
                    return f"tensor_parallel_size={width} with pipeline_parallel_size={depth}"
        return "a device with more memory"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _tensor_parallel_sizes(model: Model) -> list[int]:
    """Sizes that split the heads, and split the KV heads or hold each equally often."""
    num_kv_heads = model.num_kv_heads
    sizes = _divisors(model.num_heads)
    return [size for size in sizes if num_kv_heads % size == 0 or size % num_kv_heads == 0]


def _check_size(deployment: Deployment, field: str, parts: str, sizes: Iterable[int]) -> None:
    given = getattr(deployment, field)
    if given not in (valid := list(sizes)):
        valid.sort(key=lambda size: (abs(size - given), size))
        raise ConfigError(
            f"Deployment.{field} = {given} does not split the {parts} of "
            f"{deployment.model.name}: expected one of {', '.join(map(str, valid))}."
        )
