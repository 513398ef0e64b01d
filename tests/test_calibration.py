"""Calibration: known parameters come back, what is not told stays, and the band holds."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from counts import Chunk, Counts, batches, decodes, prefill, replica
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import Calibrated, ConfigError, Linear, ProfileError, Roofline, dump_config
from vidur_simpy.execution_time.calibrated import PARAMETERS
from vidur_simpy.measurements import Chunk as MeasuredChunk
from vidur_simpy.measurements import Iteration
from vidur_simpy.result import NotAvailableError

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import calibration_vllm_cpu

LINE = Linear(base=0.004, per_token=5e-5, per_context_token=4e-7)
TRUE = {
    "overhead": 0.002,
    "per_sequence": 1e-4,
    "compute_scale": 1.5,
    "context_scale": 0.7,
}
FITTED = Calibrated(LINE, **TRUE, covariance=np.diag([1e-4, 1e-5, 0.01, 0.01]).tolist(), drift=0.05)
WORKLOAD = vs.Workload(
    vs.Poisson(10.0), vs.LognormalLengths(200.0, 0.8, 40.0, 0.7), num_requests=80
)


@pytest.fixture
def line_cluster(make_cluster):
    """One replica whose iterations are a straight line."""
    return make_cluster(execution_time=LINE, kv_cache=vs.KVCache(num_blocks=4000))


def some_iterations(rng, num_iterations):
    """Batches as a server has them, most of them decodes alone."""
    made = []
    for _ in range(num_iterations):
        num_decodes, chunks = int(rng.integers(1, 40)), []
        context = int(num_decodes * rng.integers(10, 2000))
        if rng.random() < 0.2:
            num_tokens = int(rng.integers(1, 500))
            chunks.append(MeasuredChunk(num_tokens, num_tokens + int(rng.integers(0, 500))))
        made.append(Iteration(num_decodes, context, tuple(chunks)))
    return made


def measured_with(model, iterations, noise=None, num_runs=1):
    """The iterations with the times of a model, times noise."""
    stage_time = model.for_replica(replica())
    durations = np.array([stage_time(each, 0) for each in iterations])
    durations *= 1.0 if noise is None else noise
    runs = np.arange(len(durations)) * num_runs // len(durations)
    return vs.MeasuredIterations("simulated", iterations, durations, runs)


def measured_of(result, source="simulated"):
    """The requests of a simulation as if they were measured."""
    requests = result.requests
    columns = [requests[name].to_numpy() for name in ("arrived_at", "num_prefill_tokens")]
    columns += [requests[name].to_numpy() for name in ("num_decode_tokens", "ttft", "e2e")]
    return vs.MeasuredRequests(source, *columns, np.zeros(len(requests), int))


# The model


@given(batches)
@settings(max_examples=50)
def test_without_corrections_it_is_its_base(batch):
    """Whatever the batch, up to rounding."""
    for base in (Roofline(), Linear()):
        expected = base.for_replica(replica())(batch, 0)
        assert Calibrated(base).for_replica(replica())(batch, 0) == pytest.approx(expected)


@given(batches, st.floats(-0.001, 0.01), st.floats(0, 1e-3), st.floats(0, 4), st.floats(0, 4))
@settings(max_examples=50)
def test_the_parts_are_scaled_one_by_one(batch, overhead, per_sequence, compute, context):
    """The time is what the docstring says, of parts that make up the base's time."""
    model = Calibrated(Roofline(), overhead, per_sequence, compute, context, time_scale=1.1)
    stage_time = model.for_replica(replica())
    parts = stage_time.parts(batch, 0)
    assert sum(parts) == pytest.approx(Roofline().for_replica(replica())(batch, 0))
    assert parts.least == stage_time.least_time(0)
    num_sequences = batch.num_decodes + len(batch.prefills)
    expected = parts.least + overhead + per_sequence * num_sequences
    expected += compute * parts.compute + context * parts.context
    assert stage_time(batch, 0) == pytest.approx(1.1 * expected)


