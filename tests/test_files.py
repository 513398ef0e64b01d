"""Files that are in the way, cannot be written, or are half there: said, and nothing is lost."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import ConfigError, VidurError
from vidur_simpy.cli import main
from vidur_simpy.exchange.files import new_path

mpl.use("Agg")

WORKLOAD = vs.Workload(vs.Poisson(5.0), vs.FixedLengths(100, 10), num_requests=20)
CONFIG = """
cluster: {execution_time: linear}
workload: {type: synthetic, arrivals: {type: poisson, rate: 20.0}, num_requests: 20,
  lengths: {type: fixed, num_prefill_tokens: 16, num_decode_tokens: 4}}
"""


@pytest.fixture(scope="module")
def result():
    cluster = vs.Cluster(execution_time=vs.Linear())
    return vs.simulate(cluster, WORKLOAD, record=("batches", "stages", "events", "tokens"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call the command line in a folder with a configuration; tell its exit code and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture
def no_room(monkeypatch):
    """Let nobody write into folders named `sealed`, whoever runs the tests."""
    make = tempfile.mkdtemp

    def refuse(suffix=None, prefix=None, dir=None):
        if dir is not None and Path(dir).name == "sealed":
            raise PermissionError(13, "Permission denied", str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


def said(error):
    """The message of an error: one line, a full sentence."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def writers(result):
    return {
        "vllm.json": result.to_vllm_bench,
        "aiperf.csv": result.to_aiperf_csv,
        "trace.json.gz": result.to_chrome_trace,
        "events.json": result.to_event_trace,
    }


# What is there stays there


def test_no_export_takes_the_place_of_a_file_unasked(result, tmp_path):
    """Each says that the file is there; told to, it takes its place."""
    for name, write in writers(result).items():
        path = tmp_path / name
        path.write_text("precious")
        with pytest.raises(VidurError, match=r"it is there already.*overwrite=True"):
            write(path)
        assert path.read_text() == "precious"
        write(path, overwrite=True)
        assert path.stat().st_size > 100
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(writers(result))


def test_a_failed_export_leaves_what_was_there(tmp_path):
    """The file is written aside and takes its place when it is complete."""
    path = tmp_path / "table.csv"
    path.write_text("precious")

    def write():
        with new_path(path, overwrite=True) as aside:
            aside.write_text("half of ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["table.csv"]


def test_a_result_takes_the_place_of_a_result_when_told(result, tmp_path):
    """In either format; an incomplete one counts as one that is there."""
    result.save(tmp_path / "saved")
    for table_format in ("csv", "parquet"):
        with pytest.raises(VidurError) as error:
            result.save(tmp_path / "saved", table_format=table_format)
        assert said(error) == (
            f"cannot save the result in {str(tmp_path / 'saved')!r}: a saved result is there "
            "already; name another directory, or say overwrite=True (--overwrite on the command "
            "line) to replace it."
        )
        result.save(tmp_path / "saved", table_format=table_format, overwrite=True)
    assert vs.load_result(tmp_path / "saved").figures == result.figures


def test_overwriting_never_reaches_outside(result, tmp_path):
    """A manifest that names files elsewhere is not one of ours."""
    (tmp_path / "mine.txt").write_text("precious")
    result.save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "info.json").read_text())
    for change in (
        {"files": ["../mine.txt"]},
        {"files": [str(tmp_path / "mine.txt")]},
        {"tables": {"requests": {"file": "../mine.txt", "rows": 1, "columns": {}}}},
    ):
        (tmp_path / "saved" / "info.json").write_text(json.dumps(manifest | change))
        with pytest.raises(VidurError, match="is not a saved result"):
            result.save(tmp_path / "saved", overwrite=True)
        with pytest.raises(VidurError, match=r"info.json' is damaged"):
            vs.load_result(tmp_path / "saved")
    assert (tmp_path / "mine.txt").read_text() == "precious"


