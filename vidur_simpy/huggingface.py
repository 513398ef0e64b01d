"""What a Hugging Face ``config.json`` says about a decoder, in the words of `Model`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vidur_simpy.errors import ConfigError, unknown_name

__all__ = ["ARCHITECTURES", "read"]

Fields: TypeAlias = dict[str, Any]

# One figure under the names that architectures have for it.
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN_SIZE = ("hidden_size", "n_embd", "n_embed", "d_model")
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads")
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "kv_channels")
MLP_SIZE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
MAX_POSITION = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")


class _Config:
    """The content of a config.json, which remembers what was missing."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        self.content = content
        self.place = place
        self.missing: list[str] = []

    def find(self, *names: str) -> Any:
        """Return the first of these that is there, or None."""
        given = (self.content[name] for name in names if self.content.get(name) is not None)
        return next(given, None)

    def count(self, *names: str, default: int | None = None) -> int:
        """Return a whole number; note it as missing if it is not there and has no default."""
        found = self.find(*names)
        if found is None:
            if default is None:
                self.missing.append(" or ".join(map(repr, names)))
            return 1 if default is None else default
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            name = next(name for name in names if self.content.get(name) is not None)
            raise ConfigError(f"{self.place}: {name} = {found!r}: expected a whole number.")
        return found


def _grouped_attention(config: _Config) -> Fields:
    num_heads = config.count(*NUM_HEADS)
    hidden_size = config.count(*HIDDEN_SIZE)
    return {
        "num_heads": num_heads,
        "num_kv_heads": config.count(*NUM_KV_HEADS, default=num_heads) or num_heads,
        "head_dim": config.count(*HEAD_DIM, default=hidden_size // max(num_heads, 1)),
    }


def _multi_query_attention(config: _Config) -> Fields:
    """Read Falcon's and StarCoder's: one KV head, unless the config asks for more."""
    fields = _grouped_attention(config)
    if not config.find("new_decoder_architecture"):
        is_multi_query = config.content.get("multi_query", True)
        fields["num_kv_heads"] = 1 if is_multi_query else fields["num_heads"]
    return fields


def _latent_attention(config: _Config) -> Fields:
    num_heads = config.count(*NUM_HEADS)
    rope_head_dim = config.count("qk_rope_head_dim")
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": config.count("qk_nope_head_dim") + rope_head_dim,
        "rope_head_dim": rope_head_dim,
        "value_head_dim": config.count("v_head_dim"),
        "kv_latent_size": config.count("kv_lora_rank") + rope_head_dim,
        "query_latent_size": config.count("q_lora_rank", default=0),
    }


def _plain_mlp(config: _Config) -> Fields:
    return {"intermediate_size": config.count(*MLP_SIZE)}


def _fourfold_mlp(config: _Config) -> Fields:
    """Read an MLP that is four times the hidden size where the config does not say."""
    return {"intermediate_size": config.count(*MLP_SIZE, default=4 * config.count(*HIDDEN_SIZE))}


