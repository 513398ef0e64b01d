from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from vidur_simpy import plots, storage
from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import ConfigError, VidurError
from vidur_simpy.loading import load_result
from vidur_simpy.result import NotAvailableError, Result

NAN = float("nan")
INFO = {"simulated_time": 11.0, "num_events": 42, "version": "0.1.0", "seed": 7}
CONFIG = {"cluster": {"model": "llama-2-7b", "num_replicas": 2}, "seed": 7}


def request_columns(**changes):
    """Five requests: two completed, one of a single token, one unfinished, one refused."""
    columns = {
        "request_id": [0, 1, 2, 3, 4],
        "replica_id": [0, 1, 0, 1, None],
        "arrived_at": [1.0, 2.0, 3.0, 4.0, 5.0],
        "scheduled_at": [1.5, 2.0, 5.0, 6.0, None],
        "first_token_at": [2.0, 2.5, 7.0, 8.0, None],
        "completed_at": [5.0, 6.5, 7.0, None, None],
        "num_prefill_tokens": [100, 200, 300, 400, 9000],
        "num_decode_tokens": [4, 5, 1, 50, 10],
        "num_restarts": [0, 2, 0, 1, 0],
        "execution_time": [3.0, 4.0, 1.0, 1.0, 0.0],
        "preempted_time": [0.5, 0.0, 0.0, 0.25, 0.0],
        "refusal": ["", "", "", "", "its 9010 tokens are more than max_model_len = 4096"],
    }
    return columns | changes


def made(record=(), info=INFO, config=CONFIG, **changes):
    """Return a result with all its tables, or with some of those that need recording."""
    tables = {
        "requests": request_columns(**changes),
        "replicas": {
            "replica_id": [0, 1],
            "num_requests": [2, 2],
            "num_batches": [10, 12],
            "num_restarts": [0, 3],
            "num_prefill_tokens": [400, 900],
            "num_decode_tokens": [5, 30],
            "num_blocks": [1500, 1500],
            "utilisation": [0.5, 0.7],
            "kv_cache_usage_mean": [0.1, 0.3],
            "kv_cache_usage_peak": [0.4, 0.8],
            "mfu": [0.2, 0.3],
            "mbu": [0.3, 0.5],
        },
        "timeline": {
            "time": [1.5, 2.0, 5.0],
            "replica_id": [0, 1, 0],
            "num_running": [1, 1, 2],
            "num_waiting": [0, 0, 1],
            "kv_cache_usage": [0.1, 0.2, 0.3],
        },
    }
    recorded = {
        "batches": {
            "replica_id": [0, 1],
            "batch_index": [0, 0],
            "scheduled_at": [1.5, 6.0],
            "completed_at": [2.0, NAN],
            "request_ids": [[0], [1, 3]],
            "num_tokens": [[100], [1, 400]],
            "num_prefill_tokens": [100, 400],
            "num_decode_tokens": [0, 1],
        },
        "stages": {
            "replica_id": [0, 1],
            "batch_index": [0, 0],
            "stage_id": [0, 0],
            "started_at": [1.5, 6.0],
            "ended_at": [2.0, 8.0],
            "num_prefill_tokens": [100, 400],
            "num_decode_tokens": [0, 1],
        },
        "events": {
            "time": [1.0, 1.0, 1.5],
            "event_type": ["REQUEST_ARRIVAL", "GLOBAL_SCHEDULE", "REPLICA_SCHEDULE"],
            "replica_id": [None, None, 0],
            "stage_id": [None, None, None],
            "batch_index": [None, None, None],
            "request_id": [0, None, None],
        },
        "tokens": {
            "time": [3.0, 4.0, 5.0],
            "replica_id": [0, 0, 1],
            "inter_token_latency": [1.0, 0.5, 2.0],
            "num_tokens": [3, 4, 1],
        },
    }
    tables |= {name: recorded[name] for name in record}
    return Result(tables, config=config, info=info)


ALL = ("batches", "stages", "events", "tokens")


# -- tables ----------------------------------------------------------------------------------------


