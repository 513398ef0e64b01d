"""Models and devices from catalogue sheets."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vidur_simpy import catalogue, huggingface
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.precision import BF16_BYTES, Format, precision
from vidur_simpy.validation import configuration, field_names

__all__ = ["GIB", "Device", "Model", "device_names", "model_names"]

GIB = 2**30


@configuration
class Model:
    """The geometry of a decoder, from which sizes and times follow.

    Parameters
    ----------
    name : str
        Full name, such as ``meta-llama/Llama-3.1-8B``.
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size : int
        As in the model's ``config.json``; `intermediate_size` is 0 if every MLP is a mixture,
        `head_dim` is that of queries and keys.
    gated_mlp : bool
        Whether the MLP has a gate besides its up and down projections (SwiGLU).
    tied_embeddings : bool
        Whether the LM head shares the embedding table.
    max_position : int
        Longest sequence the model was made for, in tokens; 0 if unknown.
    num_experts, experts_per_token, moe_intermediate_size, num_shared_experts : int
        Of a mixture of experts; 0 in a dense model.
    num_dense_layers : int
        Layers of a mixture of experts that have a plain MLP.
    kv_latent_size : int
        Values that multi-head latent attention caches per token and layer, its rotary ones
        included; 0 for ordinary attention.
    query_latent_size, rope_head_dim, value_head_dim : int
        Of latent attention: the width that queries are compressed to (0 if they are not), the
        rotary part of `head_dim`, and the width of a head's values.
    sliding_window, num_sliding_layers : int
        Tokens that a layer with a sliding window attends to at most, and how many layers are so;
        0 if none is.
    quantization : str or None
        What the published weights are quantized with, by vLLM's name; None for bf16.
    source : str
        Where the figures come from.

    Examples
    --------
    >>> model = Model.from_name("llama-3.1-8b")
    >>> model.name, round(model.num_parameters / 1e9, 2), model.kv_bytes_per_token
    ('meta-llama/Llama-3.1-8B', 8.03, 131072)
    """

    name: str
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=0)
    vocab_size: int = Field(ge=1)
    gated_mlp: bool = True
    tied_embeddings: bool = False
    max_position: int = Field(default=0, ge=0)
    num_experts: int = Field(default=0, ge=0)
    experts_per_token: int = Field(default=0, ge=0)
    moe_intermediate_size: int = Field(default=0, ge=0)
    num_shared_experts: int = Field(default=0, ge=0)
    num_dense_layers: int = Field(default=0, ge=0)
    kv_latent_size: int = Field(default=0, ge=0)
    query_latent_size: int = Field(default=0, ge=0)
    rope_head_dim: int = Field(default=0, ge=0)
    value_head_dim: int = Field(default=0, ge=0)
    sliding_window: int = Field(default=0, ge=0)
    num_sliding_layers: int = Field(default=0, ge=0)
    quantization: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            self._refuse(
                f"num_heads = {self.num_heads}", f"a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        self._check_experts()
        if self.kv_latent_size and not (
            0 < self.rope_head_dim < min(self.kv_latent_size, self.head_dim) and self.value_head_dim
        ):
            self._refuse(
                f"kv_latent_size = {self.kv_latent_size}",
                "with it value_head_dim, and a rope_head_dim that is less than it and head_dim",
            )
        if self.num_sliding_layers > (self.num_layers if self.sliding_window else 0):
            self._refuse(
                f"num_sliding_layers = {self.num_sliding_layers}",
                f"a sliding_window and at most {self.num_layers} layers",
            )
        if self.quantization is not None:
            precision(self.quantization, f"Model.quantization of {self.name}")

    def _check_experts(self) -> None:
        if self.experts_per_token > self.num_experts:
            self._refuse(
                f"experts_per_token = {self.experts_per_token}",
                f"at most num_experts = {self.num_experts}",
            )
        if self.num_experts and not (self.experts_per_token and self.moe_intermediate_size):
            self._refuse(
                f"num_experts = {self.num_experts}",
                "with it experts_per_token and moe_intermediate_size",
            )
        if self.num_dense_layers > (self.num_layers if self.num_experts else 0):
            self._refuse(
                f"num_dense_layers = {self.num_dense_layers}",
                "at most the layers of a mixture of experts",
            )
        if self.num_plain_layers and not self.intermediate_size:
            self._refuse("intermediate_size = 0", "at least 1 in a model with plain MLPs")

    def _refuse(self, what: str, expected: str) -> None:
        raise ConfigError(f"Model {self.name}: {what}: expected {expected}.")

    @classmethod
    def from_name(cls, name: str) -> Model:
        """Return a model of the catalogue, in any case.

        Known are the full name (``meta-llama/Llama-2-7b-hf``), its part after the slash, and the
        shorter spellings of the sheet (``llama-2-7b``), with or without the organisation. One that
        was tuned to chat (``-instruct``, ``-chat``, ``-it``) is the model it was made from, which
        has the same shape.

        Raises
        ------
        ConfigError
            If there is no such model, with the nearest.
        """
        known, lowered = _models(), str(name).lower()
        found = known.get(lowered) or known.get(re.sub(r"-(instruct|chat|it)\b", "", lowered))
        if found is None:
            raise unknown_name("model", name, model_names())
        return found

    @classmethod
    def from_huggingface(
        cls, source: str | Path | Mapping[str, Any], name: str | None = None
    ) -> Model:
        """Read the Hugging Face ``config.json`` of a decoder.

        Of a model that also sees or hears, its language model is read. Sliding windows count;
        Llama 4's chunked attention does not, and is taken for full attention.

        Parameters
        ----------
        source : str, Path or mapping
            The file, the folder that holds it, or its content.
        name : str, optional
            Name of the model; by default what the file or its folder says.

        Raises
        ------
        ConfigError
            If it cannot be read, lacks a figure, or is of a ``model_type`` or a quantization that
            is not known; the message names those that are.
        """
        return cls(**huggingface.read(source, name))

    @property
    def num_mixture_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def num_plain_layers(self) -> int:
        """Layers that have a plain MLP."""
        return self.num_layers - self.num_mixture_layers

    @property
    def embedding_parameters(self) -> int:
        """Values in one table of the vocabulary: the embedding, or the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """Values of the weight matrices of one layer's attention."""
        if not self.kv_latent_size:
            return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        width = self.query_latent_size or self.hidden_size
        per_head = width * self.head_dim + self.latent_rank * self.latent_head_width
        per_head += self.value_head_dim * self.hidden_size
        return self.num_heads * per_head + self.latent_parameters

    @property
    def latent_parameters(self) -> int:
        """Values of one layer's projections into latent spaces, which no parallelism splits."""
        return self.hidden_size * (self.query_latent_size + self.kv_latent_size)

    @property
    def latent_rank(self) -> int:
        """Values of a latent cache entry from which keys and values are computed."""
        return self.kv_latent_size - self.rope_head_dim

    @property
    def latent_head_width(self) -> int:
        """Values of one head's key and value that are computed from the latent cache."""
        return self.head_dim - self.rope_head_dim + self.value_head_dim

    @property
    def mlp_parameters(self) -> int:
        """Values of one layer's plain MLP."""
        return self._matrices * self.hidden_size * self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Values of one expert."""
        return self._matrices * self.hidden_size * self.moe_intermediate_size

    @property
    def router_parameters(self) -> int:
        """Values of one layer's router."""
        return self.hidden_size * self.num_experts

    @property
    def norm_parameters(self) -> int:
        """Values of all norms, two a layer and the last one; biases (< 0.3 %) are left out."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Values of the weights of all layers together."""
        return self._count(self.num_experts) + self.norm_parameters

    @property
    def num_parameters(self) -> int:
        """Values of all weights and embeddings."""
        num_tables = 1 if self.tied_embeddings else 2
        return self.layer_parameters + num_tables * self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Values that a token is multiplied with: its layers' and experts', and the LM head."""
        return self._count(self.experts_per_token) + self.embedding_parameters

    @property
    def attended_operations(self) -> int:
        """Operations of all layers for one token that attends to one token."""
        value_head_dim = self.value_head_dim or self.head_dim
        return 2 * self.num_layers * self.num_heads * (self.head_dim + value_head_dim)

    @property
    def cached_values(self) -> int:
        """Values of KV cache of one token in one layer."""
        return self.kv_latent_size or 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache of one token over all layers, in bf16."""
        return BF16_BYTES * self.num_layers * self.cached_values

    @property
    def _matrices(self) -> int:
        return 3 if self.gated_mlp else 2

    def _count(self, num_experts: int) -> int:
        """Count the layers' matrices with so many experts in each layer that is a mixture."""
        mixture = (num_experts + self.num_shared_experts) * self.expert_parameters
        mixture += self.router_parameters
        return (
            self.num_layers * self.attention_parameters
            + self.num_plain_layers * self.mlp_parameters
            + self.num_mixture_layers * mixture
        )