def _halved_mlp(config: _Config) -> Fields:
    """Read Qwen's first: its figure is the sum of both gated halves."""
    return {"intermediate_size": config.count(*MLP_SIZE) // 2}


def _experts(config: _Config) -> Fields:
    return {
        "num_experts": config.count(*NUM_EXPERTS),
        "experts_per_token": config.count(*EXPERTS_PER_TOKEN),
    }


def _mixtral_mlp(config: _Config) -> Fields:
    """Read a mixture in every layer, whose experts have the width of an MLP."""
    width = config.count("intermediate_size")
    return _experts(config) | {"intermediate_size": 0, "moe_intermediate_size": width}


def _qwen_mlp(config: _Config) -> Fields:
    """Read mixtures in every `decoder_sparse_step`-th layer; a shared expert has its own width."""
    width = config.count("moe_intermediate_size")
    step = max(config.count("decoder_sparse_step", default=1), 1)
    plain = set(config.find("mlp_only_layers") or ())
    num_layers = config.count(*NUM_LAYERS)
    num_mixtures = sum(
        layer not in plain and (layer + 1) % step == 0 for layer in range(num_layers)
    )
    num_shared = _ratio(config, "shared_expert_intermediate_size", "moe_intermediate_size")
    return _experts(config) | {
        "moe_intermediate_size": width,
        "num_shared_experts": num_shared,
        "num_dense_layers": num_layers - num_mixtures,
        "intermediate_size": config.count("intermediate_size", default=0),
    }


def _deepseek_mlp(config: _Config) -> Fields:
    """Read mixtures after the first `first_k_dense_replace` layers."""
    num_layers = config.count(*NUM_LAYERS)
    num_plain = config.count("first_k_dense_replace", default=0)
    step = max(config.count("moe_layer_freq", default=1), 1)
    num_mixtures = sum(layer % step == 0 for layer in range(num_plain, num_layers))
    return _experts(config) | {
        "moe_intermediate_size": config.count("moe_intermediate_size"),
        "num_shared_experts": config.count("n_shared_experts", default=0),
        "num_dense_layers": num_layers - num_mixtures,
        "intermediate_size": config.count("intermediate_size"),
    }


def _llama4_mlp(config: _Config) -> Fields:
    """Read a mixture with one shared expert in every `interleave_moe_layer_step`-th layer."""
    num_layers = config.count(*NUM_LAYERS)
    step = max(config.count("interleave_moe_layer_step", default=1), 1)
    mixtures = config.find("moe_layers")
    num_mixtures = num_layers // step if mixtures is None else len(mixtures)
    return _experts(config) | {
        "moe_intermediate_size": config.count("intermediate_size"),
        "num_shared_experts": 1,
        "num_dense_layers": num_layers - num_mixtures,
        "intermediate_size": config.count("intermediate_size_mlp"),
    }


def _ratio(config: _Config, whole: str, part: str) -> int:
    """Return how often one width is in another, which must be a whole number."""
    times, rest = divmod(config.count(whole, default=0), max(config.count(part), 1))
    if rest:
        raise ConfigError(
            f"{config.place}: {whole} = {config.find(whole)}: expected a multiple of {part} = "
            f"{config.find(part)}."
        )
    return times


class Architecture(NamedTuple):
    """How to read the configuration of one ``model_type``.

    Attributes
    ----------
    is_gated : bool
        Whether its MLP has a gate.
    is_tied : bool
        Whether it shares the embedding table where the configuration does not say.
    read_mlp, read_attention : callable
        Take the configuration, return fields of `Model`.
    full_every : int
        All layers but each such one have a sliding window, where ``layer_types`` does not say
        which; with 0 and a ``sliding_window`` all have.
    """

    is_gated: bool = True
    is_tied: bool = False
    read_mlp: Callable[[_Config], Fields] = _plain_mlp
    read_attention: Callable[[_Config], Fields] = _grouped_attention
    full_every: int = 0


_LLAMA = Architecture()
_TIED = Architecture(is_tied=True)
_UNGATED = Architecture(is_gated=False)
_GPT = Architecture(is_gated=False, is_tied=True, read_mlp=_fourfold_mlp)
_MIXTRAL = Architecture(read_mlp=_mixtral_mlp)
_QWEN_MOE = Architecture(read_mlp=_qwen_mlp)
_DEEPSEEK = Architecture(read_mlp=_deepseek_mlp, read_attention=_latent_attention)

ARCHITECTURES: dict[str, Architecture] = {
    "baichuan": _LLAMA,
    "bloom": _GPT,
    "chatglm": _LLAMA,
    "cohere": _TIED,
    "cohere2": _TIED._replace(full_every=4),
    "deepseek": _DEEPSEEK._replace(read_attention=_grouped_attention),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "dots1": _DEEPSEEK._replace(read_attention=_grouped_attention),
    "falcon": _GPT._replace(read_attention=_multi_query_attention),
    "gemma": _TIED,
    "gemma2": _TIED._replace(full_every=2),
    "gemma3_text": _TIED._replace(full_every=6),
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "glm4_moe": _DEEPSEEK._replace(read_attention=_grouped_attention),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT._replace(read_attention=_multi_query_attention),
    "gpt_neox": _UNGATED,
    "gpt_oss": _MIXTRAL._replace(full_every=2),
    "gptj": _GPT._replace(is_tied=False),
    "granite": _LLAMA,
    "internlm": _LLAMA,
    "internlm2": _LLAMA,
    "internlm3": _LLAMA,
    "kimi_k2": _DEEPSEEK,
    "llama": _LLAMA,
    "llama4_text": Architecture(read_mlp=_llama4_mlp),
    "mimo": _LLAMA,
    "minimax_m2": _MIXTRAL,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "mpt": _GPT,
    "nemotron": _UNGATED,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmoe": _MIXTRAL,
    "opt": _GPT,
    "phi": _UNGATED,
    "phi3": _LLAMA,
    "phimoe": _MIXTRAL,
    "qwen": Architecture(read_mlp=_halved_mlp),
    "qwen2": _LLAMA,
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN_MOE,
    "qwen3_vl_moe_text": _QWEN_MOE,
    "qwen3_vl_text": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _TIED,
    "stablelm": _LLAMA,
    "starcoder2": Architecture(is_gated=False, is_tied=True),
}
"""By ``model_type``."""


def read(source: str | Path | Mapping[str, Any], name: str | None = None) -> Fields:
    """Return the fields of a `Model` from a config.json, the folder that holds it, or its content.

    Raises
    ------
    ConfigError
        See `Model.from_huggingface`.
    """
    whole, place = _content(source)
    kind, content = _decoder(whole, place)
    architecture = ARCHITECTURES[kind]
    config = _Config(content, place)
    fields = {
        "name": name or content.get("_name_or_path") or place,
        "num_layers": config.count(*NUM_LAYERS),
        "hidden_size": config.count(*HIDDEN_SIZE),
        "vocab_size": config.count("padded_vocab_size", "vocab_size"),
        "gated_mlp": architecture.is_gated,
        "tied_embeddings": config.content.get("tie_word_embeddings", architecture.is_tied),
        "max_position": config.count(*MAX_POSITION, default=0),
        "quantization": _quantization(whole, place),
        "source": f"{place} (Hugging Face config)",
    }
    fields |= architecture.read_attention(config) | architecture.read_mlp(config)
    fields |= _window(config, architecture)
    if config.missing:
        missing = ", ".join(dict.fromkeys(config.missing))
        raise ConfigError(f"{place} lacks {missing}, which {kind} needs.")
    return fields


def _content(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the content of a config.json and what to call it in a message."""
    if isinstance(source, Mapping):
        return source, "the Hugging Face config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the Hugging Face config {path}: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}: expected a mapping.")
    return content, str(path)


def _decoder(content: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    """Return the ``model_type`` to read, and the part of the content that describes it."""
    kind = content.get("model_type")
    inner = content.get("text_config")
    if kind not in ARCHITECTURES and isinstance(inner, Mapping):
        kind, content = inner.get("model_type", kind), inner
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise unknown_name(f"model_type in {place}", kind, ARCHITECTURES)
    return kind, content


def _window(config: _Config, architecture: Architecture) -> Fields:
    """Return the sliding window and how many layers have it."""
    window = config.count("sliding_window", default=0)
    num_layers = config.count(*NUM_LAYERS)
    layer_types = config.find("layer_types")
    if layer_types is not None:
        num_sliding = sum(kind == "sliding_attention" for kind in layer_types)
    elif "use_sliding_window" in config.content:
        first = config.count("max_window_layers", default=0)
        num_sliding = max(num_layers - first, 0) if config.find("use_sliding_window") else 0
    else:
        full_every = config.count("sliding_window_pattern", default=architecture.full_every)
        num_sliding = num_layers - (num_layers // full_every if full_every else 0)
    if not window or not num_sliding:
        return {}
    return {"sliding_window": window, "num_sliding_layers": num_sliding}


def _quantization(content: Mapping[str, Any], place: str) -> str | None:
    """Return our name for what ``quantization_config`` says."""
    said = content.get("quantization_config")
    said = said or (content.get("text_config") or {}).get("quantization_config")
    if not said:
        return None
    method = str(said.get("quant_method") or said.get("quant_algo")).lower()
    kind = f"{method} {_kind_of_weights(said)}"
    if kind not in _QUANTIZATIONS:
        raise unknown_name(f"quantization_config in {place}", kind, _QUANTIZATIONS)
    return _QUANTIZATIONS[kind]


_QUANTIZATIONS = {
    "awq 4 bits": "awq",
    "compressed-tensors 4 bits": "int4",
    "compressed-tensors 8 bits": "int8",
    "compressed-tensors fp8": "fp8",
    "fbgemm_fp8 fp8": "fp8",
    "fp8 fp8": "fp8",
    "gptq 4 bits": "gptq",
    "modelopt fp8": "fp8",
    "mxfp4 mxfp4": "mxfp4",
}
"""Our name by method and kind of weights."""


def _kind_of_weights(said: Mapping[str, Any]) -> str:
    """Return the format of the weights, or their bits if they are whole numbers."""
    algorithm = str(said.get("quant_algo") or said.get("quant_method")).lower()
    if "fp8" in algorithm:
        return "fp8"
    groups = list((said.get("config_groups") or {}).values())
    if algorithm != "compressed-tensors" or not groups:
        bits = said.get("bits", said.get("w_bit"))
        return algorithm if bits is None else f"{bits} bits"
    weights = groups[0].get("weights") or {}
    is_float = weights.get("type") == "float"
    return f"fp{weights.get('num_bits')}" if is_float else f"{weights.get('num_bits')} bits"
