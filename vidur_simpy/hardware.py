"""Models and devices from catalogue sheets."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.validation import configuration, field_names

__all__ = ["Device", "Model", "device_names", "model_names"]

BYTES_PER_VALUE = 2
"""Weights, activations and the KV cache are bf16."""

GIB = 2**30

_HUGGINGFACE_GATED_MLP = {
    "internlm2": True,
    "llama": True,
    "mistral": True,
    "phi": False,
    "phi3": True,
    "qwen2": True,
    "qwen3": True,
}
"""The `model_type` values that `Model.from_huggingface` reads, and whether their MLP is gated."""


@configuration
class Model:
    """The geometry of a decoder, from which sizes and times follow.

    Parameters
    ----------
    name : str
        Full name, such as ``meta-llama/Llama-3.1-8B``.
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size : int
        As in the model's ``config.json``; `intermediate_size` is 0 if every MLP is a mixture.
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
        Values that multi-head latent attention caches per token and layer; 0 for ordinary
        attention.
    published_parameters_b, published_active_parameters_b : float or None
        Billions of parameters as published, in all and used per token. They count where the
        geometry above does not tell: for latent attention.
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
    published_parameters_b: float | None = Field(default=None, gt=0)
    published_active_parameters_b: float | None = Field(default=None, gt=0)
    source: str = ""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"Model {self.name}: num_heads = {self.num_heads} is no multiple of "
                f"num_kv_heads = {self.num_kv_heads}."
            )
        if not self.num_experts and not self.intermediate_size:
            raise ConfigError(
                f"Model {self.name}: intermediate_size = 0: expected at least 1 in a dense model."
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"Model {self.name}: experts_per_token = {self.experts_per_token}: expected at "
                f"most num_experts = {self.num_experts}."
            )
        published = (self.published_parameters_b, self.published_active_parameters_b)
        if self.kv_latent_size and None in published:
            raise ConfigError(
                f"Model {self.name}: latent attention needs published_parameters_b and "
                "published_active_parameters_b."
            )

    @classmethod
    def from_name(cls, name: str) -> Model:
        """Return a model of the catalogue, in any case.

        Known are the full name (``meta-llama/Llama-2-7b-hf``), its part after the slash, and the
        shorter spellings of the sheet (``llama-2-7b``), with or without the organisation.

        Raises
        ------
        ConfigError
            If there is no such model, with the nearest.
        """
        found = _models().get(str(name).lower())
        if found is None:
            raise unknown_name("model", name, model_names())
        return found

    @classmethod
    def from_huggingface(
        cls, source: str | Path | Mapping[str, Any], name: str | None = None
    ) -> Model:
        """Read a Hugging Face ``config.json`` of a plain dense decoder.

        Parameters
        ----------
        source : str, Path or mapping
            The file, the folder that holds it, or its content.
        name : str, optional
            Name of the model; by default what the file or its folder says.

        Raises
        ------
        ConfigError
            If it cannot be read, lacks a figure, is quantized, or is of another ``model_type``
            than internlm2, llama, mistral, phi, phi3, qwen2 or qwen3.
        """
        config, place = _huggingface_config(source)
        kind = config.get("model_type")
        if kind not in _HUGGINGFACE_GATED_MLP:
            raise unknown_name(f"model_type in {place}", kind, _HUGGINGFACE_GATED_MLP)
        if config.get("quantization_config"):
            raise ConfigError(f"{place} is quantized: expected the config.json of the bf16 model.")
        try:
            num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
            return cls(
                name=name or config.get("_name_or_path") or place,
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or hidden_size // num_heads,
                intermediate_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                gated_mlp=_HUGGINGFACE_GATED_MLP[kind],
                tied_embeddings=config.get("tie_word_embeddings", False),
                max_position=config.get("max_position_embeddings", 0),
                source=f"{place} (Hugging Face config)",
            )
        except KeyError as error:
            raise ConfigError(f"{place} lacks {error.args[0]!r}, which {kind} needs.") from None

    @property
    def is_dense(self) -> bool:
        """Whether it has ordinary attention and no mixture of experts."""
        return not self.num_experts and not self.kv_latent_size

    @property
    def embedding_parameters(self) -> int:
        """Values in one table of the vocabulary: the embedding, or the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Values of all weight matrices and embeddings; norms and biases (< 0.3 %) are left out."""
        num_tables = 1 if self.tied_embeddings else 2
        return self.layer_parameters + num_tables * self.embedding_parameters

    @property
    def layer_parameters(self) -> int:
        """Values of the weight matrices of all layers together."""
        if self.kv_latent_size:
            return self._published(self.published_parameters_b)
        return self._count(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Values that a token is multiplied with: its layers' and experts', and the LM head."""
        if self.kv_latent_size:
            layers = self._published(self.published_active_parameters_b)
        else:
            layers = self._count(self.experts_per_token)
        return layers + self.embedding_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache of one token over all layers, in bf16."""
        values = self.kv_latent_size or 2 * self.num_kv_heads * self.head_dim
        return BYTES_PER_VALUE * self.num_layers * values

    def _count(self, num_experts: int) -> int:
        """Count the layers' weights with so many experts in each layer that is a mixture."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * heads
        matrix = (3 if self.gated_mlp else 2) * self.hidden_size
        dense = matrix * self.intermediate_size
        experts = matrix * self.moe_intermediate_size * (num_experts + self.num_shared_experts)
        mixture = experts + self.hidden_size * self.num_experts
        num_dense = self.num_dense_layers if self.num_experts else self.num_layers
        num_mixtures = self.num_layers - num_dense
        return self.num_layers * attention + num_dense * dense + num_mixtures * mixture

    def _published(self, billions: float | None) -> int:
        """Take both tables of the vocabulary off a published count."""
        assert billions is not None, "checked at construction"
        num_tables = 1 if self.tied_embeddings else 2
        return round(billions * 1e9) - num_tables * self.embedding_parameters


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
    fp8_dense_tflops : float or None
        As above for fp8; None where there is none.
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
    reported_memory_mib: int | None = Field(default=None, gt=0)
    scaleup_link: str = ""
    tdp_w: float | None = Field(default=None, gt=0)
    source: str = ""

    @classmethod
    def from_name(cls, name: str) -> Device:
        """Return a device of the catalogue, in any case.

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


def model_names() -> list[str]:
    """Return the short names of the models in the catalogue.

    >>> model_names()[:2]
    ['bloom', 'codellama-34b-instruct-hf']
    """
    return sorted({_short(model.name) for model in _models().values()})


def device_names() -> list[str]:
    """Return the names of the devices in the catalogue.

    >>> device_names()[:2]
    ['a10', 'a100-40gb-sxm']
    """
    return sorted({device.name for device in _devices().values()})


Row = TypeVar("Row", Model, Device)


def _sheet(file: str, cls: type[Row]) -> dict[str, Row]:
    """Read a catalogue sheet into its rows by each of their names in lower case."""
    text = (resources.files("vidur_simpy") / "data" / file).read_text(encoding="utf-8")
    known = field_names(cls)
    by_name: dict[str, Row] = {}
    cells: dict[str, str]
    for cells in csv.DictReader(text.splitlines()):
        # An empty cell stands for the field's default; some columns are for readers only.
        row = cls(**{field: _value(cells[field]) for field in known if cells[field]})
        organisation = row.name.lower().rpartition("/")[0]
        for short in (_short(row.name), *cells["aliases"].split()):
            by_name[short] = by_name[f"{organisation}/{short}".lstrip("/")] = row
    return by_name


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


@functools.cache
def _models() -> dict[str, Model]:
    return _sheet("models.csv", Model)


@functools.cache
def _devices() -> dict[str, Device]:
    return _sheet("devices.csv", Device)


def _huggingface_config(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the content of a config.json and what to call it in a message."""
    if isinstance(source, Mapping):
        return source, "the Hugging Face config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the Hugging Face config {path}: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}: expected a mapping.")
    return config, str(path)
