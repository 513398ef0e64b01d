"""A simulation in a notebook: its bar, what it shows at a pause, and what a ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser

import pytest
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import EventType, Request, Simulation
from vidur_simpy.progress import RunBar

WORKLOAD = vs.Workload(vs.Poisson(rate=3.0), vs.UniformLengths(20, 400, 8.0), num_requests=60)
RECORDS = ("batches", "stages", "events", "tokens")
SCHEDULERS = [
    vs.Sarathi(max_num_seqs=16, chunk_size=64),
    vs.Vllm(max_num_seqs=16),
    vs.VllmV1(max_num_seqs=16, max_num_batched_tokens=512),
    vs.Mnemosyne(max_num_seqs=16),
    vs.Orca(max_num_seqs=16),
    vs.FasterTransformer(max_num_seqs=16),
    vs.LightLLM(max_num_seqs=16),
]


def busy_cluster(**changes):
    """A cluster so short of memory that requests wait and are preempted."""
    settings = {
        "num_replicas": 2,
        "max_model_len": 512,
        "kv_cache": vs.KVCache(num_blocks=80),
        "replica_scheduler": SCHEDULERS[0],
        "execution_time": vs.Linear(base=0.05),
    }
    return vs.Cluster(**(settings | changes))


def assert_consistent(sim):
    """Nobody is lost or counted twice, and the result says the same as the state."""
    counts = {
        "done": sum(replica.num_requests - replica.num_outstanding for replica in sim.replicas),
        "running": sum(replica.scheduler.num_running for replica in sim.replicas),
        "waiting": len(sim.router.queue) + sum(replica.num_waiting for replica in sim.replicas),
        "refused": sim.result().figures["refused"],
    }
    assert sum(counts.values()) == sim.router.num_received
    shown = ", ".join(f"{value} {name}" for name, value in counts.items())
    assert repr(sim).endswith(f": {sim.router.num_received} arrived, {shown}>")
    figures = sim.result().figures
    assert figures["num_requests"] == sim.router.num_received
    assert figures["completed"] == counts["done"]
    assert figures["unfinished"] == counts["running"] + counts["waiting"]


def assert_equal_results(ours, theirs):
    """To the last bit."""
    assert ours.tables == theirs.tables
    for name in ours.tables:
        assert_frame_equal(getattr(ours, name), getattr(theirs, name), check_exact=True, obj=name)
    assert ours.config == theirs.config
    assert ours.info == theirs.info


# The bar


class Clock:
    """Real time that a test tells."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def bar(capsys):
    """Make a bar of a run that the test moves on; it returns what was drawn last."""

    class Driven:
        def __init__(self, num_expected=0, start=(0.0, 0), **options):
            self.instant, self.num_done = start
            self.clock = Clock()
            self.bar = RunBar(
                lambda: self.instant,
                lambda: self.num_done,
                lambda: num_expected,
                clock=self.clock,
                **({"shown": True} | options),
            )
            self.bar.__enter__()

        def at(self, seconds, instant, num_done):
            self.clock.now = 100.0 + seconds
            self.instant, self.num_done = instant, num_done
            self.bar.tick()
            return capsys.readouterr().err.split("\r")[-1]

    return Driven


def test_the_bar_tells_time_requests_speed_and_what_is_left(bar):
    """Half of the requests in ten seconds: ten more to go."""
    drawn = bar(num_expected=5_000).at(10.0, 250.0, 2_500)
    assert drawn.startswith(" 50%|")
    assert "2,500/5,000 requests, 250.0 s simulated [0:10<0:10, " in drawn
    assert "250.0 requests/s, 25.00 simulated s/s]" in drawn


def test_the_bar_of_a_run_until_an_instant_goes_by_time(bar):
    """A quarter of the time: three times as long to go, however many requests there are."""
    drawn = bar(until=400.0).at(20.0, 100.0, 70)
    assert drawn.startswith(" 25%|")
    assert "70 requests, 100.0 s simulated [0:20<1:00, 3.500 requests/s" in drawn


def test_the_bar_goes_by_what_comes_first(bar):
    """A run until an instant may be out of requests before."""
    assert bar(num_expected=100, until=1e6).at(30.0, 50.0, 90).startswith(" 90%|")


