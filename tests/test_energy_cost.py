"""How busy devices are, what energy they take and what they cost, computed by hand."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from counts import replica
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_series_equal
from shared_folder import SHARED

import vidur_simpy as vs
from vidur_simpy.hardware import GIB
from vidur_simpy.power import mean_power_w
from vidur_simpy.result import Result

MEASURED = SHARED / "data" / "reference" / "splitwise_perf_model.csv"


# Bytes read


def test_a_decode_reads_all_weights_but_the_embedding():
    """Llama-3.1-8B in bf16: what it holds less one table, and 128 KiB per token of context."""
    deployment = replica()
    table = 128256 * 4096
    weights = 2 * (deployment.model.num_parameters - table)
    assert deployment.bytes_read(1, 1, 0) == weights
    assert deployment.bytes_read(10, 640, 5000) == 10 * weights + 5000 * 131_072
    assert deployment.bytes_read(0, 0, 0) == 0.0


@pytest.mark.parametrize("changes", [{"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2}])
def test_splitting_a_model_reads_the_same(changes):
    """Four devices read together what one would, but for norms, which all have."""
    whole, split = replica("llama-3.1-70b", "h200"), replica("llama-3.1-70b", "h200", **changes)
    assert split.bytes_read(3, 9, 999) == pytest.approx(whole.bytes_read(3, 9, 999), rel=1e-3)


def test_quantized_weights_and_caches_read_less():
    """Half of the layers' weights, the LM head in bf16; half of the cache."""
    table = 2 * 128256 * 4096
    wide, narrow = replica(), replica(quantization="fp8", kv_cache_dtype="fp8")
    layers = wide.bytes_read(1, 1, 0) - table
    assert narrow.bytes_read(1, 1, 0) == pytest.approx(layers / 2 + table, rel=1e-4)
    one_more = narrow.bytes_read(1, 1, 1) - narrow.bytes_read(1, 1, 0)
    assert one_more == 65_536


def test_few_tokens_read_few_experts():
    """One token reads the experts it chooses, 8 of 128; many tokens read all."""
    deployment = replica("qwen3-30b-a3b")
    expert = 2 * deployment.model.expert_parameters * 48
    one, two, many = (deployment.bytes_read(1, n, 0) for n in (1, 2, 4096))
    assert many - one == pytest.approx(120 * expert)
    assert two - one == pytest.approx((1 - (1 - 8 / 128) ** 2) * 128 * expert - 8 * expert)


def test_replicas_that_share_experts_read_their_part():
    """Two replicas' tokens choose the experts, each replica's devices read half of them."""
    alone = replica("mixtral-8x7b")
    shared = replica("mixtral-8x7b", data_parallel_size=2, enable_expert_parallel=True)
    experts = 2 * alone.model.expert_parameters * 32 * 8
    assert alone.bytes_read(1, 4096, 0) - shared.bytes_read(1, 4096, 0) == pytest.approx(
        experts / 2
    )


# A run by hand: one request of 100 + 3 tokens, alone; three iterations of half a second

SETTINGS = {"model": "llama-3.1-8b", "device": "h100", "execution_time": lambda batch: 0.5}
ONE = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(100, 3), num_requests=1)


def one_request(**settings):
    return vs.simulate(vs.Cluster(**SETTINGS | settings), ONE)


def test_mbu_by_hand():
    """Weights three times, the prompt's cache, and those after it, in 1.5 s at 3350 GB/s.

    The prefill counts the first output token as processed.
    """
    result = one_request()
    deployment = replica()
    num_bytes = 3 * deployment.bytes_read(1, 1, 0) + (100 + 102 + 103) * 131_072
    expected = num_bytes / (1.5 * 3350e9)
    assert result.replicas["mbu"].to_list() == pytest.approx([expected])
    assert result.figures["mbu"] == pytest.approx(expected)
    assert f"MBU                       {expected:.1%}" in result.summary_text()


def test_mfu_by_hand():
    """102 tokens through the model, 100 of them attending to what is before them."""
    result = one_request()
    pairs = 100 * 101 / 2 + 102 + 103
    flops = 2 * 102 * replica().model.active_parameters + 4 * 32 * 32 * 128 * pairs
    assert result.figures["mfu"] == pytest.approx(flops / (1.5 * 989.4e12))


def test_steps_taken_at_once_read_as_much_as_one_by_one():
    """What is counted does not depend on how the run was computed."""
    workload = vs.Workload(vs.Poisson(8.0), vs.UniformLengths(10, 400, 4.0), num_requests=60)
    cluster = vs.Cluster(model="qwen3-30b-a3b", num_replicas=2)
    plain, watched = (
        vs.simulate(cluster, workload, seed=1, record=record).replicas
        for record in ((), ("events",))
    )
    assert_series_equal(plain["mbu"], watched["mbu"])
    assert_series_equal(plain["energy_kwh"], watched["energy_kwh"])


