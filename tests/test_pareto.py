"""Fronts hold what no other beats, and the recommendation is the best that surely meets the SLO."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.search.narrowing import proposed, successive_halving

mpl.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

PRICES = {"h100": 4.0, "a100": 2.0}
SLO = {"ttft:p90": 0.2}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cluster():
    """Batches of 20 ms and more: one replica is kept busy by some 50 requests/s."""
    return vs.Cluster(max_model_len=4096, execution_time=vs.Linear(base=0.02))


@pytest.fixture(scope="module")
def workload():
    return vs.Workload(vs.Poisson(30.0), vs.FixedLengths(512, 16), num_requests=200)


@pytest.fixture(scope="module")
def advice(cluster, workload):
    """One to four replicas, on either device, whose execution times are the same here."""
    grid = {"cluster.device": ["h100", "a100"], "cluster.num_replicas": [1, 2, 4]}
    return vs.recommend(cluster, workload, SLO, grid, price_per_gpu_hour=PRICES, max_replications=4)


# Fronts


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=25),
    st.sets(st.sampled_from(["x", "y"])),
)
@settings(max_examples=60, deadline=None)
def test_a_front_is_what_no_row_beats(rows, maximise):
    """As the definition says, by comparing each with each."""
    table = pd.DataFrame(rows, columns=["x", "y"]).astype(float)
    sign = np.array([-1.0 if name in maximise else 1.0 for name in ("x", "y")])
    costs = table.to_numpy() * sign
    beaten = [
        any((other <= cost).all() and (other < cost).any() for other in costs) for cost in costs
    ]
    front = vs.pareto(table, "x", "y", maximise=maximise)
    assert sorted(front.index) == list(np.flatnonzero(~np.array(beaten)))
    assert front["x"].is_monotonic_increasing


def test_rows_without_a_number_are_on_no_front():
    """A run that failed has NaN."""
    table = pd.DataFrame({"x": [1.0, np.nan, 0.5], "y": [1.0, 0.0, np.inf]})
    assert list(vs.pareto(table, "x", "y").index) == [0]


def test_results_and_sweeps_have_fronts(cluster, workload):
    """More replicas are faster and busy for less of the time."""
    clusters = {n: vs.Cluster(num_replicas=n, execution_time=vs.Linear()) for n in (1, 2)}
    results = {f"{n} replicas": vs.simulate(each, workload) for n, each in clusters.items()}
    front = vs.pareto(results, "utilisation", "ttft_p90")
    assert list(front.index) == ["2 replicas"]
    sweep = vs.sweep(cluster, workload, {"cluster.num_replicas": [1, 2]})
    assert len(vs.pareto(sweep, "cluster.num_replicas", "ttft_p90")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cots", "ttft"), "did you mean 'cost'"),
        (("cost", "name"), "values that are no numbers"),
    ],
)
def test_a_column_has_to_be_there_and_numeric(arguments, message):
    """The nearest name is told."""
    table = pd.DataFrame({"cost": [1.0], "ttft": [1.0], "name": ["a"]})
    with pytest.raises(vs.ConfigError, match=message):
        vs.pareto(table, *arguments)


def test_only_what_is_compared_can_be_maximised():
    """A third column would be ignored."""
    table = pd.DataFrame({"cost": [1.0], "ttft": [1.0], "mfu": [1.0]})
    with pytest.raises(vs.ConfigError, match="maximise = 'mfu'"):
        vs.pareto(table, "cost", "ttft", maximise=["mfu"])
    with pytest.raises(vs.ConfigError, match="expected a table"):
        vs.pareto([1, 2], "cost", "ttft")


# Recommendations


def test_the_cheapest_that_meets_the_slo_is_recommended(advice):
    """One replica is too slow for 30 requests/s; two on the cheaper device are the least."""
    assert advice.settings == {"cluster.device": "a100", "cluster.num_replicas": 2}
    assert advice.cluster.num_replicas == 2
    assert list(advice.table["verdict"]) == ["misses", "meets", "meets"] * 2
    assert advice.table["cost_per_hour"].to_list() == [4.0, 8.0, 16.0, 2.0, 4.0, 8.0]
    assert advice.objective == "cost_per_hour"
    assert "surely better than row 5, by 4" in advice.notes


def test_of_equally_cheap_ones_the_one_with_most_room_is_recommended(cluster, workload):
    """Smaller chunks delay first tokens; the price is the same, and that is told."""
    grid = {"cluster.replica_scheduler.chunk_size": [256, 1024, 512], "cluster.num_replicas": [4]}
    found = vs.recommend(cluster, workload, SLO, grid, price_per_gpu_hour=1.0, max_replications=2)
    assert found.settings["cluster.replica_scheduler.chunk_size"] == 1024
    assert found.runner_up == 2
    assert "as good as row 2, but further from its limits" in found.notes


def test_objects_of_the_users_own_are_told_by_name(cluster, workload):
    """Not by where they lie in memory, which is elsewhere in the next run."""

    class Halved:
        """Half of the usual time."""

        def __call__(self, batch, stage_id):
            return 0.5 * vs.Linear().base

    grid = {"cluster.execution_time": [Halved()]}
    options = {"price_per_gpu_hour": 1.0, "max_replications": 1}
    found = vs.recommend(cluster, workload, {"ttft:p50": 5.0}, grid, **options)
    assert found.table["cluster.execution_time"].to_list()[0].endswith("Halved")
    assert " object at " not in repr(found)


def test_what_is_known_without_a_run_is_sure(cluster, workload):
    """One run leaves no interval of a figure, but a price has none."""
    grid = {"cluster.num_replicas": [3, 4]}
    options = {"price_per_gpu_hour": 1.5, "max_replications": 1}
    found = vs.recommend(cluster, workload, {"ttft:p50": 0.2}, grid, **options)
    assert (found.lead.low, found.lead.high) == (1.5, 1.5)
    assert "surely better than row 1, by 1.5" in found.notes


def test_short_runs_are_told(cluster):
    """Requests that wait for most of the run say little about traffic that goes on."""
    workload = vs.Workload(vs.Poisson(300.0), vs.FixedLengths(512, 100), num_requests=150)
    found = vs.recommend(
        cluster, workload, {"e2e:p50": 30.0}, [{}], price_per_gpu_hour=1.0, max_replications=1
    )
    assert any("runs are too short to overload" in note for note in found.notes)


def test_a_job_that_ends_pays_until_its_last_request_is_done(cluster):
    """All at once: twice the replicas for half the time cost an hour twice, the job the same."""
    job = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(512, 16), num_requests=2000)
    found = {
        objective: vs.recommend(
            cluster,
            job,
            {"e2e:p90": 120.0},
            {"cluster.num_replicas": [1, 2]},
            objective=objective,
            price_per_gpu_hour=1.0,
            max_replications=1,
        )
        for objective in ("cost", "cost_per_million_tokens")
    }
    assert found["cost"].cluster.num_replicas == 1
    costs = found["cost_per_million_tokens"].table["cost_per_million_tokens"]
    assert costs[1] == pytest.approx(costs[0], rel=0.1)


def test_it_says_how_sure_it_is(advice):
    """The runner-up ran the same seeds: at twice the price the lead is sure."""
    assert advice.runner_up in (1, 5)
    assert advice.lead.low > 0
    assert "surely better" in repr(advice)
    assert advice.table["num_runs"].iloc[advice.best] == 4
    assert advice.table["num_runs"].sum() == advice.num_runs


def test_cost_is_price_times_devices_times_time(advice, cluster, workload):
    """As `Result.cost` has it, mean over the runs."""
    results = vs.replicate(advice.cluster, workload, 4)
    costs = [result.cost(2.0)["cost_per_million_tokens"] for result in results]
    row = advice.table.iloc[advice.best]
    assert row["cost_per_million_tokens"] == pytest.approx(np.mean(costs))
    energy = [result.energy()["kwh_per_million_tokens"] for result in results]
    assert row["kwh_per_million_tokens"] == pytest.approx(np.mean(energy))


@pytest.mark.parametrize(
    ("objective", "replicas"), [("ttft:p90", 4), ("throughput", 4), ("energy", 2)]
)
def test_other_objectives(cluster, workload, objective, replicas):
    """Four replicas are fastest; two take less energy."""
    found = vs.recommend(
        cluster,
        workload,
        SLO,
        {"cluster.num_replicas": [1, 2, 4]},
        objective=objective,
        max_replications=4,
    )
    assert found.cluster.num_replicas == replicas


def test_none_meets_an_slo_that_is_too_strict(cluster, workload):
    """A batch alone takes 20 ms."""
    grid = {"cluster.num_replicas": [1, 2]}
    found = vs.recommend(
        cluster, workload, {"ttft:p90": 0.01}, grid, price_per_gpu_hour=1.0, max_replications=2
    )
    assert found.best is None
    assert found.settings == {}
    assert "no configuration meets the SLO; row 1 comes closest" in repr(found)
    with pytest.raises(vs.VidurError, match="no configuration meets"):
        _ = found.cluster


def test_what_does_not_fit_is_a_row_with_its_error(workload):
    """A 70B model needs more than one device."""
    grid = {"cluster.tensor_parallel_size": [1, 4]}
    big = vs.Cluster(model="llama-3-70b", tensor_parallel_size=4, execution_time=vs.Linear())
    found = vs.recommend(big, workload, SLO, grid, price_per_gpu_hour=1.0, max_replications=2)
    assert found.table["error"].iloc[0].startswith("CapacityError")
    assert found.settings == {"cluster.tensor_parallel_size": 4}
    assert "no other configuration meets the SLO" in repr(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs price_per_gpu_hour"),
        ({"price_per_gpu_hour": {"a100": 2.0}}, "but no h100-80gb-sxm"),
        ({"price_per_gpu_hour": -1.0}, "price_per_gpu_hour = -1.0"),
        ({"objective": "cots"}, "did you mean 'cost'"),
        ({"price_per_gpu_hour": 1.0, "method": "gird"}, "did you mean 'grid'"),
        ({"objective": "throughput", "max_tried": 0}, "max_tried = 0"),
        (
            {"objective": "throughput", "max_replications": 0},
            r"recommend\(\): max_replications = 0",
        ),
        ({"objective": "throughput", "confidence": 95}, r"recommend\(\): confidence = 95"),
        ({"objective": "throughput", "where": lambda cluster: False}, "none of the 2 config"),
        ({"objective": "throughput", "where": 16}, "where = 16: expected a function"),
    ],
)
def test_bad_arguments_are_told(cluster, workload, arguments, message):
    """Before anything runs."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.recommend(cluster, workload, SLO, {"cluster.num_replicas": [1, 2]}, **arguments)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "the grid is empty"),
        ({"cluster.num_replicas": []}, "the grid is empty: cluster.num_replicas has no values"),
        ([], "the grid is empty"),
        ({"cluster.num_replica": [1]}, "did you mean 'num_replicas'"),
        ({"cluster.replica_scheduler.chunk_sise": [1]}, "did you mean 'chunk_size'"),
        ({"cluster.replica_scheduler": ["sarthi"]}, "did you mean 'sarathi'"),
        ({"cluster.device": ["h10"]}, "unknown device 'h10'"),
    ],
)
def test_an_impossible_grid_is_told(cluster, workload, grid, message):
    """As by a sweep; names get the nearest one there is."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.recommend(cluster, workload, SLO, grid, price_per_gpu_hour=1.0)


def test_a_condition_on_clusters_leaves_the_others_out(cluster, workload):
    """Every way to use just four devices; none of the others is run."""
    grid = {
        "cluster.tensor_parallel_size": [1, 2, 4],
        "cluster.pipeline_parallel_size": [1, 2],
        "cluster.num_replicas": [1, 2, 4],
    }
    found = vs.recommend(
        cluster,
        workload,
        SLO,
        grid,
        price_per_gpu_hour=1.0,
        where=lambda cluster: cluster.num_devices == 4,
        max_replications=2,
    )
    assert found.table["num_devices"].to_list() == [4] * len(found.points) == [4] * 5
    assert found.cluster.num_devices == 4


def test_an_objective_that_is_not_known_recommends_nothing(workload):
    """A device whose data sheet gives no power takes an unknown amount of energy."""
    h100 = vs.Device.from_name("h100")
    device = dataclasses.replace(h100, name="secret", tdp_w=None)
    cluster = vs.Cluster(device=device, execution_time=vs.Linear())
    grid = {"cluster.num_replicas": [2]}
    found = vs.recommend(
        cluster, workload, SLO, grid, objective="energy", max_replications=2, jobs=1
    )
    assert found.best is None
    assert "kwh_per_million_tokens is not known of any configuration" in repr(found)


def test_what_may_be_better_is_told(cluster):
    """A cheaper configuration of which it cannot be told whether it meets the SLO."""
    workload = vs.Workload(vs.Poisson(40.0), vs.FixedLengths(512, 16), num_requests=150)
    found = vs.recommend(
        cluster,
        workload,
        {"ttft:p90": 0.08},
        {"cluster.num_replicas": [2, 3, 4, 5, 6, 8]},
        price_per_gpu_hour=1.0,
        max_replications=2,
    )
    verdicts = found.table["verdict"].to_list()
    assert "cannot tell" in verdicts[: found.best]
    row = verdicts.index("cannot tell")
    assert f"row {row} would be better, if it met the SLO, which cannot be told" in found.notes


def test_a_point_whose_runs_fail_is_a_row_with_its_error(cluster, tmp_path):
    """The others are compared, and it is not tried again."""
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,10\n0.1,100,10\n")
    grid = {"workload": [vs.Trace(path), vs.Trace(tmp_path / "none.csv")]}
    workload = vs.Trace(path)
    found = vs.recommend(cluster, workload, {"ttft:mean": 1.0}, grid, objective="throughput")
    assert found.table["error"].str.partition(":")[0].to_list() == ["", "TraceError"]
    assert found.num_runs == 1


# A store


def test_a_recommendation_is_not_computed_twice(cluster, workload, tmp_path):
    """Its runs are taken from the store, whatever the objective, and whoever made them."""
    grid = {"cluster.num_replicas": [1, 2]}
    options = {"max_replications": 2, "store": tmp_path}
    first = vs.recommend(cluster, workload, SLO, grid, price_per_gpu_hour=1.0, **options)
    second = vs.recommend(cluster, workload, SLO, grid, objective="energy", **options)
    assert (first.num_reused, second.num_reused) == (0, first.num_runs)
    unkept = vs.recommend(cluster, workload, SLO, grid, objective="energy", max_replications=2)
    pd.testing.assert_frame_equal(second.table, unkept.table, check_exact=True)
    assert vs.sweep(cluster, workload, grid, replications=2, store=tmp_path).num_reused == 4


def test_what_cannot_be_stored_is_told_once(cluster, workload, tmp_path):
    """The other configurations are stored."""
    grid = {"cluster.execution_time": [vs.Linear(base=0.02), lambda batch: 0.02]}
    with pytest.warns(UserWarning, match="1 of 2 configurations are made, but not stored") as told:
        found = vs.recommend(
            cluster, workload, SLO, grid, objective="throughput", store=tmp_path, max_replications=2
        )
    assert len(told) == 1
    assert found.num_runs == 4
    assert len(list((tmp_path / "runs").iterdir())) == 2


# Halving


@given(st.permutations(range(40)), st.floats(0.02, 1.0))
@settings(max_examples=30, deadline=None)
def test_halving_keeps_everyone_once_and_the_best_first(order, least_share):
    """With ranks that do not change, the best survives; nobody is lost."""
    efforts = []

    def rank(candidates, share):
        efforts.append((len(candidates), share))
        return [(0, float(order[candidate])) for candidate in candidates]

    ordered = successive_halving(range(40), rank, share=least_share)
    assert sorted(ordered) == list(range(40))
    assert efforts == sorted(efforts, key=lambda effort: -effort[0])
    if efforts:
        assert order[ordered[0]] == 0


SETTINGS = [{"a": a, "b": b, "c": c} for a in range(20) for b in "xyz" for c in (1, 2, 4, 8)]


def ranked(numbers, share):
    """What the settings are worth: "x" misses its SLO; else a near 13 and a small c are good."""
    values = [SETTINGS[number] for number in numbers]
    return [
        (1, 2.0 + each["a"]) if each["b"] == "x" else (0, abs(each["a"] - 13.0) + each["c"])
        for each in values
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_optuna_finds_the_best_among_few(seed):
    """The best of 240, though it looks at 80; each once, the same with the same seed."""
    ordered, again = (
        proposed(SETTINGS, ranked, share=0.1, num_tried=80, seed=seed) for _ in range(2)
    )
    assert len(set(ordered)) == len(ordered) == 80
    assert SETTINGS[ordered[0]] == {"a": 13, "b": "y", "c": 1}
    assert ordered == again


def test_optuna_stays_on_the_points_there_are():
    """A list of settings is no full grid: what is missing is not run; all there are is enough."""
    settings = [{"a": a, "b": a % 2} for a in range(12)] + [{"c": "only"}]

    def rank(numbers, share):
        return [(0, float("inf")) if "c" in settings[n] else (0, 12.0 - n) for n in numbers]

    ordered = proposed(settings, rank, share=0.5, num_tried=100, seed=0)
    assert set(ordered) <= set(range(13))
    assert ordered[0] == 11


def test_optuna_is_asked_for_where_it_is_missing(cluster, workload, monkeypatch):
    """With the extra that has it."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    grid = {"cluster.num_replicas": [1, 2]}
    with pytest.raises(vs.ConfigError, match=r"Optuna.*vidur-simpy\[search\]"):
        vs.recommend(cluster, workload, SLO, grid, objective="throughput", method="optuna")


