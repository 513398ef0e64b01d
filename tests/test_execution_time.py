"""Stage times: the contract, the straight line and the roofline."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time import (
    EXECUTION_TIMES,
    ExecutionTime,
    Linear,
    Roofline,
    RooflineFactors,
    stage_time_of,
)
from vidur_simpy.deployment import Deployment
from vidur_simpy.hardware import Device, Model, device_names, model_names

SHARED = Path(
    os.environ.get("VIDUR_SHARED") or Path(__file__).resolve().parents[1].parent / "shared"
)
GOLDEN = SHARED / "golden" / "vidur"
FIT = SHARED / "data" / "hardware" / "roofline_fit.json"
GOLDEN_CASES = [
    "ms_orca_pp1_r1_round_robin_poisson",
    "ms_sarathi_pp1_r1_round_robin_poisson",
    "v26_vllm_pp1_r1_round_robin_poisson",
]


class Chunk(NamedTuple):
    num_tokens: int
    context: int


class Counts(NamedTuple):
    """The least that an execution-time model is given."""

    num_decodes: int = 0
    decode_context: int = 0
    prefills: tuple[Chunk, ...] = ()

    @property
    def num_tokens(self):
        return self.num_decodes + sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def total_context(self):
        return self.decode_context + sum(chunk.context for chunk in self.prefills)


def replica(model="llama-3.1-8b", device="h100", tp=1, pp=1):
    return Deployment(Model.from_name(model), Device.from_name(device), tp, pp)


def roofline(*args, cpu_overhead=0.0, **kwargs):
    return Roofline(cpu_overhead=cpu_overhead).for_replica(replica(*args, **kwargs))


def decodes(num_decodes, context):
    return Counts(num_decodes, num_decodes * context)


def prefill(num_tokens, prefix=0):
    return Counts(prefills=(Chunk(num_tokens, prefix + num_tokens),))


chunks = st.builds(
    lambda num_tokens, prefix: Chunk(num_tokens, prefix + num_tokens),
    st.integers(1, 4096),
    st.integers(0, 8192),
)
batches = st.builds(
    lambda n, mean, prefills: Counts(n, n * mean, tuple(prefills)),
    st.integers(0, 256),
    st.integers(1, 8192),
    st.lists(chunks, min_size=1, max_size=3),
) | st.builds(decodes, st.integers(1, 256), st.integers(1, 8192))


# The contract


def test_the_table_holds_models():
    """Every model of the table has the shape of one, and works without settings."""
    assert set(EXECUTION_TIMES) == {"linear", "roofline"}
    for model in EXECUTION_TIMES.values():
        assert isinstance(model(), ExecutionTime)
        assert stage_time_of(model(), replica())(decodes(4, 100), 0) > 0


def test_a_function_of_the_batch_is_the_time_of_each_stage():
    """A plain function need not know of stages."""
    stage_time = stage_time_of(lambda batch: 0.5 * batch.num_tokens, replica(pp=2))
    assert [stage_time(decodes(3, 10), stage) for stage in (0, 1)] == [1.5, 1.5]


def test_a_function_of_batch_and_stage_is_taken_as_it_is():
    """A function that knows of stages is called directly."""

    def stage_time(batch, stage_id):
        return batch.num_tokens + stage_id

    assert stage_time_of(stage_time, replica()) is stage_time


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda batch, scale=2.0: scale, 2.0),
        (lambda batch, stage_id=7: float(stage_id), 1.0),
        (lambda batch, stage_id, scale=2.0: scale * stage_id, 2.0),
        (lambda *args: float(len(args)), 1.0),
        (partial(lambda scale, batch: scale, 3.0), 3.0),
    ],
)
def test_only_a_stage_id_is_passed_besides_the_batch(function, expected):
    """Another parameter with a default keeps it."""
    assert stage_time_of(function, replica())(decodes(1, 1), 1) == expected


@pytest.mark.parametrize("given_", [3, "roofline", None, Linear, lambda: 0.0, lambda a, b, c: 0.0])
def test_what_is_no_model_is_refused(given_):
    """The error says what is expected."""
    with pytest.raises(ConfigError, match=r"execution_time .* \(batch\) or \(batch, stage_id\)"):
        stage_time_of(given_, replica())


# The straight line


def test_linear_is_evaluated_left_to_right():
    """The sum is that of the formula to the last bit, divided over the stages."""
    batch = Counts(3, 1001, (Chunk(333, 777),))
    stage_time = Linear(base=0.1, per_token=0.7e-5, per_context_token=0.3e-7).for_replica(
        replica(pp=4)
    )
    assert stage_time(batch, 2) == (0.1 + 0.7e-5 * 336 + 0.3e-7 * 1778) / 4


@pytest.mark.parametrize("setting", [{"base": -1e-3}, {"per_token": "fast"}, {"slope": 1.0}])
def test_linear_settings_are_checked(setting):
    """Times are numbers, not negative, and known by name."""
    with pytest.raises(ConfigError, match="Linear"):
        Linear(**setting)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_linear_reproduces_the_reference(case):
    """Every batch of the golden cases ends at the same instant, bit for bit."""
    folder = GOLDEN / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    settings = json.loads((folder / "case.json").read_text())["execution_time"]
    model = Linear(settings["base"], settings["per_token"], settings["per_kv_token"])
    stage_time = model.for_replica(replica())
    processed: dict[str, int] = {}
    prompts = {
        row["request_id"]: int(row["num_prefill_tokens"]) for row in table(folder, "workload")
    }
    for row in table(folder, "batches"):
        batch = []
        for request, tokens in zip(
            row["request_ids"].split(), row["num_q_tokens"].split(), strict=True
        ):
            context = processed.get(request, 0) + int(tokens)
            batch.append(Chunk(int(tokens), context))
            processed[request] = context + (context == prompts[request])
        end = float(row["stage0_start"]) + stage_time(Counts(prefills=tuple(batch)), 0)
        assert end == float(row["stage0_end"])


def table(folder, name):
    with (folder / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


# The roofline


def iteration_time(deployment, factors, batch, cpu_overhead):
    """The roofline as its formula is written down, slowly: the time summed over the stages."""
    model, device, f = deployment.model, deployment.device, factors
    tp, pp = deployment.tensor_parallel_size, deployment.pipeline_parallel_size
    h, hd, inter = model.hidden_size, model.head_dim, model.intermediate_size
    nq, nkv = model.num_heads / tp, max(model.num_kv_heads / tp, 1)
    peak, bandwidth = device.bf16_dense_tflops * 1e12, device.memory_bandwidth_gbps * 1e9
    link = device.scaleup_bidir_gbps * 1e9 / 2
    gates = 2 if model.gated_mlp else 1
    T, S = batch.num_tokens, batch.num_decodes + len(batch.prefills)  # noqa: N806

    def smax(a, b):
        return (a**f.smoothness + b**f.smoothness) ** (1 / f.smoothness)

    def gemm(m, n, k):
        efficiency = f.gemm_compute * m / (m + f.gemm_half_efficiency_rows)
        compute = 2 * m * n * k / (peak * efficiency)
        memory = ((m * k + m * n) * 2 + n * k * 2) / (bandwidth * f.gemm_memory)
        return smax(compute, memory) + f.kernel_time

    layer = gemm(T, (nq + 2 * nkv) * hd, h) + gemm(T, h, nq * hd)
    layer += gemm(T, gates * inter / tp, h) + gemm(T, h, inter / tp)
    for num_bytes in (4 * T * h * 2, 4 * T * h * 2, (gates + 1) * T * inter / tp * 2):
        layer += num_bytes / (bandwidth * f.elementwise_memory) + f.kernel_time
    if batch.prefills:
        compute = memory = 0.0
        for c, context in batch.prefills:
            compute += 4 * nq * hd * (c * (context - c) + c * (c + 1) / 2)
            memory += 2 * context * nkv * hd * 2 + 2 * c * nq * hd * 2
        compute /= peak * f.prefill_compute
        layer += smax(compute, memory / (bandwidth * f.prefill_memory)) + f.attention_time
    if batch.num_decodes:
        memory = 2 * batch.decode_context * nkv * hd * 2
        layer += memory / (bandwidth * f.decode_memory) + f.attention_time
    if tp > 1:
        sent = 2 * (tp - 1) / tp * T * h * 2
        layer += 2 * (f.all_reduce_time + sent / (link * f.all_reduce_link))
    sends = (pp - 1) * (10e-6 + T * h * 2 / link)
    return model.num_layers * layer + gemm(S, model.vocab_size / tp, h) + sends + cpu_overhead


@given(
    batch=batches,
    model=st.sampled_from(["llama-3.1-8b", "llama-2-70b", "qwen2.5-7b", "opt-13b", "phi-2"]),
    device=st.sampled_from(["a100", "h100", "h200", "b200", "l40s", "rtx-pro-6000", "mi300x"]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    cpu_overhead=st.sampled_from([0.0, 0.002]),
)
def test_roofline_equals_its_formula(batch, model, device, tp, pp, cpu_overhead):
    """The stages together take what the formula, written out plainly, says."""
    deployment = replica(model, device, tp, pp)
    stage_time = Roofline(cpu_overhead=cpu_overhead).for_replica(deployment)
    factors = RooflineFactors.of_device(deployment.device)
    expected = iteration_time(deployment, factors, batch, cpu_overhead)
    assert sum(stage_time(batch, stage) for stage in range(pp)) == pytest.approx(expected, rel=1e-9)
    again = sum(stage_time(batch, stage) for stage in range(pp))
    assert again == pytest.approx(expected, rel=1e-9)


def test_kv_heads_are_held_whole_beyond_one_device_each():
    """With more devices than KV heads, each reads one whole head."""
    deployment = replica("llama-3.1-8b", "h100", 16)
    factors = RooflineFactors.from_name("h100")
    batch = decodes(8, 1000)
    expected = iteration_time(deployment, factors, batch, 0.0)
    assert roofline(tp=16)(batch, 0) == pytest.approx(expected, rel=1e-9)


def test_decoding_one_sequence_is_bound_by_reading_the_weights():
    """Decoding alone takes the time to read weights at the achieved bandwidth, and launches."""
    deployment = replica()
    read = 2 * deployment.model.active_parameters / 3350e9
    time = roofline()(decodes(1, 1000), 0)
    factors = RooflineFactors.from_name("h100")
    launches = 32 * (7 * factors.kernel_time + factors.attention_time)
    assert read < time < read / factors.gemm_memory * 1.02 + launches


def test_a_long_prefill_is_bound_by_compute():
    """A prompt of 8k tokens runs at more than half, and less than all, of peak FLOP/s."""
    deployment = replica()
    flops = deployment.flops(8192, 8192 * 8193 // 2)
    assert 0.5 < flops / roofline()(prefill(8192), 0) / deployment.peak_flops < 1


@given(
    batch=batches, context=st.integers(1, 4096), device=st.sampled_from(["a100", "h100", "b200"])
)
def test_time_grows_with_tokens_and_context(batch, context, device):
    """A decode more, a chunk more, or more context never makes a batch faster."""
    stage_time = roofline(device=device)
    time = stage_time(batch, 0)
    n, decoded, prefills = batch
    assert stage_time(Counts(n + 1, decoded + context, prefills), 0) > time
    assert stage_time(Counts(n, decoded, (*prefills, Chunk(1, context))), 0) > time
    if n:
        assert stage_time(Counts(n, decoded + context, prefills), 0) > time
    if prefills:
        first = Chunk(prefills[0].num_tokens, prefills[0].context + context)
        assert stage_time(Counts(n, decoded, (first, *prefills[1:])), 0) > time


@pytest.mark.parametrize("batch", [prefill(8192), decodes(256, 4096)], ids=["prefill", "decode"])
def test_tensor_parallelism_speeds_up_large_batches(batch):
    """Two devices are faster than one, but not twice as fast."""
    one, two = roofline(tp=1)(batch, 0), roofline(tp=2)(batch, 0)
    assert one / 2 < two < one


def test_two_stages_take_one_iteration_and_a_transfer():
    """A pipeline adds the time to send hidden states, and splits the rest."""
    batch = Counts(32, 32_000, (Chunk(512, 512),))
    whole, split = roofline(pp=1), roofline(pp=2)
    send = 10e-6 + batch.num_tokens * 4096 * 2 / 450e9
    assert split(batch, 0) + split(batch, 1) == pytest.approx(whole(batch, 0) + send, rel=1e-9)


def test_cpu_overhead_is_paid_once_in_the_first_stage():
    """Later stages wait for the device only."""
    batch = decodes(8, 100)
    with_cpu, without = roofline(pp=2, cpu_overhead=0.003), roofline(pp=2)
    assert with_cpu(batch, 0) == pytest.approx(without(batch, 0) + 0.003, rel=1e-9)
    assert with_cpu(batch, 1) == without(batch, 1)


def test_every_dense_model_runs_on_every_device():
    """Roofline times are finite and positive for the whole catalogue."""
    batch = Counts(8, 8000, (Chunk(100, 300),))
    models = [model for model in map(Model.from_name, model_names()) if model.is_dense]
    for device in map(Device.from_name, device_names()):
        for model in models:
            time = Roofline().for_replica(Deployment(model, device))(batch, 0)
            assert 0 < time < 60


def test_what_is_not_dense_is_refused():
    """The formula is for dense models with ordinary attention; the error says so."""
    with pytest.raises(ConfigError, match=r"Mixtral.* is a mixture of experts: expected a dense"):
        Roofline().for_replica(replica("mixtral-8x7b"))
    latent = dataclasses.replace(
        Model.from_name("deepseek-v2-lite"), num_experts=0, experts_per_token=0
    )
    latent_only = Deployment(latent, Device.from_name("h100"))
    with pytest.raises(ConfigError, match="is a model with latent attention"):
        Roofline().for_replica(latent_only)


# Fitted factors


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("a100-40gb", "a100"),
        ("h100", "h100"),
        ("h100-pcie", "hopper"),
        ("gh200", "hopper"),
        ("gb200", "b200"),
        ("l4", "l40s"),
        ("rtx-pro-6000", "rtx-pro-6000"),
        ("mi300x", "hopper"),
    ],
)
def test_a_device_without_a_fit_takes_the_nearest(device, name):
    """Which factors are in use can be asked of the model and of the stage times."""
    assert Roofline().factors_name(Device.from_name(device)) == name
    assert Roofline().for_replica(replica(device=device)).factors_name == name


def test_factors_can_be_given():
    """By the name of a set, or as a set of one's own."""
    hopper = RooflineFactors.from_name("hopper")
    by_name = Roofline(factors="hopper").for_replica(replica())
    by_value = Roofline(factors=hopper).for_replica(replica())
    batch = decodes(8, 100)
    assert by_name(batch, 0) == by_value(batch, 0) != Roofline().for_replica(replica())(batch, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": "hoper"}, "did you mean 'hopper'"),
        ({"cpu_overhead": -0.001}, "Roofline.cpu_overhead = -0.001"),
        ({"overhead": 0.001}, "did you mean 'cpu_overhead'"),
    ],
)
def test_roofline_settings_are_checked(settings, message):
    """Unknown sets, unknown settings and negative times are refused when it is made."""
    with pytest.raises(ConfigError, match=message):
        Roofline(**settings)


