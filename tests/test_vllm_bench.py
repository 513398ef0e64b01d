"""Results as files of benchmark tools, and a benchmark's file as a result."""

from __future__ import annotations

import csv
import gzip
import json

import matplotlib as mpl
import numpy as np
import pytest

import vidur_simpy as vs
from vidur_simpy import plots
from vidur_simpy.errors import TraceError, VidurError
from vidur_simpy.exchange.token_times import gaps_between_tokens
from vidur_simpy.exchange.vllm_bench import read_vllm_bench
from vidur_simpy.result import NotAvailableError
from vidur_simpy.summary import LATENCIES

mpl.use("Agg")

# What `vllm bench serve --save-detailed` writes of a generation run.
SCALARS = {
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests", "rtfx"),
}
LISTS = {
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
    *("generated_texts", "errors", "server_queue_times", "server_ttfts"),
}
METRICS = ("ttft", "tpot", "itl", "e2el")
SETUP = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency"),
}

# A run that a person can check: two requests served, one failed.
BENCH = {
    "backend": "vllm",
    "duration": 3.5,
    "input_lens": [10, 20, 30],
    "output_lens": [3, 1, 0],
    "ttfts": [0.5, 1.0, 0.0],
    "itls": [[0.25, 0.75], [], []],
    "latencies": [1.5, 1.0, 0.0],
    "start_times": [1000.0, 1002.5, 1001.0],
    "errors": ["", "", "Internal Server Error"],
}


def run(*record, scheduler=None, num_blocks=110, num_requests=60):
    """Two replicas short of memory, so that requests wait, and some restart or are refused."""
    cluster = vs.Cluster(
        num_replicas=2,
        pipeline_parallel_size=2,
        max_model_len=1024,
        kv_cache=vs.KVCache(num_blocks=num_blocks),
        replica_scheduler=scheduler or vs.Vllm(),
        execution_time=vs.Linear(),
    )
    lengths = vs.LognormalLengths(
        prompt_median=250, prompt_sigma=1.0, output_median=60, output_sigma=0.7
    )
    workload = vs.Workload(vs.Poisson(6.0), lengths, num_requests=num_requests)
    return vs.simulate(cluster, workload, seed=1, record=record)


@pytest.fixture(scope="module")
def recorded():
    return run("batches", "tokens")


@pytest.fixture
def write(tmp_path):
    def to_file(entries, name="bench.json"):
        path = tmp_path / name
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return path

    return to_file


def exported(result, path, **options):
    result.to_vllm_bench(path, **options)
    return json.loads(path.read_text())


# -- gaps between tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler", [vs.Vllm(), vs.Sarathi(), vs.Mnemosyne(), vs.Orca(), vs.FasterTransformer()]
)
def test_batches_tell_when_each_token_came(scheduler):
    """Pooled over requests, the gaps are those that the simulation recorded, restarts included."""
    result = run("batches", "tokens", scheduler=scheduler, num_blocks=66)
    if isinstance(scheduler, vs.Vllm):
        assert result.figures["restarts"] > 0
    gaps = gaps_between_tokens(result)
    is_completed = result.requests["completed_at"].notna()
    assert [row is not None for row in gaps] == is_completed.tolist()
    pooled = np.sort(np.concatenate([row for row in gaps if row is not None]))
    tokens = result.tokens
    expected = np.sort(np.repeat(tokens["inter_token_latency"], tokens["num_tokens"]))
    assert pooled == pytest.approx(expected, abs=1e-12)


def test_without_batches_no_gap_is_known():
    """Nothing is guessed."""
    assert set(gaps_between_tokens(run(num_requests=5))) == {None}


# -- writing vllm bench JSON -----------------------------------------------------------------------


def test_the_file_has_the_entries_of_the_tool(recorded, tmp_path):
    """Every entry of `vllm bench serve --save-detailed`, and no other."""
    entries = exported(recorded, tmp_path / "bench.json", metric_percentiles=(90, 99, 99.9))
    kinds = ("mean", "median", "std", "p90", "p99", "p99.9")
    statistics = {f"{kind}_{metric}_ms" for kind in kinds for metric in METRICS}
    assert entries.keys() == SCALARS | LISTS | SETUP | statistics
    assert {len(entries[name]) for name in LISTS} == {60}


