from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def made(ttft, num_replicas=1, **tables):
    """Requests that arrive a second apart, wait half of their ttft, and end a second after it."""
    ttft = np.asarray(ttft, dtype=float)
    arrived_at = np.arange(len(ttft), dtype=float)
    count = np.ones(len(ttft), dtype=int)
    requests = {
        "request_id": np.arange(len(ttft)),
        "replica_id": np.arange(len(ttft)) % num_replicas,
        "arrived_at": arrived_at,
        "scheduled_at": arrived_at + ttft / 2,
        "first_token_at": arrived_at + ttft,
        "completed_at": arrived_at + ttft + 1.0,
        "num_prefill_tokens": 100 * count,
        "num_decode_tokens": 3 * count,
        "num_restarts": 0 * count,
        "refusal": [""] * len(ttft),
    }
    replicas = {"replica_id": list(range(num_replicas))}
    tables = {"requests": requests, "replicas": replicas, "timeline": {}} | tables
    return Result(tables, config=None, info={"simulated_time": 100.0})


def samples(*rows):
    names = ("time", "replica_id", "num_running", "num_waiting", "kv_cache_usage")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def stages(num_batches, num_stages=1, replica_id=0, prefill=0, decode=8):
    """Batches of 10 ms each, one after another, through a pipeline."""
    rows = [
        (replica_id, b, s, 0.01 * (b + s), 0.01 * (b + s + 1), prefill, decode)
        for b in range(num_batches)
        for s in range(num_stages)
    ]
    names = ("replica_id", "batch_index", "stage_id", "started_at", "ended_at")
    names += ("num_prefill_tokens", "num_decode_tokens")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def batches(num_batches, prefill=0, decode=8):
    """Batches formed 10 ms apart, each of one long prompt chunk and some decodes."""
    count = range(num_batches)
    return {
        "replica_id": [0 for _ in count],
        "batch_index": list(count),
        "scheduled_at": [0.01 * index for index in count],
        "completed_at": [0.01 * (index + 1) for index in count],
        "request_ids": [[0] for _ in count],
        "num_tokens": [[prefill + decode] for _ in count],
        "num_prefill_tokens": [prefill for _ in count],
        "num_decode_tokens": [decode for _ in count],
    }


def joined(parts):
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def line(ax, label):
    """Return x and y of the line with this label."""
    (found,) = [one for one in ax.lines if one.get_label().startswith(label)]
    return found.get_xdata().tolist(), found.get_ydata().tolist()


