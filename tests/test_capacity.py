"""Capacity lies where theory says, and it is told how sure that is, or that nobody can tell."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import vidur_simpy as vs
from vidur_simpy.search import runs
from vidur_simpy.search.scaling import ScaledArrivals, mean_rate, with_rate
from vidur_simpy.search.slo import MLPERF, read_slo

mpl.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def server():
    """One request at a time, 0.1 s each for 8 tokens: M/D/1 under Poisson arrivals."""
    return vs.Cluster(
        replica_scheduler=vs.Vllm(max_num_seqs=1), execution_time=lambda batch: 0.1 / 8
    )


@pytest.fixture
def batching():
    """A cluster that batches, cheap to simulate."""
    return vs.Cluster(execution_time=vs.Linear())


def poisson(num_requests, rate=20.0, num_decode_tokens=8):
    lengths = vs.FixedLengths(500, num_decode_tokens)
    return vs.Workload(vs.Poisson(rate), lengths, num_requests=num_requests)


def md1_capacity(limit, service=0.1):
    """The rate at which the mean time in system, wait and service, is the limit."""
    wait_in_services = limit / service - 1
    load = 2 * wait_in_services / (1 + 2 * wait_in_services)
    return load / service


# The SLO


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"ttft:p99": 2, "tpot:mean": 0.05}, "Slo(ttft:p99 <= 2 s, tpot:mean <= 0.05 s)"),
        (
            ["ttft=2", "tpot=.1", "fraction=0.9"],
            "Slo(90 % of requests: ttft <= 2 s, tpot <= 0.1 s)",
        ),
        ("e2e:p99.9=30", "Slo(e2e:p99.9 <= 30 s)"),
    ],
)
def test_an_slo_is_written_as_people_say_it(given, shown):
    """As a mapping or as texts of the command line."""
    assert repr(read_slo(given)) == shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected seconds"),
        ({"tft:p99": 2}, "did you mean 'ttft'"),
        ({"ttft:q99": 2}, "a quantile such as p99"),
        ({"ttft:p0": 2}, "a quantile such as p99"),
        ({"ttft:p99": 0}, "expected a positive number"),
        ({"ttft:p99": "2"}, "expected a positive number"),
        ({"ttft": 2}, "or give fraction"),
        (["itl=2", "fraction=0.9"], "say of what, as in itl:p99"),
        (["ttft:p99=2", "fraction=0.9"], "limits on each request beside it"),
        (["ttft=2", "fraction=1.5"], "a share between 0 and 1"),
        (["ttft:p99"], "expected a name and seconds"),
        (2.0, "expected an Slo"),
    ],
)
def test_a_bad_slo_says_what_is_wrong(given, message):
    """Before anything runs."""
    with pytest.raises(vs.ConfigError, match=message):
        read_slo(given)


def test_mlperf_limits_are_presets():
    """Both are 99th percentiles; an unknown model or scenario is told."""
    assert vs.Slo.mlperf("llama-2-70b") == vs.Slo({"ttft:p99": 2.0, "tpot:p99": 0.2})
    for model, scenarios in MLPERF.items():
        for scenario in scenarios:
            assert len(vs.Slo.mlperf(model, scenario).requirements) == 2
    with pytest.raises(vs.ConfigError, match="did you mean 'llama-2-70b'"):
        vs.Slo.mlperf("llama2-70b")
    with pytest.raises(vs.ConfigError, match="unknown MLPerf scenario 'offline'"):
        vs.Slo.mlperf("deepseek-r1", "offline")


# The same requests at another rate


@pytest.mark.parametrize(
    "arrivals", [vs.Poisson(2.0), vs.Gamma(2.0, cv=3.0), vs.Constant(2.0), "own", "stretched"]
)
def test_another_rate_stretches_time_and_nothing_else(arrivals):
    """Every gap is divided by the same factor; lengths stay."""

    class Own:
        def arrival_times(self, rng, num_requests=None, duration=None):
            return np.cumsum(rng.uniform(size=num_requests))

    made = {"own": Own(), "stretched": ScaledArrivals(vs.Poisson(2.0), 0.5)}.get(arrivals, arrivals)
    lengths = vs.UniformLengths(min_tokens=10, max_tokens=100, prefill_to_decode_ratio=4.0)
    workload = vs.Workload(made, lengths, num_requests=50)
    faster = with_rate(workload, 3 * mean_rate(workload))

    def drawn(each):
        streams = [np.random.default_rng(np.random.SeedSequence(0, spawn_key=(i,))) for i in (0, 1)]
        return each.requests(*streams)

    before, after = drawn(workload), drawn(faster)
    np.testing.assert_allclose(after.arrived_at, before.arrived_at / 3, rtol=1e-12)
    np.testing.assert_array_equal(after.num_prefill_tokens, before.num_prefill_tokens)
    assert mean_rate(faster) == pytest.approx(3 * mean_rate(workload))


def test_a_duration_becomes_a_number_of_requests():
    """Else a faster run would have more requests, and others."""
    workload = vs.Workload(vs.Poisson(2.0), vs.FixedLengths(10, 2), duration=100.0)
    faster = with_rate(workload, 8.0)
    assert faster.duration is None
    assert 150 < faster.num_requests < 250
    assert with_rate(workload, 2.0).num_requests == faster.num_requests


def test_requests_that_come_at_once_have_no_rate(batching):
    """An offline batch has no capacity in requests per second."""
    workload = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(10, 2), num_requests=10)
    with pytest.raises(vs.ConfigError, match=r"AllAtOnce.* has no rate"):
        vs.capacity(batching, workload, {"ttft:p90": 1.0})


# Known answers


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.2])
def test_capacity_of_a_queue_with_constant_service(server, limit):
    """M/D/1: the rate whose mean wait meets the limit, within 2 %, and between the sure rates."""
    found = vs.capacity(server, poisson(2_000), {"e2e:mean": limit}, tolerance=0.05)
    assert found.rate == pytest.approx(md1_capacity(limit), rel=0.02)
    assert found.low <= md1_capacity(limit) <= found.high


def test_a_regular_stream_is_served_up_to_the_rate_of_service(server):
    """D/D/1: no wait at all below 10 requests/s, and a queue that grows above."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(500, 8), num_requests=500)
    found = vs.capacity(server, workload, {"e2e:p90": 0.12}, tolerance=0.02, max_replications=1)
    assert found.answer == "found"
    assert found.rate == pytest.approx(10.0, rel=0.02)
    assert found.low <= 10.0 <= found.high


