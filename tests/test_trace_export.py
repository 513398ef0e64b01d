"""Traces for viewers: the rules of the format, and agreement with the result.

The same file was loaded with Perfetto's own trace processor, which finds no error in it; that is
not part of the tests, as it comes with no small package.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

import vidur_simpy as vs
from vidur_simpy.errors import VidurError
from vidur_simpy.exchange.trace_export import FIRST_REPLICA, ROUTER
from vidur_simpy.result import NotAvailableError, Result
from vidur_simpy.series import load_samples

ALL = ("batches", "stages", "events")
AWKWARD = "<b>\"Zoë\" & 'co'</b>\n\t\\ 漢字 🚀 \u2028"


def run(record=ALL, **changes):
    """Four replicas of two stages, short of memory: requests wait, restart or are refused."""
    cluster = vs.Cluster(
        num_replicas=4,
        pipeline_parallel_size=2,
        max_model_len=1024,
        kv_cache=vs.KVCache(num_blocks=100),
        replica_scheduler=vs.Vllm(),
        execution_time=vs.Linear(),
    )
    lengths = vs.LognormalLengths(
        prompt_median=250, prompt_sigma=0.8, output_median=40, output_sigma=0.7
    )
    workload = vs.Workload(vs.Poisson(16.0), lengths, num_requests=48)
    return vs.simulate(cluster, workload, seed=2, record=record, **changes)


@pytest.fixture(scope="module")
def result():
    return run()


def trace_of(result, path):
    result.to_chrome_trace(path)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def events(result, tmp_path_factory):
    return trace_of(result, tmp_path_factory.mktemp("trace") / "run.json")["traceEvents"]


def by_phase(events, phase):
    return [event for event in events if event["ph"] == phase]


def nanoseconds(microseconds):
    return round(1000 * microseconds)


# -- the format ------------------------------------------------------------------------------------


def test_every_event_has_what_its_phase_needs(events):
    """The fields that the Trace Event Format asks for, and times that are numbers from 0 on."""
    always = {"ph", "name", "pid"}
    needed = {
        "M": {"args"},
        "X": {"ts", "dur", "tid"},
        "C": {"ts", "args"},
        "b": {"ts", "id2", "cat"},
        "e": {"ts", "id2", "cat"},
        "i": {"ts", "s", "tid"},
        "s": {"ts", "id", "cat", "tid"},
        "f": {"ts", "id", "cat", "tid", "bp"},
    }
    assert {event["ph"] for event in events} == set(needed)
    for event in events:
        assert always | needed[event["ph"]] <= event.keys()
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        assert event["pid"] > 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())


def test_a_replica_is_a_process_and_a_stage_a_thread(events):
    """Each has its name and its place, and no two threads share a number."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    replicas = {FIRST_REPLICA * (r + 1): f"replica {r}" for r in range(4)}
    assert names == {ROUTER: "router"} | replicas
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    assert threads == {(pid, pid + s): f"stage {s}" for pid in replicas for s in range(2)}
    assert {(e["pid"], e["tid"]) for e in by_phase(events, "X")} == set(threads)


def test_slices_do_not_overlap_on_a_stage(events):
    """A stage does one batch at a time, also in whole nanoseconds."""
    slices = defaultdict(list)
    for event in by_phase(events, "X"):
        start = nanoseconds(event["ts"])
        slices[event["pid"], event["tid"]].append((start, start + nanoseconds(event["dur"])))
    assert len(slices) == 8
    for spans in slices.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_asynchronous_slices_nest(events):
    """What begins of a request ends, in the reverse order, and not before it began."""
    lives = defaultdict(list)
    for event in events:
        if event["ph"] in "be":
            lives[event["pid"], event["id2"]["local"]].append(event)
    for life in lives.values():
        times = [event["ts"] for event in life[:-1]]
        assert times == sorted(times)
        opened = []
        for event in life:
            if event["ph"] == "b":
                opened.append(event["name"])
            else:
                assert opened.pop() == event["name"]
        assert opened == []


# -- agreement with the result ---------------------------------------------------------------------