def test_prefill_chunks_are_compute_and_context_is_bandwidth():
    """A prompt's time has nothing of the decodes' context, and the reverse."""
    stage_time = Calibrated(LINE).for_replica(replica())
    assert stage_time.parts(prefill(500), 0).context == 0
    longer = [stage_time.parts(decodes(8, context), 0) for context in (100, 200)]
    assert longer[0].compute == longer[1].compute
    assert longer[1].context - longer[0].context == pytest.approx(8 * 100 * 4e-7)


def test_overheads_are_spent_in_the_first_stage():
    """As those of a roofline are."""
    stage_time = Calibrated(LINE, overhead=0.01, per_sequence=0.001).for_replica(replica(pp=2))
    batch = Counts(3, 300, (Chunk(7, 7),))
    assert stage_time(batch, 0) - stage_time(batch, 1) == pytest.approx(0.01 + 4 * 0.001)


def test_a_batch_of_decodes_costs_one_call_of_the_base():
    """A batch with prefill chunks a second one; what depends on counts alone is kept."""
    calls = []
    stage_time = Calibrated(lambda batch: calls.append(batch) or 1.0).for_replica(replica())
    warm = [decodes(5, 100), Counts(5, 700, (Chunk(3, 3),))]
    for batch in warm:
        stage_time(batch, 0)
    counts = []
    for batch in [decodes(5, 200), Counts(5, 900, (Chunk(4, 9),)), prefill(9)]:
        calls.clear()
        stage_time(batch, 0)
        counts.append(len(calls))
    assert counts == [1, 2, 1]


def test_a_run_of_decodes_is_that_of_the_base():
    """Bit by bit what one call after the other gives, as a list or as an array."""

    class Runs:
        def __init__(self, as_list):
            self.as_list = as_list
            self.stage_time = LINE.for_replica(replica())

        def __call__(self, batch, stage_id):
            return self.stage_time(batch, stage_id)

        def decode_times(self, num_decodes, decode_context, num_iterations, stage_id):
            contexts = [decode_context + i * num_decodes for i in range(num_iterations)]
            times = [self(Counts(num_decodes, context), stage_id) for context in contexts]
            return times if self.as_list else np.array(times)

    for as_list in (True, False):
        stage_time = Calibrated(Runs(as_list), **TRUE).for_replica(replica())
        times = list(stage_time.decode_times(7, 700, 50, 0))
        assert times == [stage_time(Counts(7, 700 + 7 * i), 0) for i in range(50)]


@pytest.mark.parametrize("base", [LINE, Roofline()])
@pytest.mark.parametrize("num_iterations", [3, 100])
def test_a_run_of_decodes_is_exact_over_our_own_models(base, num_iterations):
    """Where they answer a run of iterations at once."""
    stage_time = Calibrated(base, **TRUE, time_scale=1.1).for_replica(replica(pp=2))
    assert hasattr(stage_time, "decode_times") == hasattr(
        base.for_replica(replica()), "decode_times"
    )
    if hasattr(stage_time, "decode_times"):
        times = list(stage_time.decode_times(7, 701, num_iterations, 1))
        assert times == [stage_time(Counts(7, 701 + 7 * i), 1) for i in range(num_iterations)]


def test_what_the_base_cannot_do_is_not_there():
    """Nobody asks a plain function for its operators."""
    stage_time = Calibrated(lambda batch: 1.0).for_replica(replica())
    assert not hasattr(stage_time, "decode_times")
    assert not hasattr(stage_time, "operators")
    assert not hasattr(Calibrated(LINE), "factors_name")


@given(batches, st.floats(-0.002, 0.01))
@settings(max_examples=25)
def test_the_operators_make_up_the_time(batch, overhead):
    """Those of the base and the fitted overhead, none negative."""
    stage_time = Calibrated(Roofline(), overhead, 1e-4, 1.3, 0.8).for_replica(replica(pp=2))
    for stage_id in (0, 1):
        operators = stage_time.operators(batch, stage_id)
        assert sum(operators.values()) == pytest.approx(stage_time(batch, stage_id))
        assert min(operators.values()) >= 0
        assert "mlp" in operators