def test_the_definitions_are_those_of_the_tool(recorded, tmp_path):
    """Statistics follow from the lists of the file as the tool computes them."""
    entries = exported(recorded, tmp_path / "bench.json", slo={"ttft": 0.5, "tpot": 0.05})
    is_served = [not error for error in entries["errors"]]
    ttft, e2el, output = (
        np.array(entries[name])[is_served] for name in ("ttfts", "latencies", "output_lens")
    )
    several = output > 1
    tpot = (e2el - ttft)[several] / (output[several] - 1)
    itl = np.concatenate(entries["itls"])
    for name, values in {"ttft": ttft, "tpot": tpot, "itl": itl, "e2el": e2el}.items():
        found = [entries[f"{kind}_{name}_ms"] for kind in ("mean", "median", "std", "p99")]
        expected = [values.mean(), np.median(values), values.std(), np.percentile(values, 99)]
        assert found == pytest.approx(1000 * np.array(expected), rel=1e-9)
    is_good = (ttft <= 0.5) & (
        np.where(several, (e2el - ttft) / np.maximum(output - 1, 1), 0) < 0.05
    )
    assert entries["request_goodput"] == pytest.approx(is_good.sum() / entries["duration"])
    assert entries["completed"] + entries["failed"] == entries["num_prompts"]
    assert entries["output_throughput"] == pytest.approx(output.sum() / entries["duration"])
    assert entries["request_rate"] == 6.0


def test_peaks_of_the_tool(recorded, tmp_path):
    """Most requests at a time, and most tokens in a second counted from the first request."""
    entries = exported(recorded, tmp_path / "bench.json")
    served = [i for i, error in enumerate(entries["errors"]) if not error]
    start, ttft, e2e = (np.array(entries[k]) for k in ("start_times", "ttfts", "latencies"))
    ends = start + e2e
    running = [sum((start[i] >= start[served]) & (start[i] < ends[served])) for i in served]
    assert entries["max_concurrent_requests"] == max(running)
    times = np.concatenate(
        [start[i] + ttft[i] + np.cumsum([0, *entries["itls"][i]]) for i in served]
    )
    per_second = np.bincount((times - start[served].min()).astype(int))
    assert entries["max_output_tokens_per_s"] == pytest.approx(per_second.max(), abs=1)


@pytest.mark.parametrize(("record", "known"), [(["tokens"], True), ([], False)])
def test_unknown_gaps_are_not_made_up(record, known, tmp_path, recorded):
    """Without batches the lists are empty; statistics are exact with tokens, else only the mean."""
    result = run(*record)
    entries = exported(result, tmp_path / "bench.json")
    assert set(map(len, entries["itls"])) == {0}
    assert entries["max_output_tokens_per_s"] is None
    exact = exported(recorded, tmp_path / "exact.json")
    assert entries["mean_itl_ms"] == pytest.approx(exact["mean_itl_ms"])
    for kind in ("median", "std", "p99"):
        expected = pytest.approx(exact[f"{kind}_itl_ms"]) if known else None
        assert entries[f"{kind}_itl_ms"] == expected
    assert "tokens" not in vs.load_vllm_bench(tmp_path / "bench.json").tables


def test_refused_and_unfinished_requests_have_failed(tmp_path):
    """Their error says why, and they have no output, as in the tool."""
    simulation = vs.Simulation(
        vs.Cluster(max_model_len=512, execution_time=lambda batch: 1.0),
        vs.Workload(vs.Constant(1.0), vs.FixedLengths(100, 4), num_requests=3),
    )
    simulation.submit(vs.Request(500, 100))
    simulation.run(until=5.5)
    entries = exported(simulation.result(), tmp_path / "bench.json")
    reasons = [error for error in entries["errors"] if error]
    assert entries["failed"] == len(reasons) >= 2
    assert any("max_model_len" in error for error in reasons)
    assert "not completed when the run stopped" in reasons
    failed = [bool(error) for error in entries["errors"]]
    assert set(np.array(entries["output_lens"])[failed]) == {0}