def test_latencies_are_derived():
    """ttft, tpot, e2e and scheduling delay follow from the instants of a request."""
    first = made().requests.iloc[0]
    assert (first.ttft, first.tpot, first.e2e, first.scheduling_delay) == (1.0, 1.0, 4.0, 0.5)


def test_what_did_not_happen_is_nan():
    """An unfinished request has a ttft but no e2e; a refused one has neither."""
    requests = made().requests
    assert requests["ttft"].isna().to_list() == [False, False, False, False, True]
    assert requests["e2e"].isna().to_list() == [False, False, False, True, True]


def test_one_output_token_has_no_tpot():
    """Time per output token after the first is undefined when there is only the first."""
    requests = made().requests
    assert np.isnan(requests.loc[2, "tpot"])
    assert requests.loc[2, "e2e"] == 4.0


def test_columns_have_the_order_of_the_contract():
    """The table has the columns of the contract in its order, then the additional ones."""
    requests = made(priority=[0, 0, 1, 0, 0], deadline=[9.0, 9.0, NAN, 9.0, 9.0]).requests
    some_schedulers_only = {"num_cached_tokens", "num_output_tokens"}
    contract = [name for name in COLUMNS["requests"] if name not in some_schedulers_only]
    assert list(requests.columns) == [*contract, "priority", "deadline"]


@pytest.mark.parametrize("missing", [None, -1, NAN])
def test_missing_replica(missing):
    """None, NaN and negative numbers all say that there is no replica."""
    replica_id = made(replica_id=[0, 1, 0, 1, missing]).requests["replica_id"]
    assert replica_id.dtype == "Int64"
    assert replica_id.isna().to_list() == [False, False, False, False, True]


def test_numpy_columns_and_lists_make_equal_tables():
    """A column may be a list or an array."""
    arrays = {
        name: np.array(values, dtype=float) if None in values else np.array(values)
        for name, values in request_columns().items()
    }
    assert_frame_equal(made(**arrays).requests, made().requests)


def test_empty_tables_have_their_columns():
    """A table without rows still has the columns and types of the contract."""
    result = Result({"requests": {}, "replicas": {}, "timeline": {}, "batches": {}}, **NOTHING)
    assert list(result.batches) == list(COLUMNS["batches"])
    assert len(result.requests) == len(result.timeline) == 0
    assert result.timeline["num_running"].dtype == np.int64


NOTHING = {"config": None, "info": {}}


def test_unrecorded_table_says_how_to_record_it():
    """The error names the argument of simulate; it is an AttributeError, as hasattr expects."""
    result = made()
    with pytest.raises(NotAvailableError, match=r"pass record=\('batches',\) to simulate"):
        _ = result.batches
    assert not hasattr(result, "tokens")
    assert result.tables == ("requests", "timeline", "replicas")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"requets": {}}, "did you mean 'requests'"),
        ({"requests": {}, "replicas": {}}, "needs the table 'timeline'"),
        (
            {"requests": {"request_id": [0]}, "replicas": {}, "timeline": {}},
            "needs the column 'arrived_at'",
        ),
    ],
)
def test_tables_are_checked_when_given(tables, message):
    """A wrong or missing table is found at once, not when it is looked at."""
    with pytest.raises(VidurError, match=message):
        Result(tables, **NOTHING)


def test_columns_of_one_length():
    """Columns that differ in length are refused, never padded."""
    with pytest.raises(VidurError, match=r"expected columns of one length.* num_restarts 1"):
        _ = made(num_restarts=[0]).requests


def test_results_can_be_copied_and_sent():
    """A result survives pickling, which parallel sweeps need, and copying."""
    result = made(ALL)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert_frame_equal(other.requests, result.requests)
        assert other.config == CONFIG


# -- numbers ---------------------------------------------------------------------------------------