def test_it_says_which_factors_its_base_uses():
    """A result tells them, calibrated or not."""
    cluster = vs.Cluster(execution_time=Calibrated(Roofline(), overhead=0.001))
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=2)
    assert vs.simulate(cluster, workload).info["roofline_factors"] == "h100"


@pytest.mark.parametrize(
    "model",
    [
        FITTED,
        Calibrated(Calibrated(Roofline(factors="hopper"), overhead=1e-3), time_scale=1.25),
    ],
)
def test_a_fit_can_be_saved_and_reproduced(model):
    """Plain numbers, through YAML and back."""
    text = yaml.safe_dump(dump_config(cluster=vs.Cluster(execution_time=model)))
    assert vs.load_config(yaml.safe_load(text))["cluster"].execution_time == model


def test_the_base_can_be_named_and_changed_in_a_configuration():
    """As any execution time."""
    config = {"cluster": {"execution_time": {"type": "calibrated", "base": "linear"}}}
    overrides = ["cluster.execution_time.base.per_token=0.5"]
    made = vs.load_config(config, overrides)["cluster"].execution_time
    assert made == Calibrated(Linear(per_token=0.5))
    with pytest.raises(ConfigError, match=r"base.type 'liner': did you mean 'linear'"):
        vs.load_config(config, ["cluster.execution_time.base=liner"])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"base": "roofline"}, r"Calibrated.base = 'roofline': expected an execution-time model"),
        ({"base": Linear}, r"Calibrated.base = .*expected an execution-time model"),
        ({"compute_scale": -1.0}, r"Calibrated.compute_scale = -1.0"),
        ({"covariance": [[1.0]]}, r"expected a row and a column for each of overhead"),
        ({"covariance": (-np.eye(4)).tolist()}, r"variances >= 0"),
        ({"overhed": 1.0}, r"did you mean 'overhead'"),
    ],
)
def test_settings_are_checked(settings_, message):
    """With what was expected."""
    with pytest.raises(ConfigError, match=message):
        Calibrated(**settings_)


def test_a_batch_takes_time():
    """An overhead that takes more than all of it is refused before anything runs."""
    with pytest.raises(ConfigError, match=r"Calibrated.overhead = -1.0 .* expected more than 0"):
        vs.Cluster(execution_time=Calibrated(LINE, overhead=-1.0))


# From iterations


@given(
    st.floats(-0.003, 0.01), st.floats(0, 5e-4), st.floats(0.2, 5), st.floats(0.2, 5), st.booleans()
)
@settings(max_examples=10, deadline=None)
def test_known_parameters_come_back(overhead, per_sequence, compute, context, is_roofline):
    """Iterations of a model with known corrections give these corrections."""
    base = Roofline() if is_roofline else LINE
    true = Calibrated(base, overhead, per_sequence, compute, context)
    rng = np.random.default_rng(7)
    measured = measured_with(true, some_iterations(rng, 200))
    found = vs.calibrate(vs.Cluster(execution_time=base), measured).execution_time
    for name in PARAMETERS:
        tolerance = {"abs": 1e-5 if name in ("overhead", "per_sequence") else 0.01}
        assert getattr(found, name) == pytest.approx(getattr(true, name), **tolerance)


def test_noise_and_outliers_are_within_the_standard_errors(line_cluster, rng):
    """A fifth of noise and two stalls in a hundred hardly move the fit."""
    iterations = some_iterations(rng, 2000)
    noise = np.exp(0.2 * rng.standard_normal(2000)) * np.where(rng.random(2000) < 0.02, 10.0, 1.0)
    calibration = vs.calibrate(line_cluster, measured_with(FITTED, iterations, noise))
    table = calibration.parameters
    assert table["value"]["compute_scale"] == pytest.approx(1.5, rel=0.1)
    predicted = calibration.rows["predicted"][:2000]
    clean = measured_with(FITTED, iterations).durations
    # Lognormal noise has a mean above its median.
    assert np.median(predicted / clean) == pytest.approx(np.exp(0.02), abs=0.03)
    assert (table["standard_error"] > 0).all()