def num_bars(ax):
    """How many boxes there are of each kind, bubbles aside."""
    boxes = {patch.get_label(): len(patch.get_path().vertices) // 5 for patch in ax.patches}
    return {kind: number for kind, number in boxes.items() if kind != "bubble"}


# -- cdf -------------------------------------------------------------------------------------------


def test_cdf_rises_at_each_value():
    """The curve starts at the least value and gains an equal share at each."""
    ax = plots.cdf(made([4.0, 1.0, 2.0, 3.0]))
    assert line(ax, "p50") == ([1.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    assert ax.get_xlabel() == "time to first token (s)"
    assert ax.get_ylabel() == "share of requests at or below"
    assert ax.get_title() == "Distribution of the time to first token"


def test_cdf_lists_its_quantiles():
    """The legend has the same p50, p90 and p99 as the summary; marks lie on the curve."""
    ax = plots.cdf(made([1.0, 2.0, 3.0, 4.0]))
    (text,) = ax.get_legend().get_texts()
    assert text.get_text() == "p50 2.500, p90 3.700, p99 3.970 s"
    marks = ax.lines[1]
    assert marks.get_xdata() == pytest.approx([2.5, 3.7, 3.97])
    assert marks.get_ydata() == pytest.approx([0.5, 0.75, 0.75])


def test_complementary_cdf_shows_the_tail():
    """The share at or above falls from one to that of the greatest value, on a log axis."""
    ax = plots.cdf(made([4.0, 1.0, 2.0, 3.0]), complementary=True, log=True)
    assert line(ax, "p50") == ([1.0, 2.0, 3.0, 4.0], [1.0, 0.75, 0.5, 0.25])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_ylabel() == "share of requests at or above"


def test_cdf_leaves_out_what_did_not_happen():
    """Requests without a value are not in the distribution."""
    x, y = line(plots.cdf(made([1.0, NAN, 3.0])), "p50")
    assert (x, y) == ([1.0, 1.0, 3.0], [0.0, 0.5, 1.0])


def test_cdf_of_inter_token_latencies():
    """They are weighted with the tokens they stand for."""
    tokens = {"time": [0, 0], "replica_id": [0, 0]}
    tokens |= {"inter_token_latency": [0.2, 0.1], "num_tokens": [1, 3]}
    ax = plots.cdf(made([1.0], tokens=tokens), "itl")
    assert line(ax, "p50") == ([0.1, 0.1, 0.2], [0.0, 0.75, 1.0])
    assert ax.get_xlabel() == "inter-token latency (s)"
    with pytest.raises(NotAvailableError, match="tokens were not recorded"):
        plots.cdf(made([1.0]), "itl")


def test_cdf_of_any_numeric_column():
    """Also of lengths, in tokens; what is no number is refused with the nearest name."""
    assert (
        plots.cdf(made([1.0, 2.0]), "num_prefill_tokens").get_xlabel() == "prompt length (tokens)"
    )
    with pytest.raises(ConfigError, match="unknown metric 'tftt': did you mean 'ttft'"):
        plots.cdf(made([1.0]), "tftt")
    with pytest.raises(ConfigError, match="unknown metric 'refusal'"):
        plots.cdf(made([1.0]), "refusal")


def test_curves_on_one_axes_differ_in_colour_and_style():
    """Several results can be compared without colours."""
    ax = plots.cdf(made([1.0, 2.0]), label="two replicas")
    assert plots.cdf(made([1.0, 3.0]), ax=ax, label="one replica") is ax
    curves = [one for one in ax.lines if one.get_gid() == "cdf"]
    assert [one.get_label().split(":")[0] for one in curves] == ["two replicas", "one replica"]
    assert curves[0].get_linestyle() != curves[1].get_linestyle()
    assert curves[0].get_color() != curves[1].get_color()


def test_the_title_follows_a_legend_that_is_moved():
    """With the call that the docstring names."""
    ax = plots.cdf(made([1.0, 2.0]))
    ax.legend(loc="lower right")
    ax.set_title(ax.get_title())
    ax.figure.canvas.draw()
    assert ax.title.get_window_extent().y0 - ax.get_window_extent().y1 < 12


@pytest.mark.parametrize("logs", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("complementary", [False, True])
def test_axes_hold_every_curve(complementary, logs):
    """A slower run that is drawn later is shown to its end, and so are its marks."""
    options = {"complementary": complementary}
    fast, slow = made([0.1, 0.2, 0.3]), made([10.0, 20.0, 30.0])
    for first, second in ((fast, slow), (slow, fast)):
        ax = plots.cdf(first, log=logs[0], label="first", **options)
        plots.cdf(second, ax=ax, log=logs[1], label="second", **options)
        left, right = ax.get_xlim()
        assert left <= 0.1 < 30.0 <= right < 40.0
        assert left == 0 or any(logs)


def test_axes_hold_values_below_zero():
    """The left end is 0 only if nothing is below it, whichever curve came first."""
    below = made([1.0, 2.0])
    below.requests["slack"] = [-2.0, 1.0]
    above = made([1.0, 2.0])
    above.requests["slack"] = [1.0, 2.0]
    for first, second in ((below, above), (above, below)):
        ax = plots.cdf(first, "slack")
        assert plots.cdf(second, "slack", ax=ax).get_xlim()[0] < -2


@pytest.mark.parametrize("complementary", [False, True])
def test_large_distributions_are_thinned(complementary):
    """A million values become some thousand points that keep both tails."""
    values = np.sort(np.random.default_rng(0).lognormal(size=1_000_000))
    shares = np.arange(1, 1_000_001) / 1_000_000
    x, y = series.distribution_steps(values, shares, complementary=complementary)
    assert len(x) <= 5_000
    assert np.isin(values[:10], x).all()
    assert np.isin(values[-10:], x).all()
    at = np.linspace(0.1, 10, 50)
    drawn = y[np.searchsorted(x, at)] if complementary else y[np.searchsorted(x, at) - 1]
    exact = (values[:, None] >= at).mean(axis=0)
    assert drawn == pytest.approx(exact if complementary else 1 - exact, abs=1e-3)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ttft", [[], [NAN], [0.0, 0.0], [0.0, 1.0], [2.0]])
def test_cdf_of_degenerate_values(ttft, log):
    """No values, one value, equal values and zeros draw without a warning."""
    ax = plots.cdf(made(ttft), log=log)
    ax.figure.canvas.draw()
    assert ax.get_xlabel() == "time to first token (s)"


# -- quantiles -------------------------------------------------------------------------------------


def test_quantiles_by_window_of_arrival():
    """Ten requests in windows of five seconds: the second window is ten times slower."""
    ax = plots.quantiles(made([1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0]), window=5.0)
    assert line(ax, "p50") == ([2.5, 7.5], [3.0, 30.0])
    assert line(ax, "p90")[1] == pytest.approx([4.6, 46.0])
    assert ax.get_title() == "Time to first token, by windows of 5 s"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("arrival (s)", "time to first token (s)")
    assert len({(one.get_linestyle(), one.get_marker()) for one in ax.lines}) == 3


def test_empty_windows_are_gaps():
    """A window in which nothing got its first token has no quantile."""
    x, y = line(plots.quantiles(made([1.0, NAN, 3.0]), window=1.0), "p99")
    assert x == [0.5, 1.5, 2.5]
    assert np.isnan(y[1])


@given(st.integers(1, 5_000), st.floats(1e-3, 1e5))
def test_windows_are_round_and_few(num_requests, span):
    """By default there are at most some forty windows, of 1, 2 or 5 times a power of ten."""
    window = series.round_window(np.linspace(0, span, num_requests))
    assert f"{window:.0e}"[0] in "125"
    assert window == pytest.approx(float(f"{window:.0e}"))
    assert span / window <= 40.001 or num_requests == 1


@pytest.mark.parametrize("ttft", [[], [NAN, NAN], [1.0]])
def test_quantiles_of_few_requests(ttft):
    """None or one draw without a warning."""
    ax = plots.quantiles(made(ttft))
    ax.figure.canvas.draw()
    assert "time to first token" in ax.get_ylabel()


@pytest.mark.parametrize("figure", [plots.quantiles, plots.timeline])
def test_figures_over_time_hold_every_run(figure):
    """Whichever of two runs is longer and slower, the axes of both hold it."""
    short, long = made([1.0] * 10), made([50.0] * 90)
    for first, second in ((short, long), (long, short)):
        ax = figure(second, ax=figure(first))
        drawn = np.concatenate([one.get_xydata() for one in ax.lines])
        low, high = np.transpose([ax.get_xlim(), ax.get_ylim()])
        assert (low <= np.nanmin(drawn, axis=0)).all()
        assert (np.nanmax(drawn, axis=0) <= high).all()


@pytest.mark.parametrize("window", [0, -1.0, NAN])
def test_window_is_positive(window):
    """A window without length is refused."""
    with pytest.raises(ConfigError, match="window"):
        plots.quantiles(made([1.0]), window=window)


# -- timeline --------------------------------------------------------------------------------------


def test_timeline_sums_replicas():
    """Each replica's last sample stands until its next one."""
    timeline = samples((0.0, 0, 1, 0, 0.2), (1.0, 1, 3, 2, 0.6), (2.0, 0, 2, 1, 0.4))
    result = made([50.0, 50.0], num_replicas=2, timeline=timeline)
    ax = plots.timeline(result)
    right = ax.figure.axes[1]
    assert ax.lines[0].get_drawstyle() == "steps-post"
    assert [y[:3] for _, y in (line(ax, "running"), line(ax, "waiting"))] == [[1, 4, 5], [0, 2, 3]]
    assert line(right, "KV cache")[1][:3] == pytest.approx([10.0, 40.0, 50.0])
    assert right.get_ylabel() == "KV cache in use (%)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "requests")
    assert len({one.get_linestyle() for one in (*ax.lines, *right.lines)}) == 3
    assert len(ax.get_legend().get_texts()) == 3


def test_idle_replicas_run_nothing():
    """A replica whose last request is complete forms no batch, yet its line falls to zero."""
    timeline = samples((0.0, 0, 1, 0, 0.5), (10.0, 0, 1, 0, 0.5))
    result = made([1.0] + [NAN] * 9 + [1.0], timeline=timeline)
    requests = result.requests.iloc[[0, 10]]
    idle = Result(
        {"requests": requests, "replicas": result.replicas, "timeline": timeline},
        config=None,
        info={},
    )
    assert line(plots.timeline(idle), "running") == ([0.0, 2.0, 10.0, 12.0], [1, 0, 1, 0])


def test_timeline_without_samples():
    """It comes from the requests then, and knows no KV cache."""
    ax = plots.timeline(made([2.0, 2.0]))
    assert line(ax, "waiting") == ([0.0, 1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0, 0])
    assert line(ax, "running") == ([0.0, 1.0, 2.0, 3.0, 4.0], [0, 1, 2, 1, 0])
    assert len(ax.figure.axes) == 1


def test_timeline_without_requests():
    """It says that none arrived."""
    ax = plots.timeline(made([]))
    assert [text.get_text() for text in ax.texts] == ["no request arrived"]


def test_timeline_of_refused_requests():
    """They did arrive, and were refused."""
    refused = made([NAN, NAN])
    refused.requests["refusal"] = "too long"
    ax = plots.timeline(refused)
    assert [text.get_text() for text in ax.texts] == ["every request was refused"]


def test_many_samples_become_means_and_ranges():
    """Too many steps to see are drawn as a mean in a band that keeps the extremes."""
    time = np.arange(100_000) / 100
    waiting = np.where(time == 500.0, 1_000, 3)
    ones = np.ones(100_000, dtype=int)
    columns = {"time": time, "replica_id": 0 * ones, "num_running": ones, "num_waiting": waiting}
    ax = plots.timeline(made([NAN], timeline=columns | {"kv_cache_usage": 0.5 * ones}))
    x, y = line(ax, "waiting")
    assert len(x) == 300
    assert max(y) == pytest.approx(3 + 997 * 0.01 / (999.99 / 300))
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (3, 1_000)
    assert "mean and range per 3.333 s" in ax.get_title()


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 100)), min_size=2, max_size=50),
    st.integers(1, 20),
)
def test_spans_keep_integral_and_extremes(steps, num_spans):
    """Means of spans weigh what the steps weigh; the range is that of the steps."""
    lengths, value = (np.array(column, dtype=float) for column in zip(*steps, strict=True))
    time = np.cumsum(lengths)
    _, mean, least, greatest = series.spans(time, value, num_spans)
    span = (time[-1] - time[0]) / num_spans
    assert mean.sum() * span == pytest.approx((value[:-1] * np.diff(time)).sum(), abs=1e-6)
    assert (least.min(), greatest.max()) == (value.min(), value.max())
    assert (mean >= least - 1e-6).all()
    assert (mean <= greatest + 1e-6).all()