def test_summary_is_that_of_numpy():
    """Each row describes the requests that have the latency, with numpy's definitions."""
    summary = made().summary()
    values = [1.0, 0.5, 4.0, 4.0]
    expected = [np.mean(values), np.std(values), *np.quantile(values, [0.5, 0.9, 0.95, 0.99]), 4]
    assert summary.loc["ttft"].to_list() == pytest.approx(expected)
    assert list(summary.columns) == ["mean", "std", "p50", "p90", "p95", "p99", "count"]
    assert summary["count"].to_dict() == {"ttft": 4, "tpot": 2, "e2e": 3, "scheduling_delay": 4}


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 9)), min_size=1, max_size=30).filter(
        lambda rows: sum(count for _, count in rows) > 0
    )
)
def test_inter_token_latencies_are_pooled_by_weight(rows):
    """A row that stands for n tokens counts as n rows would."""
    latency, num_tokens = map(list, zip(*rows, strict=True))
    columns = {"time": latency, "replica_id": [0] * len(rows)}
    columns |= {"inter_token_latency": latency, "num_tokens": num_tokens}
    tables = {"requests": {}, "replicas": {}, "timeline": {}, "tokens": columns}
    row = Result(tables, **NOTHING).summary().loc["itl"]
    pooled = np.repeat(latency, num_tokens)
    assert row["mean"] == pytest.approx(pooled.mean())
    assert row["std"] == pytest.approx(pooled.std(), abs=1e-6)
    assert row["count"] == len(pooled)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        assert row[name] == pytest.approx(np.quantile(pooled, share))


def test_figures():
    """Throughput is that of completed requests, from the first arrival to the last completion."""
    assert made().figures == pytest.approx(
        {
            "num_requests": 5,
            "completed": 3,
            "unfinished": 1,
            "refused": 1,
            "restarts": 3,
            "makespan": 6.0,
            "request_throughput": 0.5,
            "output_token_throughput": 10 / 6,
            "total_token_throughput": 610 / 6,
            "utilisation": 0.6,
            "kv_cache_usage_mean": 0.2,
            "kv_cache_usage_peak": 0.8,
            "mfu": 0.25,
            "mbu": 0.4,
        }
    )


def test_nothing_completed():
    """Without a completed request the figures are NaN, and nothing warns."""
    result = made(first_token_at=[NAN] * 5, completed_at=[NAN] * 5, scheduled_at=[NAN] * 5)
    assert result.figures["completed"] == 0
    assert np.isnan(result.figures["request_throughput"])
    assert result.summary().loc["e2e", "count"] == 0
    assert np.isnan(result.slo(ttft=1.0)["goodput"])
    assert "request throughput        - requests/s" in result.summary_text()


def test_no_requests():
    """A run without requests has a summary too."""
    result = Result({"requests": {}, "replicas": {}, "timeline": {}}, **NOTHING)
    assert repr(result) == "<Result: 0 requests, 0 completed, 0 unfinished, 0 refused>"
    assert "ttft" in str(result)
    assert result.slo(e2e=1.0).isna().all()


# -- printing --------------------------------------------------------------------------------------


def test_printed_summary():
    """print(result) gives latencies in seconds with four digits, then the figures."""
    assert str(made(("tokens",))) == PRINTED


PRINTED = """\
latency (s)             mean       std       p50       p90       p95       p99     count
ttft                   2.375     1.635     2.500     4.000     4.000     4.000         4
tpot                   1.000         0     1.000     1.000     1.000     1.000         2
e2e                    4.167    0.2357     4.000     4.400     4.450     4.490         3
scheduling_delay       1.125    0.8927     1.250     2.000     2.000     2.000         4
itl                   0.8750    0.4841    0.7500     1.300     1.650     1.930         8

requests                  5: 3 completed, 1 unfinished, 1 refused
most often refused for    its 9010 tokens are more than max_model_len = 4096
makespan                  6.000 s
request throughput        0.5000 requests/s
output token throughput   1.667 tokens/s
total token throughput    101.7 tokens/s
restarts                  3
utilisation               60.0%
KV-cache usage            20.0% mean, 80.0% peak
MFU                       25.0%
MBU                       40.0%"""