def test_the_bar_of_an_endless_run_tells_no_end(bar):
    """Clients that come back have no last request: what is done is told, not what is left."""
    drawn = bar().at(3_700.0, 12_345.6, 1_234)
    assert drawn.startswith("1,234 requests, 12346 s simulated [1:01:40, 0.3335 requests/s, 3.337")


def test_the_bar_of_a_run_that_goes_on_counts_from_there(bar):
    """Speed and time left are those of this call."""
    drawn = bar(num_expected=200, start=(50.0, 100)).at(10.0, 60.0, 150)
    assert drawn.startswith(" 50%|")
    assert "150/200 requests, 60.00 s simulated [0:10<0:10, 5.000 requests/s, 1.000" in drawn


def test_the_bar_is_drawn_now_and_then(bar):
    """However often it is told; drawing costs far more than an event."""
    driven = bar(num_expected=10)
    assert driven.at(1.0, 1.0, 1)
    assert driven.at(1.1, 1.1, 2) == ""
    assert driven.at(1.3, 1.3, 3)


def test_a_bar_that_nobody_asked_for_waits(bar, monkeypatch):
    """On a terminal it appears after two seconds; elsewhere never."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    driven = bar(num_expected=10, shown=None)
    assert driven.at(1.9, 1.0, 1) == ""
    assert "2/10 requests" in driven.at(2.0, 1.0, 2)
    monkeypatch.undo()
    assert bar(num_expected=10, shown=None).bar.is_shown == ("ipykernel" in sys.modules)


def test_runs_show_their_bar(capsys):
    """To the end of each call: of all requests, of a cut run, of one that an event ends."""
    sim = Simulation(busy_cluster(), WORKLOAD, progress=True)
    sim.run(until=8.0)
    first = capsys.readouterr().err
    assert "0/60 requests, 0 s simulated" in first
    assert "100%" in first.split("\r")[-1]
    assert "/60 requests, 8.000 s simulated" in first.split("\r")[-1]
    sim.run(until=sim.submit(Request(20, 2)))
    assert "/61 requests" in capsys.readouterr().err.split("\r")[-1]
    sim.run()
    assert "61/61 requests" in capsys.readouterr().err.split("\r")[-1]


def test_a_closed_loop_shows_what_is_done(cluster, capsys):
    """Requests that are submitted have no total."""
    sim = Simulation(cluster, progress=True)

    def client():
        for _ in range(3):
            yield sim.submit(Request(10, 2))

    sim.env.process(client())
    sim.run()
    assert "\r3 requests, 6.000 s simulated [" in capsys.readouterr().err


def test_a_short_run_is_silent(capsys):
    """Nor is anything imported for a bar that is not drawn."""
    code = (
        "import sys, vidur_simpy as vs\n"
        "cluster = vs.Cluster(execution_time=vs.Linear())\n"
        "workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=5)\n"
        "vs.simulate(cluster, workload)\n"
        "assert 'tqdm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_bar_changes_nothing():
    """With and without, tables are equal to the last bit."""
    plain = vs.simulate(busy_cluster(), WORKLOAD, seed=2)
    assert_equal_results(vs.simulate(busy_cluster(), WORKLOAD, seed=2, progress=True), plain)


# The state at a pause


def test_a_simulation_shows_its_state_at_any_pause():
    """Before the first run, in the middle, and at the end."""
    sim = Simulation(busy_cluster(), WORKLOAD, seed=2, record=("batches",))
    assert str(sim).startswith("Simulation at 0 s, not started\n")
    assert repr(sim) == (
        "<Simulation at 0 s, not started: 0 arrived, 0 done, 0 running, 0 waiting, 0 refused>"
    )
    sim.run(until=5.0)
    lines = [" ".join(line.split()) for line in str(sim).splitlines()]
    assert lines[0] == "Simulation at 5 s"
    assert lines[1] == "cluster 2 x meta-llama/Llama-3.1-8B on 2 x h100-80gb-sxm, Sarathi"
    assert lines[2].startswith(f"requests {sim.router.num_received} arrived, ")
    assert lines[3] == "expected 60 requests of the workload"
    assert (
        lines[4] == f"next event {sim.env.next_entry[3].event_type.name} at {sim.env.peek():.9g} s"
    )
    assert lines[5] == "recorded requests, replicas, timeline, batches"
    assert lines[7] == "replica routed done running waiting batches KV cache utilisation"
    assert len(lines) == 10
    sim.run()
    assert ", nothing left to happen\n" in str(sim)
    assert "next event  none" in str(sim)
    assert_consistent(sim)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_nobody_is_lost_at_any_pause(scheduler):
    """Arrived = done + running + waiting + refused, with every scheduler, also when preempting."""
    settings = {"replica_scheduler": scheduler, "pipeline_parallel_size": 2}
    if isinstance(scheduler, (vs.VllmV1, vs.LightLLM)):
        settings["pipeline_parallel_size"] = 1
    if isinstance(scheduler, vs.LightLLM):
        settings["kv_cache"] = vs.KVCache(block_size=1, num_blocks=1280)
    cluster = busy_cluster(**settings)
    sim = Simulation(cluster, WORKLOAD, seed=2)
    sim.submit(Request(400, 400))
    assert_consistent(sim)
    for instant in range(1, 40, 3):
        sim.run(until=float(instant))
        assert_consistent(sim)
    sim.run()
    assert_consistent(sim)
    figures = sim.result().figures
    assert figures["completed"] + figures["refused"] == 61


def test_a_process_may_look_at_the_state():
    """Looking from within a run changes nothing."""
    plain = vs.simulate(busy_cluster(), WORKLOAD, seed=2)
    sim = Simulation(busy_cluster(), WORKLOAD, seed=2)
    shown = []

    def watch():
        for _ in range(20):
            yield sim.env.timeout(1.0)
            assert_consistent(sim)
            shown.append((str(sim), sim._repr_html_()))

    sim.env.process(watch())
    sim.run()
    assert len(set(shown)) == 20
    for name in ("requests", "replicas", "timeline"):
        assert_frame_equal(
            getattr(sim.result(), name), getattr(plain, name), check_exact=True, obj=name
        )


def test_many_replicas_are_cut(make_cluster):
    """Sixteen are shown, the others counted."""
    for num_replicas, rest in ((64, "... and 48 more"), (17, "... and 1 more"), (16, None)):
        sim = Simulation(make_cluster(num_replicas=num_replicas))
        table = str(sim).partition("\n\n")[2].splitlines()
        assert len(table) == 17 + bool(rest)
        assert rest is None or table[-1] == rest
        assert sim._repr_html_().count("<tr><th>") == 6 + 16 + bool(rest)


class Cells(HTMLParser):
    """The tags of a page and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not attrs

    def handle_data(self, data):
        self.cells.append(data)