# -- gantt -----------------------------------------------------------------------------------------


def test_gantt_draws_a_bar_per_batch_and_stage():
    """Two stages of ten batches are twenty bars in two rows, named from the top."""
    ax = plots.gantt(made([1.0], stages=stages(10, num_stages=2)))
    assert num_bars(ax) == {"decode only": 20}
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["replica 0, stage 0", "replica 0, stage 1"]
    assert ax.yaxis_inverted()
    first = ax.patches[0].get_path().vertices[5:10]
    assert (first[:, 0].min(), first[:, 0].max()) == (0.01, 0.02)
    assert first[:, 1].mean() == pytest.approx(1.0, abs=0.2)
    assert ax.get_xlabel() == "time (s)"


def test_gantt_tells_batches_apart():
    """Kinds of batches differ in colour and in hatch, and are in the legend."""
    parts = [stages(2, prefill=9, decode=0), stages(3, prefill=9), stages(4)]
    columns = joined(parts)
    ax = plots.gantt(made([1.0], stages=columns))
    assert num_bars(ax) == {"prefill only": 2, "prefill and decode": 3, "decode only": 4}
    looks = {(bars.get_facecolor(), bars.get_hatch()) for bars in ax.patches}
    assert len({colour for colour, _ in looks}) == len({hatch for _, hatch in looks}) == 3
    assert len(ax.get_legend().get_texts()) == 3