@pytest.mark.parametrize("scheduler", ["sarathi", "vllm", "vllm_v1", "orca"])
def test_shares_stay_below_one_with_roofline_times(scheduler):
    """The formula charges for every byte and operation counted here."""
    workload = vs.Workload(vs.Poisson(30.0), vs.FixedLengths(300, 100), num_requests=150)
    result = vs.simulate(vs.Cluster(replica_scheduler=scheduler), workload)
    assert 0 < result.figures["mfu"] < 1
    assert 0.05 < result.figures["mbu"] < 1


# Power


def test_power_lies_between_idle_and_peak():
    """Nothing to do: idle; memory or matrix units busy: up to the peak, never beyond."""
    busy = {"utilisation": 1.0}
    assert mean_power_w(700, utilisation=0.0, mfu=0.0, mbu=0.0) == 175
    assert mean_power_w(700, mfu=0.0, mbu=0.5, **busy) == 175 + 0.5 * 525
    assert mean_power_w(700, mfu=0.2, mbu=0.1, **busy) == 175 + 0.5 * 525
    assert mean_power_w(700, mfu=0.6, mbu=0.3, **busy) == 700
    assert mean_power_w(700, mfu=0.6, mbu=0.3, utilisation=0.5) == 175 + 0.5 * 525
    assert mean_power_w(700, mfu=0.0, mbu=0.5, idle_power_w=100, **busy) == 400


shares = st.floats(0, 1)


@given(utilisation=shares, mfu=shares, mbu=shares, more=shares)
def test_power_grows_with_work(utilisation, mfu, mbu, more):
    """A share more never draws less."""
    power = mean_power_w(400, utilisation=utilisation, mfu=mfu, mbu=mbu)
    assert 100 <= power <= 400
    assert mean_power_w(400, utilisation=utilisation, mfu=mfu, mbu=mbu + more) >= power
    assert mean_power_w(400, utilisation=utilisation, mfu=mfu + more, mbu=mbu) >= power


@pytest.mark.skipif(not MEASURED.exists(), reason="shared/data is not beside the repository")
@pytest.mark.parametrize(
    ("model", "tp"),
    [("llama-2-70b", 2), ("llama-2-70b", 4), ("llama-2-70b", 8), ("bloom", 8)],
)
def test_power_of_decodes_is_near_that_of_measured_a100s(model, tp):
    """One sequence after 128 tokens of prompt, as a share of 400 W: at most 9 % off."""
    names = {"llama-2-70b": "llama2-70b", "bloom": "bloom-176b"}
    with MEASURED.open(encoding="utf-8") as file:
        rows = [
            (float(row["token_time"]) / 1e3, float(row["average_power"]))
            for row in csv.DictReader(file)
            if (row["hardware"], row["model"]) == ("a100-80gb", names[model])
            and (row["prompt_size"], row["batch_size"]) == ("128", "1")
            and row["tensor_parallel"] == str(tp)
        ]
    seconds, measured = np.median(rows, axis=0)
    deployment = replica(model, "a100", tp)
    device = deployment.device
    rate = deployment.bytes_read(1, 1, 192) / seconds
    mbu = rate / (tp * device.memory_bandwidth_gbps * 1e9)
    mfu = deployment.flops(1, 192) / seconds / (tp * deployment.peak_flops)
    power = mean_power_w(device.tdp_w, utilisation=1.0, mfu=mfu, mbu=mbu)
    assert power / device.tdp_w == pytest.approx(measured, rel=0.09)


# Energy and cost of results


def test_energy_by_hand():
    """Two devices of a replica, half a run idle: power times time, per token of the request."""
    result = one_request(tensor_parallel_size=2)
    row = result.replicas.iloc[0]
    watts = 2 * (175 + 525 * (row["mbu"] + 2 * row["mfu"]))
    energy = result.energy()
    assert energy["mean_power_w"] == pytest.approx(watts)
    assert energy["energy_kwh"] == pytest.approx(watts * 1.5 / 3.6e6)
    assert energy["energy_kwh"] == pytest.approx(row["energy_kwh"])
    assert energy["joules_per_output_token"] == pytest.approx(watts * 1.5 / 3)
    assert energy["kwh_per_million_input_tokens"] == pytest.approx(watts * 1.5 / 3.6e6 * 1e4)
    assert energy["kwh_per_million_output_tokens"] == pytest.approx(watts * 1.5 / 3.6e6 / 3e-6)
    assert energy["kwh_per_million_tokens"] == pytest.approx(watts * 1.5 / 3.6e6 / 103e-6)


