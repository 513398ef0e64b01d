"""Catalogue sheets, sizes that follow from them, and memory planning."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidur_simpy.deployment import Deployment
from vidur_simpy.errors import CapacityError, ConfigError
from vidur_simpy.hardware import GIB, Device, Model, device_names, model_names

SHARED = Path(
    os.environ.get("VIDUR_SHARED") or Path(__file__).resolve().parents[1].parent / "shared"
)
SHEETS = SHARED / "data" / "hardware"
needs_sheets = pytest.mark.skipif(not SHEETS.is_dir(), reason=f"{SHEETS} is absent")

MODELS = [Model.from_name(name) for name in model_names()]
DEVICES = [Device.from_name(name) for name in device_names()]

TINY = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
LLAMA_CONFIG = {
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


def deployment(model="llama-3.1-8b", device="h100", tp=1, pp=1):
    return Deployment(Model.from_name(model), Device.from_name(device), tp, pp)


def rows(file):
    with (SHEETS / file).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# The catalogue


def test_catalogue_is_complete():
    """Every entry of both sheets loads, and says where its figures come from."""
    assert (len(MODELS), len(DEVICES)) == (48, 34)
    assert all(entry.source for entry in [*MODELS, *DEVICES])


@pytest.mark.parametrize(
    ("name", "full_name"),
    [
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("LLAMA-2-7B-HF", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-70B", "meta-llama/Llama-3.1-70B"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
    ],
)
def test_a_model_has_short_names(name, full_name):
    """Full and short names in any case mean the same model."""
    assert Model.from_name(name).name == full_name


@pytest.mark.parametrize(
    ("name", "full_name"),
    [
        ("h100-80gb-sxm", "h100-80gb-sxm"),
        ("H100", "h100-80gb-sxm"),
        ("a100", "a100-80gb-sxm"),
        ("a100-pcie", "a100-80gb-pcie"),
        ("rtx-pro-6000", "rtx-pro-6000-server"),
    ],
)
def test_a_device_has_short_names(name, full_name):
    """The usual short names mean the SXM device."""
    assert Device.from_name(name).name == full_name


@pytest.mark.parametrize(
    ("find", "name", "nearest"),
    [
        (Model.from_name, "llama-3.1-8", "'llama-3.1-8b'"),
        (Model.from_name, "somebody/llama-3.1-8b", "'llama-3.1-8b'"),
        (Device.from_name, "h100-80g-sxm", "'h100-80gb-sxm'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(find, name, nearest):
    """A misspelt name, or another organisation's model, is refused with a suggestion."""
    with pytest.raises(ConfigError, match=f"did you mean {nearest}"):
        find(name)


@needs_sheets
def test_device_figures_match_the_sheet():
    """No figure was changed on the way into the package."""
    for row in rows("devices.csv"):
        device = Device.from_name(row["device"])
        assert device.bf16_dense_tflops == float(row["bf16_dense_tflops"])
        assert device.fp8_dense_tflops == (float(row["fp8_dense_tflops"] or 0) or None)
        assert device.memory_bandwidth_gbps == float(row["hbm_gbps"])
        assert device.memory_gb == float(row["mem_gb"])
        assert device.scaleup_bidir_gbps == float(row["scaleup_bidir_gbps"])
        assert (device.scaleup_link, device.vendor) == (row["scaleup_link"], row["vendor"])
        assert device.tdp_w == (float(row["tdp_w"] or 0) or None)


@needs_sheets
def test_model_sizes_match_the_sheet():
    """Parameters, active parameters and KV bytes computed here agree with the sheet's."""
    for row in rows("models.csv"):
        model = Model.from_name(row["model"])
        lookup = 0 if model.tied_embeddings else model.embedding_parameters
        active = model.active_parameters + lookup
        assert model.num_parameters / 1e9 == pytest.approx(
            float(row["params_computed_b"]), rel=1e-3
        )
        assert active / 1e9 == pytest.approx(float(row["active_params_b"]), rel=2e-3)
        assert model.kv_bytes_per_token == int(row["kv_bytes_per_token_bf16"])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_agree_with_the_published_count(model):
    """Counted from the geometry, a model has the parameters it was published with."""
    # Falcon-180B was published with its tied LM head counted twice.
    twice = model.embedding_parameters if model.name == "tiiuae/falcon-180B" else 0
    counted = (model.num_parameters + twice) / 1e9
    assert counted == pytest.approx(model.published_parameters_b, rel=0.005)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_reported_memory_is_near_the_product_name(device):
    """What drivers report is the figure on the box in GiB, less up to 6.3 % of GDDR's ECC."""
    share = device.memory_bytes / (device.memory_gb * GIB)
    assert 0.937 <= share <= 1


# Models of one's own