def test_a_run_of_nothing_has_a_file(tmp_path):
    """Where nothing was served, statistics are null, not NaN, which JSON does not know."""
    result = run(num_requests=3).after(1e9)
    entries = exported(result, tmp_path / "bench.json")
    assert entries["mean_ttft_ms"] is None
    assert "NaN" not in (tmp_path / "bench.json").read_text()


def test_no_file_is_overwritten_unasked(recorded, tmp_path):
    """A file that is there, a folder, and a folder that is not there: each is said."""
    path = tmp_path / "bench.json"
    path.write_text("precious")
    for write in (recorded.to_vllm_bench, recorded.to_aiperf_csv):
        with pytest.raises(VidurError, match=r"is there already.*overwrite=True"):
            write(path)
        with pytest.raises(VidurError, match="it is a directory"):
            write(tmp_path)
        with pytest.raises(VidurError, match="cannot write"):
            write(tmp_path / "no" / "such" / "folder.json")
    assert path.read_text() == "precious"
    recorded.to_vllm_bench(path, overwrite=True)
    assert json.loads(path.read_text())["num_prompts"] == 60


def test_a_failed_write_leaves_nothing(recorded, tmp_path):
    """An unknown limit is found before a file is there."""
    with pytest.raises(vs.ConfigError, match="metric_percentiles has 101"):
        recorded.to_vllm_bench(tmp_path / "bench.json", metric_percentiles=(101,))
    with pytest.raises(TypeError):
        recorded.to_vllm_bench(tmp_path / "bench.json", slo={"tffft": 1.0})
    assert list(tmp_path.iterdir()) == []


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bench.json", "bench.json.gz"])
def test_a_round_trip_keeps_every_latency(recorded, tmp_path, name):
    """TTFT, TPOT, E2E and delay of each request, and every gap between tokens, to 1e-9."""
    path = tmp_path / name
    recorded.to_vllm_bench(path)
    loaded = vs.load_vllm_bench(path)
    old, new = recorded.requests, loaded.requests
    is_served = old["completed_at"].notna()
    for column in LATENCIES:
        expected = old[column].where(is_served).to_numpy()
        assert new[column].to_numpy()[is_served] == pytest.approx(
            expected[is_served], abs=1e-9, nan_ok=True
        )
    assert new["num_prefill_tokens"].tolist() == old["num_prefill_tokens"].tolist()
    assert new["arrived_at"].to_numpy() == pytest.approx(old["arrived_at"] - old["arrived_at"][0])
    difference = (loaded.summary() - recorded.summary()).loc["itl"].abs()
    assert difference.max() < 1e-9


def test_a_file_reads_like_the_archive(recorded, tmp_path):
    """The name says whether it is compressed; equal results give equal bytes."""
    recorded.to_vllm_bench(tmp_path / "a.json.gz")
    recorded.to_vllm_bench(tmp_path / "b.json.gz")
    recorded.to_vllm_bench(tmp_path / "c.json")
    archives = [(tmp_path / name).read_bytes() for name in ("a.json.gz", "b.json.gz")]
    assert archives[0] == archives[1]
    assert gzip.decompress(archives[0]) == (tmp_path / "c.json").read_bytes()


def test_a_benchmark_becomes_a_result(write):
    """Clock from the first request, in order of sending; failures with their reason."""
    result = vs.load_vllm_bench(write(BENCH))
    requests = result.requests
    assert requests["arrived_at"].tolist() == [0.0, 1.0, 2.5]
    assert requests["ttft"].tolist() == pytest.approx([0.5, np.nan, 1.0], nan_ok=True)
    assert requests["tpot"].tolist() == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)
    assert requests["e2e"].tolist() == pytest.approx([1.5, np.nan, 1.0], nan_ok=True)
    assert requests["refusal"].tolist() == ["", "Internal Server Error", ""]
    assert requests["scheduled_at"].isna().all()
    assert result.tokens["inter_token_latency"].tolist() == [0.25, 0.75]
    assert result.tokens["time"].tolist() == [0.75, 1.5]
    assert result.info["benchmark"] == {"backend": "vllm", "duration": 3.5}
    assert result.figures["makespan"] == 3.5
    assert result.slo(ttft=0.5)["attainment"] == pytest.approx(1 / 3)