def test_the_html_escapes_what_users_can_name(tmp_path):
    """Names of model, device, scheduler and folder, and why a request was refused."""
    evil = "<script>alert('&amp;')</script>"
    cluster = vs.Cluster(
        model={
            "name": evil,
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 32,
            "intermediate_size": 128,
            "vocab_size": 1000,
        },
        device={
            "name": f"{evil}2",
            "bf16_dense_tflops": 100,
            "memory_bandwidth_gbps": 1000,
            "memory_gb": 80,
            "scaleup_bidir_gbps": 100,
        },
        max_model_len=512,
        replica_scheduler=partial(Choosy, evil),
    )
    sim = Simulation(cluster, record_to=tmp_path / "<b>rows")
    sim.submit(Request(1, 1, session_id=evil))
    sim.run()
    page = Cells(sim._repr_html_())
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert any(f"1 x {evil} on 1 x {evil}2" in cell for cell in page.cells)
    assert f"no, {evil}" in page.cells
    assert any("<b>rows" in cell for cell in page.cells)
    assert evil in str(sim)


class Choosy:
    """A replica scheduler that refuses everything, with a reason of its own."""

    num_running = num_waiting = 0

    def __init__(self, reason, resources):
        self.reason = reason

    def refusal(self, request):
        return f"no, {self.reason}"

    add = schedule = end_first_stage = end = refusal


# The instant of an arrival


