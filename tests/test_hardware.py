"""Catalogue sheets, and the sizes that follow from them."""

from __future__ import annotations

import csv
from dataclasses import FrozenInstanceError
from importlib import resources

import pytest
from shared_folder import SHARED

from vidur_simpy.errors import ConfigError
from vidur_simpy.hardware import GIB, Device, Model, device_names, model_names

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
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
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
        assert device.int8_dense_tops == (float(row["int8_dense_tops"] or 0) or None)
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
    sheet = resources.files("vidur_simpy") / "data" / "models.csv"
    rows = {row["name"]: row for row in csv.DictReader(sheet.read_text().splitlines())}
    published = float(rows[model.name]["published_parameters_b"])
    # Falcon-180B was published with its tied LM head counted twice.
    twice = model.embedding_parameters if model.name == "tiiuae/falcon-180B" else 0
    assert (model.num_parameters + twice) / 1e9 == pytest.approx(published, rel=0.005)


def test_a_device_multiplies_in_bf16_what_it_has_no_units_for():
    """An A100 has units for int8, none for fp8; a V100 has neither."""
    a100, v100, h100 = (Device.from_name(name) for name in ("a100", "v100", "h100"))
    assert [a100.peak_flops(kind) / 1e12 for kind in ("bf16", "fp8", "int8")] == [312, 312, 624]
    assert {v100.peak_flops(kind) for kind in ("bf16", "fp8", "int8")} == {125e12}
    assert h100.peak_flops("fp8") == 1978.9e12


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
        ({"num_kv_heads": 3}, "num_heads = 8: expected a multiple of num_kv_heads = 3"),
        ({"experts_per_token": 2}, "experts_per_token = 2: expected at most num_experts = 0"),
        ({"intermediate_size": 0}, "intermediate_size = 0: expected at least 1"),
        ({"num_experts": 8}, "num_experts = 8: expected with it experts_per_token"),
        ({"num_dense_layers": 1}, "num_dense_layers = 1: expected at most the layers of a mixture"),
        ({"kv_latent_size": 512}, "kv_latent_size = 512: expected with it value_head_dim"),
        ({"num_sliding_layers": 2}, "num_sliding_layers = 2: expected a sliding_window"),
        ({"quantization": "fp7"}, "Model.quantization of tiny 'fp7': did you mean 'fp8'"),
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
    idle = 4 * 6 * expert + 64 * 1000 + model.norm_parameters
    assert model.num_parameters - model.active_parameters == idle


def test_latent_attention_is_counted_from_its_projections():
    """DeepSeek-V3's attention has the 187 million weights a layer that its geometry gives."""
    model = Model.from_name("deepseek-v3")
    queries = 7168 * 1536 + 1536 * 128 * 192
    keys_and_values = 7168 * 576 + 512 * 128 * (128 + 128)
    assert model.attention_parameters == queries + keys_and_values + 128 * 128 * 7168
    assert model.cached_values == 576
    assert model.attended_operations == 61 * 128 * 2 * (192 + 128)
