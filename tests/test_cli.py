"""The command line: prints the summary, writes what it is told to, and exits 0, 1 or 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import yaml

import vidur_simpy as vs
from vidur_simpy.cli import main

CONFIG = """\
cluster:
  num_replicas: 2
  max_model_len: 4096
  execution_time: linear
workload:
  type: synthetic
  arrivals: {type: poisson, rate: 20.0}
  lengths: {type: fixed, num_prefill_tokens: 100, num_decode_tokens: 10}
  num_requests: 50
"""


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(here):
    """A small configuration in that folder."""
    (here / "config.yaml").write_text(CONFIG)
    return "config.yaml"


@pytest.fixture
def run(capsys):
    """Call the command line; tell its exit code, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out, printed.err

    return call


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# Running


def test_run_prints_the_summary_and_writes_nothing(run, config, here):
    """Exit code 0, the table of latencies on the output, not a file more than before."""
    code, out, err = run("run", config)
    assert (code, err) == (0, "")
    for name in ("ttft", "tpot", "e2e", "scheduling_delay", "p99", "request throughput"):
        assert name in out
    assert "50: 50 completed, 0 unfinished, 0 refused" in out
    assert files(here) == ["config.yaml"]


def test_out_gets_tables_and_figures(run, config, here):
    """What is saved is the result: it opens again, with what was recorded and what makes it."""
    code, out, _ = run("run", config, "--record", "batches", "--record", "events", "--out", "saved")
    assert code == 0
    assert "Tables and figures are in saved." in out
    assert {"requests.csv", "batches.csv", "events.csv", "summary.csv", "config.yaml"} <= set(
        files(here / "saved")
    )
    for figure in ("timeline.png", "ttft.png"):
        assert (here / "saved" / figure).read_bytes().startswith(b"\x89PNG")
    result = vs.load_result("saved")
    again = vs.simulate(**vs.load_config("saved/config.yaml"))
    assert again.requests.equals(result.requests)
    assert again.batches.equals(result.batches)


def test_out_replaces_an_earlier_result(run, config, here):
    """Once it is told to; without, it says so before anything runs."""
    run("run", config, "--out", "saved")
    again = ("run", config, "--set", "workload.num_requests=3", "--out", "saved")
    code, out, err = run(*again)
    assert (code, out) == (2, "")
    assert "'saved': a saved result is there already" in err
    assert "--overwrite" in err
    code, _, _ = run(*again, "--overwrite")
    assert code == 0
    assert len(vs.load_result("saved").requests) == 3


def test_settings_from_the_command_line_win(run, config):
    """--set replaces what the file says, several times."""
    code, out, _ = run(
        "run", config, "--set", "workload.num_requests=7", "--set", "cluster.num_replicas=1"
    )
    assert code == 0
    assert "7: 7 completed" in out


def test_tables_of_the_file_are_recorded_too(run, config, here):
    """`record` in the file and --record add up."""
    run("run", config, "--set", "record=tokens", "--record", "stages", "--out", "saved")
    assert {"tokens", "stages"} < set(vs.load_result("saved").tables)


def test_until_cuts_the_run(run, config):
    """The rest is unfinished, which is no failure."""
    code, out, _ = run("run", config, "--set", "until=1.0")
    assert code == 0
    assert "completed" in out
    assert " 0 unfinished" not in out


@pytest.mark.parametrize("setting", ["until=1e-9", "cluster.max_model_len=2"])
def test_a_run_in_which_nothing_completes_is_written_too(run, config, here, setting):
    """Before the first arrival, or with every request refused, tables and figures are empty."""
    code, out, err = run("run", config, "--set", setting, "--out", "saved")
    assert (code, err) == (0, "")
    assert " 0 completed" in out
    assert (here / "saved" / "ttft.png").exists()


def test_check_says_what_would_run(run, config, here):
    """It reads the trace and plans the memory, runs nothing and writes nothing."""
    code, out, err = run("check", config, "--set", "cluster.model=llama-2-7b")
    assert (code, err) == (0, "")
    assert out.startswith("config.yaml: ok. 2 x meta-llama/Llama-2-7b-hf on 2 x h100-80gb-sxm, ")
    assert "KV-cache blocks of 16 tokens per replica, 50 requests" in out
    assert files(here) == ["config.yaml"]


@pytest.mark.parametrize("command", [[], ["run"], ["check"]])
def test_help_is_there(run, command):
    """Each command says what it does."""
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: vidur-simpy" in out


def test_version_is_told(run):
    """The version is that of the package."""
    assert run("--version")[1].strip().endswith(vs.__version__)


# Failing