# What cannot be written


@pytest.mark.usefixtures("no_room")
def test_a_folder_that_cannot_be_written_is_named(result, tmp_path):
    """By every writer, with what to do; records say so before the run."""
    (tmp_path / "sealed").mkdir()
    with pytest.raises(VidurError, match="name a directory that can be written") as error:
        result.save(tmp_path / "sealed")
    assert "sealed" in said(error)
    for name, write in writers(result).items():
        with pytest.raises(VidurError, match=r"cannot write .*sealed.*Permission denied"):
            write(tmp_path / "sealed" / name)
    with pytest.raises(ConfigError, match=r"record_to = .*sealed': it cannot be written"):
        vs.Simulation(vs.Cluster(), WORKLOAD, record_to=tmp_path / "sealed")
    assert list((tmp_path / "sealed").iterdir()) == []


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere; POSIX only"
)
def test_a_folder_without_permission_is_named(result, tmp_path):
    """The same, with a folder that the system really seals."""
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o500)
    with pytest.raises(VidurError, match="name a directory that can be written"):
        result.save(folder / "below")
    with pytest.raises(VidurError, match="cannot write"):
        result.to_vllm_bench(folder / "bench.json")


@pytest.mark.parametrize("place", ["config.yaml", "config.yaml/below", "full", "saved", "sealed"])
@pytest.mark.usefixtures("no_room")
def test_the_command_line_says_so_before_the_run(command, tmp_path, monkeypatch, result, place):
    """A file, a place below one, a folder of others, a saved result, one that is sealed."""
    monkeypatch.setattr(vs.Simulation, "run", lambda *_: pytest.fail("it ran"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "sealed").mkdir()
    result.save(tmp_path / "saved")
    code, error = command("run", "config.yaml", "--out", place)
    assert code == 2
    if place == "config.yaml":
        assert "Directory 'config.yaml' is a file" in error
    else:
        assert error.startswith(f"Error: cannot save the result in {place!r}: ")
        assert error.count("\n") == 1
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "config.yaml").read_text() == CONFIG


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "config.yaml", "--grid", "cluster.num_replicas=1", "--jobs", "1"],
        ["capacity", "config.yaml", "--slo", "ttft:p90=0.05", "--max-replications", "1"],
    ],
)
def test_tables_of_the_command_line_stay_unless_told(command, tmp_path, monkeypatch, arguments):
    """The file is found before anything runs, and replaced with --overwrite."""
    (tmp_path / "t.csv").write_text("precious")
    with monkeypatch.context() as patch:
        for name in ("sweep", "capacity"):
            patch.setattr(vs, name, lambda *_, **__: pytest.fail("it ran"))
        code, error = command(*arguments, "--out", "t.csv")
        assert (code, error.count("\n")) == (2, 1)
        assert "cannot write 't.csv': it is there already" in error
    assert (tmp_path / "t.csv").read_text() == "precious"
    with monkeypatch.context() as patch:
        patch.setattr(vs, "capacity", lambda *_, **__: SimpleNamespace(curve=pd.DataFrame()))
        code, error = command(*arguments, "--out", "t.csv", "--overwrite")
    assert code == 0, error
    assert (tmp_path / "t.csv").read_text() != "precious"


# What is half there


