"""Records that are written as they come: equal tables, little memory, and what a kill leaves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from functools import partial

import busy_runs
import pytest
from busy_runs import RECORDS, WORKLOAD, assert_equal_tables
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import ConfigError, Request, Simulation, VidurError, record_columns
from vidur_simpy.cli import main

pytest.importorskip("pyarrow", reason="records in files need pyarrow")

busy_cluster = partial(busy_runs.busy_cluster, pipeline_parallel_size=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of so few rows that a short run writes many."""
    monkeypatch.setattr(record_columns, "ROWS_PER_PART", 16)


def files_of(directory, table):
    return sorted((directory / table).glob("part-*.parquet"))


# The same tables


def test_tables_are_those_of_a_run_in_memory(tmp_path):
    """Where rows are kept changes nothing, in the result and in the directory."""
    whole = vs.simulate(busy_cluster(), WORKLOAD, record=RECORDS)
    result = vs.simulate(busy_cluster(), WORKLOAD, record=RECORDS, record_to=tmp_path / "records")
    assert_equal_tables(result, whole)
    assert result.summary_text() == whole.summary_text()
    for name in ("requests", *RECORDS):
        assert len(files_of(tmp_path / "records", name)) > 3
        loaded = vs.load_records(tmp_path / "records", name)
        assert_frame_equal(loaded, getattr(whole, name), check_exact=True)


@pytest.mark.parametrize(("size", "cut"), [(13, 0.05), (32, 7.3), (101, 20.0)])
def test_a_result_in_between_stays_what_it_was(tmp_path, monkeypatch, size, cut):
    """A result read after the run went on is that of its instant, whatever the size of parts."""
    early = vs.simulate(busy_cluster(), WORKLOAD, record=RECORDS, until=cut)
    whole = vs.simulate(busy_cluster(), WORKLOAD, record=RECORDS)
    monkeypatch.setattr(record_columns, "ROWS_PER_PART", size)
    sim = Simulation(busy_cluster(), WORKLOAD, record=RECORDS, record_to=tmp_path)
    sim.run(until=cut)
    between = sim.result()
    sim.run()
    assert_equal_tables(between, early)
    assert_equal_tables(sim.result(), whole)
    for name in ("requests", *RECORDS):
        assert_frame_equal(vs.load_records(tmp_path, name), getattr(whole, name))


def test_columns_that_few_requests_have_survive(tmp_path):
    """Sessions, priorities, deadlines and refusals in some parts only are in the whole table."""

    def run(record_to):
        sim = Simulation(busy_cluster(), record_to=record_to)
        for number in range(60):
            special = {"session_id": f"chat {number}", "priority": 2, "deadline": 9.0}
            tokens = 600 if number == 50 else 20
            sim.submit(Request(tokens, 8, **(special if number in (20, 21) else {})))
        sim.run()
        return sim.result()

    ours, theirs = run(tmp_path), run(None)
    assert_frame_equal(ours.requests, theirs.requests, check_exact=True)
    assert_frame_equal(vs.load_records(tmp_path, "requests"), theirs.requests, check_exact=True)
    assert {"session_id", "priority", "deadline"} <= set(ours.requests)


def test_sessions_of_several_types_are_read_as_text(tmp_path):
    """What has no type in a file is told as the table tells it."""

    def run(record_to):
        sim = Simulation(busy_cluster(), record_to=record_to)
        for number in range(40):
            sim.submit(Request(20, 2, session_id="chat" if number % 2 else number))
        sim.run()
        return sim.result().requests

    assert_frame_equal(run(tmp_path), run(None), check_exact=True)


def test_the_result_is_saved_and_sent_like_any_other(tmp_path):
    """A result that reads its rows from files can be pickled and saved."""
    result = vs.simulate(busy_cluster(), WORKLOAD, record=RECORDS, record_to=tmp_path / "records")
    sent = pickle.loads(pickle.dumps(result))
    assert_equal_tables(sent, result)
    result.save(tmp_path / "saved")
    assert_equal_tables(vs.load_result(tmp_path / "saved"), result)


# Little memory


def test_memory_holds_less_than_one_part(tmp_path):
    """However long the run, each table holds fewer rows than a part and what is under way."""
    sim = Simulation(busy_cluster(), WORKLOAD, record=RECORDS, record_to=tmp_path)
    most = dict.fromkeys(("requests", *RECORDS), 0)
    most_waiting = 0
    while sim.env.peek() < float("inf"):
        sim.env.step()
        batches = sim.logs["batches"]
        held = {"requests": sim.request_log._rows, "batches": batches._ended_rows}
        held |= {name: sim.logs[name]._rows for name in ("stages", "events", "tokens")}
        most = {name: max(most[name], rows.num_held) for name, rows in held.items()}
        most_waiting = max(most_waiting, len(batches._waiting))
    assert most == dict.fromkeys(most, 15)
    assert most_waiting <= 8
    assert len(sim.logs["events"]) > 1_000


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """A result whose files are gone is made all the same, and says which one it misses."""
    result = vs.simulate(busy_cluster(), WORKLOAD, record=("events",), record_to=tmp_path)
    assert result.figures["completed"] == 60
    files_of(tmp_path, "events")[2].unlink()
    with pytest.raises(VidurError, match=r"events/part-00002.parquet' is damaged or missing"):
        _ = result.events