def test_most_common_refusal():
    """Reasons that differ only in their numbers are one reason."""
    refusal = ["no room for 7 blocks", "too long: 90 tokens", "too long: 80 tokens", "", ""]
    assert "refused for    too long: 90 tokens" in made(refusal=refusal).summary_text()


def test_html():
    """Notebooks get plain tables, with everything escaped and nothing loaded from elsewhere."""
    html = made(refusal=["<script>", "", "", "", ""])._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<th>ttft</th><td>2.375</td>" in html
    assert html.count("<table>") == html.count("</table>") == 2


# -- objectives ------------------------------------------------------------------------------------


def test_slo_counts_every_request():
    """Of five requests two meet both limits; refused and unfinished ones are misses."""
    slo = made().slo(ttft=1.0, e2e=4.5)
    assert slo.to_dict() == pytest.approx(
        {"ttft": 0.4, "e2e": 0.6, "attainment": 0.4, "goodput": 2 / 6.0}
    )


def test_single_token_meets_any_tpot():
    """As in vllm bench serve, a request of one output token has no TPOT to violate."""
    assert made().slo(tpot=1e-9)["tpot"] == pytest.approx(0.2)
    assert made().slo(tpot=1.0)["attainment"] == pytest.approx(0.6)


def test_slo_of_inter_token_latency():
    """Gaps are pooled over requests, so their share stands beside attainment and goodput."""
    slo = made(("tokens",)).slo(ttft=10.0, itl=0.5)
    assert slo["itl"] == 0.5
    assert slo["attainment"] == pytest.approx(0.6)


@pytest.mark.parametrize("limits", [{}, {"itl": 0.1}, {"ttft": 0}, {"ttft": "1"}, {"e2e": NAN}])
def test_slo_needs_positive_limits(limits):
    """A limit is a positive number of seconds, and there is at least one on requests."""
    with pytest.raises(ConfigError, match=r"slo\(\)"):
        made(("tokens",)).slo(**limits)


@given(st.floats(0.01, 10), st.floats(0.01, 10))
def test_looser_limits_are_met_more(one, other):
    """Attainment and goodput grow with the limit."""
    strict, loose = (made().slo(ttft=limit) for limit in sorted((one, other)))
    assert (strict <= loose).all()


# -- warm-up ---------------------------------------------------------------------------------------


def test_after_keeps_what_came_later():
    """Requests count from their arrival, other rows from their instant; replicas stay whole."""
    later = made(ALL).after(3.0)
    assert later.requests["request_id"].to_list() == [2, 3, 4]
    assert later.timeline["time"].to_list() == [5.0]
    assert later.batches["scheduled_at"].to_list() == [6.0]
    assert later.tokens["time"].to_list() == [3.0, 4.0, 5.0]
    assert later.events.empty
    assert_frame_equal(later.replicas, made().replicas)
    assert later.figures["makespan"] == 4.0
    assert later.config == CONFIG
    assert "arrived from              3.000 s on" in str(later)


def test_after_nothing():
    """A warm-up of zero leaves every table as it is."""
    result = made(ALL)
    for name in result.tables:
        assert_frame_equal(getattr(result.after(0.0), name), getattr(result, name))


# -- plots -----------------------------------------------------------------------------------------


def test_plot_names_are_the_functions(monkeypatch):
    """A function added to plots is a plot of every result, with its own documentation."""

    def rainbow(result, colours=7):
        """Draw a rainbow."""
        return result, colours

    monkeypatch.setattr(plots, "rainbow", rainbow, raising=False)
    monkeypatch.setattr(plots, "__all__", [*plots.__all__, "rainbow"])
    result = made()
    assert result.plot.rainbow(colours=3) == (result, 3)
    assert result.plot.rainbow.__doc__ == "Draw a rainbow."
    assert {"cdf", "timeline", "gantt", "quantiles", "rainbow"} <= set(dir(result.plot))


def test_unknown_plot_names_the_nearest():
    """A misspelt plot is an AttributeError that names the nearest one."""
    with pytest.raises(NotAvailableError, match="did you mean 'timeline'"):
        made().plot.timelines()
    assert not hasattr(made().plot, "_repr_html_")