@pytest.mark.skipif(not FIT.is_file(), reason=f"{FIT} is absent")
@pytest.mark.parametrize(
    ("name", "fitted"),
    [
        ("a100", "a100_sxm"),
        ("h100", "h100_sxm"),
        ("h200", "h200_sxm"),
        ("b200", "b200_sxm"),
        ("l40s", "l40s"),
        ("rtx-pro-6000", "rtx_pro_6000_server"),
        ("hopper", None),
    ],
)
def test_factors_match_the_fit(name, fitted):
    """The sets hold the fitted figures to six digits, of the device's own peak."""
    fit = json.loads(FIT.read_text())
    figures = fit["per_device"][fitted] if fitted else fit["hopper"]
    factors = RooflineFactors.from_name(name)
    peak = 503.8 / 467.8 if name == "rtx-pro-6000" else 1.0
    expected = {
        "gemm_compute": figures["eg_c"] * peak,
        "gemm_memory": figures["eg_m"],
        "prefill_compute": figures["ea_c"] * peak,
        "prefill_memory": figures["ea_m"],
        "decode_memory": figures["ea_d"],
        "elementwise_memory": figures["em"],
        "kernel_time": figures["tk"],
        "attention_time": figures["ta"],
        "all_reduce_time": figures["ar_a"],
        "all_reduce_link": figures["ar_b"],
        "smoothness": figures["p"],
    }
    for field, value in expected.items():
        assert getattr(factors, field) == pytest.approx(value, rel=1e-5)
    assert factors.gemm_half_efficiency_rows == pytest.approx(figures["mh"], rel=1e-5, abs=1e-3)