def test_a_model_is_frozen_and_compares_by_value():
    """A model is its own configuration."""
    model = Model(name="tiny", **TINY)
    assert model == Model(name="tiny", **TINY)
    assert hash(model) == hash(Model(name="tiny", **TINY))
    with pytest.raises(FrozenInstanceError):
        model.num_layers = 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads = 8 is no multiple of num_kv_heads = 3"),
        ({"experts_per_token": 2}, "experts_per_token = 2: expected at most num_experts = 0"),
        ({"intermediate_size": 0}, "intermediate_size = 0: expected at least 1"),
        ({"kv_latent_size": 512}, "needs published_parameters_b"),
        ({"num_layers": 0}, r"Model.num_layers = 0: expected greater than or equal to 1"),
        ({"num_layer": 4}, "did you mean 'num_layers'"),
    ],
)
def test_an_impossible_model_is_refused(change, message):
    """The error names the model, the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        Model(name="tiny", **(TINY | change))


def test_mixture_of_experts_counts_all_experts_but_uses_some():
    """All experts take memory; a token is multiplied with its own ones only."""
    mixture = {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 32}
    model = Model(name="tiny", **(TINY | mixture))
    expert = 3 * 64 * 32
    assert model.num_parameters - model.active_parameters == 4 * 6 * expert + 64 * 1000


# Hugging Face


def test_huggingface_config_gives_the_catalogue_model(tmp_path):
    """Folder, file and content of a config.json are the same model."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    read = [
        Model.from_huggingface(source, name="mine")
        for source in (tmp_path, str(tmp_path / "config.json"), LLAMA_CONFIG)
    ]
    known = Model.from_name("llama-3.1-8b")
    assert [model.num_parameters for model in read] == [known.num_parameters] * 3
    assert {model.kv_bytes_per_token for model in read} == {known.kv_bytes_per_token}
    assert {model.name for model in read} == {"mine"}


def test_huggingface_config_without_kv_heads_has_one_per_head():
    """Older Llama configurations leave num_key_value_heads and head_dim out."""
    config = {k: v for k, v in LLAMA_CONFIG.items() if k != "num_key_value_heads"}
    model = Model.from_huggingface(config)
    assert (model.num_kv_heads, model.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "unknown model_type .* 'mixtral'.* Known: internlm2, llama"),
        ({"model_type": None}, "unknown model_type"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"num_hidden_layers": "32"}, "Model.num_layers = '32': expected integer"),
    ],
)
def test_huggingface_config_that_cannot_be_read_is_refused(change, message):
    """What is not a plain dense decoder is refused by name."""
    with pytest.raises(ConfigError, match=message):
        Model.from_huggingface(LLAMA_CONFIG | change)