# -- files -----------------------------------------------------------------------------------------


def assert_equal_results(one, other):
    assert one.tables == other.tables
    for name in one.tables:
        assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    assert one.config == other.config
    assert one.info == other.info


def test_save_and_load(tmp_path):
    """A loaded result equals the saved one: tables, types, configuration and information."""
    result = made(ALL, session_id=[3, 3, None, 4, 4], hash_ids=[[1, 2], [], [3], [], [4]])
    result.save(tmp_path / "run" / "first")
    loaded = load_result(tmp_path / "run" / "first")
    assert_equal_results(loaded, result)
    assert loaded.summary_text() == result.summary_text()
    assert loaded.requests["session_id"].dtype == "Int64"


def test_saved_files_are_plain(tmp_path):
    """The directory has a CSV per table, readable by anything, and nothing else."""
    made(("batches",)).save(tmp_path)
    names = "batches.csv config.yaml info.json replicas.csv requests.csv summary.csv timeline.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()
    assert (tmp_path / "batches.csv").read_text().splitlines()[2] == "1,0,6.0,,1 3,1 400,400,1"
    assert pd.read_csv(tmp_path / "requests.csv")["ttft"][0] == 1.0
    assert pd.read_csv(tmp_path / "summary.csv")["metric"][0] == "ttft"
    assert json.loads((tmp_path / "info.json").read_text())["figures"]["completed"] == 3


TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
INSTANTS = st.floats(0, 1e9)


@settings(max_examples=50, deadline=None)
@example([(0.0, 0.0, "one\rother\r\nlast", True)])
@given(st.lists(st.tuples(INSTANTS, st.floats(), TEXTS, st.booleans()), min_size=1, max_size=5))
def test_values_survive_exactly(tmp_path_factory, rows):
    """Every float and every text comes back as it was."""
    instants, deadlines, texts, flags = map(list, zip(*rows, strict=True))
    zeros = [0] * len(rows)
    columns = dict.fromkeys(("scheduled_at", "first_token_at", "completed_at"), instants)
    columns |= dict.fromkeys(("num_prefill_tokens", "num_decode_tokens", "num_restarts"), zeros)
    columns |= {"arrived_at": [0.0] * len(rows), "refusal": texts, "is_good": flags, "tag": texts}
    columns["deadline"] = deadlines
    tables = {"requests": columns, "replicas": {}, "timeline": {}, "batches": {}, "events": {}}
    result = Result(tables, **NOTHING)
    directory = tmp_path_factory.mktemp("saved")
    result.save(directory)
    assert_equal_results(load_result(directory), result)
    assert load_result(directory).requests["tag"].to_list() == texts


def test_large_tables_are_compressed(tmp_path, monkeypatch):
    """Above a number of rows a table is a .csv.gz; the bytes do not depend on the hour."""
    monkeypatch.setattr(storage, "MAX_PLAIN_ROWS", 4)
    for name in ("one", "other"):
        made().save(tmp_path / name)
    assert_equal_results(load_result(tmp_path / "one"), made())
    one, other = (tmp_path / name / "requests.csv.gz" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "one" / "replicas.csv").exists()


def test_save_replaces_an_earlier_result(tmp_path):
    """If it is told to: its files go, those of the user stay."""
    made(ALL).save(tmp_path)
    (tmp_path / "ttft.png").write_text("a figure")
    with pytest.raises(VidurError, match=r"is there already; name another .*overwrite=True"):
        made(config=None).save(tmp_path)
    assert_equal_results(load_result(tmp_path), made(ALL))
    made(config=None).save(tmp_path, overwrite=True)
    assert_equal_results(load_result(tmp_path), made(config=None))
    names = "info.json replicas.csv requests.csv summary.csv timeline.csv ttft.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()


@pytest.mark.parametrize("name", ["requests.csv", "info.json", "notes.txt"])
def test_save_spares_other_directories(tmp_path, name):
    """A directory with anything in it that is not a saved result is left alone."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(VidurError, match=f"holds '{name}' and is not a saved result"):
        made().save(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_save_needs_a_directory(tmp_path):
    """A path that is a file, or below one, is refused with its name."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VidurError, match="it is a file"):
        made().save(tmp_path / "file")
    with pytest.raises(VidurError, match="cannot save the result in"):
        made().save(tmp_path / "file" / "below")


