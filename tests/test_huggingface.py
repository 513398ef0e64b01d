"""Hugging Face configurations: every architecture that is read, and what is refused."""

from __future__ import annotations

import json

import pytest

from vidur_simpy.cluster import Cluster
from vidur_simpy.errors import ConfigError
from vidur_simpy.hardware import Model
from vidur_simpy.huggingface import ARCHITECTURES

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

# The figures of the published files, less what says nothing about sizes.
CONFIGS = {
    "mixtral-8x7b": LLAMA
    | {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "llama-4-scout-17b-16e": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "num_hidden_layers": 48,
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "vocab_size": 202048,
            "max_position_embeddings": 10485760,
            "tie_word_embeddings": False,
        },
    },
    "falcon-180b": {
        "model_type": "falcon",
        "num_hidden_layers": 80,
        "hidden_size": 14848,
        "num_attention_heads": 232,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "vocab_size": 65024,
    },
    "opt-66b": {
        "model_type": "opt",
        "num_hidden_layers": 64,
        "hidden_size": 9216,
        "num_attention_heads": 72,
        "ffn_dim": 36864,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "bloom": {
        "model_type": "bloom",
        "n_layer": 70,
        "n_embed": 14336,
        "n_head": 112,
        "vocab_size": 250880,
        "seq_length": 2048,
    },
    "phi-2": {
        "model_type": "phi",
        "num_hidden_layers": 32,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
    },
    "mistral-7b-v0.1": LLAMA
    | {
        "model_type": "mistral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
SIZES = (
    "num_parameters",
    "active_parameters",
    "kv_bytes_per_token",
    "attended_operations",
    "gated_mlp",
    "quantization",
    "sliding_window",
    "num_sliding_layers",
    "num_mixture_layers",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_catalogue_model(name):
    """Dense, mixtures, latent and windowed attention: the sizes are those of the catalogue."""
    read, known = Model.from_huggingface(CONFIGS[name]), Model.from_name(name)
    assert {size: getattr(read, size) for size in SIZES} == {
        size: getattr(known, size) for size in SIZES
    }


def test_folder_file_and_content_are_the_same_model(tmp_path):
    """A cluster takes each of them for its model, too."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    sources = (tmp_path, str(tmp_path / "config.json"), LLAMA)
    read = [Model.from_huggingface(source, name="mine") for source in sources]
    known = Model.from_name("llama-3.1-8b")
    assert {model.num_parameters for model in read} == {known.num_parameters}
    assert {model.name for model in read} == {"mine"}
    for source in (str(tmp_path), str(tmp_path / "config.json"), LLAMA):
        model = Cluster(model=source, max_model_len=4096).deployment.model
        assert model.num_parameters == known.num_parameters


def test_a_config_without_kv_heads_has_one_per_head():
    """Older Llama configurations leave num_key_value_heads and head_dim out."""
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    model = Model.from_huggingface(config)
    assert (model.num_kv_heads, model.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("change", "num_mixtures", "num_shared"),
    [
        ({"decoder_sparse_step": 2}, 24, 0),
        ({"mlp_only_layers": [0, 5]}, 46, 0),
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 3072}, 48, 4),
    ],
)
def test_qwen_says_which_layers_are_mixtures(change, num_mixtures, num_shared):
    """Some layers may be plain, and an expert may be shared."""
    model = Model.from_huggingface(CONFIGS["qwen3-30b-a3b"] | change)
    assert (model.num_mixture_layers, model.num_shared_experts) == (num_mixtures, num_shared)


@pytest.mark.parametrize(
    ("change", "num_sliding"),
    [
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 28,
            },
            4,
        ),
        ({"model_type": "gemma2", "sliding_window": 4096}, 16),
        ({"model_type": "gemma3_text", "sliding_window": 1024}, 27),
        ({"model_type": "phi3", "sliding_window": 2047}, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0),
    ],
)
def test_a_sliding_window_is_on_the_layers_that_the_config_says(change, num_sliding):
    """All of them, a pattern, those from a layer on, or none."""
    assert Model.from_huggingface(LLAMA | change).num_sliding_layers == num_sliding


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "int8",
        ),
    ],
)
def test_a_quantized_checkpoint_says_in_what(said, name):
    """The model keeps the precision that it was published in."""
    assert Model.from_huggingface(LLAMA | {"quantization_config": said}).quantization == name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_names_what_it_lacks(kind):
    """An empty configuration of a known architecture is refused with the figures it needs."""
    with pytest.raises(ConfigError, match=rf"lacks 'num_hidden_layers' or .*which {kind} needs"):
        Model.from_huggingface({"model_type": kind})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "unknown model_type .* 'mamba2'.* Known: baichuan, bloom"),
        ({"model_type": "deepseek_v32"}, "did you mean 'deepseek_v3'"),
        ({"model_type": None}, "unknown model_type"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config .* Known"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "'modelopt nvfp4': did you mean 'modelopt fp8'",
        ),
        ({"num_hidden_layers": "32"}, "num_hidden_layers = '32': expected a whole number"),
        ({"num_attention_heads": -1}, "num_attention_heads = -1: expected a whole number"),
        ({"hidden_size": None, "vocab_size": None}, "lacks 'hidden_size' or .*'vocab_size'"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(change, message):
    """Unknown architectures, quantizations and figures are refused by name."""
    with pytest.raises(ConfigError, match=message):
        Model.from_huggingface(LLAMA | change)


def test_a_shared_expert_of_odd_width_is_refused():
    """It must be as wide as a whole number of experts."""
    config = CONFIGS["qwen3-30b-a3b"] | {"shared_expert_intermediate_size": 1000}
    with pytest.raises(ConfigError, match="= 1000: expected a multiple of moe_intermediate_size"):
        Model.from_huggingface(config)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    """A path that does not hold a mapping with all figures is named in the error."""
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.json"):
        Model.from_huggingface(tmp_path / "absent.json")
    path = tmp_path / "config.json"
    for content, message in [
        ("{", "cannot read"),
        ("[]", "holds a list"),
        ('{"model_type": "llama"}', "lacks .*'num_attention_heads'"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Model.from_huggingface(tmp_path)


def test_a_cluster_needs_to_know_how_long_sequences_may_be():
    """Where the configuration does not say, the user has to."""
    with pytest.raises(ConfigError, match=r"max_model_len = None: .* does not say how long"):
        Cluster(model={k: v for k, v in LLAMA.items() if k != "max_position_embeddings"})