def test_capacity_is_monotone_in_the_slo(batching):
    """A looser limit never means a lower rate."""
    found = [
        vs.capacity(batching, poisson(150), {"ttft:p90": limit}, max_replications=2)
        for limit in (0.04, 0.08, 0.2)
    ]
    rates = [each.rate for each in found]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


@pytest.mark.slow
def test_capacity_is_monotone_between_close_limits(batching, tmp_path):
    """Also where the search takes another path: it is the same rates that are compared."""
    rates = [
        vs.capacity(
            batching, poisson(150), {"ttft:p90": limit}, max_replications=2, store=tmp_path
        ).rate
        for limit in np.geomspace(0.09, 0.11, 8).tolist()
    ]
    assert rates == sorted(rates)


def test_two_limits_are_as_strict_as_the_stricter(batching):
    """The rates and their seeds are the same, so the answers are."""
    alone = vs.capacity(batching, poisson(150), {"ttft:p90": 0.05}, max_replications=2)
    both = vs.capacity(
        batching, poisson(150), {"ttft:p90": 0.05, "e2e:p90": 100.0}, max_replications=2
    )
    assert both.rate == pytest.approx(alone.rate, rel=0.05)


def test_a_share_of_good_requests_is_a_quantile(batching):
    """90 % of requests within 0.05 s, and a p90 of at most 0.05 s, are the same requirement."""
    quantile = vs.capacity(batching, poisson(150), {"ttft:p90": 0.05}, max_replications=2)
    slo = vs.Slo({"ttft": 0.05}, fraction=0.9)
    share = vs.capacity(batching, poisson(150), slo, max_replications=2)
    assert share.rate == quantile.rate
    at_low = share.curve[share.curve["rate"] == share.low].iloc[0]
    assert at_low["fraction"] >= 0.9


