"""What each figure shows, and that it stays light on a million requests."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy import plots, series
from vidur_simpy.errors import ConfigError
from vidur_simpy.result import NotAvailableError, Result

mpl.use("Agg")

import matplotlib.pyplot as plt

NAN = float("nan")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def made(ttft=(1.0,), *, num_replicas=1, until=100.0, tables=None, **columns):
    """Requests that arrive a second apart and end a second after their first token."""
    ttft = np.asarray(ttft, dtype=float)
    arrived_at = np.arange(len(ttft), dtype=float)
    requests = {
        "request_id": np.arange(len(ttft)),
        "replica_id": np.arange(len(ttft)) % num_replicas,
        "arrived_at": arrived_at,
        "scheduled_at": arrived_at + ttft / 2,
        "first_token_at": arrived_at + ttft,
        "completed_at": arrived_at + ttft + 1.0,
        "num_prefill_tokens": np.full(len(ttft), 100),
        "num_decode_tokens": np.full(len(ttft), 3),
        "num_restarts": np.zeros(len(ttft), int),
        "refusal": np.full(len(ttft), "", object),
    } | columns
    tables = {
        "requests": requests,
        "replicas": {"replica_id": list(range(num_replicas))},
        "timeline": {},
    } | (tables or {})
    return Result(tables, config=None, info={"simulated_time": until})


def table(names, *rows):
    return dict(zip(names.split(), map(list, zip(*rows, strict=True)), strict=True))


def samples(*rows):
    return table("time replica_id num_running num_waiting kv_cache_usage", *rows)


def stages(*rows):
    names = "replica_id batch_index stage_id started_at ended_at"
    return table(f"{names} num_prefill_tokens num_decode_tokens", *((*row, 0, 1) for row in rows))


def batches(*rows):
    """Batches of 10 ms each, back to back: (request, tokens, whether it decodes), ..."""
    columns = {name: [] for name in vs.COLUMNS["batches"]}
    for index, row in enumerate(rows):
        row = sorted(row, key=lambda each: not each[2])
        columns["replica_id"].append(0)
        columns["batch_index"].append(index)
        columns["scheduled_at"].append(0.01 * index)
        columns["completed_at"].append(0.01 * (index + 1))
        columns["request_ids"].append([request for request, _, _ in row])
        columns["num_tokens"].append([tokens for _, tokens, _ in row])
        columns["num_prefill_tokens"].append(sum(n for _, n, is_decode in row if not is_decode))
        columns["num_decode_tokens"].append(sum(n for _, n, is_decode in row if is_decode))
    return columns


def texts(ax):
    return {text.get_text() for text in ax.texts}


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curve(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def cells(ax):
    return np.asarray(ax.images[0].get_array())


# -- preemptions -----------------------------------------------------------------------------------


def test_a_preempted_decode_is_seen_in_its_batches():
    """Who decodes and then computes a prompt again was preempted at the end of its last batch."""
    steps = batches([(0, 100, False)], [(0, 1, True)], [], [(0, 102, False)], [(0, 1, True)])
    result = made(num_restarts=[1], tables={"batches": steps})
    assert series.preempted_at(result).tolist() == [0.02]


def test_a_preempted_prefill_is_seen_in_its_batches():
    """Chunks that are more than a prompt mean that the first ones were lost."""
    steps = batches([(0, 60, False)], [], [(0, 60, False)], [(0, 40, False)], [(0, 1, True)])
    result = made(num_restarts=[1], tables={"batches": steps})
    assert series.preempted_at(result).tolist() == [0.01]


def test_a_prefix_cache_hides_no_preemption():
    """A prefill that found tokens in the cache ends with its first decode."""
    steps = batches(
        [(0, 36, False)], [(0, 1, True)], [], [(0, 38, False)], [(0, 1, True)], [(0, 1, True)]
    )
    result = made(num_restarts=[1], tables={"batches": steps})
    assert series.preempted_at(result).tolist() == [0.02]


@pytest.mark.parametrize(
    "scheduler", [vs.Sarathi(chunk_size=128), vs.Vllm(), vs.Mnemosyne(ordering="edf")]
)
def test_every_preemption_of_a_run_is_found(scheduler):
    """As many as the requests count, each while the run lasts."""
    cluster = vs.Cluster(
        replica_scheduler=scheduler,
        kv_cache=vs.KVCache(num_blocks=100),
        max_model_len=1_024,
        execution_time=vs.Linear(),
    )
    workload = vs.Workload(vs.Poisson(50.0), vs.FixedLengths(200, 150), num_requests=30)
    result = vs.simulate(cluster, workload, record=("batches",))
    found = series.preempted_at(result)
    assert len(found) == result.figures["restarts"] > 5
    assert 0 < found.min() <= found.max() < result.info["simulated_time"]
    ax = result.plot.timeline()
    assert "preemptions" in labels(ax)
    assert f"{len(found)} preemptions" in ax.get_title()
    assert len(ax.collections[-1].get_segments()) <= 300


def test_without_batches_preemptions_are_counted_only():
    """The title says how many there were."""
    ax = made([1.0, 1.0], num_restarts=[2, 1]).plot.timeline()
    assert ax.get_title() == "Load of 1 replica, 3 preemptions"
    assert "preemptions" not in labels(ax)


# -- load ------------------------------------------------------------------------------------------


def test_a_replica_that_is_busy_again_is_not_idle_until_its_next_sample():
    """Samples of long runs are far apart; what stood before a short pause stands again."""
    timeline = samples((0.0, 0, 1, 0, 0.5), (20.0, 0, 1, 0, 0.5))
    columns = {"arrived_at": [0.0, 5.0, 20.0], "completed_at": [4.0, 9.0, 21.0]}
    ax = made([1.0] * 3, tables={"timeline": timeline}, **columns).plot.timeline()
    time, running = curve(ax, "running")
    assert list(zip(time, running, strict=True)) == [
        (0, 1),
        (4, 0),
        (5, 1),
        (9, 0),
        (20, 1),
        (21, 0),
    ]


def test_a_map_has_a_row_per_replica():
    """Each cell is a mean over time; what never got a request is empty."""
    timeline = samples((0.0, 0, 4, 1, 0.2), (0.0, 1, 2, 0, 0.6), (15.0, 0, 8, 0, 0.4))
    result = made([50.0, 50.0], num_replicas=3, tables={"timeline": timeline})
    result.info["measured_from"] = 0.0  # only the samples
    running = cells(result.plot.heatmap())
    assert running.shape == (3, 150)
    assert running.mean(axis=1) == pytest.approx([4.0, 2.0, 0.0])
    ax = result.plot.heatmap("kv_cache")
    assert cells(ax)[1] == pytest.approx(60.0)
    assert ax.images[0].get_clim() == (0.0, 100.0)
    assert ax.images[0].colorbar.ax.get_ylabel() == "KV cache in use (%)"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2"]


def test_the_map_of_an_unbalanced_run_says_so():
    """The busiest replica is compared with the mean."""
    ax = made([10.0] * 4, replica_id=[0, 0, 0, 1], num_replicas=2).plot.heatmap("running")
    rows = cells(ax).mean(axis=1)
    assert f"{rows.max() / rows.mean():.3f} times the mean" in ax.get_title()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "replica")


def test_the_map_of_busy_stages():
    """Half of two stages busy all the time are 50 %."""
    rows = [(0, b, s, 0.1 * (2 * b + s), 0.1 * (2 * b + s + 1)) for b in range(50) for s in (0, 1)]
    ax = made(tables={"stages": stages(*rows)}).plot.heatmap("utilisation")
    assert cells(ax) == pytest.approx(50.0)
    with pytest.raises(NotAvailableError, match=r"record=\('stages',\)"):
        made().plot.heatmap("utilisation")


def test_many_replicas_share_rows():
    """The map of 1,024 replicas has 256 rows, and one hot replica is still seen."""
    ids = range(1_024)
    timeline = samples(*((0.0, i, 100 if i == 700 else 1, 0, 0.1) for i in ids))
    result = made([], num_replicas=1_024, tables={"timeline": timeline})
    ax = result.plot.heatmap()
    assert cells(ax).shape == (256, 150)
    assert cells(ax)[175] == pytest.approx(100.0)
    assert len(ax.get_yticklabels()) <= 40


def test_a_map_of_nothing_says_so():
    """Measurements know no KV cache, and an empty run knows nothing."""
    assert texts(made([1.0]).plot.heatmap("kv_cache")) == {
        "there are no samples of KV cache in use"
    }
    assert texts(made([]).plot.heatmap()) == {"there are no samples of requests running"}
    with pytest.raises(ConfigError, match="unknown quantity 'utilization': did you mean 'utilisa"):
        made().plot.heatmap("utilization")


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 100)), min_size=1, max_size=30),
    st.integers(1, 9),
)
def test_means_of_spans_keep_the_integral(steps, num_spans):
    """Whatever the spans, they hold what the steps hold."""
    lengths, value = (np.array(column, dtype=float) for column in zip(*steps, strict=True))
    time = np.cumsum(lengths)
    edges = np.linspace(0.0, time[-1] + 1.0, num_spans + 1)
    total = (value * np.diff(np.append(time, edges[-1]))).sum()
    means = series.span_means(time, value, edges)
    assert (means * np.diff(edges)).sum() == pytest.approx(total, abs=1e-6)


# -- bubbles ---------------------------------------------------------------------------------------


def bubbles(ax):
    (found,) = [patch for patch in ax.patches if patch.get_label() == "bubble"]
    corners = found.get_path().vertices.reshape(-1, 5, 2)
    return [(box[0, 0], box[1, 0], round(box[:4, 1].mean())) for box in corners]


def test_a_stage_that_waits_for_another_has_a_bubble():
    """While neither stage works the replica is idle; the shares of both are told."""
    rows = [(0, 0, 0, 0.0, 2.0), (0, 0, 1, 2.0, 3.0), (0, 1, 0, 5.0, 7.0), (0, 1, 1, 7.0, 8.0)]
    ax = made(tables={"stages": stages(*rows)}).plot.gantt(start=0.0, duration=10.0)
    assert bubbles(ax) == [(2, 3, 0), (7, 8, 0), (0, 2, 1), (5, 7, 1)]
    assert ax.get_title() == "Batches on their stages: 30.0% bubbles, 40.0% idle"
    right = ax.child_axes[0]
    assert [text.get_text() for text in right.get_yticklabels()] == ["20% + 40%", "40% + 40%"]
    assert right.get_ylabel() == "bubbles + idle"
    assert "bubble" in labels(ax)


def test_one_stage_has_no_bubbles():
    """Without a pipeline a gap is idle time."""
    rows = [(0, 0, 0, 0.0, 1.0), (0, 1, 0, 3.0, 4.0)]
    ax = made(tables={"stages": stages(*rows)}).plot.gantt()
    assert ax.get_title() == "Batches on their stages: 50.0% idle"
    assert ax.child_axes[0].get_ylabel() == "idle"
    assert "bubble" not in labels(ax)


def test_bubbles_and_utilisation_agree():
    """Over a whole run, what is no bubble and not idle is the utilisation."""
    cluster = vs.Cluster(pipeline_parallel_size=2, execution_time=vs.Linear())
    workload = vs.Workload(vs.Poisson(4.0), vs.FixedLengths(400, 10), num_requests=20)
    result = vs.simulate(cluster, workload, record=("stages",))
    end = result.info["simulated_time"]
    ax = result.plot.gantt(start=0.0, duration=end)
    gaps = plots.stages._gaps(result.stages, [(0, 0), (0, 1)], 0.0, end)
    busy = 1 - gaps.bubble_share - gaps.idle_share
    assert busy.mean() == pytest.approx(result.figures["utilisation"])
    assert f"{gaps.bubble_share.mean():.1%} bubbles" in ax.get_title()


def test_the_first_of_very_many_replicas_are_shown():
    """As many as have room; the title says so, and any other can be chosen."""
    rows = [(replica_id, 0, s, s, s + 1.0) for replica_id in range(300) for s in (0, 1)]
    result = made(tables={"stages": stages(*rows)})
    ax = result.plot.gantt()
    assert ax.get_title().endswith("\nfirst 64 of 300 replicas")
    assert ax.get_ylim() == (127.6, -0.6)
    assert result.plot.gantt(replica_id=299).get_ylim() == (1.6, -0.6)
    with pytest.raises(ConfigError, match=r"replica_id = 300: expected one of 0, 1, \.\.\., 299"):
        result.plot.gantt(replica_id=300)


# -- TTFT and TPOT ---------------------------------------------------------------------------------


def test_shares_of_the_quadrants_are_those_of_the_slo():
    """Together with what was not completed they are all requests."""
    result = made(
        [0.1, 0.1, 9.0, 9.0, 0.1, NAN],
        completed_at=[1.0, 30.0, 11.5, 40.0, 4.15, NAN],
        num_decode_tokens=[3, 3, 3, 3, 1, 3],
        refusal=["", "", "", "", "", "too long"],
    )
    ax = result.plot.ttft_tpot(ttft=1.0, tpot=2.0)
    assert texts(ax) == {
        "33.3% within limits",
        "16.7% TPOT too long",
        "16.7% TTFT too long",
        "16.7% both too long",
    }
    assert result.slo(ttft=1.0, tpot=2.0)["attainment"] == pytest.approx(2 / 6)
    assert ax.get_title() == "TTFT and TPOT of 4 of 6 requests, 16.7% not completed"
    assert ax.get_xlabel() == "time to first token (s), limit 1"
    assert labels(ax) == ["meets the limits", "misses a limit"]
    assert len({line.get_marker() for line in ax.lines[:2]}) == 2


def test_one_limit_makes_two_parts_and_none_makes_one():
    """Only what was asked for is drawn."""
    result = made([0.5, 2.0, 2.0, 2.0])
    assert texts(result.plot.ttft_tpot(ttft=1.0)) == {"25.0% within limits", "75.0% TTFT too long"}
    assert texts(result.plot.ttft_tpot(tpot=0.1)) == {"0.0% within limits", "100.0% TPOT too long"}
    ax = result.plot.ttft_tpot()
    assert not ax.texts
    assert ax.get_legend() is None
    assert not [line for line in ax.lines if line.get_linestyle() == "--"]


def test_many_points_become_hexagons():
    """As many requests as there are points, in a few hundred cells."""
    rng = np.random.default_rng(0)
    result = made(rng.lognormal(size=5_000), completed_at=1e4 + rng.lognormal(9.0, 1.0, size=5_000))
    ax = result.plot.ttft_tpot(ttft=1.0)
    (hexagons,) = ax.collections
    assert hexagons.get_array().sum() == 5_000
    assert len(hexagons.get_offsets()) < 3_000
    assert ax.get_legend() is None


@pytest.mark.parametrize("ttft", [[], [NAN], [0.0]])
def test_latencies_that_have_no_place_on_a_logarithmic_axis(ttft):
    """Nothing, what did not happen, and zero draw an empty figure that says so."""
    ax = made(ttft).plot.ttft_tpot(ttft=1.0, tpot=1.0)
    ax.figure.canvas.draw()
    assert "no request has both latencies" in texts(ax)
    with pytest.raises(ConfigError, match="limit tpot = 0"):
        made().plot.ttft_tpot(tpot=0)


# -- deadlines -------------------------------------------------------------------------------------


def test_deadlines_missed_over_time():
    """A refused request missed its deadline; one that may still meet it is left out."""
    result = made(
        [1.0, 3.0, NAN, NAN, NAN, 1.0],
        deadline=[2.0, 3.0, 4.0, 50.0, 5.0, NAN],
        refusal=["", "", "too long", "", "", ""],
        until=10.0,
    )
    ax = result.plot.deadline_misses(window=2.5)
    assert ax.get_title() == "75.0% of 4 first tokens after their deadline"
    assert ax.patches[0].get_data().values.tolist() == [0.0, 100.0, 100.0]
    right = ax.figure.axes[-1]
    assert right.lines[0].get_ydata().tolist() == [1, 2, 1, 1]
    assert (ax.get_xlabel(), right.get_ylabel()) == ("deadline (s)", "deadlines")
    assert labels(ax) == ["missed", "deadlines (right axis)"]


def test_a_deadline_may_be_one_of_the_completion():
    """It comes later than the first token; equal to the deadline is in time."""
    result = made([1.0, 1.0], deadline=[2.0, 2.5])
    assert "0.0% of 2 first tokens" in result.plot.deadline_misses().get_title()
    title = result.plot.deadline_misses(due="completed_at").get_title()
    assert title == "50.0% of 2 completions after their deadline"


def test_deadlines_missed_by_the_time_that_was_given():
    """Short deadlines are missed here, generous ones are met."""
    ttft = np.full(100, 1.0)
    slack = np.geomspace(0.1, 10.0, 100)
    ax = made(ttft, deadline=np.arange(100) + slack).plot.deadline_misses(by="slack")
    shares = ax.patches[0].get_data().values
    assert shares.tolist() == [100.0, 100.0, 0.0, 0.0]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "time from arrival to deadline (s)")


def test_deadlines_of_a_scheduler_are_drawn():
    """Mnemosyne sets them; equal ones make one bar."""
    cluster = vs.Cluster(replica_scheduler=vs.Mnemosyne(ordering="edf"), execution_time=vs.Linear())
    workload = vs.Workload(vs.Poisson(20.0), vs.FixedLengths(400, 10), num_requests=20)
    result = vs.simulate(cluster, workload)
    for by in ("deadline", "slack"):
        ax = result.plot.deadline_misses(by=by)
        ax.figure.canvas.draw()
        missed = (result.requests["first_token_at"] > result.requests["deadline"]).mean()
        assert ax.get_title() == f"{missed:.1%} of 20 first tokens after their deadline"


def test_without_deadlines_the_figure_says_so():
    """And a misspelt option names the nearest one."""
    assert texts(made().plot.deadline_misses()) == {"no request has a deadline"}
    assert texts(made(deadline=[NAN]).plot.deadline_misses()) == {"no request has a deadline"}
    with pytest.raises(ConfigError, match="'slac': did you mean 'slack'"):
        made().plot.deadline_misses(by="slac")
    with pytest.raises(ConfigError, match="did you mean 'completed_at'"):
        made().plot.deadline_misses(due="completed")


# -- windows and legends ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantiles", "composition", "deadline_misses"])
def test_windows_that_nobody_sees_are_refused(name):
    """A million of them would take a minute and show nothing."""
    steps = {"batches": batches([(0, 1, True)], [(0, 1, True)])}
    result = made([1.0, 1.0], deadline=[1.0, 2.0], tables=steps)
    with pytest.raises(ConfigError, match="windows: expected at most 2000, so"):
        getattr(result.plot, name)(window=1e-7)
    with pytest.raises(ConfigError, match="window = 0"):
        getattr(result.plot, name)(window=0)


def test_quantiles_of_tokens_are_elsewhere():
    """The message says where."""
    with pytest.raises(ConfigError, match=r"draw cdf\('itl'\)"):
        made().plot.quantiles("itl")
    with pytest.raises(ConfigError, match="'itll': did you mean 'itl'"):
        made().plot.cdf("itll")


def legend_hides_data(ax):
    """Whether the legend lies on the axes."""
    ax.figure.canvas.draw()
    return bool(ax.get_legend().get_window_extent().overlaps(ax.get_window_extent()))


def test_legends_and_titles_stay_off_the_data():
    """However many curves there are, and however long their names."""
    _, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for index in range(4):
        made([1.0, 2.0]).plot.cdf(ax=ax, label=f"a rather long name of run {index} " * 2)
    legend, title = ax.get_legend(), ax.title
    assert not legend_hides_data(ax)
    assert not legend.get_window_extent().overlaps(title.get_window_extent())
    assert ax.get_window_extent().width > 400
    for name in ("quantiles", "timeline"):
        assert not legend_hides_data(getattr(made([1.0, 2.0]).plot, name)())


# -- several runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_rate():
    cluster = vs.Cluster(execution_time=vs.Linear())

    def run(rate):
        workload = vs.Workload(vs.Constant(rate), vs.FixedLengths(512, 16), num_requests=60)
        return vs.simulate(cluster, workload)

    return {rate: run(rate) for rate in (5.0, 20.0, 80.0, 160.0)}


def test_results_by_rate_are_a_curve(by_rate):
    """A point per run, with units on both axes."""
    ax = vs.plot_throughput_latency(by_rate, limit=0.1)
    assert len(ax.lines[0].get_xdata()) == 4
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "output token throughput (tokens/s)",
        "TTFT p99 (s)",
    )
    assert labels(ax) == ["limit 0.1 s"]


def test_results_by_name_are_points(by_rate):
    """Names are shown as they are, and no line joins what has nothing in common."""
    ax = vs.plot_throughput_latency({"_$a$": by_rate[5.0], "b": by_rate[80.0]})
    assert [len(line.get_xdata()) for line in ax.lines] == [1, 1]
    assert labels(ax) == [r" _\$a\$", "b"]


def test_attainment_falls_with_the_rate(by_rate):
    """It is what slo() says of each run, and each limit has a curve of its own."""
    limits = {"ttft": 0.1, "tpot": 0.02}
    ax = vs.plot_attainment(by_rate, slo=limits, goal=0.9)
    rates, shares = curve(ax, "all limits")
    assert rates.tolist() == [5.0, 20.0, 80.0, 160.0]
    expected = [100 * run.slo(**limits)["attainment"] for run in by_rate.values()]
    assert shares.tolist() == pytest.approx(expected)
    assert expected[0] == 100 > expected[-1]
    assert labels(ax) == ["all limits", "TTFT", "TPOT", "goal 90%"]
    assert ax.get_xlabel() == "arrival rate (requests/s)"
    assert len({line.get_linestyle() for line in ax.lines}) > 2


def test_attainment_of_a_sweep():
    """A curve per configuration; of replications the mean, in a band."""
    workload = vs.Workload(vs.Poisson(5.0), vs.FixedLengths(512, 16), num_requests=20)
    grid = {"cluster.num_replicas": [1, 2], "workload.arrivals.rate": [20.0, 60.0]}
    cluster = vs.Cluster(execution_time=vs.Linear())
    found = vs.sweep(cluster, workload, grid, slo={"ttft": 0.06}, replications=2)
    ax = vs.plot_attainment(found, by="cluster.num_replicas")
    assert labels(ax) == ["1", "2"]
    assert ax.get_title() == "SLO attainment against load, by num replicas"
    means = found.table.groupby(["cluster.num_replicas", "workload.arrivals.rate"])
    shares = means["slo_attainment"].mean()
    assert curve(ax, "1")[1] == pytest.approx(100 * shares[1].to_numpy())
    assert len(ax.collections) >= 1
    over = vs.plot_throughput_latency(found, by="cluster.num_replicas")
    assert [len(line.get_xdata()) for line in over.lines] == [2, 2]


@pytest.fixture(scope="module")
def grid_of_rates():
    workload = vs.Workload(vs.Constant(5.0), vs.FixedLengths(512, 16), num_requests=20)
    grid = {"cluster.num_replicas": [1, 2], "workload.arrivals.rate": [20.0, 5.0, 60.0]}
    cluster = vs.Cluster(execution_time=vs.Linear())
    return vs.sweep(cluster, workload, grid, slo={"ttft": 0.06})


def test_a_line_joins_one_configuration(grid_of_rates):
    """By default each setting that differs but the rate has a curve, from rate to rate."""
    over = vs.plot_throughput_latency(grid_of_rates)
    assert labels(over) == ["1", "2"]
    assert over.get_title() == "Latency against throughput, by num replicas"
    table = grid_of_rates.table.sort_values("workload.arrivals.rate")
    for number in (1, 2):
        rows = table[table["cluster.num_replicas"] == number]
        x, y = curve(over, str(number))
        assert x.tolist() == rows["output_token_throughput"].tolist()
        assert y.tolist() == rows["ttft_p99"].tolist()
    assert labels(vs.plot_attainment(grid_of_rates)) == ["1", "2"]
    by_rate = vs.plot_attainment(grid_of_rates, load="cluster.num_replicas")
    assert labels(by_rate) == ["20.0", "5.0", "60.0"]


def test_all_runs_can_be_one_curve(grid_of_rates):
    """An empty list of columns says so."""
    (line,) = vs.plot_throughput_latency(grid_of_rates, by=[]).lines
    assert len(line.get_xdata()) == 6
    assert labels(vs.plot_attainment(grid_of_rates, by=[])) == ["all limits"]


def test_without_rates_each_configuration_is_a_point_with_a_name():
    """What has nothing in common is not joined; more than can be told apart are refused."""
    rows = [{"cluster.num_replicas": n, "ttft_p99": 1.0, "throughput": n} for n in range(1, 26)]
    table = pd.DataFrame(rows)
    ax = vs.plot_throughput_latency(table[:3], throughput="throughput")
    assert labels(ax) == ["1", "2", "3"]
    assert [len(line.get_xdata()) for line in ax.lines] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"num_replicas make 25 curves: .* say by="):
        vs.plot_throughput_latency(table, throughput="throughput")


def test_attainment_of_a_capacity_search():
    """The goal is what was asked for; quantiles say nothing of shares."""
    workload = vs.Workload(vs.Poisson(8.0), vs.FixedLengths(512, 16), num_requests=200)
    cluster = vs.Cluster(execution_time=vs.Linear())
    slo = vs.Slo({"ttft": 0.1}, fraction=0.9)
    ax = vs.plot_attainment(vs.capacity(cluster, workload, slo, tolerance=0.5))
    assert labels(ax) == ["all limits", "goal 90%"]
    table = pd.DataFrame({"rate": [1.0], "ttft_p99": [1.0]})
    with pytest.raises(ConfigError, match="limits with a fraction"):
        vs.plot_attainment(table)


def test_runs_that_are_none_are_refused(by_rate):
    """One message each, with the nearest name."""
    with pytest.raises(ConfigError, match="expected a Sweep, a Capacity, a table, or results"):
        vs.plot_attainment([1])
    with pytest.raises(ConfigError, match="expected a Sweep"):
        vs.plot_throughput_latency({"a": 3})
    with pytest.raises(ConfigError, match="give slo="):
        vs.plot_attainment(by_rate)
    with pytest.raises(ConfigError, match="unknown column 'tftt_p99': did you mean 'ttft_p99'"):
        vs.plot_throughput_latency(by_rate, "tftt_p99")
    with pytest.raises(ConfigError, match="unknown column 'rat': did you mean 'rate'"):
        vs.plot_attainment(by_rate, slo={"ttft": 1.0}, load="rat")
    with pytest.raises(ConfigError, match="has no column 'rate': say load="):
        vs.plot_attainment(pd.DataFrame({"slo_attainment": [1.0]}))


# -- measurements ----------------------------------------------------------------------------------


def test_figures_of_a_measurement(tmp_path):
    """Each is drawn, is empty and says why, or says that a measurement does not know it."""
    workload = vs.Workload(vs.Poisson(20.0), vs.FixedLengths(100, 5), num_requests=20)
    cluster = vs.Cluster(execution_time=vs.Linear())
    vs.simulate(cluster, workload).to_vllm_bench(tmp_path / "bench.json")
    measured = vs.load_vllm_bench(tmp_path / "bench.json")
    for name in ("cdf", "quantiles", "timeline", "heatmap", "ttft_tpot"):
        assert not getattr(measured.plot, name)().texts, name
    assert texts(measured.plot.deadline_misses()) == {"no request has a deadline"}
    assert "no samples" in texts(measured.plot.heatmap("kv_cache")).pop()
    for name in ("composition", "gantt", "operators"):
        with pytest.raises(NotAvailableError, match="not known of a measurement by vllm bench"):
            getattr(measured.plot, name)()


# -- a million requests ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def million():
    """A run of 10,000 seconds on 64 replicas, from arrays."""
    rng = np.random.default_rng(0)
    num_requests, num_replicas, num_batches = 1_000_000, 64, 20_000
    ttft = rng.lognormal(-1.5, 0.9, num_requests)
    arrived_at = 0.01 * np.arange(num_requests)
    time = np.sort(rng.uniform(0, 1e4, num_batches))
    replica_id = np.arange(num_batches) % num_replicas
    timeline = {
        "time": time,
        "replica_id": replica_id,
        "num_running": rng.integers(0, 60, num_batches),
        "num_waiting": rng.poisson(3, num_batches),
        "kv_cache_usage": rng.uniform(size=num_batches),
    }
    load = {
        "replica_id": replica_id,
        "batch_index": np.arange(num_batches) // num_replicas,
        "num_prefill_tokens": rng.integers(0, 2, num_batches) * 100,
        "num_decode_tokens": rng.integers(0, 2, num_batches) * 50,
    }
    members = {"request_ids": [[0]] * num_batches, "num_tokens": [[1]] * num_batches}
    tokens = {"inter_token_latency": ttft[:num_batches], "num_tokens": [1] * num_batches}
    tables = {
        "timeline": timeline,
        "batches": load | members | {"scheduled_at": time, "completed_at": time + 0.01},
        "stages": load | {"stage_id": 0 * replica_id, "started_at": time, "ended_at": time + 0.01},
        "tokens": tokens | {"time": time, "replica_id": replica_id},
        "operators": table(" ".join(vs.COLUMNS["operators"]), (0, 0, "mixed", "mlp", 9, 1.0, 1.0)),
    }
    return made(
        ttft,
        num_replicas=num_replicas,
        tables=tables,
        arrived_at=arrived_at,
        scheduled_at=arrived_at + ttft / 2,
        first_token_at=arrived_at + ttft,
        completed_at=arrived_at + ttft + rng.lognormal(1.0, 1.0, num_requests),
        deadline=arrived_at + rng.lognormal(-1.0, 0.5, num_requests),
    )


def num_vertices(ax):
    """How many points a file of vectors has to hold."""
    found = 0
    for each in (ax, *[other for other in ax.figure.axes if other is not ax]):
        found += sum(len(line.get_xdata()) for line in each.lines)
        found += sum(len(patch.get_path().vertices) for patch in each.patches)
        for drawn in each.collections:
            shapes = [len(path.vertices) for path in drawn.get_paths()]
            repeats = len(drawn.get_offsets()) if len(shapes) == 1 else 1
            found += repeats * sum(shapes)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in plots.__all__),
        ("cdf", {"complementary": True, "log": True}),
        ("heatmap", {"quantity": "utilisation"}),
        ("ttft_tpot", {"ttft": 0.5, "tpot": 1.0}),
        ("deadline_misses", {"by": "slack"}),
    ],
)
def test_a_million_requests_are_few_points(million, name, options, tmp_path):
    """Lines are thinned, points and cells are counted, so that the file stays small."""
    ax = getattr(million.plot, name)(**options)
    assert num_vertices(ax) < 30_000
    ax.figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size < 300_000