def damages(content, rng):
    """Nothing, the content cut off here and there, with a bit turned, and with a hole."""
    size = len(content)
    yield b""
    for end in (size // 3, size - 1):
        yield content[:end]
    for place in rng.integers(0, size, 3).tolist():
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    place = int(rng.integers(0, size))
    yield content[:place] + bytes(min(64, size - place)) + content[place + 64 :]


@pytest.mark.slow
@pytest.mark.parametrize("table_format", ["csv", "parquet"])
def test_damage_of_any_file_is_named(result, tmp_path, rng, table_format):
    """Missing, cut off, or a bit of it turned: one message with the name, no wrong table."""
    result.save(tmp_path, table_format=table_format)
    files = [path for path in sorted(tmp_path.iterdir()) if path.name != "summary.csv"]
    assert len(files) == 9
    for path in files:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(VidurError) as error:
            vs.load_result(tmp_path)
        assert "info.json" in said(error) or path.name in said(error)
        for damaged in damages(content, rng):
            if damaged == content:
                continue
            path.write_bytes(damaged)
            if path.name == "info.json":
                # Words and numbers of it say nothing of the tables, which are compared.
                assert_unharmed_or_said(tmp_path, result)
                continue
            with pytest.raises(VidurError) as error:
                vs.load_result(tmp_path)
            assert f"{path.name}' is damaged" in str(error.value)
        path.write_bytes(content)
    assert vs.load_result(tmp_path).figures == result.figures


def assert_unharmed_or_said(folder, result):
    try:
        loaded = vs.load_result(folder)
    except VidurError:
        return
    for name in loaded.tables:
        expected = getattr(result, name)
        if list(getattr(loaded, name).columns) == list(expected.columns):
            assert_frame_equal(getattr(loaded, name), expected, check_dtype=False)


def test_damaged_records_are_named(tmp_path, rng):
    """Rows that a run wrote as they came: a part that is cut off is named."""
    vs.simulate(vs.Cluster(), WORKLOAD, record=("batches",), record_to=tmp_path)
    for path in (tmp_path / "requests" / "part-00000.parquet", *(tmp_path / "batches").iterdir()):
        content = path.read_bytes()
        for end in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:end])
            with pytest.raises(VidurError, match=rf"{path.name}' is damaged"):
                vs.load_records(tmp_path, path.parent.name)
        path.write_bytes(content)


def test_a_bench_file_that_was_cut_off_is_named(result, tmp_path):
    """At any place of it, compressed or not."""
    for name in ("bench.json", "bench.json.gz"):
        path = tmp_path / name
        result.to_vllm_bench(path)
        content = path.read_bytes()
        for end in np.linspace(0, len(content) - 3, 9).astype(int).tolist():
            path.write_bytes(content[:end])
            with pytest.raises(VidurError) as error:
                vs.load_vllm_bench(path)
            assert name in said(error)


# Names


def test_unknown_names_of_figures_metrics_and_tables(result):
    """Each names the nearest that there is."""
    other = vs.simulate(vs.Cluster(), WORKLOAD, seed=1)
    comparison = vs.compare({"one": result, "other": other}, num_resamples=100)
    for asked, nearest in (
        (lambda: result.plot.cdff(), "cdf"),
        (lambda: result.plot.cdf("tftt"), "ttft"),
        (lambda: result.plot.quantiles("e2ee"), "e2e"),
        (lambda: result.interval("tftt", 0.5), "ttft"),
        (lambda: comparison.plot.difference(), "differences"),
        (lambda: comparison.plot.cdf("tpto"), "tpot"),
        (lambda: vs.compare({"one": result, "other": other}, metrics=["tftt"]), "ttft"),
        (lambda: vs.metrics_dictionary("reqests"), "requests"),
        (lambda: vs.simulate(vs.Cluster(), WORKLOAD, record=("batchs",)), "batches"),
        (lambda: result.save("nowhere", table_format="parket"), "parquet"),
    ):
        with pytest.raises(VidurError) as error:
            asked()
        assert f"did you mean {nearest!r}?" in said(error)
    assert not Path("nowhere").exists()


def test_runs_of_other_workloads_are_compared_unpaired_and_it_is_said(result):
    """In text and html, with the reason."""
    other = vs.simulate(vs.Cluster(), WORKLOAD, seed=1)
    comparison = vs.compare({"one": result, "other": other}, num_resamples=100)
    assert set(comparison.reasons) == {"other"}
    for shown in (str(comparison), comparison._repr_html_()):
        assert "had another workload (request 1 arrives" in shown