def test_gaps_between_tokens_can_be_limited(make_cluster):
    """Tokens are recorded for it: a batch of up to 128 takes 0.01 s, so any rate meets 0.02 s."""
    cluster = make_cluster(execution_time=lambda batch: 0.01)
    workload = poisson(100, num_decode_tokens=10)
    found = vs.capacity(cluster, workload, {"itl:p90": 0.02}, max_replications=2)
    assert found.answer == "every rate"
    assert "itl_p90" in found.curve


# What cannot be answered


def test_an_slo_that_no_rate_meets(server):
    """Service alone takes 0.1 s."""
    found = vs.capacity(server, poisson(120), {"e2e:p90": 0.05})
    assert (found.answer, found.rate) == ("no rate", 0.0)
    assert "even when requests are alone, e2e:p90 is 0.1" in repr(found)


def test_an_slo_that_every_rate_meets(server):
    """120 requests take 12 s at most, all together."""
    found = vs.capacity(server, poisson(120), {"e2e:p90": 30.0}, max_replications=2)
    assert (found.answer, found.rate) == ("every rate", float("inf"))
    assert "all requests arrive at once" in repr(found)


def test_too_few_requests_cannot_tell(server):
    """Twenty requests have no p99, at any rate."""
    found = vs.capacity(server, poisson(20), {"e2e:p99": 0.5}, max_replications=2)
    assert found.answer == "cannot tell"
    assert "too few values for a p99" in repr(found)
    assert "use more requests or max_replications" in repr(found)


def test_a_run_too_short_to_overload_is_noted(make_cluster):
    """Ten at a time, 20 s each: 100 of them take 200 s, and wait 150 s if they come in 50 s."""
    cluster = make_cluster(replica_scheduler=vs.Vllm(max_num_seqs=10))
    workload = poisson(100, rate=1.0, num_decode_tokens=20)
    found = vs.capacity(cluster, workload, {"e2e:p90": 150.0}, max_replications=2)
    assert any("too short to overload" in note for note in found.notes)