def test_large_grids_are_halved_and_larger_ones_left_to_optuna(cluster, monkeypatch):
    """What was tried, and what was run in full, is told."""
    monkeypatch.setattr("vidur_simpy.search.recommendation.MAX_GRID", 5)
    monkeypatch.setattr("vidur_simpy.search.recommendation.MAX_HALVED", 40)
    workload = vs.Workload(vs.Poisson(60.0), vs.FixedLengths(512, 4), num_requests=150)
    options = {"price_per_gpu_hour": 1.0, "max_replications": 1, "max_tried": 16}
    for seqs, chunks, tried in (
        ([64], [512], 5),
        ([32, 64], [512, 1024], 20),
        (range(2, 12), [512], 16),
    ):
        grid = {
            "cluster.num_replicas": [1, 2, 3, 4, 5],
            "cluster.replica_scheduler.max_num_seqs": seqs,
            "cluster.replica_scheduler.chunk_size": chunks,
        }
        found = vs.recommend(cluster, workload, {"ttft:p90": 0.5}, grid, **options)
        size = len(found.table)
        told = [note for note in found.notes if f"{tried} of {size} configurations were tr" in note]
        assert bool(told) == (size > 5)


def test_halving_finds_what_the_whole_grid_finds(cluster, workload):
    """With fewer requests simulated; so does Optuna, with even fewer."""
    grid = {
        "cluster.num_replicas": [1, 2, 3, 4],
        "cluster.replica_scheduler.chunk_size": [256, 512, 1024],
        "cluster.replica_scheduler.max_num_seqs": [16, 128],
    }
    found = {
        method: vs.recommend(
            cluster,
            workload,
            SLO,
            grid,
            price_per_gpu_hour=1.0,
            method=method,
            max_tried=16,
            max_replications=2,
        )
        for method in ("grid", "halving", "optuna")
    }
    assert found["halving"].settings == found["optuna"].settings == found["grid"].settings
    assert "16 of 24 configurations were tried, 8 in full" in found["optuna"].notes
    in_full = {method: (each.table["verdict"] != "").sum() for method, each in found.items()}
    assert in_full["halving"] < in_full["grid"] == 24