@configuration
class Device:
    """An accelerator as its product sheet describes it.

    Parameters
    ----------
    name : str
    bf16_dense_tflops : float
        Peak of the matrix units without sparsity, 1e12 operations per second; fp16 where there
        is no bf16.
    memory_bandwidth_gbps : float
        1e9 bytes per second.
    memory_gb : float
        As the product is called. Its unit is 2**30 bytes, as vendors count memory: an "80 GB"
        H100 reports 79.6 GiB.
    scaleup_bidir_gbps : float
        Bandwidth to the neighbouring devices, both directions together, 1e9 bytes per second.
    vendor, scaleup_link, source : str
        Its maker, what the link is, and where the figures come from.
    fp8_dense_tflops, int8_dense_tops : float or None
        As above for fp8 and int8; None where there is none.
    reported_memory_mib : int or None
        What the driver reports, in 2**20 bytes, where known: cards with GDDR memory keep 6 % of
        it for error correction. `memory_bytes` goes by this figure, else by `memory_gb`.
    tdp_w : float or None
        Watts.

    Examples
    --------
    >>> Device.from_name("h100").name
    'h100-80gb-sxm'
    """

    name: str
    bf16_dense_tflops: float = Field(gt=0)
    memory_bandwidth_gbps: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    scaleup_bidir_gbps: float = Field(gt=0)
    vendor: str = ""
    fp8_dense_tflops: float | None = Field(default=None, gt=0)
    int8_dense_tops: float | None = Field(default=None, gt=0)
    reported_memory_mib: int | None = Field(default=None, gt=0)
    scaleup_link: str = ""
    tdp_w: float | None = Field(default=None, gt=0)
    source: str = ""

    @classmethod
    def from_name(cls, name: str) -> Device:
        """Return a device of the catalogue by its `name`, in any case.

        Short names: a100, a100-80gb, h100, h100-80gb, h200, h800, a800, h20, b200, b300 and v100
        are the SXM devices (of 80 GB where there are two), a100-40gb the smaller one; a100-pcie,
        h100-pcie, h100-nvl, gh200 and rtx-pro-6000 the one device that is called so.

        Raises
        ------
        ConfigError
            If there is no such device, with the nearest.
        """
        found = _devices().get(str(name).lower())
        if found is None:
            raise unknown_name("device", name, device_names())
        return found

    @property
    def memory_bytes(self) -> float:
        """Memory that programs can use."""
        if self.reported_memory_mib is not None:
            return self.reported_memory_mib * 2**20
        return self.memory_gb * GIB

    def peak_flops(self, format: Format = "bf16") -> float:
        """Operations per second in a `format` without sparsity; in bf16 where it has no such.

        >>> Device.from_name("h100").peak_flops("fp8"), Device.from_name("a100").peak_flops("fp8")
        (1978900000000000.0, 312000000000000.0)
        """
        peaks = {"fp8": self.fp8_dense_tflops, "int8": self.int8_dense_tops}
        return (peaks.get(format) or self.bf16_dense_tflops) * 1e12


def model_names() -> list[str]:
    """Return the short names of the models in the catalogue.

    >>> model_names()[:2]
    ['bloom', 'codellama-34b-instruct-hf']
    """
    return sorted({catalogue.short(model.name) for model in _models().values()})


def device_names() -> list[str]:
    """Return the names of the devices in the catalogue.

    >>> device_names()[:2]
    ['a10', 'a100-40gb-sxm']
    """
    return sorted({device.name for device in _devices().values()})


@functools.cache
def _models() -> dict[str, Model]:
    return catalogue.rows("models.csv", Model, field_names(Model))


@functools.cache
def _devices() -> dict[str, Device]:
    return catalogue.rows("devices.csv", Device, field_names(Device))
