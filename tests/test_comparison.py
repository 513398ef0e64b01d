"""Runs side by side: what pairs them, which differences are called real, and how that looks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.columns import COLUMNS
from vidur_simpy.result import Result
from vidur_simpy.statistics.resampling import Blocks, block_length, joint_intervals

mpl.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import comparison_coverage

AWKWARD = '<script>alert("1")</script> & $x_1$'


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def result_of(ttft, prompt=100, output=3, **changes):
    """Requests that arrive a second apart, with these times to first token (NaN: refused)."""
    ttft = np.asarray(ttft, dtype=float)
    arrived_at = np.arange(len(ttft), dtype=float)
    count = np.ones(len(ttft), dtype=int)
    requests = {
        "request_id": np.arange(len(ttft)),
        "replica_id": 0 * count,
        "arrived_at": arrived_at,
        "scheduled_at": arrived_at,
        "first_token_at": arrived_at + ttft,
        "completed_at": arrived_at + ttft + 1.0,
        "num_prefill_tokens": prompt * count,
        "num_decode_tokens": output * count,
        "num_restarts": 0 * count,
        "refusal": np.where(np.isnan(ttft), "too long", ""),
    } | changes
    return Result(
        {"requests": requests, "replicas": {}, "timeline": {}},
        config=None,
        info={"simulated_time": 1.0},
    )


def noisy(count=600, mean=1.0, seed=0):
    return mean * np.random.default_rng(seed).lognormal(0.0, 0.3, size=count)


# -- pairing ---------------------------------------------------------------------------------------


def test_the_same_requests_are_paired():
    """A small slow-down of every request is real, though far smaller than what requests vary."""
    base = noisy()
    comparison = vs.compare({"a": result_of(base), "b": result_of(base + 0.01)})
    assert comparison.reasons == {}
    row = comparison.table.loc[("ttft", "mean", "b")]
    assert row["verdict"] == "higher"
    assert row["difference"] == pytest.approx(0.01)
    assert row["low"] == pytest.approx(row["high"]) == pytest.approx(0.01)
    assert "Compared request by request: 'b'." in str(comparison)


def test_other_requests_are_not_paired():
    """The same slow-down is chance if the requests are others, and it says why they are others."""
    runs = {"a": result_of(noisy()), "b": result_of(noisy(seed=1) + 0.01, prompt=101)}
    comparison = vs.compare(runs)
    assert comparison.reasons == {"b": "request 0 has 101 prompt tokens, not 100"}
    assert comparison.table.loc[("ttft", "mean", "b"), "verdict"] == "not distinguishable"
    assert "Not paired: 'b' had another workload (request 0 has 101" in str(comparison)


def test_what_tells_workloads_apart():
    """Count, prompt, output, and arrivals; a clock that starts elsewhere does not."""
    base = noisy(30)
    arrived_at = np.arange(30.0)
    others = {
        "count": result_of(base[:29]),
        "output": result_of(base, output=4),
        "arrivals": result_of(base, arrived_at=1.5 * arrived_at),
        "clock": result_of(base, arrived_at=100.0 + arrived_at),
        "jitter": result_of(base, arrived_at=arrived_at + 0.009 * (arrived_at > 5)),
    }
    reasons = vs.compare({"a": result_of(base)} | others).reasons
    assert reasons == {
        "count": "29 requests, not 30",
        "output": "request 0 has 4 output tokens, not 3",
        "arrivals": "request 1 arrives 0.5000 s earlier or later",
    }


def test_a_measured_failure_has_no_output_to_compare():
    """A measurement does not know how long the output would have been."""
    base = noisy(30)
    refused = np.where(np.arange(30) == 7, np.nan, base)
    output = np.where(np.arange(30) == 7, 0, 3)
    comparison = vs.compare({"a": result_of(base), "b": result_of(refused, output=output)})
    assert comparison.reasons == {}
    assert comparison.table["count"].max() == 29


def test_a_measurement_compares_with_a_simulation(tmp_path):
    """A result read from a benchmark's file is paired with the run that it came from."""
    cluster = vs.Cluster(execution_time=vs.Linear())
    workload = vs.Workload(vs.Poisson(4.0), vs.FixedLengths(100, 20), num_requests=60)
    simulated = vs.simulate(cluster, workload)
    simulated.to_vllm_bench(tmp_path / "bench.json")
    measured = vs.load_vllm_bench(tmp_path / "bench.json")
    comparison = vs.compare({"measured": measured, "simulated": simulated}, quantiles=[0.5])
    assert comparison.reasons == {}
    assert comparison.table["difference"].abs().max() < 1e-9
    assert comparison.plot.cdf("ttft").get_legend() is not None