def test_the_recommendation_does_not_depend_on_the_workers(cluster, workload):
    """One worker, two workers: the same table, bit for bit."""
    cheap = vs.Workload(vs.Poisson(30.0), vs.FixedLengths(512, 4), num_requests=60)
    one, two = (
        vs.recommend(
            cluster,
            cheap,
            SLO,
            {"cluster.num_replicas": [1, 2, 3, 4, 5, 6]},
            price_per_gpu_hour=1.0,
            method="optuna",
            max_tried=4,
            max_replications=2,
            jobs=jobs,
        )
        for jobs in (1, 2)
    )
    assert one.table.equals(two.table)
    assert (one.best, one.lead, one.notes) == (two.best, two.lead, two.notes)


# Figures


def test_a_front_is_drawn_among_those_that_meet_the_slo(advice):
    """Axes come back, given or new; points are told apart by verdict."""
    given = plt.subplots()[1]
    axes = advice.plot(y="ttft_p90", ax=given)
    assert axes is given
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"meets", "misses", "front"} <= set(texts)
    front = advice.pareto("cost_per_million_tokens", "ttft_p90")
    assert set(front["verdict"]) == {"meets"}
    assert axes.get_title() == f"{len(front)} of 6 configurations are not beaten"
    labelled = advice.plot("cost_per_hour", "ttft_p90", by="cluster.device", label="num_devices")
    assert {text.get_text() for text in labelled.texts} <= {"1", "2", "4"}


