"""Many configurations, one table: the same wherever the runs are made."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sweep_script import NUM_RUNS, small_sweep

import vidur_simpy as vs
from vidur_simpy.cli import main
from vidur_simpy.search import figures_of, points_of, replication_seeds

SCRIPT = Path(__file__).with_name("sweep_script.py")


@pytest.fixture(scope="module")
def serial():
    """The table that all others have to equal."""
    return small_sweep().table


@pytest.fixture
def cluster():
    """Some replicas on which nothing takes long."""
    return vs.Cluster(
        max_model_len=4096, kv_cache=vs.KVCache(num_blocks=1000), execution_time=vs.Linear()
    )


@pytest.fixture
def workload():
    """A few requests."""
    lengths = vs.FixedLengths(num_prefill_tokens=100, num_decode_tokens=10)
    return vs.Workload(vs.Poisson(rate=20.0), lengths, num_requests=20)


def same(ours, theirs):
    """Rows, order, types and bits."""
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    return True


# The table


def test_a_row_per_point_and_replication(serial):
    """All combinations, the last name varying fastest, each with its replications."""
    assert serial["point"].tolist() == [point for point in range(6) for _ in range(2)]
    assert serial["cluster.num_replicas"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert serial["replication"].tolist() == [0, 1] * 6
    schedulers = serial["cluster.replica_scheduler"].unique()
    assert schedulers[0] == "vllm"
    assert schedulers[1].startswith("Sarathi(")
    assert serial["cluster.replica_scheduler"].tolist() == list(np.repeat(schedulers, 2)) * 3
    assert (serial["error"] == "").all()


def test_a_row_is_what_simulate_gives(cluster, workload):
    """The figures are those of the run that the row describes, and can be made again."""
    swept = vs.sweep(cluster, workload, {"cluster.num_replicas": [3]}, replications=2, seed=5)
    for row in (0, 1):
        seed = int(swept.table["seed"][row])
        result = vs.simulate(swept.points[0].cluster, workload, seed=seed)
        for name, value in figures_of(result).items():
            assert swept.table[name][row] == value
        pd.testing.assert_frame_equal(swept.result(row).requests, result.requests)
    with pytest.raises(vs.ConfigError, match=r"result\(2\): expected a row from 0 to 1"):
        swept.result(2)


def test_columns_have_one_type_each(serial):
    """Figures are float64, also where they count, so that a failed run changes no type."""
    figures = serial.loc[:, "ttft_mean":"simulated_time"]
    assert set(figures.dtypes.astype(str)) == {"float64"}
    assert serial[["point", "replication", "seed"]].dtypes.astype(str).tolist() == ["int64"] * 3


def test_configurations_share_their_random_numbers(cluster, workload):
    """The same arrivals at every point; other ones at every replication."""
    grid = {"cluster.num_replicas": [1, 2]}
    figures = vs.sweep(
        cluster,
        workload,
        grid,
        replications=3,
        metrics=lambda result: {"last": result.requests["arrived_at"].iloc[-1]},
    ).table.pivot(index="point", columns="replication", values="last")
    assert (figures.loc[0] == figures.loc[1]).all()
    assert figures.loc[0].nunique() == 3


def test_replications_are_independent_and_prolonged():
    """The first is the seed itself; more replications keep the ones before."""
    assert replication_seeds(7, 4)[:2] == replication_seeds(7, 2)
    assert replication_seeds(7, 1) == [7]
    drawn = replication_seeds(0, 500) + replication_seeds(1, 500)
    assert len(set(drawn)) == 1000
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_slo_adds_shares_and_goodput(cluster, workload):
    """As `Result.slo` gives them."""
    swept = vs.sweep(cluster, workload, {"cluster.num_replicas": [1]}, slo={"ttft": 0.01})
    expected = swept.result(0).slo(ttft=0.01)
    row = swept.table.iloc[0]
    assert (row["slo_ttft"], row["slo_attainment"]) == (expected["ttft"], expected["attainment"])
    assert row["goodput"] == expected["goodput"]


def test_recorded_tokens_add_their_latencies(cluster, workload):
    """Figures of what `record` asks for are columns, too."""
    assert "itl_p99" in vs.sweep(cluster, workload, [{}], record="tokens").table


def test_a_sweep_shows_itself(serial, cluster, workload):
    """As text, as html, and in one line."""
    swept = vs.sweep(cluster, workload, {"cluster.max_model_len": [4096, 64]})
    assert repr(swept) == "<Sweep: 2 runs of 2 configurations, 0 failed>"
    assert "<table" in swept._repr_html_()
    assert "refused" in str(swept)
    assert len(swept) == 2


def test_progress_is_shown_when_asked_for(cluster, workload, capsys):
    """A bar of runs on a terminal's error stream; none otherwise."""
    vs.sweep(cluster, workload, {"cluster.num_replicas": [1, 2]}, progress=True)
    assert "2/2" in capsys.readouterr().err
    vs.sweep(cluster, workload, {"cluster.num_replicas": [1, 2]})
    assert capsys.readouterr().err == ""