def test_gantt_after_the_end_says_so():
    """A replica is not idle once the run has ended."""
    result = made([1.0], stages=stages(2, num_stages=2))
    ax = plots.gantt(result, start=1e6, duration=1.0)
    assert [text.get_text() for text in ax.texts] == [
        "no batch in this window: the run ended at 100.0 s"
    ]
    assert ax.get_title() == "Batches on their stages"
    assert not ax.child_axes
    ax = plots.gantt(result, start=50.0, duration=1.0)
    assert [text.get_text() for text in ax.texts] == ["no batch in this window"]
    assert ax.get_title() == "Batches on their stages: 0.0% bubbles, 100.0% idle"


def test_gantt_shows_the_first_batches():
    """By default sixty of a replica; start and duration choose others."""
    result = made([1.0], stages=stages(1_000))
    assert num_bars(plots.gantt(result)) == {"decode only": 60}
    assert plots.gantt(result).get_xlim() == pytest.approx((0.0, 0.6))
    later = plots.gantt(result, start=1.005, duration=0.1)
    assert num_bars(later) == {"decode only": 11}
    assert later.get_xlim() == pytest.approx((1.005, 1.105))
    assert num_bars(plots.gantt(result, start=50.0)) == {}


def test_gantt_numbers_wide_bars():
    """Bars with room for it bear the index of their batch."""
    result = made([1.0], stages=stages(100))
    wide = plots.gantt(result, start=0.05, duration=0.03)
    assert [text.get_text() for text in wide.texts] == ["5", "6", "7"]
    assert not plots.gantt(result, duration=1.0).texts