def test_cost_by_hand():
    """Three replicas of two devices for 1.5 s, of which one worked: all are paid for."""
    result = one_request(tensor_parallel_size=2, num_replicas=3)
    cost = result.cost(price_per_gpu_hour=2.4)
    gpu_hours = 6 * 1.5 / 3600
    assert cost.name == "cost"
    assert cost.to_dict() == pytest.approx(
        {
            "gpu_hours": gpu_hours,
            "cost": 2.4 * gpu_hours,
            "cost_per_million_input_tokens": 2.4 * gpu_hours / 100e-6,
            "cost_per_million_output_tokens": 2.4 * gpu_hours / 3e-6,
            "cost_per_million_tokens": 2.4 * gpu_hours / 103e-6,
        }
    )


def test_power_can_be_given():
    """A power cap and a measured idle power instead of the data sheet's."""
    result = one_request()
    row = result.replicas.iloc[0]
    energy = result.energy(idle_power_w=90, peak_power_w=500)
    assert energy["mean_power_w"] == pytest.approx(90 + 410 * (row["mbu"] + 2 * row["mfu"]))


def test_after_a_warm_up_the_rest_counts():
    """Time and requests from there on; of the mean power only that of the whole run is known."""
    workload = vs.Workload(vs.Constant(rate=1.0), vs.FixedLengths(100, 10), num_requests=20)
    whole = vs.simulate(vs.Cluster(), workload)
    later = whole.after(10.5)
    rest = whole.info["simulated_time"] - 10.5
    assert later.cost(3.6)["cost"] == pytest.approx(0.001 * rest)
    assert later.energy()["mean_power_w"] == whole.energy()["mean_power_w"]
    num_tokens = later.requests["num_decode_tokens"].sum()
    joules = later.energy()["mean_power_w"] * rest
    assert later.energy()["joules_per_output_token"] == pytest.approx(joules / num_tokens)


def test_a_saved_result_knows_what_it_took(tmp_path):
    """Energy and cost of a loaded result are the same."""
    result = one_request()
    result.save(tmp_path / "saved")
    loaded = vs.load_result(tmp_path / "saved")
    assert_series_equal(loaded.energy(), result.energy())
    assert_series_equal(loaded.cost(1.0), result.cost(1.0))


def test_a_device_without_a_tdp_needs_a_peak():
    """The data sheets of TPUs have none: the energy is missing, and can be had with a figure."""
    result = one_request(device="tpu-v6e", tensor_parallel_size=2)
    assert result.replicas["energy_kwh"].isna().all()
    with pytest.raises(vs.ConfigError, match="no TDP; give peak_power_w in watts"):
        result.energy()
    assert result.energy(peak_power_w=400)["energy_kwh"] > 0


@pytest.mark.parametrize("price", [0, -1.0, float("nan"), float("inf"), "2.5", True, None])
def test_a_price_is_a_positive_number(price):
    """Anything else is refused by name."""
    with pytest.raises(vs.ConfigError, match=r"cost\(\) price_per_gpu_hour = .*positive amount"):
        one_request().cost(price)


@pytest.mark.parametrize(
    ("powers", "message"),
    [
        (
            {"idle_power_w": -5},
            r"energy\(\) idle_power_w = -5: expected a positive amount of watts",
        ),
        ({"peak_power_w": "700"}, r"energy\(\) peak_power_w = '700'"),
        ({"idle_power_w": 800}, r"idle_power_w = 800: expected at most the peak of 700 W"),
        ({"idle_power_w": 300, "peak_power_w": 200}, "at most the peak of 200 W"),
    ],
)
def test_powers_are_checked(powers, message):
    """Positive, and idle below peak."""
    with pytest.raises(vs.ConfigError, match=message):
        one_request().energy(**powers)


def test_a_measurement_does_not_know():
    """A result without devices says so; a run in which nothing completed has no cost per token."""
    tables = {"requests": {}, "replicas": {}, "timeline": {}}
    result = Result(tables, config=None, info={"simulated_time": 1.0})
    with pytest.raises(vs.VidurError, match="no replicas with a column 'num_devices'"):
        result.cost(1.0)
    cut = vs.simulate(vs.Cluster(**SETTINGS), ONE, until=0.7)
    assert cut.cost(1.0)["cost"] == pytest.approx(0.7 / 3600)
    assert np.isnan(cut.cost(1.0)["cost_per_million_tokens"])


def test_memory_planning_is_as_before():
    """Weights on a device: those of the layers and both tables."""
    deployment = replica()
    assert deployment.weight_bytes_per_device == 2 * deployment.model.num_parameters
    assert 14.9 < deployment.weight_bytes_per_device / GIB < 15.0