def test_schedulers_on_one_workload(make_cluster):
    """Two schedulers, one workload and seed: paired, with the verdict that the tables tell."""
    workload = vs.Workload(vs.Poisson(0.4), vs.FixedLengths(300, 6), num_requests=150)
    time = {"execution_time": lambda batch: 0.01 + 0.001 * batch.num_tokens}
    results = {
        name: vs.simulate(make_cluster(replica_scheduler=scheduler, **time), workload)
        for name, scheduler in (("vLLM", vs.Vllm()), ("Sarathi", vs.Sarathi(chunk_size=50)))
    }
    comparison = vs.compare(results)
    row = comparison.table.loc[("ttft", "mean", "Sarathi")]
    means = [result.requests["ttft"].mean() for result in results.values()]
    assert [row["baseline"], row["value"]] == pytest.approx(means)
    assert row["verdict"] == "higher"
    assert comparison.table.loc[("ttft", "p99", "Sarathi"), "verdict"] == "too few requests"


# -- verdicts --------------------------------------------------------------------------------------


def test_a_run_equals_itself():
    """No difference, no interval, none of it real."""
    base = noisy()
    comparison = vs.compare({"a": result_of(base), "b": result_of(base)})
    assert set(comparison.table["verdict"]) == {"equal"}
    assert not comparison.table["is_real"].any()
    assert repr(comparison) == "<Comparison of 2 results with 'a': 0 of 12 differences are real>"


def test_a_large_difference_is_real_unpaired():
    """Three times the latency is told from chance, in the mean and in every quantile."""
    comparison = vs.compare(
        {"a": result_of(noisy(mean=3.0)), "b": result_of(noisy(seed=1), prompt=90)},
        metrics="ttft",
    )
    assert set(comparison.table["verdict"]) == {"lower"}
    relative = comparison.table["relative"]
    assert relative.to_numpy() == pytest.approx(-2 / 3, abs=0.1)
    assert (comparison.table["high"] < 0).all()


def test_few_requests_have_no_interval():
    """A p99 takes 368 requests, a mean 20; below, the verdict says so and nothing is real."""
    small = vs.compare({"a": result_of(noisy(100)), "b": result_of(noisy(100) + 1)})
    verdicts = small.table["verdict"].xs("ttft").droplevel("result").to_dict()
    assert verdicts == {
        "mean": "higher",
        "p50": "higher",
        "p90": "higher",
        "p99": "too few requests",
    }
    tiny = vs.compare({"a": result_of(noisy(4)), "b": result_of(noisy(4) + 1)}, quantiles=[])
    assert tiny.table["verdict"].tolist() == ["too few requests"] * 3
    assert tiny.table["low"].isna().all()


def test_nothing_to_compare():
    """Runs that served no request have no difference, and still show themselves."""
    nothing = result_of([np.nan] * 5)
    comparison = vs.compare({"a": nothing, "b": nothing})
    assert comparison.table["difference"].isna().all()
    assert "too few requests" in str(comparison)
    assert comparison.plot.differences().texts[0].get_text() == "there is nothing to compare"
    assert comparison.plot.cdf("ttft") is not None


def test_a_trend_is_noted():
    """In overload neighbours resemble each other over the whole run: the note says so."""
    growing = np.linspace(1.0, 50.0, 500)
    comparison = vs.compare({"a": result_of(growing), "b": result_of(1.1 * growing)})
    (note,) = comparison.notes
    assert "resemble each other over more than a 20th of the run" in note
    assert note.endswith("'b'")
    assert vs.compare({"a": result_of(noisy()), "b": result_of(noisy() * 2)}).notes == ()