@pytest.mark.parametrize("record", [(), ("events",)])
def test_a_request_is_there_once_it_has_arrived(cluster, record):
    """A run until the very instant of an arrival stops before it; a row comes with the arrival."""
    workload = vs.Workload(vs.Constant(rate=1.0), vs.FixedLengths(10, 3), num_requests=4)
    sim = Simulation(cluster, workload, record=record)
    for instant in (1.0, 2.0, 3.0):  # at which one arrives
        sim.run(until=instant)
        assert len(sim.result().requests) == instant - 1
        assert_consistent(sim)
    later = sim.submit(Request(5, 2, arrived_at=3.5))
    sim.submit(Request(5, 2))
    assert len(sim.result().requests) == 2
    sim.run(until=later)
    assert len(sim.result().requests) == 6
    assert_consistent(sim)


def test_shards_cut_at_an_arrival_like_the_single_run():
    """Neither it nor any shard has a row of the request that would be next."""
    cluster = busy_cluster(num_replicas=4)
    workload = vs.Workload(vs.Constant(rate=8.0), vs.FixedLengths(64, 8), num_requests=40)
    for until in (0.125, 1.0, 2.5):
        single = vs.simulate(cluster, workload, until=until)
        parts = vs.simulate(cluster, workload, until=until, shards=2, progress=False)
        assert len(single.requests) == until * 8 - 1
        for name in single.tables:
            assert_frame_equal(
                getattr(parts, name), getattr(single, name), check_exact=True, obj=name
            )


# ctrl-C


def press_once(calls, number):
    """Press ctrl-C at call `number` of what the test has it called by."""
    calls.append(None)
    if len(calls) == number:
        signal.raise_signal(signal.SIGINT)


class InterruptedTime:
    """An execution time that presses ctrl-C when it is asked for the `number`-th time."""

    def __init__(self, number):
        self.number, self.calls = number, []

    def __call__(self, batch):
        press_once(self.calls, self.number)
        return 0.05 + 1e-4 * batch.num_tokens


def from_execution_time(make, number):
    return make(execution_time=InterruptedTime(number))


def from_user_process(make, number):
    sim = make(execution_time=InterruptedTime(None))

    def press():
        yield sim.env.timeout(0.6 + 0.16 * number)
        signal.raise_signal(signal.SIGINT)
        yield sim.env.timeout(0.0)

    sim.env.process(press())
    return sim


def from_listener(make, number):
    sim = make(execution_time=InterruptedTime(None))
    calls = []
    sim.on(EventType.BATCH_END, lambda event: press_once(calls, number))
    return sim


