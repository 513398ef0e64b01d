"""How models are split over devices, in what precision, and whether they fit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidur_simpy.deployment import Deployment
from vidur_simpy.errors import CapacityError, ConfigError
from vidur_simpy.hardware import GIB, Device, Model, device_names, model_names
from vidur_simpy.precision import PRECISIONS

MODELS = [Model.from_name(name) for name in model_names()]
DEVICES = [Device.from_name(name) for name in device_names()]


def deployment(model="llama-3.1-8b", device="h100", tp=1, pp=1, **settings):
    return Deployment(Model.from_name(model), Device.from_name(device), tp, pp, **settings)


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
    split = model.num_parameters - model.norm_parameters
    assert deployment(tp=4).weight_bytes_per_device == split / 2 + 2 * model.norm_parameters
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
            r"left .* use max_model_len <= 29184 or tensor_parallel_size >= 2\.",
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
    assert deployment("llama-3.1-8b", "l4").plan_num_blocks(16, 0.9, 29184) == 1824
    assert deployment("llama-2-70b", "a100", 2).plan_num_blocks(16, 0.9, 4096) > 0
    assert deployment("llama-3.1-405b", "l4", 8, 6).plan_num_blocks(16, 0.9, 4096) > 0


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_is_planned_or_refused_on_every_device_in_every_precision(model):
    """Planning ends with blocks for the longest request or says which split would do."""
    max_model_len = min(model.max_position, 8192)
    precisions = [None, *PRECISIONS] if model.num_experts else [None, "bf16", "fp8", "int8", "int4"]
    for device in DEVICES:
        for name in precisions:
            replica = Deployment(model, device, quantization=name)
            assert room_for(replica, max_model_len) in ("tensor_parallel_size", True)


def room_for(replica, max_model_len):
    """Whether the blocks planned hold the longest request; what to change if refused."""
    try:
        return replica.plan_num_blocks(16, 0.9, max_model_len) * 16 >= max_model_len
    except CapacityError as error:
        advice = str(error).rpartition("use ")[2].rpartition(" or ")[2]
        return advice.partition("=")[0].removesuffix(" >")


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


# Experts


@pytest.mark.parametrize(
    ("model", "split", "message"),
    [
        ("llama-3.1-8b", {"data_parallel_size": 2}, "data_parallel_size = 2, .* has no experts"),
        ("llama-3.1-8b", {"enable_expert_parallel": True}, "enable_expert_parallel = True"),
        (
            "mixtral-8x7b",
            {"data_parallel_size": 3, "enable_expert_parallel": True},
            "data_parallel_size = 3 does not split the 8 experts .* one of 2, 4, 1, 8",
        ),
        (
            "mixtral-8x7b",
            {"tp": 4, "data_parallel_size": 4, "enable_expert_parallel": True},
            "tensor_parallel_size = 4 .* 8 experts.* one of 2, 1",
        ),
        ("qwen3-30b-a3b", {"data_parallel_size": 5}, "768 columns of each expert"),
        ("llama-3.1-8b", {"quantization": "mxfp4"}, "quantization = 'mxfp4', .* has no experts"),
        ("llama-3.1-8b", {"quantization": "fp6"}, "Deployment.quantization 'fp6': did you mean"),
        ("llama-3.1-8b", {"kv_cache_dtype": "fp9"}, "kv_cache_dtype 'fp9': did you mean 'fp8'"),
    ],
)
def test_what_a_model_cannot_have_is_refused(model, split, message):
    """Splits of experts and precisions are refused by name, with those that can be."""
    with pytest.raises(ConfigError, match=message):
        deployment(model, **split)


@pytest.mark.parametrize("is_expert_parallel", [True, False])
def test_experts_are_split_over_all_replicas_that_share_them(is_expert_parallel):
    """Two replicas hold half of the experts each, whole or cut; everything else is on both."""
    settings = {"data_parallel_size": 2, "enable_expert_parallel": is_expert_parallel}
    alone, shared = deployment("mixtral-8x7b"), deployment("mixtral-8x7b", **settings)
    model = alone.model
    experts = 2 * 32 * 8 * model.expert_parameters
    assert alone.weight_bytes_per_device - shared.weight_bytes_per_device == experts / 2
    assert shared.experts_per_device == (4 if is_expert_parallel else 8)
    assert shared.expert_width_per_device == (14336 if is_expert_parallel else 7168)
    assert shared.num_devices == 1


def test_routers_and_projections_into_latent_space_are_on_every_device():
    """What tensor parallelism does not split is whole on each device."""
    model = Model.from_name("deepseek-v3")
    one, eight = (deployment("deepseek-v3", tp=tp).weight_bytes_per_device for tp in (1, 8))
    whole = 61 * model.latent_parameters + 2 * (
        58 * model.router_parameters + model.norm_parameters
    )
    assert eight - whole == pytest.approx((one - whole) / 8, rel=1e-9)


# Precisions


@pytest.mark.parametrize(
    ("quantization", "weight_bytes"), [("bf16", 2), ("fp8", 1), ("int8", 1), ("int4", 0.51953125)]
)
def test_tables_of_the_vocabulary_and_norms_stay_in_bf16(quantization, weight_bytes):
    """Only the matrices of the layers are quantized."""
    replica = deployment(quantization=quantization)
    model = replica.model
    kept = 2 * model.embedding_parameters + model.norm_parameters
    matrices = model.num_parameters - kept
    assert replica.weight_bytes_per_device == round(2 * kept + weight_bytes * matrices)


def test_a_checkpoint_keeps_its_own_precision():
    """DeepSeek-V3 comes in fp8, gpt-oss with experts of 4 bits, unless bf16 is asked for."""
    assert deployment("deepseek-v3").weight_bytes_per_device == pytest.approx(673e9, rel=0.01)
    assert deployment("deepseek-v3").peak_flops == 1978.9e12
    in_bf16 = deployment("deepseek-v3", quantization="bf16")
    assert in_bf16.weight_bytes_per_device == 2 * in_bf16.model.num_parameters
    # The published files of gpt-oss hold 65.3 and 13.8 GB.
    for name, gigabytes in (("gpt-oss-120b", 65.3), ("gpt-oss-20b", 13.8)):
        replica = deployment(name)
        assert replica.weight_bytes_per_device / 1e9 == pytest.approx(gigabytes, rel=0.01)
        assert replica.dense_precision.weight_bytes == 2


def test_a_cache_in_fp8_holds_twice_the_tokens():
    """A value takes a byte; the weights stay as they were."""
    wide, narrow = deployment(), deployment(kv_cache_dtype="fp8")
    assert wide.kv_bytes_per_token_per_device == 2 * narrow.kv_bytes_per_token_per_device
    assert wide.weight_bytes_per_device == narrow.weight_bytes_per_device
    blocks = [replica.plan_num_blocks(16, 0.9, 4096) for replica in (wide, narrow)]
    assert blocks[1] - 2 * blocks[0] in (0, 1)


def test_the_ceiling_of_mfu_is_that_of_the_format_multiplied():
    """Weights of 4 bits are multiplied in bf16, and so is fp8 on a device without it."""
    assert deployment(quantization="fp8").peak_flops == 1978.9e12
    assert deployment(quantization="awq").peak_flops == 989.4e12
    assert deployment(device="a100", quantization="fp8").peak_flops == 312e12
    assert deployment(device="a100", quantization="int8").peak_flops == 624e12