def test_equal_seeds_give_equal_intervals():
    """Another seed gives others, close by."""
    runs = {"a": result_of(noisy()), "b": result_of(noisy(seed=1))}
    tables = [vs.compare(runs, seed=seed).table for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])
    widths = [(table["high"] - table["low"]).to_numpy() for table in tables]
    assert widths[2] == pytest.approx(widths[0], rel=0.4)


def test_differences_are_seldom_found_where_there_are_none():
    """In 95 of 100 comparisons of like with like, no interval of the four misses zero."""
    found, _ = comparison_coverage.run(500, 0.5, repetitions=40, num_resamples=100)
    assert found <= 0.15


# -- resampling ------------------------------------------------------------------------------------


def test_blocks_are_as_long_as_values_resemble_each_other():
    """Independent values need no blocks; the closer neighbours are, the longer the blocks."""
    rng = np.random.default_rng(0)
    lengths = [
        block_length(comparison_coverage.latencies(2_000, correlation, rng))
        for correlation in (0.0, 0.5, 0.9)
    ]
    assert lengths[0] < 5 < lengths[1] < lengths[2] < 100
    assert block_length(np.full(100, 3.0)) == 1.0
    assert block_length(np.array([1.0, np.nan])) == 1.0


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 3_000), length=st.floats(1, 500), quantile=st.floats(0.01, 0.99))
def test_the_first_draw_is_the_run_itself(count, length, quantile):
    """Mean and quantile of the run as it is are numpy's, to the distance of two values."""
    values = np.random.default_rng(count).normal(size=count)
    blocks = Blocks(count, length, 5, np.random.default_rng(0))
    drawn = blocks.statistics(values, [quantile])
    assert drawn.shape == (6, 2)
    assert drawn[0, 0] == pytest.approx(values.mean(), abs=1e-9)
    ranks = [quantile - 1.5 / count - 0.01, quantile + 1.5 / count + 0.01]
    low, high = np.quantile(values, np.clip(ranks, 0, 1))
    assert low <= drawn[0, 1] <= high
    assert blocks.num_blocks <= max(1_000, 20)


@pytest.mark.parametrize("count", [400, 20_000])
def test_errors_of_independent_values_are_the_known_ones(count):
    """The standard errors of mean and median are those of the textbook, also where many values
    share a cell of the grid."""
    errors = []
    for seed in range(8):
        values = np.random.default_rng(seed).normal(size=count)
        blocks = Blocks(count, 1.0, 500, np.random.default_rng(0))
        found, half = joint_intervals(blocks.statistics(values, [0.5]), blocks.num_blocks, 0.95)
        assert (1.9 * found < half).all()
        assert (half < 3 * found).all()
        errors.append(found * np.sqrt(count))
    expected = [1.0, np.sqrt(np.pi / 2)]
    assert np.mean(errors, axis=0) == pytest.approx(expected, rel=0.12)


# -- how it looks ----------------------------------------------------------------------------------


def test_html_escapes_names():
    """What users name is shown, never run."""
    comparison = vs.compare({AWKWARD: result_of(noisy(30)), "<b>": result_of(noisy(30, seed=1))})
    html = comparison._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; $x_1$" in html
    assert html.count("<table>") == html.count("</table>") == 2


def test_figures_show_names_as_they_are():
    """A dollar is no formula, and a name that begins with a bar is not hidden."""
    comparison = vs.compare({AWKWARD: result_of(noisy(30)), "_b": result_of(noisy(30, seed=1))})
    ax = comparison.plot.cdf("ttft", log=True)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == 2
    assert texts[0].startswith(AWKWARD.replace("$", r"\$") + ": p50")
    assert texts[1].strip().startswith("_b: p50")
    ax.figure.canvas.draw()
    comparison.plot.differences().figure.canvas.draw()