def test_older_files_have_no_latencies(write):
    """There a latency is the TTFT and the times between tokens; an empty reason is one, too."""
    older = {name: value for name, value in BENCH.items() if name not in ("latencies", "errors")}
    bench = read_vllm_bench(write(older))
    assert bench.latencies.tolist() == [1.5, 0.0, 1.0]
    assert bench.errors == ["", "failed", ""]


def test_the_server_may_say_how_long_requests_waited(write):
    """Then the wait is known, for those for which it said so."""
    result = vs.load_vllm_bench(write(BENCH | {"server_queue_times": [0.2, None, 0.0]}))
    delay = result.requests["scheduling_delay"].tolist()
    assert delay == pytest.approx([0.2, 0.0, np.nan], nan_ok=True)


def test_a_measurement_has_every_figure(write, recorded, tmp_path):
    """Figures draw what was measured, or say what was not recorded."""
    recorded.to_vllm_bench(tmp_path / "other.json")
    for path in (write(BENCH), tmp_path / "other.json"):
        result = vs.load_vllm_bench(path)
        drawn = []
        for name in plots.__all__:
            try:
                getattr(result.plot, name)()
                drawn.append(name)
            except (NotAvailableError, vs.ConfigError, TypeError):
                continue
        assert {"cdf", "quantiles", "timeline"} <= set(drawn)
        assert "measured" not in repr(result)
        mpl.pyplot.close("all")


def test_requests_of_a_measurement_run_from_their_arrival(write):
    """Where no first batch is known, the load is what is in flight; it ends at zero."""
    result = vs.load_vllm_bench(write(BENCH))
    (running,) = [
        line for line in result.plot.timeline().lines if line.get_label().startswith("running")
    ]
    assert running.get_xdata().tolist() == [0.0, 1.5, 2.5, 3.5]
    assert running.get_ydata().tolist() == [1, 0, 1, 0]
    mpl.pyplot.close("all")


def test_a_measurement_is_saved_and_loaded(write, tmp_path):
    """Like any other result."""
    result = vs.load_vllm_bench(write(BENCH))
    result.save(tmp_path / "saved")
    again = vs.load_result(tmp_path / "saved")
    assert again.requests.equals(result.requests)
    assert again.info["measured_by"] == "vllm bench serve"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "is not one JSON object"),
        ("[1, 2]", "holds a list: expected the JSON object"),
        (json.dumps(BENCH) + "\n" + json.dumps(BENCH), "--append-result"),
        ({"start_times": None}, "expected 'start_times' to be a list of numbers"),
        ({"start_times": []}, "holds no requests"),
        ({"ttfts": [0.5, -1.0, 0.0]}, r"'ttfts'\[1\] = -1.0: expected a finite number, 0 or more"),
        ({"latencies": [1.0, float("nan"), 1.0]}, r"'latencies'\[1\] = nan"),
        ({"ttfts": [0.5]}, "'ttfts' has 1 values, 'start_times' has 3"),
        ({"itls": 5}, "expected 'itls' to be a list, one value per request"),
        ({"errors": "none"}, "expected 'errors' to be a list"),
        ({"server_queue_times": [0.1, -1.0, None]}, r"'server_queue_times'\[1\] = -1.0"),
        ({"server_queue_times": [0.1, "x", None]}, "'server_queue_times' to be a list of numbers"),
        ({"itls": [[0.1], ["x"], []]}, r"expected 'itls\[1\]' to be a list of numbers"),
    ],
)
def test_an_unusable_file_is_said(write, change, message):
    """The message names the file and the entry."""
    path = write(change if isinstance(change, str) else BENCH | change)
    with pytest.raises(TraceError, match=message) as error:
        vs.load_vllm_bench(path)
    assert "bench.json" in str(error.value)


@pytest.mark.parametrize("name", ["input_lens", "output_lens", "ttfts", "start_times"])
def test_a_file_without_details_is_said(write, name):
    """The option that was missing is named."""
    with pytest.raises(TraceError, match=f"has no '{name}'.*--save-detailed"):
        vs.load_vllm_bench(write({key: BENCH[key] for key in BENCH if key != name}))


def test_a_missing_file_is_said(tmp_path):
    """As is a broken archive."""
    with pytest.raises(TraceError, match="cannot read"):
        vs.load_vllm_bench(tmp_path / "none.json")
    (tmp_path / "broken.json.gz").write_bytes(b"not gzip")
    with pytest.raises(TraceError, match="cannot read"):
        vs.load_vllm_bench(tmp_path / "broken.json.gz")