def test_missing_or_broken_huggingface_config_is_refused(tmp_path):
    """A path that does not hold a mapping with all figures is named in the error."""
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.json"):
        Model.from_huggingface(tmp_path / "absent.json")
    path = tmp_path / "config.json"
    for content, message in [
        ("{", "cannot read"),
        ("[]", "holds a list"),
        ('{"model_type": "llama"}', "lacks 'num_attention_heads'"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Model.from_huggingface(tmp_path)


# Deployments


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            "tensor_parallel_size = 3 .* 32 heads and 8 KV heads .* one of 2, 4, 1, 8, 16, 32",
        ),
        ({"pipeline_parallel_size": 5}, "32 layers .* expected one of 4, 2, 8, 1, 16, 32"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size = 0"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(split, message):
    """The error lists the sizes that do, nearest first."""
    with pytest.raises(ConfigError, match=message):
        Deployment(Model.from_name("llama-3.1-8b"), Device.from_name("h100"), **split)


def test_weights_on_one_device_are_all_parameters():
    """Without parallelism, a device holds the model."""
    whole = deployment("llama-2-70b")
    assert whole.weight_bytes_per_device == 2 * whole.model.num_parameters


def test_weights_are_split_over_devices():
    """Tensor parallelism splits everything; pipeline stages hold one vocabulary table at most."""
    model = Model.from_name("llama-3.1-8b")
    assert deployment(tp=4).weight_bytes_per_device == model.num_parameters / 2
    stage = model.layer_parameters / 2 + model.embedding_parameters
    assert deployment(pp=2).weight_bytes_per_device == 2 * stage


def test_tied_embeddings_are_held_by_both_ends_of_a_pipeline():
    """The last stage needs a table for the LM head, though the first has it too."""
    model = Model.from_name("llama-3.2-1b")
    stage = model.layer_parameters / 2 + model.embedding_parameters
    assert deployment("llama-3.2-1b", pp=2).weight_bytes_per_device == 2 * stage


def test_kv_heads_are_copied_beyond_one_device_each():
    """With more devices than KV heads, a device holds one head and its weights."""
    wide, narrow = deployment(tp=16), deployment(tp=8)
    assert wide.kv_bytes_per_token_per_device == narrow.kv_bytes_per_token_per_device == 16384
    assert 2 * wide.weight_bytes_per_device > narrow.weight_bytes_per_device


def test_a_latent_cache_is_not_split():
    """Latent attention keeps the whole latent on each device."""
    assert deployment("deepseek-v3", tp=8).kv_bytes_per_token_per_device == 2 * 61 * 576


def test_planned_blocks_fill_the_memory():
    """Weights, working memory and blocks together just fit the share of memory allowed."""
    replica = deployment("llama-3.1-8b", "a100")
    num_blocks = replica.plan_num_blocks(16, 0.9, 8192)
    block = 16 * replica.kv_bytes_per_token_per_device
    taken = replica.weight_bytes_per_device + replica.working_bytes()
    left = 0.9 * replica.device.memory_bytes - taken - num_blocks * block
    assert 0 <= left < block


def test_planned_cache_is_near_what_vllm_found():
    """vLLM measured 53.3 GiB for the KV cache of Llama-3-8B on an 80 GB A100."""
    num_blocks = deployment("llama-3-8b", "a100").plan_num_blocks(
        16, 0.9, 8192, max_num_batched_tokens=8192
    )
    assert num_blocks * 16 * 131072 / GIB == pytest.approx(53.3, rel=0.05)


@pytest.mark.parametrize(
    ("replica", "max_model_len", "message"),
    [
        (
            ("llama-2-70b", "a100"),
            4096,
            r"meta-llama/Llama-2-70b-hf needs 128.5 GiB of weights .* 1 x a100-80gb-sxm offers "
            r"72.0 GiB at gpu_memory_utilization=0.9; use tensor_parallel_size >= 2\.",
        ),
        (
            ("llama-3.1-405b", "l4"),
            4096,
            r"offers 20.2 GiB .* use tensor_parallel_size=8 with pipeline_parallel_size=6\.",
        ),
        (
            ("llama-3.1-8b", "l4"),
            131072,
            r"needs 16.0 GiB of KV cache for a request of max_model_len=131072, .* has 3.6 GiB "
            r"left .* use max_model_len <= 29200 or tensor_parallel_size >= 2\.",
        ),
        (("bloom", "t4", 4), 2048, r"each of 4 x t4 offers 13.5 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(replica, max_model_len, message):
    """The error names what is needed, what is there, and the smallest change that fits."""
    with pytest.raises(CapacityError, match=message):
        deployment(*replica).plan_num_blocks(16, 0.9, max_model_len)


def test_advice_can_be_followed():
    """The length and the width that an error suggests do fit."""
    assert deployment("llama-3.1-8b", "l4").plan_num_blocks(16, 0.9, 29200) == 1825
    assert deployment("llama-2-70b", "a100", 2).plan_num_blocks(16, 0.9, 4096) > 0
    assert deployment("llama-3.1-405b", "l4", 8, 6).plan_num_blocks(16, 0.9, 4096) > 0


@pytest.mark.parametrize("model", [m for m in MODELS if m.is_dense], ids=lambda model: model.name)
def test_every_dense_model_is_planned_or_refused_on_every_device(model):
    """Planning ends with blocks for the longest request or with a CapacityError."""
    max_model_len = min(model.max_position, 8192)
    for device in DEVICES:
        assert room_for(Deployment(model, device), max_model_len) in (None, True)


def room_for(replica, max_model_len):
    """Whether the blocks planned hold the longest request; None if refused."""
    try:
        return replica.plan_num_blocks(16, 0.9, max_model_len) * 16 >= max_model_len
    except CapacityError:
        return None


@pytest.mark.parametrize(
    "arguments", [(0, 0.9, 4096), (16, 0.0, 4096), (16, 1.1, 4096), (16, 0.9, 0), (16, math.nan, 1)]
)
def test_planning_arguments_are_checked(arguments):
    """Sizes are at least 1, the share of memory lies in (0, 1]."""
    with pytest.raises(ConfigError, match="expected"):
        deployment().plan_num_blocks(*arguments)


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 4]),
    share=st.floats(0.5, 1),
    block_size=st.integers(1, 256),
)
def test_more_devices_hold_more_blocks(tp, pp, share, block_size):
    """Doubling either parallelism never costs a block."""
    few = deployment(tp=tp, pp=pp).plan_num_blocks(block_size, share, 1024)
    assert deployment(tp=2 * tp, pp=pp).plan_num_blocks(block_size, share, 1024) >= few
    assert deployment(tp=tp, pp=2 * pp).plan_num_blocks(block_size, share, 1024) >= few


def test_flops_are_two_per_active_parameter_and_four_per_attended_value():
    """Operations of a batch, by the formula in the docstring."""
    replica = deployment()
    layer = 2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 14336
    assert replica.flops(10, 0) == 2 * 10 * (32 * layer + 4096 * 128256)
    assert replica.flops(0, 100) == 100 * 4 * 32 * 32 * 128
    assert replica.peak_flops == 989.4e12