def test_the_figure_of_differences_has_a_mark_for_each():
    """Marks at the relative differences, filled where they are real; far ones on a log axis."""
    base = noisy()
    runs = {"a": result_of(base), "b": result_of(1.03 * base), "c": result_of(base + noisy(seed=3))}
    comparison = vs.compare(runs, metrics=["ttft"], quantiles=[0.5])
    ax = comparison.plot.differences()
    drawn = sorted(
        x
        for line in ax.lines
        if line.get_marker() in "os"
        for x in line.get_xdata()
        if len(line.get_xdata())
    )
    assert drawn == pytest.approx(sorted(100 * comparison.table["relative"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ttft mean", "ttft p50"]
    assert ax.get_xscale() == "linear"
    far = vs.compare({"a": result_of(base), "b": result_of(50 * base)}).plot.differences()
    assert far.get_xscale() == "symlog"
    assert far.get_xlabel() == "difference from a (%)"


@pytest.mark.parametrize("name", ["run {}", "a rather long name of the run with number {}"])
def test_many_names_have_room_between_title_and_axes(name):
    """The legend is whole, and lies neither on the title nor on the data."""
    base = noisy(60)
    runs = {name.format(index): result_of((1 + index) * base) for index in range(6)}
    ax = vs.compare(runs).plot.differences()
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.title.get_window_extent())
    assert not legend.overlaps(ax.get_window_extent())
    assert 0 <= legend.x0 < legend.x1 <= ax.figure.bbox.width


def test_the_text_lists_every_difference_and_the_figures():
    """A line for each row of the table, and one for each figure, with all names in full."""
    name = "a name of more than twenty characters"
    text = str(vs.compare({"a": result_of(noisy()), name: result_of(noisy(seed=1))}))
    assert len(re.findall(rf"^(?:ttft|tpot|e2e) .*{name}", text, flags=re.MULTILINE)) == 12
    assert re.search(r"requests completed +600 +600", text)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["ttfd"]}, "unknown metric 'ttfd': did you mean 'ttft'"),
        ({"quantiles": [99]}, "quantiles has 99: expected between 0 and 1"),
        ({"confidence": 95}, "confidence has 95"),
        ({"num_resamples": 10}, "num_resamples = 10: expected 100 or more"),
    ],
)
def test_unusable_options_are_said(options, message):
    """With the value and what was expected."""
    runs = {"a": result_of(noisy(30)), "b": result_of(noisy(30))}
    with pytest.raises(vs.ConfigError, match=message):
        vs.compare(runs, **options)


def test_unusable_runs_are_said():
    """Two or more, each a result."""
    one = result_of(noisy(30))
    for runs in ({}, {"a": one}, [one, one], one):
        with pytest.raises(vs.ConfigError, match="two results or more"):
            vs.compare(runs)
    with pytest.raises(vs.ConfigError, match="'b' is a int: expected a Result"):
        vs.compare({"a": one, "b": 3})


# -- the dictionary of metrics ---------------------------------------------------------------------


def test_the_dictionary_has_every_column():
    """A row for each column of each table, in their order, with unit and meaning."""
    dictionary = vs.metrics_dictionary()
    assert list(dictionary.columns) == ["table", "column", "unit", "meaning"]
    pairs = list(zip(dictionary["table"], dictionary["column"], strict=True))
    columns = [(table, column) for table, columns in COLUMNS.items() for column in columns]
    assert pairs[: len(columns)] == columns
    assert (dictionary["meaning"].str.len() > 3).all()
    assert set(vs.metrics_dictionary("tokens")["table"]) == {"tokens"}
    with pytest.raises(vs.ConfigError, match="unknown table 'tokns': did you mean 'tokens'"):
        vs.metrics_dictionary("tokns")


def test_the_dictionary_is_shown_in_full():
    """A notebook cuts no meaning short and leaves no row out."""
    html = vs.metrics_dictionary()._repr_html_()
    assert "..." not in html
    assert html.count("<tr>") == len(vs.metrics_dictionary())
    assert COLUMNS["requests"]["tpot"][1] in html