# -- AIPerf ----------------------------------------------------------------------------------------


def aiperf(result, path, **options):
    result.to_aiperf_csv(path, **options)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    middle = rows.index([])
    header, *metrics = rows[:middle]
    return (
        header,
        {row[0]: dict(zip(header, row, strict=True)) for row in metrics},
        dict(rows[middle + 1 :]),
    )


def test_the_csv_has_the_names_and_units_of_aiperf(recorded, tmp_path):
    """Its inter-token latency is the TPOT, its inter-chunk latency the ITL, in milliseconds."""
    header, metrics, values = aiperf(recorded, tmp_path / "a.csv", slo={"ttft": 0.5})
    shares = ["p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99"]
    assert header == ["Metric", "avg", "min", "max", "sum", *shares, "std"]
    completed = recorded.requests.dropna(subset="completed_at")
    for name, column in (
        ("Inter Token Latency (ms)", completed["tpot"]),
        ("Request Latency (ms)", completed["e2e"]),
        ("Time to First Token (ms)", completed["ttft"]),
    ):
        assert float(metrics[name]["avg"]) == pytest.approx(1e3 * column.mean(), abs=1e-5)
        assert float(metrics[name]["p99"]) == pytest.approx(1e3 * column.quantile(0.99), abs=1e-5)
    itl = recorded.summary().loc["itl"]
    assert float(metrics["Inter Chunk Latency (ms)"]["p90"]) == pytest.approx(
        1e3 * itl["p90"], abs=1e-5
    )
    assert int(values["Request Count"]) == len(completed)
    assert float(values["Goodput (requests/sec)"]) == pytest.approx(
        recorded.slo(ttft=0.5)["goodput"], abs=1e-6
    )


def test_the_csv_leaves_out_what_is_not_known(tmp_path):
    """Without batches there is no inter-chunk latency; without an objective no goodput."""
    _, metrics, values = aiperf(run(num_requests=5), tmp_path / "a.csv")
    assert "Inter Chunk Latency (ms)" not in metrics
    assert "Time to Second Token (ms)" not in metrics
    assert "Goodput (requests/sec)" not in values
    _, metrics, values = aiperf(run(num_requests=5).after(1e9), tmp_path / "b.csv")
    assert metrics == {}
    assert values["Benchmark Duration (sec)"] == ""


# -- Parquet ---------------------------------------------------------------------------------------


def test_parquet_keeps_every_table(recorded, tmp_path):
    """Saved as Parquet, every value and every type comes back; CSV may replace it."""
    pytest.importorskip("pyarrow")
    recorded.save(tmp_path / "saved", table_format="parquet")
    assert (tmp_path / "saved" / "batches.parquet").exists()
    loaded = vs.load_result(tmp_path / "saved")
    for name in recorded.tables:
        old, new = getattr(recorded, name), getattr(loaded, name)
        assert old.equals(new)
        assert old.dtypes.tolist() == new.dtypes.tolist()
    recorded.save(tmp_path / "saved", overwrite=True)
    assert not list((tmp_path / "saved").glob("*.parquet"))
    assert vs.load_result(tmp_path / "saved").requests.equals(recorded.requests)


def test_parquet_says_what_is_wrong(recorded, tmp_path, monkeypatch):
    """An unknown format, a damaged file, and a package that is not installed."""
    pytest.importorskip("pyarrow")
    with pytest.raises(vs.ConfigError, match="unknown table_format 'parket': did you mean 'parqu"):
        recorded.save(tmp_path / "saved", table_format="parket")
    recorded.save(tmp_path / "saved", table_format="parquet")
    (tmp_path / "saved" / "batches.parquet").write_bytes(b"cut off")
    with pytest.raises(VidurError, match=r"batches.parquet' is damaged"):
        vs.load_result(tmp_path / "saved")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for act in (
        lambda: recorded.save(tmp_path / "other", table_format="parquet"),
        lambda: vs.load_result(tmp_path / "saved"),
    ):
        with pytest.raises(vs.ConfigError, match=r"pip install 'vidur-simpy\[parquet\]'"):
            act()
