"""What a sweep has finished is on disk: nothing of it is lost or made again, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import reusable_executor
from sweep_script import NUM_RUNS, small_sweep

import vidur_simpy as vs
from vidur_simpy.search import Run, open_store, run_all
from vidur_simpy.search.store import DamagedEntryError, key_of

SCRIPT = Path(__file__).with_name("sweep_script.py")


@pytest.fixture(scope="module")
def expected():
    """The table of a sweep that keeps nothing."""
    return small_sweep().table


@pytest.fixture
def run():
    """One small run."""
    cluster = vs.Cluster(max_model_len=4096, execution_time=vs.Linear())
    workload = vs.Workload(vs.Constant(rate=2.0), vs.FixedLengths(100, 10), num_requests=3)
    return Run(cluster, workload)


def entries(store):
    """The files of a store, and what tells a file from one that was written anew."""
    files = (Path(store) / "runs").glob("[!.]*.json")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def wait_for_entries(store, count):
    """Return once there are so many; what they are."""
    for _ in range(6_000):
        if len(entries(store)) >= count:
            return entries(store)
        time.sleep(0.01)
    raise AssertionError(f"{store} holds {len(entries(store))} runs, expected {count}")


def script(*arguments):
    """Start a sweep in a process of its own, whose workers can be told from ours."""
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def worker_of(process, name):
    """The identifier of a process that works for another one, by a part of its command."""
    psutil = pytest.importorskip("psutil")
    for _ in range(500):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(child.cmdline()):
                    return child.pid
        time.sleep(0.01)
    raise AssertionError(f"there is no process {name}")


def kill(process):
    """SIGKILL it, and it alone."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def resumed(store, before):
    """Finish a sweep, and show that what was there before was not touched."""
    table = small_sweep(store=store).table
    after = entries(store)
    assert before.items() <= after.items()
    assert len(after) == NUM_RUNS
    return table


# Going on


def test_a_second_sweep_makes_nothing(tmp_path, expected, made):
    """Figures that were stored are the same to the bit."""
    first = small_sweep(store=tmp_path).table
    assert len(made) == NUM_RUNS
    second = small_sweep(store=tmp_path).table
    assert len(made) == NUM_RUNS
    for table in (first, second):
        pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_more_points_make_only_what_is_new(tmp_path, run, made):
    """Replications and values that were there are taken from the store."""
    grid = {"cluster.num_replicas": [1, 2]}
    vs.sweep(run.cluster, run.workload, grid, replications=2, store=tmp_path)
    grid = {"cluster.num_replicas": [1, 2, 3]}
    vs.sweep(run.cluster, run.workload, grid, replications=3, store=tmp_path)
    assert len(made) == 4 + (9 - 4)


def test_a_run_that_failed_is_made_again(tmp_path, run, made):
    """What it lacked may be there the next time, such as its trace."""
    trace = tmp_path / "trace.csv"
    grid = [{"workload": vs.Trace(trace)}]
    first = vs.sweep(run.cluster, run.workload, grid, store=tmp_path / "store").table
    assert first["error"][0].startswith("TraceError")
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,10\n")
    second = vs.sweep(run.cluster, run.workload, grid, store=tmp_path / "store").table
    assert second["error"][0] == ""
    assert len(made) == 2


def test_a_sweep_whose_process_was_killed_goes_on(tmp_path, expected):
    """SIGKILL in the middle: what was stored stays, the rest is made."""
    process = script("serial", tmp_path / "table", tmp_path / "store")
    before = wait_for_entries(tmp_path / "store", 3)
    kill(process)
    assert not (tmp_path / "table").exists()
    table = resumed(tmp_path / "store", before)
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


@pytest.mark.slow
def test_a_sweep_whose_worker_was_killed_goes_on(tmp_path):
    """The sweep says so and ends; what other workers stored stays."""
    before = {}

    def kill_one():
        before.update(wait_for_entries(tmp_path, 2))
        os.kill(next(iter(reusable_executor._executor._processes)), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(vs.VidurError, match="a worker process died, most often because memory"):
        # So many requests that they take longer than it takes to kill a worker.
        small_sweep(store=tmp_path, jobs=2, num_requests=1000)
    killer.join()
    assert before.items() <= entries(tmp_path).items()
    assert len(entries(tmp_path)) < NUM_RUNS
    before = entries(tmp_path)
    made = small_sweep(store=tmp_path, num_requests=1000).table
    assert before.items() <= entries(tmp_path).items()
    assert len(entries(tmp_path)) == NUM_RUNS
    assert (made["error"] == "").all()


@pytest.mark.slow
def test_workers_of_a_killed_process_leave_a_sound_store(tmp_path):
    """SIGKILL of the parent of two workers, which end what they began: nothing is made twice."""
    process = script("loky", tmp_path / "table", tmp_path / "store", 1000)
    before = wait_for_entries(tmp_path / "store", 2)
    kill(process)
    table = small_sweep(store=tmp_path / "store", num_requests=1000).table
    os.killpg(process.pid, signal.SIGKILL)  # idle workers would stay for some minutes
    assert before.items() <= entries(tmp_path / "store").items()
    unkept = small_sweep(num_requests=1000).table
    pd.testing.assert_frame_equal(table, unkept, check_exact=True)
    assert len(entries(tmp_path / "store")) == NUM_RUNS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "worker", "says"),
    [("dask", "spawn_main", ""), ("ray", "ray::PoolActor", "a worker process died")],
)
def test_a_cluster_whose_worker_was_killed_loses_nothing(tmp_path, backend, worker, says):
    """Dask makes the runs of a dead worker elsewhere; on Ray the sweep ends, and says so."""
    pytest.importorskip("distributed" if backend == "dask" else "ray")
    store = tmp_path / "store"
    process = script(backend, tmp_path / "table", store, 2000)
    before = wait_for_entries(store, 2)
    os.kill(worker_of(process, worker), signal.SIGKILL)
    told = process.communicate(timeout=120)[1]
    assert says in told
    assert (process.returncode == 0) == (not says)
    assert (tmp_path / "table").exists() == (not says)
    assert before.items() <= entries(store).items()
    before = entries(store)
    table = small_sweep(store=store, num_requests=2000).table
    assert before.items() <= entries(store).items()
    pd.testing.assert_frame_equal(table, small_sweep(num_requests=2000).table, check_exact=True)