def test_standard_errors_cover(line_cluster):
    """With a machine that drifts, nearly all fits lie within three of them."""
    misses = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        drift = np.repeat(np.exp(0.1 * rng.standard_normal(8)), 50)
        measured = measured_with(FITTED, some_iterations(rng, 400), drift, num_runs=8)
        calibration = vs.calibrate(line_cluster, measured)
        errors = calibration.parameters["value"] - [TRUE[name] for name in PARAMETERS]
        misses.append((errors / calibration.parameters["standard_error"]).abs())
        assert 0.03 < calibration.execution_time.drift < 0.25
    assert np.mean(np.array(misses) > 3) < 0.1


def test_what_is_not_told_stays_as_it_is(line_cluster):
    """Without any context but the tokens' own, its scale is one, and its error is as large."""
    iterations = [Iteration(n, n) for n in range(1, 60)]
    calibration = vs.calibrate(line_cluster, measured_with(FITTED, iterations))
    assert calibration.execution_time.context_scale == pytest.approx(1.0)
    assert calibration.parameters["standard_error"]["context_scale"] == pytest.approx(1, rel=0.1)
    assert calibration.residuals.loc["iteration", "spread"] < 1e-4


def test_only_the_parameters_asked_for_are_fitted(line_cluster, rng):
    """The others stay neutral and have no error."""
    measured = measured_with(Calibrated(LINE, overhead=0.01), some_iterations(rng, 50))
    table = vs.calibrate(line_cluster, measured, parameters=["overhead"]).parameters
    assert table["value"].to_list() == pytest.approx([0.01, 0.0, 1.0, 1.0])
    assert table["standard_error"].isna().to_list() == [False, True, True, True]


def test_an_iteration_goes_through_all_stages(make_cluster, rng):
    """With pipeline parallelism its duration is that of all of them."""
    cluster = make_cluster(execution_time=LINE, pipeline_parallel_size=2)
    stage_time = FITTED.for_replica(cluster.deployment)
    iterations = some_iterations(rng, 100)
    durations = np.array([stage_time(each, 0) + stage_time(each, 1) for each in iterations])
    measured = vs.MeasuredIterations("pipeline", iterations, durations, np.zeros(100, int))
    found = vs.calibrate(cluster, measured).execution_time
    assert [getattr(found, name) for name in PARAMETERS] == pytest.approx(list(TRUE.values()))


def test_calibrating_again_starts_from_the_base(line_cluster, rng):
    """The fit does not depend on what was fitted before."""
    measured = measured_with(FITTED, some_iterations(rng, 50))
    once = vs.calibrate(line_cluster, measured)
    assert vs.calibrate(once.cluster, measured).execution_time == once.execution_time


# From requests


@pytest.mark.parametrize("base", [LINE, Roofline()])
def test_known_parameters_come_back_from_requests(make_cluster, base):
    """The latencies of a simulation with known corrections tell them, as far as their waits let."""
    true = Calibrated(base, overhead=0.002, per_sequence=1e-4, compute_scale=1.5)
    cluster = make_cluster(execution_time=true, kv_cache=vs.KVCache(num_blocks=4000))
    measured = measured_of(vs.simulate(cluster, dataclasses.replace(WORKLOAD, num_requests=200)))
    start = dataclasses.replace(cluster, execution_time=base)
    calibration = vs.calibrate(start, measured, parameters=PARAMETERS[:3])
    found = calibration.execution_time
    assert found.overhead == pytest.approx(0.002, abs=4e-4)
    assert found.compute_scale == pytest.approx(1.5, rel=0.15)
    for batch in (decodes(2, 200), decodes(6, 300), prefill(400)):
        times = [model.for_replica(replica())(batch, 0) for model in (true, found)]
        assert times[1] == pytest.approx(times[0], rel=0.03)
    assert calibration.residuals["bias"].abs().max() < 0.03
    assert calibration.residuals.index.to_list() == ["ttft", "tpot", "e2e"]