def test_a_trace_runs_once_at_each_rate(batching, tmp_path):
    """It is what it is: other seeds would give the same run."""
    rows = "\n".join(f"{0.05 * index + (index % 4) * 0.01},100,4" for index in range(400))
    path = tmp_path / "trace.csv"
    path.write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}\n")
    found = vs.capacity(batching, vs.Trace(path), {"ttft:p90": 0.05})
    assert set(found.curve["num_runs"]) == {1}
    assert found.low < found.rate < found.high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance = 0\.0: expected a number above 0 and below 1"),
        ({"confidence": 95}, "confidence = 95: expected a number above 0 and below 1"),
        ({"max_replications": 0}, "max_replications = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_settings_are_told(batching, settings, message):
    """Before anything runs."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.capacity(batching, poisson(10), {"ttft:p90": 1.0}, **settings)


# A store


LIMITS = {"ttft:p90": 0.05}
FEW = {"max_replications": 2, "tolerance": 0.2}


def test_what_was_run_is_not_run_again(batching, tmp_path, made):
    """The second time everything is there; the answer is the same to the bit."""
    alone = vs.capacity(batching, poisson(100), LIMITS, **FEW)
    first = vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    assert len(made) == alone.num_runs + first.num_runs
    second = vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    assert len(made) == alone.num_runs + first.num_runs
    assert (first.num_reused, second.num_reused) == (0, first.num_runs)
    assert f"{second.num_runs} runs ({second.num_runs} reused)" in repr(second)
    for each in (first, second):
        assert each.curve.equals(alone.curve)
        assert (each.rate, each.low, each.high) == (alone.rate, alone.low, alone.high)


def test_a_search_that_was_cut_off_goes_on(batching, tmp_path, made, monkeypatch):
    """What was done before an interruption is not done again."""
    counted = runs.simulate

    def interrupted(*args, **kwargs):
        if len(made) == 5:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    monkeypatch.setattr(runs, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    monkeypatch.setattr(runs, "simulate", counted)
    found = vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    assert found.num_reused == 5
    assert len(made) == found.num_runs


@pytest.mark.slow
def test_a_search_whose_process_was_killed_goes_on(batching, tmp_path):
    """SIGKILL in the middle."""
    script = (
        "import sys, vidur_simpy as vs\n"
        "workload = vs.Workload(vs.Poisson(20.0), vs.FixedLengths(500, 8), num_requests=2000)\n"
        "vs.capacity(vs.Cluster(execution_time=vs.Linear()), workload, {'ttft:p90': 0.05},\n"
        "    store=sys.argv[1], max_replications=2, tolerance=0.2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path])
    folder = tmp_path / "runs"
    while process.poll() is None and len(list(folder.glob("[!.]*.json"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_kept = len(list(folder.glob("[!.]*.json")))
    found = vs.capacity(batching, poisson(2000), LIMITS, store=tmp_path, **FEW)
    assert found.num_reused == num_kept >= 3
    assert found.num_runs == len(list(folder.glob("[!.]*.json")))


def test_another_slo_takes_what_is_there(batching, tmp_path, made):
    """Latencies are kept, not whether they met a limit: only new rates are run."""
    vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    before = len(made)
    other = {"e2e:p90": 0.15, "tpot:mean": 0.1}
    found = vs.capacity(batching, poisson(100), other, store=tmp_path, **FEW)
    assert len(made) - before == found.num_runs - found.num_reused < found.num_runs
    assert found.curve.equals(vs.capacity(batching, poisson(100), other, **FEW).curve)


def test_sweeps_capacities_and_recommendations_share_runs(batching, tmp_path, made):
    """Whoever made a run, it is the same run; the workload at its own rate is one."""
    grid = {"cluster.num_replicas": [1, 2]}
    swept = vs.sweep(batching, poisson(100), grid, replications=2, store=tmp_path)
    assert len(made) == 4
    found = vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    assert found.num_reused == 2
    before = len(made)
    advice = vs.recommend(
        batching,
        poisson(100),
        LIMITS,
        grid,
        objective="throughput",
        max_replications=2,
        store=tmp_path,
    )
    assert (advice.num_runs, advice.num_reused) == (4, 4)
    assert "4 runs (4 reused) of 2 configurations" in repr(advice)
    again = vs.sweep(
        batching, poisson(100), {"workload.arrivals.rate": found.curve["rate"]}, store=tmp_path
    )
    assert again.num_reused == len(again)
    assert repr(again).endswith(f"0 failed, {len(again)} reused>")
    assert len(made) == before
    assert swept.table["ttft_p90"][0] == again.table["ttft_p90"][found.curve["rate"] == 20.0].item()


def test_gaps_between_tokens_are_kept_too(batching, tmp_path):
    """They are values of the run that recorded them."""
    workload = poisson(60)
    first, second = (
        vs.capacity(batching, workload, {"itl:p90": 0.006}, store=tmp_path, **FEW) for _ in "ab"
    )
    assert second.num_reused == first.num_runs
    assert first.curve.equals(second.curve)


def test_a_sweep_of_large_runs_keeps_figures_only(batching, tmp_path, made, monkeypatch):
    """A capacity makes such a run again, and keeps it whole."""
    monkeypatch.setattr(runs, "MAX_KEPT", 10)
    vs.sweep(batching, poisson(100), [{}], store=tmp_path)
    first = vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW)
    assert first.num_reused == 0
    assert vs.capacity(batching, poisson(100), LIMITS, store=tmp_path, **FEW).num_reused > 0
    assert len(made) == 1 + first.num_runs


def test_arrivals_of_a_trace_are_stored_too(batching, tmp_path):
    """At another rate they are the same trace with another time scale, which has a name."""
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at\n" + "\n".join(str(0.05 * index) for index in range(200)))
    workload = vs.Workload(vs.TraceArrivals(path), vs.FixedLengths(100, 4), num_requests=100)
    for _ in "ab":
        found = vs.capacity(batching, workload, LIMITS, store=tmp_path / "store", **FEW)
    assert found.num_reused == found.num_runs


def test_what_no_name_stands_for_is_not_stored(server, tmp_path):
    """One warning says so, however many runs there are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vs.capacity(server, poisson(40), {"e2e:p90": 0.5}, store=tmp_path, **FEW)
    assert found.num_runs > 2
    assert [str(each.message).partition(":")[0] for each in caught] == [
        "1 of 1 configurations are made, but not stored"
    ]
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_raises_what_it_raised(jobs):
    """With its own kind and message, whoever made it."""
    short = Path(__file__).with_name("no_such_trace.csv")
    workload = vs.Workload(vs.Poisson(20.0), vs.TraceLengths(short), num_requests=10)
    with pytest.raises(vs.TraceError, match="no_such_trace"):
        vs.capacity(vs.Cluster(execution_time=vs.Linear()), workload, LIMITS, jobs=jobs)


# What comes back


def test_the_curve_is_what_was_walked(batching):
    """Rates in order, each once, with verdicts that fit the answer; as many runs as it says."""
    found = vs.capacity(batching, poisson(150), {"ttft:p90": 0.05}, max_replications=2)
    curve = found.curve
    assert curve["rate"].is_monotonic_increasing
    assert curve["rate"].is_unique
    assert found.low == curve.loc[curve["verdict"] == "meets", "rate"].max()
    assert found.high == curve.loc[curve["verdict"] == "misses", "rate"].min()
    assert curve["num_runs"].sum() == found.num_runs
    sure = curve[curve["verdict"] == "meets"]
    assert (sure["ttft_p90_high"] <= 0.05).all()
    assert (curve["ttft_p90_low"] <= curve["ttft_p90"]).all()


def test_the_answer_does_not_depend_on_the_workers():
    """One worker, two workers: the same curve, bit for bit."""
    cluster = vs.Cluster(execution_time=vs.Linear())
    one, two = (
        vs.capacity(cluster, poisson(60), {"ttft:p90": 0.05}, max_replications=4, jobs=jobs)
        for jobs in (1, 2)
    )
    assert one.curve.equals(two.curve)
    assert one.rate == two.rate


def test_joblib_is_not_needed_where_nobody_asks_for_workers(batching, monkeypatch):
    """Without it, runs are made one by one; asking for two names the extra."""
    monkeypatch.setattr("vidur_simpy.search.runs.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "joblib", None)
    settings = {"tolerance": 0.5, "max_replications": 2}
    found = vs.capacity(batching, poisson(60), {"ttft:p90": 0.05}, **settings)
    assert found.num_runs > 0
    with pytest.raises(vs.ConfigError, match=r"vidur-simpy\[search\]"):
        vs.capacity(batching, poisson(60), {"ttft:p90": 0.05}, jobs=2)


def test_figures_say_limit_and_answer(batching):
    """The limit that binds is drawn unless another is asked for."""
    slo = {"ttft:p90": 0.05, "e2e:p90": 100.0}
    found = vs.capacity(batching, poisson(120), slo, max_replications=2)
    axes = found.plot()
    assert axes.get_ylabel() == "ttft:p90 (s)"
    assert axes.get_xscale() == "log"
    assert any("requests/s" in text.get_text() for text in axes.get_legend().get_texts())
    assert found.plot(plt.subplots()[1], requirement="e2e:p90").get_ylabel() == "e2e:p90 (s)"
    with pytest.raises(vs.ConfigError, match="unknown limit of the SLO"):
        found.plot(requirement="tpot:p90")


def test_extreme_answers_can_be_drawn(server):
    """Without a rate to mark."""
    for slo in ({"e2e:p90": 0.05}, {"e2e:p90": 30.0}):
        axes = vs.capacity(server, poisson(120), slo, max_replications=2).plot()
        assert "rate meets it" in axes.get_title()


def test_the_command_line_prints_curve_and_answer(tmp_path, capsys):
    """And writes the curve where asked."""
    from vidur_simpy.cli import main

    config = tmp_path / "c.yaml"
    config.write_text(
        "cluster: {execution_time: linear}\n"
        "workload: {type: synthetic, arrivals: {type: poisson, rate: 20.0}, num_requests: 100,\n"
        "  lengths: {type: fixed, num_prefill_tokens: 16, num_decode_tokens: 4}}\n"
    )
    out = tmp_path / "curve.csv"
    arguments = ["capacity", str(config), "--slo", "ttft:p90=0.05", "--jobs", "1"]
    arguments += ["--max-replications", "2", "--store", str(tmp_path / "store")]
    for printed in ("Capacity under Slo(ttft:p90 <= 0.05 s)", "reused"):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--out", str(out), "--overwrite"])
        assert ended.value.code == 0
        assert printed in capsys.readouterr().out
    assert out.read_text().startswith("rate,verdict,num_runs,ttft_p90")
    with pytest.raises(SystemExit) as ended:
        main(["capacity", str(config), "--slo", "tft:p90=0.05"])
    assert ended.value.code == 2
    assert "did you mean 'ttft'" in capsys.readouterr().err