# Sharing


def test_two_processes_share_a_store(tmp_path, expected):
    """At the same time: each run is made by one of them, both have the whole table."""
    processes = [
        script("serial", tmp_path / f"table{number}", tmp_path / "store") for number in range(2)
    ]
    num_made = [int(process.communicate()[0]) for process in processes]
    assert sum(num_made) == NUM_RUNS
    for number in range(2):
        table = pd.read_pickle(tmp_path / f"table{number}")
        pd.testing.assert_frame_equal(table, expected, check_exact=True)
    assert not list((tmp_path / "store" / "claims").iterdir())


def test_a_claim_is_for_one(tmp_path):
    """While one computes a run, others do something else, or wait."""
    pytest.importorskip("fcntl")
    store = open_store(tmp_path)
    with store.claim("a", wait=False) as first, store.claim("a", wait=False) as second:
        assert (first, second) == (True, False)
    with store.claim("a", wait=False) as again:
        assert again


def test_a_run_that_somebody_else_makes_is_waited_for(tmp_path, run, made):
    """It is not made twice: its figures are those that the other one stored."""
    pytest.importorskip("fcntl")
    store = open_store(tmp_path)
    key = key_of(run.described())
    outcomes = []
    with store.claim(key, wait=False):
        waiting = threading.Thread(target=lambda: outcomes.extend(run_all([run], store=store)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        store.save(key, run.described(), {"from": 1.0})
    waiting.join()
    assert outcomes[0].figures == {"from": 1.0}
    assert not made


def test_a_worker_that_does_not_see_the_store_hands_its_figures_over(tmp_path, run, monkeypatch):
    """As on a cluster without a shared file system: the process that asked stores them."""
    monkeypatch.setattr("vidur_simpy.search.store.Store.is_here", False)
    store = open_store(tmp_path)
    (outcome,) = run_all([run], store=store)
    assert store.load(key_of(run.described())) == outcome.figures


# What a run is called


def test_equal_configurations_have_one_name(run, tmp_path):
    """However they were written; any difference gives another."""
    name = key_of(run.described())
    other = Run(vs.Cluster(), run.workload)
    changed = [
        Run(run.cluster, run.workload, seed=1),
        Run(run.cluster, run.workload, until=5.0),
        Run(run.cluster, run.workload, slo={"ttft": 1.0}),
        Run(run.cluster, run.workload, record=("tokens",)),
        Run(run.cluster, run.workload, event_order="id"),
        other,
    ]
    names = [key_of(each.described()) for each in changed]
    assert len({name, *names}) == 7
    written = {"max_model_len": 4096, "execution_time": "linear"}
    same = Run(vs.load_config({"cluster": written})["cluster"], run.workload, slo={})
    assert key_of(same.described()) == name


def test_the_content_of_a_trace_is_part_of_the_name(tmp_path, run):
    """Not where it lies, which may be elsewhere the next time."""
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,10\n"
    names = []
    for folder, content in (("a", text), ("b", text), ("c", text + "1.0,100,10\n")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "trace.csv"
        path.write_text(content)
        names.append(key_of(Run(run.cluster, vs.Trace(path)).described()))
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("setting", ["path", "network", "cpu_overheads"])
def test_the_content_of_a_profile_is_part_of_the_name(tmp_path, run, setting):
    """Of each of its folders: measured anew, they give other times."""
    described = dict(run.described())
    described["cluster"] = {"execution_time": {"type": "profile", setting: str(tmp_path)}}
    (tmp_path / "measured.csv").write_text("time\n1.0\n")
    name = key_of(described)
    (tmp_path / "measured.csv").write_text("time\n1.25\n")
    assert key_of(described) != name


def test_the_version_is_part_of_the_name(run, monkeypatch):
    """Another version may compute other figures."""
    name = key_of(run.described())
    monkeypatch.setattr("vidur_simpy.search.store._code", lambda: "0.2.0+0")
    assert key_of(run.described()) != name


def test_objects_without_a_name_are_run_but_not_stored(tmp_path, run, made):
    """A warning says how many and which; the others are stored."""
    grid = {"cluster.execution_time": [vs.Linear(), lambda batch: 0.01]}
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 2 runs are made, but not stored.*<lambda>"):
            table = vs.sweep(run.cluster, run.workload, grid, store=tmp_path).table
        assert (table["error"] == "").all()
    assert len(made) == 2 + 1
    assert len(entries(tmp_path)) == 1


def test_metrics_are_not_stored(tmp_path, run):
    """Nobody can tell whether a function is still the same."""
    with pytest.warns(UserWarning, match="not stored.*lambda"):
        vs.sweep(run.cluster, run.workload, [{}], store=tmp_path, metrics=lambda result: {"a": 1})
    assert not entries(tmp_path)


# Damage and strangers


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"completed": 3.0', '"completed": 4.0'),
        lambda text: "[1, 2]",
        lambda text: text.replace("ttft", "\x00\xff"),
    ],
)
def test_a_damaged_entry_is_noticed_and_made_again(tmp_path, run, made, damage):
    """Cut short, emptied, changed, or something else altogether."""
    vs.sweep(run.cluster, run.workload, [{}], store=tmp_path)
    (file,) = (tmp_path / "runs").iterdir()
    text = file.read_text()
    file.write_text(damage(text), encoding="latin-1")
    with pytest.raises(DamagedEntryError):
        open_store(tmp_path).load(file.stem)
    with pytest.warns(UserWarning, match="The run is made again"):
        vs.sweep(run.cluster, run.workload, [{}], store=tmp_path)
    assert len(made) == 2
    assert file.read_text() == text


def test_an_entry_of_another_run_is_not_taken(tmp_path, run):
    """A file that was renamed has another name inside."""
    store = open_store(tmp_path)
    store.save("a", run.described(), {"x": 1.0})
    os.rename(store.path("a"), store.path("b"))
    with pytest.raises(DamagedEntryError, match="is the run a"):
        store.load("b")


def test_figures_come_back_to_the_bit(tmp_path):
    """NaN and the smallest of numbers, too."""
    store = open_store(tmp_path)
    figures = {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": float("nan"), "e": 1e308}
    store.save("k", {"priorities": {10: 1.0, 2: 3.0}}, figures)
    loaded = store.load("k")
    for name, value in figures.items():
        assert np.float64(loaded[name]).tobytes() == np.float64(value).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2, "version": "9.0.0"}, "format version 2, expected at most 1: it was"),
        (
            {"version": "99.1.0"},
            r"written by vidur_simpy 99.1.0, this is .* compute every run again",
        ),
        ({"format": "something"}, "holds a 'something'"),
        ({"version": None, "format_version": "x"}, "is damaged"),
    ],
)
def test_a_store_that_is_not_ours_is_refused(tmp_path, change, message):
    """Written by a newer version, or by something else: what it is and what to do."""
    open_store(tmp_path)
    manifest = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(manifest | change))
    with pytest.raises(vs.VidurError, match=message):
        small_sweep(store=tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """And a file is no folder."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(vs.VidurError, match=r"not a store of runs: it holds 'thesis\.tex'"):
        small_sweep(store=tmp_path)
    with pytest.raises(vs.VidurError, match="cannot keep runs in"):
        small_sweep(store=tmp_path / "thesis.tex")


def test_a_store_without_its_manifest_goes_on(tmp_path, run, made):
    """As the message advises where that is damaged; a folder with other files stays refused."""
    vs.sweep(run.cluster, run.workload, [{}], store=tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(vs.VidurError, match=r"store.json' is damaged .*; delete it if"):
        open_store(tmp_path)
    (tmp_path / "store.json").unlink()
    vs.sweep(run.cluster, run.workload, [{}], store=tmp_path)
    assert len(made) == 1
    (tmp_path / "store.json").unlink()
    (tmp_path / "runs" / "events.out").touch()
    with pytest.raises(vs.VidurError, match="not a store of runs"):
        open_store(tmp_path)


def test_an_older_store_is_used_and_gets_the_new_version(tmp_path):
    """Its runs have other names, so that they are made anew."""
    open_store(tmp_path)
    manifest = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(manifest | {"version": "0.0.1"}))
    open_store(tmp_path)
    assert json.loads((tmp_path / "store.json").read_text()) == manifest


def test_a_full_disk_is_told(tmp_path, run, monkeypatch):
    """The sweep ends: going on would lose what it computes."""
    monkeypatch.setattr(
        "vidur_simpy.search.store._write", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    store = vs.search.store.Store(tmp_path)
    with pytest.raises(vs.VidurError, match=r"cannot keep a run in .*full"):
        store.save("k", run.described(), {})


def test_nothing_is_written_without_a_store(tmp_path, run, monkeypatch):
    """A sweep leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vs.sweep(run.cluster, run.workload, [{}])
    assert not list(tmp_path.iterdir())