def test_a_fit_is_deterministic(line_cluster):
    """To the last bit."""
    cluster = dataclasses.replace(line_cluster, execution_time=FITTED)
    measured = measured_of(vs.simulate(cluster, WORKLOAD))
    first, second = (vs.calibrate(line_cluster, measured) for _ in range(2))
    assert first.execution_time == second.execution_time
    assert_frame_equal(first.residuals, second.residuals)


# What is refused


def test_milliseconds_are_noticed(line_cluster, rng):
    """Nothing is off by a factor of a thousand but the unit."""
    measured = measured_with(FITTED, some_iterations(rng, 50), noise=1000.0)
    with pytest.raises(ProfileError, match=r"simulated: the median iteration is .* in seconds"):
        vs.calibrate(line_cluster, measured)
    requests = measured_of(vs.simulate(line_cluster, WORKLOAD))
    slow = dataclasses.replace(requests, ttft=1e3 * requests.ttft, e2e=1e3 * requests.e2e)
    with pytest.raises(ProfileError, match="the median E2E is"):
        vs.calibrate(line_cluster, slow)


def test_a_measurement_of_another_model_is_refused(line_cluster):
    """Where it names one that we know."""
    requests = measured_of(vs.simulate(line_cluster, WORKLOAD))
    named = dataclasses.replace(requests, model="Qwen/Qwen3-32B")
    with pytest.raises(ConfigError, match="measured on Qwen/Qwen3-32B, the cluster serves meta"):
        vs.calibrate(line_cluster, named)
    known = dataclasses.replace(requests, model="meta-llama/Llama-3.1-8B-Instruct")
    assert vs.calibrate(line_cluster, known).execution_time.overhead == pytest.approx(0, abs=1e-4)


def test_requests_that_the_cluster_refuses_are_named(line_cluster):
    """The server took them, so the cluster is another."""
    requests = measured_of(vs.simulate(line_cluster, WORKLOAD))
    short = dataclasses.replace(line_cluster, max_model_len=100)
    with pytest.raises(ConfigError, match=r"refuses \d+ of the 80 requests .*max_model_len"):
        vs.calibrate(short, requests)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [(["overhed"], "did you mean 'overhead'"), ("overhead", "expected some of"), ([], "expected")],
)
def test_parameters_are_known_by_name(line_cluster, rng, parameters, message):
    """A misspelt one is refused."""
    measured = measured_with(FITTED, some_iterations(rng, 50))
    with pytest.raises(ConfigError, match=message):
        vs.calibrate(line_cluster, measured, parameters=parameters)


def test_a_cluster_comes_before_its_measurement(line_cluster):
    """Whoever swaps the two, or gives something else, is told so."""
    with pytest.raises(ConfigError, match=r"cluster = 'bench\.json': expected a Cluster"):
        vs.calibrate("bench.json", line_cluster)
    with pytest.raises(ConfigError, match="measurement = 3: expected a path, MeasuredIter"):
        vs.calibrate(line_cluster, 3)


def test_a_few_rows_are_not_enough(line_cluster, rng):
    """Too few to say anything."""
    with pytest.raises(ProfileError, match="19 from simulated>: expected at least 20"):
        vs.calibrate(line_cluster, measured_with(FITTED, some_iterations(rng, 19)))


# How it shows


def test_a_calibration_shows_itself(line_cluster, rng):
    """As text, as html and as a figure."""
    measured = measured_with(FITTED, some_iterations(rng, 50))
    calibration = vs.calibrate(line_cluster, measured)
    assert "overhead=0.002" in repr(calibration)
    assert "standard_error" in calibration._repr_html_()
    ax = calibration.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("measured (s)", "predicted (s)")
    assert sum(len(line.get_xdata()) for line in ax.lines[:-1]) == 50
    assert ax.get_title() == "Calibrated times against measured ones"
    assert len({line.get_marker() for line in ax.lines}) == len(ax.lines) == 3