def test_failed_save_leaves_the_earlier_result(tmp_path):
    """What cannot be written is found before anything is replaced."""
    made().save(tmp_path)
    with pytest.raises(VidurError, match="configuration cannot be written as YAML"):
        made(config={"execution_time": object()}).save(tmp_path, overwrite=True)
    assert_equal_results(load_result(tmp_path), made())


def test_interrupted_save_is_no_result(tmp_path, monkeypatch):
    """A save that is cut off between two files is reported, and can be repeated."""
    made().save(tmp_path)
    replace = storage.os.replace

    def fail_at_requests(source, target):
        if target.name == "requests.csv":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", fail_at_requests)
        with pytest.raises(KeyboardInterrupt):
            made().save(tmp_path, overwrite=True)
    with pytest.raises(VidurError, match="incomplete"):
        load_result(tmp_path)
    made().save(tmp_path, overwrite=True)
    assert_equal_results(load_result(tmp_path), made())


def test_load_needs_a_result(tmp_path):
    """A directory that is missing, empty or of somebody else is named."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "info.json").write_text("[1]")
    for name in ("missing", "theirs", "."):
        with pytest.raises(VidurError, match="is not a saved result"):
            load_result(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("requests.csv", lambda text: None),
        ("requests.csv", lambda text: ""),
        ("requests.csv", lambda text: text[: len(text) // 2]),
        ("requests.csv", lambda text: text.replace("1.5", "soon")),
        ("timeline.csv", lambda text: text.replace("num_running", "running")),
        ("timeline.csv", lambda text: text.rsplit("\n", 2)[0]),
        ("batches.csv", lambda text: text.replace("1 3", "1;3")),
        ("config.yaml", lambda text: None),
        ("config.yaml", lambda text: "a: [1"),
        ("config.yaml", lambda text: "llama"),
    ],
)
def test_damage_is_named(tmp_path, name, damage):
    """A missing, cut off or changed file is an error that names it."""
    made(("batches",)).save(tmp_path)
    path = tmp_path / name
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(VidurError, match=rf"{name}' is damaged"):
        load_result(tmp_path)


def test_cut_off_archive_is_named(tmp_path, monkeypatch):
    """So is a compressed file."""
    monkeypatch.setattr(storage, "MAX_PLAIN_ROWS", 4)
    made().save(tmp_path)
    path = tmp_path / "requests.csv.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(VidurError, match=r"requests.csv.gz' is damaged"):
        load_result(tmp_path)


def test_newer_format_is_refused(tmp_path):
    """A result of a later version says so."""
    made().save(tmp_path)
    path = tmp_path / "info.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(VidurError, match="newer vidur_simpy"):
        load_result(tmp_path)


# -- imports ---------------------------------------------------------------------------------------


def modules_after(code):
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_making_a_result_is_light():
    """Neither pandas nor matplotlib is loaded before a table or a plot is asked for."""
    code = """
from vidur_simpy.result import Result
Result({"requests": {}, "replicas": {}, "timeline": {}}, config=None, info={})
"""
    assert not {"pandas", "matplotlib"} & modules_after(code)


def test_load_needs_no_simulator(tmp_path):
    """A saved result is opened, and drawn, without SimPy, engine or schedulers."""
    made(ALL).save(tmp_path)
    code = f"""
import matplotlib
matplotlib.use("Agg")
from vidur_simpy.loading import load_result
result = load_result({str(tmp_path)!r})
str(result), result.plot.gantt(), result.plot.cdf()
"""
    loaded = modules_after(code)
    assert "vidur_simpy.plots" in loaded
    forbidden = ("simpy", "vidur_simpy.kernel", "vidur_simpy.processes", "vidur_simpy.simulation")
    assert not loaded & {*forbidden, "vidur_simpy.replica_scheduler"}