# What a kill leaves

KILLED = """
import os, signal, sys
import vidur_simpy as vs
from vidur_simpy import record_columns
sys.path.insert(0, sys.argv[1])
from test_record_to import RECORDS, WORKLOAD, busy_cluster

record_columns.ROWS_PER_PART = 16
sim = vs.Simulation(busy_cluster(), WORKLOAD, seed=3, record=RECORDS, record_to=sys.argv[2])

def killer():
    yield sim.env.timeout(20.0)
    os.kill(os.getpid(), signal.SIGKILL)

sim.env.process(killer())
sim.run()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_leaves_the_first_rows(tmp_path):
    """Parts that a killed process had written are read, and begin as the tables of a whole run."""
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = vs.simulate(busy_cluster(), WORKLOAD, seed=3, record=RECORDS)
    for name in RECORDS:
        kept, table = vs.load_records(tmp_path, name), getattr(whole, name)
        assert 16 <= len(kept) < len(table)
        assert_frame_equal(kept, table.head(len(kept)), check_exact=True)
    kept = vs.load_records(tmp_path, "requests").set_index("request_id")
    done_first = whole.requests.set_index("request_id").sort_values("completed_at").head(len(kept))
    assert len(kept) >= 16
    assert_frame_equal(kept, done_first.loc[kept.index], check_exact=True)


def test_a_part_cut_off_while_it_was_written_is_no_part(tmp_path):
    """A file is written aside and renamed: what a kill left aside is not read."""
    vs.simulate(busy_cluster(), WORKLOAD, record=("tokens",), record_to=tmp_path)
    tokens = vs.load_records(tmp_path, "tokens")
    (tmp_path / "tokens" / ".part-99999.parquet").write_bytes(b"PAR1")
    assert_frame_equal(vs.load_records(tmp_path, "tokens"), tokens)


def test_a_failed_run_keeps_all_its_rows(tmp_path):
    """An error of a user's process leaves every row that was there, the last part included."""
    sim = Simulation(busy_cluster(), WORKLOAD, record=("events",), record_to=tmp_path)

    def breaks():
        yield sim.env.timeout(5.0)
        raise RuntimeError("out of ideas")

    sim.env.process(breaks())
    with pytest.raises(RuntimeError, match="out of ideas"):
        sim.run()
    kept = vs.load_records(tmp_path, "events")
    assert len(kept) % 16
    assert_frame_equal(kept, sim.result().events)


# What is refused, and how


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    """Records never mix with what was there."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"it holds 'notes.txt'; name a new or an empty"):
        vs.simulate(busy_cluster(), WORKLOAD, record_to=tmp_path)
    with pytest.raises(ConfigError, match=r"record_to = .*notes.txt': it cannot be written"):
        vs.simulate(busy_cluster(), WORKLOAD, record_to=tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match=r"record_to = 3: expected the path"):
        vs.simulate(busy_cluster(), WORKLOAD, record_to=3)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    """What is missing is said before the run, with how to get it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'vidur-simpy\[parquet\]'"):
        Simulation(busy_cluster(), WORKLOAD, record_to=tmp_path / "records")


def test_shards_do_not_write_as_they_go(tmp_path):
    """Shards put rows in order at the end, so records in files are refused."""
    with pytest.raises(ConfigError, match=r"record_to = .* with shards = 2"):
        vs.simulate(busy_cluster(), WORKLOAD, shards=2, record_to=tmp_path)


def test_load_records_says_what_is_there(tmp_path):
    """A table that was not recorded, or does not exist, is told from those that are there."""
    vs.simulate(busy_cluster(), WORKLOAD, record=("tokens",), record_to=tmp_path)
    with pytest.raises(VidurError, match=r"no records of 'batches': it has requests, tokens"):
        vs.load_records(tmp_path, "batches")
    with pytest.raises(ConfigError, match=r"unknown table 'batchs': did you mean 'batches'"):
        vs.load_records(tmp_path, "batchs")
    with pytest.raises(VidurError, match=r"it holds no records"):
        vs.load_records(tmp_path / "elsewhere", "batches")


# The command line


def test_the_command_line_records_to_a_folder(tmp_path, capsys):
    """--record-to writes what --record names, and must lie outside of --out."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "cluster: {execution_time: linear, kv_cache: {num_blocks: 1000}}\n"
        "workload: {type: synthetic, num_requests: 20, arrivals: {type: poisson, rate: 2.0},\n"
        "  lengths: {type: fixed, num_prefill_tokens: 100, num_decode_tokens: 10}}\n"
    )
    records = str(tmp_path / "records")
    command = ["run", str(config), "--record", "batches", "--record-to", records]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0, capsys.readouterr().err
    assert len(vs.load_records(records, "requests")) == 20
    assert vs.load_records(records, "batches")["completed_at"].notna().all()
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", records])
    assert ended.value.code == 2