# The band


def test_the_band_is_around_the_fit(line_cluster):
    """And the result is that of the fit alone."""
    cluster = dataclasses.replace(line_cluster, execution_time=FITTED)
    result = vs.simulate_with_uncertainty(cluster, WORKLOAD, num_pairs=3)
    assert_frame_equal(result.requests, vs.simulate(cluster, WORKLOAD).requests)
    band = result.uncertainty()
    assert (band["low"] < band["value"]).all()
    assert (band["value"] < band["high"]).all()
    assert band.loc[("ttft", "p50"), "value"] == result.summary().loc["ttft", "p50"]


def test_drift_alone_scales_all_times(make_cluster):
    """Without queues a latency is proportional to the speed of the machine."""
    model = Calibrated(lambda batch: 0.01, drift=0.1)
    workload = vs.Workload(vs.Constant(0.1), vs.FixedLengths(10, 5), num_requests=10)
    cluster = make_cluster(execution_time=model)
    band = vs.simulate_with_uncertainty(cluster, workload, level=0.9).uncertainty()
    assert np.log(band["high"] / band["value"]).to_numpy() == pytest.approx(0.1645, abs=1e-3)
    assert np.log(band["value"] / band["low"]).to_numpy() == pytest.approx(0.1645, abs=1e-3)


def test_the_band_is_deterministic_and_saved(line_cluster, tmp_path):
    """It is opened with the result."""
    cluster = dataclasses.replace(line_cluster, execution_time=FITTED)
    first, second = (
        vs.simulate_with_uncertainty(cluster, WORKLOAD, seed=3, num_pairs=2) for _ in range(2)
    )
    assert_frame_equal(first.uncertainty(), second.uncertainty())
    first.save(tmp_path / "saved")
    assert_frame_equal(vs.load_result(tmp_path / "saved").uncertainty(), first.uncertainty())


def test_there_is_no_band_without_a_calibration(line_cluster):
    """Nor for what comes after a warm-up."""
    with pytest.raises(ConfigError, match="expected a Calibrated one"):
        vs.simulate_with_uncertainty(line_cluster, WORKLOAD)
    cluster = dataclasses.replace(line_cluster, execution_time=FITTED)
    with pytest.raises(ConfigError, match=r"level = 1\.5"):
        vs.simulate_with_uncertainty(cluster, WORKLOAD, level=1.5)
    result = vs.simulate(cluster, WORKLOAD)
    with pytest.raises(NotAvailableError, match="simulate_with_uncertainty"):
        result.uncertainty()
    banded = vs.simulate_with_uncertainty(cluster, WORKLOAD, num_pairs=1)
    with pytest.raises(NotAvailableError, match="warm-up"):
        banded.after(1.0).uncertainty()


def test_wild_draws_are_still_machines(line_cluster):
    """A fit that knows next to nothing gives a wide band, not an error."""
    vague = dataclasses.replace(FITTED, covariance=np.diag([1e-4, 1e-6, 9.0, 9.0]).tolist())
    cluster = dataclasses.replace(line_cluster, execution_time=vague)
    band = vs.simulate_with_uncertainty(cluster, WORKLOAD, num_pairs=2).uncertainty()
    assert (band["high"] > 1.5 * band["value"]).all()


# A real server


@pytest.mark.slow
def test_a_real_server_is_predicted_at_another_load(shared):
    """Fitted to the low load, the high one is met to what the machine varies, and in the band."""
    for kind, comparison in calibration_vllm_cpu.run(shared, num_pairs=4).items():
        assert comparison.errors[["mean", "p50"]].abs().max(axis=None) < 0.15, kind
        assert comparison.errors["p95"].abs().max() < 0.25, kind
        bands = comparison.bands
        assert bands["measured"].between(bands["low"], bands["high"]).mean() > 0.8, kind
        assert (bands["high"] / bands["low"]).median() < 2.5, kind