def test_gantt_of_one_replica():
    """It can be chosen; one that is not there is refused with those that are."""
    parts = [stages(3, replica_id=0), stages(2, replica_id=4)]
    columns = joined(parts)
    result = made([1.0], stages=columns)
    assert num_bars(plots.gantt(result)) == {"decode only": 5}
    assert num_bars(plots.gantt(result, replica_id=4)) == {"decode only": 2}
    with pytest.raises(ConfigError, match=r"replica_id = 1: expected one of \[0, 4\]"):
        plots.gantt(result, replica_id=1)


def test_gantt_of_many_replicas_has_room_for_names():
    """With more rows than names fit, every other one is named."""
    parts = [stages(2, replica_id=replica_id) for replica_id in range(64)]
    columns = joined(parts)
    ax = plots.gantt(made([1.0], stages=columns))
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == [f"replica {replica_id}" for replica_id in range(0, 64, 2)]
    assert num_bars(ax) == {"decode only": 128}


def test_gantt_refuses_what_cannot_be_seen(monkeypatch):
    """A window of too many bars says how many, and what to give."""
    monkeypatch.setattr("vidur_simpy.plots.stages.MAX_BARS", 50)
    with pytest.raises(ConfigError, match="has 60 bars: expected at most 50; give a shorter"):
        plots.gantt(made([1.0], stages=stages(100)))
    with pytest.raises(ConfigError, match="duration = 0"):
        plots.gantt(made([1.0], stages=stages(100)), duration=0)


def test_gantt_needs_stages():
    """Without them it says how to record them; with none it says that there are none."""
    with pytest.raises(NotAvailableError, match=r"record=\('stages',\)"):
        plots.gantt(made([1.0]))
    ax = plots.gantt(made([1.0], stages={}))
    assert [text.get_text() for text in ax.texts] == ["no batch in this window"]


# -- composition -----------------------------------------------------------------------------------


def test_composition_stacks_prompt_on_decode_tokens():
    """A window's bars are the mean decode tokens, and on top of them the prompt tokens."""
    ax = plots.composition(made([1.0], batches=batches(10, prefill=100, decode=20)), window=0.05)
    prompt, decode = ax.patches
    assert decode.get_data().values.tolist() == [20.0, 20.0]
    assert prompt.get_data().values.tolist() == [120.0, 120.0]
    assert prompt.get_hatch() != decode.get_hatch()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["prompt", "decode"]


def test_composition_needs_batches_and_a_window():
    """Without them it says how to record them; a window of no length is refused."""
    with pytest.raises(NotAvailableError, match=r"record=\('batches',\)"):
        plots.composition(made([1.0]))
    with pytest.raises(ConfigError, match="window = 0"):
        plots.composition(made([1.0], batches=batches(2)), window=0)
    ax = plots.composition(made([1.0], batches={}))
    assert [text.get_text() for text in ax.texts] == ["no batch was formed"]


# -- all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plots.__all__)
def test_plots_use_the_given_axes_and_leave_the_style(name):
    """Each draws on the axes it is given, returns them, and changes no setting."""
    before = dict(mpl.rcParams)
    result = made(
        [1.0, 2.0],
        batches=batches(5),
        stages=stages(5),
        operators={},
        timeline=samples((0.0, 0, 1, 0, 0.5)),
    )
    _, ax = plt.subplots()
    assert getattr(result.plot, name)(ax=ax) is ax
    assert ax.get_title()
    assert ax.get_xlabel()
    assert len(plt.get_fignums()) == 1
    assert dict(mpl.rcParams) == before