def test_latency_is_drawn_over_throughput(cluster, workload):
    """A curve per configuration, a point per rate."""
    grid = {"cluster.num_replicas": [1, 2], "workload.arrivals.rate": [10.0, 20.0, 30.0]}
    sweep = vs.sweep(cluster, workload, grid)
    axes = vs.plot_throughput_latency(sweep.table, "ttft_p90", by="cluster.num_replicas", limit=0.2)
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 2
    assert axes.get_xlabel() == "output token throughput (tokens/s)"
    with pytest.raises(vs.ConfigError, match="unknown column 'ttft_p9'"):
        vs.plot_throughput_latency(sweep.table, "ttft_p9")


def test_a_front_is_drawn_of_whatever_has_one(cluster, workload):
    """A sweep, its table, and results give the same figure; what is none of them is refused."""
    found = vs.sweep(cluster, workload, {"cluster.num_replicas": [1, 2]})
    given = [found, found.table, [found.result(row) for row in range(2)]]
    for each in given:
        ax = vs.plot_front(each, "ttft_p99", "output_token_throughput")
        assert ax.lines[0].get_xdata() == pytest.approx(found.table["ttft_p99"].to_numpy())
    with pytest.raises(vs.ConfigError, match="expected a table, a sweep"):
        vs.plot_front(3, "ttft_p99", "e2e_p99")