def from_router(make, number):
    calls = []

    def route(request, replicas):
        press_once(calls, number // 2)
        return replicas[request.request_id % len(replicas)]

    return make(global_scheduler=route, execution_time=InterruptedTime(None))


SOURCES = [from_execution_time, from_user_process, from_listener, from_router]


@pytest.mark.parametrize("number", [2, 41, 110])
@pytest.mark.parametrize("record", [(), RECORDS], ids=["fast", "stepping"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_a_ctrl_c_leaves_a_simulation_that_goes_on(source, record, number):
    """Wherever it comes, nobody is lost, and the rest is bit for bit what it would have been."""

    def make(**changes):
        return Simulation(busy_cluster(**changes), WORKLOAD, seed=2, record=record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "raise_signal", lambda number: None)
        undisturbed = source(make, number)
        undisturbed.run()
    sim = source(make, number)
    with pytest.raises(KeyboardInterrupt):
        sim.run()
    assert 0 < sim.env.now < undisturbed.env.now
    assert_consistent(sim)
    cut = sim.result()
    assert cut.config["until"] == sim.env.now
    assert cut.figures["unfinished"] > 0
    assert f"Simulation at {sim.env.now:.9g} s" in sim._repr_html_()
    sim.run()
    whole = undisturbed.result()
    ours = sim.result()
    whole.config["cluster"] = ours.config["cluster"] = None  # which names functions of the test
    assert_equal_results(ours, whole)
    done = cut.requests.dropna(subset="completed_at").set_index("request_id")
    assert_frame_equal(
        done, whole.requests.set_index("request_id").loc[done.index, done.columns], check_exact=True
    )


@pytest.mark.parametrize("until", [5.0, "event"])
def test_a_ctrl_c_in_the_last_event_is_heard(until):
    """Else a loop of short runs could hardly be stopped."""
    sim = Simulation(busy_cluster(), WORKLOAD, seed=2)
    done = sim.submit(Request(30, 4))
    if until == "event":
        done.callbacks.append(lambda event: signal.raise_signal(signal.SIGINT))
    else:
        sim.env._stop_at, stop_at = None, sim.env._stop_at

        def stop_and_press(instant):
            stop = stop_at(instant)
            stop.callbacks.append(lambda event: signal.raise_signal(signal.SIGINT))
            return stop

        sim.env._stop_at = stop_and_press
    with pytest.raises(KeyboardInterrupt):
        sim.run(until=done if until == "event" else until)
    assert_consistent(sim)
    sim.__dict__.pop("_stop_at", None)
    sim.run()
    assert sim.result().figures["completed"] == 61


def test_a_ctrl_c_keeps_what_was_recorded_on_disk(tmp_path):
    """Rows that went to files are those of the result, and the run goes on behind them."""
    cluster = busy_cluster(execution_time=InterruptedTime(60))
    sim = Simulation(cluster, WORKLOAD, seed=2, record=("batches",), record_to=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sim.run()
    kept = vs.load_records(tmp_path, "batches")
    ended = sim.result().batches.dropna(subset="completed_at")
    assert_frame_equal(kept, ended, check_exact=True)
    sim.run()
    assert_frame_equal(vs.load_records(tmp_path, "batches"), sim.result().batches)


REAL = """
import sys
sys.path.insert(0, sys.argv[1])
from test_live import *

record = RECORDS if sys.argv[2] == "stepping" else ()
workload = vs.Workload(vs.Poisson(3.0), vs.UniformLengths(20, 400, 8.0), num_requests=10**6)
sim = Simulation(busy_cluster(), workload, seed=2, record=record)

def say():
    yield sim.env.timeout(5.0)
    print("running", flush=True)

sim.env.process(say())
try:
    sim.run()
except KeyboardInterrupt:
    assert_consistent(sim)
    end = sim.env.now + 5.0
    sim.run(until=end)
    whole = Simulation(busy_cluster(), workload, seed=2, record=record)
    def silent():
        yield whole.env.timeout(5.0)
    whole.env.process(silent())
    whole.run(until=end)
    assert_equal_results(sim.result(), whole.result())
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another process are POSIX")
@pytest.mark.parametrize("engine", ["fast", "stepping"])
def test_a_signal_from_outside_is_heard(engine):
    """As a notebook or a terminal sends it: at no instant that the program could know."""
    command = [sys.executable, "-c", REAL, os.path.dirname(__file__), engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"running\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (0, b"equal\n"), err.decode()


CELLS = [
    "import vidur_simpy as vs\n"
    "cluster = vs.Cluster(execution_time=vs.Linear())\n"
    "workload = vs.Workload(vs.Poisson(3.0), vs.FixedLengths(50, 5), num_requests=10**7)\n"
    "sim = vs.Simulation(cluster, workload)\n"
    "print('ready', flush=True)\n"
    "sim.run()",
    "sim",
    "now = sim.env.now; sim.run(until=now + 3); sim.env.now == now + 3",
]


@pytest.mark.slow
def test_ctrl_c_in_a_notebook():
    """The stop button ends the cell; the next cells show the state and go on."""
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    outputs = []

    def hear(message):
        outputs.append(message["content"])
        if "ready" in message["content"].get("text", ""):
            kernel.interrupt_kernel()

    try:
        replies = [
            client.execute_interactive(cell, output_hook=hear, timeout=120)["content"]
            for cell in CELLS
        ]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert replies[0]["ename"] == "KeyboardInterrupt"
    assert [reply["status"] for reply in replies[1:]] == ["ok", "ok"]
    shown = [content["data"] for content in outputs if "data" in content]
    assert "<th>Simulation at " in shown[0]["text/html"]
    assert shown[0]["text/plain"].startswith("<Simulation at ")
    assert shown[1]["text/plain"] == "True"