# Grids


def test_values_may_be_objects_names_or_mappings(cluster, workload):
    """Whatever a configuration file or a Python call may say."""
    grid = {
        "cluster.replica_scheduler": ["vllm", {"type": "sarathi", "chunk_size": 64}, vs.Orca()],
        "workload.arrivals.rate": np.array([1.0, 2.0]),
    }
    points = points_of(cluster, workload, grid)
    schedulers = [type(point.cluster.replica_scheduler).__name__ for point in points]
    assert schedulers == ["Vllm", "Vllm", "Sarathi", "Sarathi", "Orca", "Orca"]
    assert [point.workload.arrivals.rate for point in points] == [1.0, 2.0] * 3
    assert points[2].cluster.replica_scheduler.chunk_size == 64


def test_a_list_runs_just_its_configurations(cluster, workload):
    """A setting that a configuration leaves out is the cluster's own, in the table as well."""
    other = vs.Trace(Path(__file__).parents[1] / "configs" / "example_trace.csv")
    rows = [{"cluster.num_replicas": 2}, {"cluster.kv_cache.num_blocks": 900}, {"workload": other}]
    points = points_of(cluster, workload, rows)
    assert [point.cluster.num_replicas for point in points] == [2, 1, 1]
    assert points[1].setting("cluster.num_replicas") == 1
    assert points[2].workload is other
    table = vs.sweep(cluster, workload, rows[:2]).table
    assert table["cluster.num_replicas"].tolist() == [2, 1]
    assert table["cluster.kv_cache.num_blocks"].tolist() == [1000, 900]


def test_settings_of_one_object_change_together(cluster, workload):
    """A workload has either of the two, so that neither can change alone."""
    rows = [{"workload.num_requests": None, "workload.duration": 3.0}]
    assert points_of(cluster, workload, rows)[0].workload.duration == 3.0


def test_a_part_may_be_replaced_and_changed(cluster, workload):
    """The fields are those of the object that is put there, and of named devices."""
    rows = [
        {"cluster.replica_scheduler": "vllm_v1", "cluster.replica_scheduler.policy": "priority"},
        {"cluster.device.memory_gb": 40.0},
    ]
    first, second = points_of(cluster, workload, rows)
    assert first.cluster.replica_scheduler.policy == "priority"
    assert second.cluster.deployment.device.memory_gb == 40.0


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, r"the grid is empty: expected values by name.*\[\{\}\] runs the cluster"),
        ([], "the grid is empty: expected at least one set"),
        ({"cluster.num_replicas": []}, "the grid is empty: cluster.num_replicas has no values"),
        ({"cluster.num_replicas": 4}, "cluster.num_replicas = 4: expected a list of values"),
        ([3], "the grid holds 3: expected values by name"),
        ([vs.Cluster()], r"the grid holds Cluster\(.{,40}: expected .*'cluster': Cluster"),
        ([{"seed": 1}], "the grid has 'seed', which is the same for all runs of a sweep: give it"),
        ({"cluster.num_replica": [1]}, "field of cluster 'num_replica': did you mean 'num_repl"),
        ({"num_replicas": [1]}, "'num_replicas': did you mean 'cluster.num_replicas'"),
        (
            {"cluster.replica_scheduler.chunk": [1]},
            "cluster.replica_scheduler 'chunk': did you mean 'chunk_size'",
        ),
        ({"workload.arrivals.rate.x": [1]}, "workload.arrivals.rate is 20.0, which has no fields"),
        ({"cluster.replica_scheduler": ["sarthi"]}, "'sarthi': did you mean 'sarathi'"),
        (
            {"cluster.num_replicas": [0, "a"]},
            "no configuration .* can run; of the first: cluster.n",
        ),
    ],
)
def test_a_wrong_grid_is_told_before_anything_runs(cluster, workload, grid, message):
    """The place, the value, what was expected, and the nearest name."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.sweep(cluster, workload, grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replications": 0}, "replications = 0: expected an integer >= 1"),
        ({"seed": -1}, "seed = -1: expected an integer >= 0"),
        ({"until": -1.0}, "until = -1.0"),
        ({"record": "token"}, "'token': did you mean 'tokens'"),
        ({"event_order": "typ"}, "'typ': did you mean 'type'"),
        ({"slo": {"tfft": 1.0}}, "limit of slo 'tfft': did you mean 'ttft'"),
        ({"slo": {"ttft": 0.0}}, "slo ttft = 0.0: expected a positive number"),
        ({"slo": {"itl": 0.1}}, "slo itl needs record"),
        ({"jobs": 0}, "jobs = 0: expected a number of workers, or -1"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_runs(cluster, workload, options, message):
    """Not once per run."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.sweep(cluster, workload, [{}], **options)