def test_many_groups_of_a_front_have_room_for_their_names():
    """The legend lies neither on the title nor on the data, and is whole."""
    rows = [{"x": index, "y": -index, "group": f"group of kind {index}"} for index in range(12)]
    ax = vs.plot_front(pd.DataFrame(rows), "x", "y", by="group")
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.title.get_window_extent())
    assert 0 <= legend.x0 < legend.x1 <= ax.figure.bbox.width


def test_a_front_of_nothing_says_so():
    """A table whose runs all failed."""
    table = pd.DataFrame({"cost": [np.nan], "ttft": [1.0]})
    axes = vs.plot_front(table, "cost", "ttft")
    assert "no row has a number" in axes.texts[0].get_text()


# The benchmark


def test_the_cost_search_finds_a_deployment_of_each_device(monkeypatch):
    """Two deployments and few requests: best first, with how many runs it took."""
    import cost_search

    fleet = cost_search.deployments("h100-80gb-sxm")
    assert len(fleet) == 50
    assert all(each.cluster.num_devices == 16 for each in fleet)
    monkeypatch.setattr(cost_search, "deployments", lambda device: fleet[22:24])
    monkeypatch.setattr(cost_search, "SLO", vs.Slo({"ttft:p50": 2.0}))
    row = cost_search.search("h100-80gb-sxm", "azure-code-2023", 60, jobs=1, exhaustive=True)
    assert row["num_deployments"] == 2
    assert row["requests_per_dollar"] == sorted(row["requests_per_dollar"], reverse=True)
    assert row["num_runs"] > 4