def test_a_failed_run_exits_with_1_and_keeps_its_result(run, config, here, monkeypatch):
    """One message, no traceback; what was computed is printed and saved."""
    calls = []

    def stage_time(batch, stage_id):
        calls.append(batch)
        return 0.01 if len(calls) < 100 else float("nan")

    monkeypatch.setattr(vs.Linear, "for_replica", lambda self, deployment: stage_time)
    code, out, err = run("run", config, "--out", "saved")
    assert code == 1
    assert err.startswith("Error: the execution time of <Batch")
    assert err.count("\n") == 1
    assert "Tables and figures are in saved" in out
    figures = vs.load_result("saved").figures
    assert figures["completed"] > 0
    assert figures["unfinished"] > 0


def test_ctrl_c_keeps_the_result(run, config, here, monkeypatch):
    """As click does it: "Aborted!" and exit code 1, without a traceback; the result is saved."""
    calls = []

    def stage_time(batch, stage_id):
        calls.append(batch)
        if len(calls) == 100:
            signal.raise_signal(signal.SIGINT)
        return 0.01

    monkeypatch.setattr(vs.Linear, "for_replica", lambda self, deployment: stage_time)
    code, out, err = run("run", config, "--out", "saved")
    assert (code, err.strip()) == (1, "Aborted!")
    assert "Tables and figures are in saved" in out
    result = vs.load_result("saved")
    assert result.config["until"] == result.info["simulated_time"]
    assert 0 < result.figures["completed"] < 50


@pytest.mark.parametrize(
    "arguments",
    [
        ["go", "config.yaml"],
        ["run"],
        ["run", "config.yaml", "--sett", "seed=1"],
        ["run", "config.yaml", "--out"],
        ["run", "."],
        ["check", "config.yaml", "again.yaml"],
    ],
)
def test_bad_usage_exits_with_2(run, config, arguments):
    """Click says what is wrong with the command itself."""
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Error: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.num_replica=2", "did you mean 'num_replicas'"),
        ("cluster.num_replicas=0", "cluster.num_replicas = 0"),
        ("cluster.model=llama-2-70b", "tensor_parallel_size >= 2"),
        ("cluster.tensor_parallel_size=3", "cluster.tensor_parallel_size = 3"),
        ("workload=null", "needs a workload"),
        ("workload={type: trace, path: gone.csv}", "gone.csv does not exist"),
        ("seed=-1", "seed = -1"),
        ("until=0", "until = 0"),
        ("record=batchs", "did you mean 'batches'"),
        ("event_order=typ", "did you mean 'type'"),
    ],
)
def test_a_bad_configuration_exits_with_2(run, config, here, command, setting, message):
    """One line on stderr that names it; nothing on the output, nothing written."""
    options = ["--out", "saved"] if command == "run" else []
    code, out, err = run(command, config, "--set", setting, *options)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert files(here) == ["config.yaml"]


def test_an_unknown_table_is_refused(run, config):
    """--record names the nearest table."""
    code, _, err = run("run", config, "--record", "stage")
    assert code == 2
    assert "unknown record 'stage': did you mean 'stages'" in err


def test_a_foreign_folder_is_left_alone(run, config, here, monkeypatch):
    """A folder that holds something else is refused before the run, and a file as well."""
    monkeypatch.setattr(vs.Simulation, "run", lambda *_: pytest.fail("it ran"))
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").write_text("precious")
    code, out, err = run("run", config, "--out", "thesis")
    assert (code, out) == (2, "")
    assert "'thesis': it holds 'chapter.tex' and is not a saved result" in err
    assert files(here / "thesis") == ["chapter.tex"]
    code, out, err = run("run", config, "--out", "config.yaml")
    assert (code, out) == (2, "")
    assert "config.yaml" in err
    assert (here / "config.yaml").read_text() == CONFIG


# As a program


def program(*arguments, folder):
    """Run it as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from vidur_simpy.cli import main; main()", *arguments],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_codes_and_streams_of_the_program(config, here):
    """0 with the summary on stdout; 2 with one line on stderr; a warning is one line, too."""
    good = program("run", config, folder=here)
    assert (good.returncode, good.stderr) == (0, "")
    assert "50 completed" in good.stdout
    bad = program("run", "gone.yaml", folder=here)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "Error: gone.yaml: no such configuration file. In .: config.yaml.\n"


def test_a_warning_is_one_line(config, here):
    """A trace that is out of order is sorted; the line that says so names it and runs on."""
    (here / "trace.csv").write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n1.0,5,5\n0.5,6,6\n"
    )
    mapping = yaml.safe_load(CONFIG) | {"workload": {"type": "trace", "path": "trace.csv"}}
    (here / "trace.yaml").write_text(yaml.safe_dump(mapping))
    done = program("run", "trace.yaml", folder=here)
    assert done.returncode == 0
    assert done.stderr == (
        "Warning: trace.csv: 1 of 2 rows arrive before a row above them, the first in line 3; "
        "sorted by arrived_at.\n"
    )
    assert "2: 2 completed" in done.stdout