@pytest.mark.parametrize(
    "function",
    [
        lambda *given: vs.sweep(*given, [{}]),
        lambda *given: vs.capacity(*given, {"ttft:p99": 1.0}),
        lambda *given: vs.recommend(*given, {"ttft:p99": 1.0}, [{}], objective="throughput"),
        lambda *given: vs.replicate(*given, 2),
    ],
)
def test_a_cluster_comes_before_its_workload(cluster, workload, function):
    """Whoever swaps the two is told so, and so is who leaves one out."""
    with pytest.raises(vs.ConfigError, match=r"cluster = Workload\(.*: expected a Cluster"):
        function(workload, cluster)
    with pytest.raises(vs.ConfigError, match=r"workload = 3.0: expected a Workload"):
        function(cluster, 3.0)


# Runs that fail


def test_a_run_that_fails_is_a_row(cluster, workload):
    """With the kind and the message of its error; the others have their figures."""

    def breaks(batch):
        return 1 / 0

    def stalls(batch):
        return -1.0

    grid = {"cluster.execution_time": [breaks, vs.Linear(), stalls]}
    table = vs.sweep(cluster, workload, grid).table
    assert table["error"][0] == "ZeroDivisionError: division by zero"
    assert table["error"][1] == ""
    assert table["error"][2].startswith("SimulationError: the execution time of")
    assert table["ttft_mean"].notna().tolist() == [False, True, False]


def test_a_model_that_does_not_fit_is_a_row(workload):
    """Settings that are possible one by one but not together fail where they meet."""
    cluster = vs.Cluster(execution_time=vs.Linear())
    grid = {
        "cluster.model": ["llama-3.1-8b", "llama-3.1-70b"],
        "cluster.tensor_parallel_size": [1, 4],
    }
    swept = vs.sweep(cluster, workload, grid)
    assert [error.partition(":")[0] for error in swept.table["error"]] == (
        ["", "", "CapacityError", ""]
    )
    assert swept.table["cluster.model"].tolist() == ["llama-3.1-8b"] * 2 + ["llama-3.1-70b"] * 2
    with pytest.raises(vs.CapacityError):
        swept.result(2)


def test_metrics_that_are_no_numbers_are_an_error(cluster, workload):
    """The row says what was expected."""
    table = vs.sweep(cluster, workload, [{}], metrics=lambda result: "fast").table
    assert "metrics gave 'fast': expected a mapping of names to numbers" in table["error"][0]


def test_ctrl_c_ends_the_sweep(cluster, workload):
    """It is no error of a run."""

    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.sweep(cluster, workload, {"cluster.execution_time": [interrupted]})


def test_without_joblib_the_message_says_what_to_install(cluster, workload, monkeypatch):
    """One sentence instead of a traceback."""
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(vs.ConfigError, match=r"pip install 'vidur-simpy\[search\]'"):
        vs.sweep(cluster, workload, [{}], jobs=2)


# From the command line