def test_each_batch_is_a_slice_on_each_stage(result, events):
    """Its instants to the nanosecond, and what it is made of."""
    slices = {
        (e["pid"] // FIRST_REPLICA - 1, e["args"]["batch"], e["tid"] - e["pid"]): e
        for e in by_phase(events, "X")
    }
    assert len(slices) == len(result.stages) == len(by_phase(events, "X"))
    members = {(b.replica_id, b.batch_index): b for b in result.batches.itertuples()}
    for row in result.stages.itertuples():
        event = slices[row.replica_id, row.batch_index, row.stage_id]
        batch = members[row.replica_id, row.batch_index]
        assert event["ts"] == pytest.approx(1e6 * row.started_at, abs=1e-3)
        assert event["ts"] + event["dur"] == pytest.approx(1e6 * row.ended_at, abs=1e-3)
        assert event["args"]["prompt tokens"] == row.num_prefill_tokens
        assert event["args"]["decode tokens"] == row.num_decode_tokens
        assert [int(x) for x in event["args"]["requests"].split()] == batch.request_ids
        assert [int(x) for x in event["args"]["tokens of each"].split()] == batch.num_tokens
    kinds = Counter(event["name"] for event in slices.values())
    assert set(kinds) == {"prefill", "decode"}  # vLLM's own scheduler never mixes them


def test_counters_agree_with_the_timeline(result, events):
    """Each sample of each replica is there, and zeros from when it falls idle."""
    counted = defaultdict(list)
    for event in by_phase(events, "C"):
        counted[event["pid"], event["name"]].append((event["ts"], event["args"]))
    samples = load_samples(result)
    assert len(samples) > len(result.timeline)
    for replica_id, rows in samples.groupby("replica_id"):
        pid = FIRST_REPLICA * (replica_id + 1)
        times, requests = zip(*counted[pid, "requests"], strict=True)
        assert times == pytest.approx(1e6 * rows["time"], abs=1e-3)
        assert [each["running"] for each in requests] == rows["running"].tolist()
        assert [each["waiting"] for each in requests] == rows["waiting"].tolist()
        usage = [each["share in use"] for _, each in counted[pid, "KV cache"]]
        assert usage == rows["usage"].tolist()
        assert requests[-1] == {"running": 0, "waiting": 0}
        recorded = result.timeline[result.timeline["replica_id"] == replica_id]
        assert max(each["running"] for each in requests) == recorded["num_running"].max()


def test_counters_agree_with_the_batches(result, events):
    """When a batch is formed, its requests are among those counted as running."""
    running = {
        (e["pid"], nanoseconds(e["ts"])): e["args"]["running"]
        for e in by_phase(events, "C")
        if e["name"] == "requests"
    }
    for batch in result.batches.itertuples():
        place = FIRST_REPLICA * (batch.replica_id + 1), round(batch.scheduled_at * 1e9)
        assert running[place] >= len(batch.request_ids)


def test_arrows_follow_each_batch_along_the_stages(result, events):
    """From its slice on the first stage to that on the second, each arrow with its own id."""
    starts = {(e["pid"], e["tid"], e["ts"]): e["args"]["batch"] for e in by_phase(events, "X")}
    flows = defaultdict(dict)
    for event in events:
        if event["ph"] in "stf":
            place = event["pid"], event["tid"], event["ts"]
            flows[event["id"]][event["ph"]] = (event["tid"] - event["pid"], starts[place])
    assert len(flows) == len(result.batches)
    for flow in flows.values():
        (first, batch), (last, same_batch) = flow["s"], flow["f"]
        assert (first, last) == (0, 1)
        assert batch == same_batch
    assert all(event["bp"] == "e" for event in by_phase(events, "f"))


def test_lives_agree_with_the_requests(result, events):
    """Begin, end and phases of each request on its replica; refused ones are instants."""
    spans = defaultdict(dict)
    for event in events:
        if event["ph"] in "be":
            key = int(event["id2"]["local"]), event["pid"]
            spans[key].setdefault(event["name"], []).append(event["ts"] / 1e6)
    refused = {e["args"]["request_id"]: e for e in by_phase(events, "i")}
    for row in result.requests.itertuples():
        if row.refusal:
            assert refused[row.request_id]["args"]["refusal"] == row.refusal
            assert refused[row.request_id]["pid"] == ROUTER
            continue
        phases = spans[row.request_id, FIRST_REPLICA * (row.replica_id + 1)]
        assert phases["request"] == pytest.approx([row.arrived_at, row.completed_at], abs=1e-9)
        prefill = [row.scheduled_at, row.first_token_at]
        assert phases["prefill"] == pytest.approx(prefill, abs=1e-9)
    assert len(spans) + len(refused) == len(result.requests)
    assert refused


def test_a_pipeline_of_one_stage_has_no_arrows(cluster, tmp_path):
    """And without recorded batches, slices do not name their requests."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=3)
    result = vs.simulate(cluster, workload, record=("stages",))
    events = trace_of(result, tmp_path / "run.json")["traceEvents"]
    assert not {"s", "t", "f"} & {event["ph"] for event in events}
    assert "requests" not in by_phase(events, "X")[0]["args"]


def test_a_pipeline_of_four_stages_has_arrows_between_all(make_cluster, tmp_path):
    """An arrow starts on the first stage, passes two, and ends on the last."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 1), num_requests=1)
    result = vs.simulate(make_cluster(pipeline_parallel_size=4), workload, record=("stages",))
    events = trace_of(result, tmp_path / "run.json")["traceEvents"]
    arrows = [(e["ph"], e["tid"] - e["pid"], e["id"]) for e in events if e["ph"] in "stf"]
    assert arrows == [("s", 0, 0), ("t", 1, 0), ("t", 2, 0), ("f", 3, 0)]


def test_what_runs_when_the_run_stops_ends_there(make_cluster, tmp_path):
    """Requests that are not completed last until the end of the run, in their present phase."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 9), num_requests=3)
    cluster = make_cluster(pipeline_parallel_size=2)
    result = vs.simulate(cluster, workload, record=("stages",), until=4.5)
    events = trace_of(result, tmp_path / "run.json")["traceEvents"]
    assert result.figures["unfinished"] > 0
    ends = {e["ts"] for e in by_phase(events, "e") if e["name"] == "request"}
    assert max(ends) == 4.5e6
    assert max(e["ts"] + e["dur"] for e in by_phase(events, "X")) <= 4.5e6


def test_a_batch_without_an_end_lasts_until_the_run_stopped(tmp_path):
    """As in a result that was made by hand."""
    stages = {"replica_id": [0], "batch_index": [0], "stage_id": [0], "started_at": [1.0]}
    stages |= {"ended_at": [float("nan")], "num_prefill_tokens": [5], "num_decode_tokens": [0]}
    tables = {"requests": {}, "replicas": {"replica_id": [0]}, "timeline": {}, "stages": stages}
    result = Result(tables, config=None, info={"simulated_time": 3.0})
    (event,) = by_phase(trace_of(result, tmp_path / "run.json")["traceEvents"], "X")
    assert (event["ts"], event["dur"]) == (1e6, 2e6)


# -- names and files -------------------------------------------------------------------------------


def test_awkward_names_survive(cluster, tmp_path):
    """Quotes, html and other alphabets come back as they were, and the file stays plain ASCII."""
    simulation = vs.Simulation(cluster, record=("stages", "events"))
    simulation.submit(vs.Request(10, 2, session_id=AWKWARD))
    simulation.run()
    result = simulation.result()
    result.info["label"] = AWKWARD
    trace = trace_of(result, tmp_path / "run.json")
    (begin,) = [e for e in by_phase(trace["traceEvents"], "b") if e["name"] == "request"]
    assert begin["args"]["session_id"] == AWKWARD
    assert trace["otherData"]["label"] == AWKWARD
    assert (tmp_path / "run.json").read_bytes().isascii()


def test_the_name_says_whether_it_is_compressed(result, tmp_path):
    """Perfetto reads both; one result gives the same bytes whenever it is written."""
    for write, name in ((result.to_chrome_trace, "trace"), (result.to_event_trace, "events")):
        for end in (".json", ".json.gz", "2.json.gz"):
            write(tmp_path / f"{name}{end}")
        archives = [(tmp_path / f"{name}{end}").read_bytes() for end in (".json.gz", "2.json.gz")]
        assert archives[0] == archives[1]
        assert gzip.decompress(archives[0]) == (tmp_path / f"{name}.json").read_bytes()


def test_no_trace_is_overwritten_unasked(result, tmp_path):
    """Nor is anything left behind where it cannot be written."""
    path = tmp_path / "run.json"
    path.write_text("precious")
    for write in (result.to_chrome_trace, result.to_event_trace):
        with pytest.raises(VidurError, match="is there already"):
            write(path)
    assert path.read_text() == "precious"
    result.to_event_trace(path, overwrite=True)
    assert json.loads(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


def test_what_was_not_recorded_is_said(tmp_path):
    """And no file appears."""
    result = run(record=())
    with pytest.raises(NotAvailableError, match="stages were not recorded; pass record="):
        result.to_chrome_trace(tmp_path / "run.json")
    with pytest.raises(NotAvailableError, match="events were not recorded; pass record="):
        result.to_event_trace(tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


# -- the event trace -------------------------------------------------------------------------------


def test_the_event_trace_is_the_table(result, tmp_path):
    """An object for each event, in order, without the ids it does not have; a line each."""
    path = tmp_path / "events.json"
    result.to_event_trace(path)
    events = json.loads(path.read_text())
    table = result.events
    assert len(events) == len(table) == len(path.read_text().splitlines()) - 2
    assert [event["time"] for event in events] == table["time"].tolist()
    assert [event["event_type"] for event in events] == table["event_type"].tolist()
    for column in ("replica_id", "stage_id", "batch_index", "request_id"):
        found = [event.get(column, -1) for event in events]
        assert found == table[column].fillna(-1).tolist()


def test_a_trace_of_nothing_is_valid(tmp_path):
    """A run in which nothing happened has a trace, too."""
    tables = {name: {} for name in ("requests", "replicas", "timeline", "stages", "events")}
    result = Result(tables, config=None, info={"simulated_time": np.float64(0.0)})
    assert trace_of(result, tmp_path / "run.json")["traceEvents"]  # the router has its name
    result.to_event_trace(tmp_path / "events.json")
    assert json.loads((tmp_path / "events.json").read_text()) == []