CONFIG = """\
cluster: {max_model_len: 4096, execution_time: linear}
workload:
  type: synthetic
  arrivals: {type: poisson, rate: 20.0}
  lengths: {type: fixed, num_prefill_tokens: 100, num_decode_tokens: 10}
  num_requests: 20
seed: 3
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call ``vidur-simpy sweep config.yaml``; tell its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(["sweep", "config.yaml", "--jobs", "1", *arguments])
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out, printed.err

    return call


def test_the_command_prints_a_row_per_run(command, tmp_path):
    """Exit code 0; nothing is written that was not asked for."""
    code, out, err = command("--grid", "cluster.num_replicas=1,2,4")
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split()[:2] == ["cluster.num_replicas", "ttft_p50"]
    assert [row.split()[0] for row in rows] == ["1", "2", "4"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_command_tells_objects_in_short(command):
    """By the name that was typed, or with the settings that are not the usual ones."""
    grid = "cluster.replica_scheduler=vllm,vllm_v1,{type: sarathi, chunk_size: 64}"
    _, out, _ = command("--grid", grid)
    cells = [row.split()[0] for row in out.splitlines()]
    assert cells == ["cluster.replica_scheduler", "vllm", "vllm_v1", "Sarathi(chunk_size=64)"]
    assert max(map(len, out.splitlines())) < 150


def test_equal_names_mean_equal_settings(cluster, workload):
    """What is not told is a default; objects within objects are told in the same way."""
    changed = dataclasses.replace(cluster, replica_scheduler=vs.Orca(max_num_seqs=4))
    table = vs.sweep(cluster, workload, {"cluster": [vs.Cluster(), changed]}).table
    first, second = table["cluster"]
    assert first == "Cluster()"
    assert "replica_scheduler=Orca(max_num_seqs=4)" in second
    assert "model=" not in second


def test_the_command_keeps_runs_and_writes_the_table(command, tmp_path):
    """Objects as in YAML; the whole table as CSV, the same as in Python."""
    grid = "cluster.replica_scheduler=vllm,{type: sarathi, chunk_size: 64}"
    options = ["--grid", grid, "--grid", "cluster.num_replicas=1,2", "--replications", "2"]
    code, out, _ = command(*options, "--store", "runs", "--out", "table.csv")
    assert code == 0
    assert "The table is in table.csv." in out
    assert len(list((tmp_path / "runs" / "runs").iterdir())) == 8
    written = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    swept = vs.sweep(
        **vs.load_config("config.yaml"),
        grid={
            "cluster.replica_scheduler": ["vllm", vs.Sarathi(chunk_size=64)],
            "cluster.num_replicas": [1, 2],
        },
        replications=2,
    )
    assert written["ttft_mean"].tolist() == swept.table["ttft_mean"].tolist()
    assert written["seed"].tolist() == swept.table["seed"].tolist()


def test_the_command_tells_failed_runs(command):
    """They are rows, and exit code 1 says that there are some."""
    code, out, err = command(
        "--grid", "cluster.model=llama-3.1-8b,llama-3.1-405b", "--set", "cluster.max_model_len=512"
    )
    assert code == 1
    assert "CapacityError" in out
    assert err.startswith("Error: 1 of 2 runs failed; the first: CapacityError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--grid'"),
        (["--grid", "cluster.num_replicas"], "expected key=value,value"),
        (["--grid", "cluster.num_replicas=[1"], "expected key=value,value"),
        (["--grid", "cluster.num_replicas="], "the grid is empty: cluster.num_replicas has no v"),
        (["--grid", "cluster.num_replica=1"], "did you mean 'num_replicas'"),
        (["--grid", "cluster.num_replicas=1", "--out", "no/t.csv"], "there is no folder 'no'"),
        (["--grid", "cluster.num_replicas=1", "--replications", "0"], "replications = 0"),
        (["--grid", "cluster.num_replicas=1", "--store", "."], "not a store of runs"),
    ],
)
def test_the_command_refuses_bad_usage(command, arguments, message):
    """Exit code 2 and one sentence."""
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err


# Wherever they are made


def test_worker_processes_give_the_same_table(serial):
    """Two loky workers, asked for or configured."""
    assert same(small_sweep(jobs=2).table, serial)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        assert same(small_sweep().table, serial)


def test_objects_of_the_users_own_travel_to_workers(cluster, workload):
    """A lambda and a closure, too; a run that fails there is a row here."""
    grid = {"cluster.execution_time": [lambda batch: 0.01, lambda batch: 1 / 0]}
    options = {"metrics": lambda result: {"num_rows": len(result.requests)}}
    there = vs.sweep(cluster, workload, grid, jobs=2, **options).table
    assert same(there, vs.sweep(cluster, workload, grid, **options).table)
    assert there["num_rows"].tolist()[0] == 20
    assert there["error"].tolist() == ["", "ZeroDivisionError: division by zero"]


def test_threads_give_the_same_table(serial):
    """No run shares anything with another."""
    with joblib.parallel_config(backend="threading", n_jobs=3):
        assert same(small_sweep().table, serial)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_gives_the_same_table(serial, tmp_path, backend):
    """A Dask LocalCluster of processes, and a local Ray, in a process of their own."""
    pytest.importorskip("distributed" if backend == "dask" else "ray")
    arguments = [backend, tmp_path / "table.pickle", tmp_path / "store"]
    command = [sys.executable, "-W", "error", SCRIPT, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert same(pd.read_pickle(tmp_path / "table.pickle"), serial)
    assert len(list((tmp_path / "store" / "runs").iterdir())) == NUM_RUNS
