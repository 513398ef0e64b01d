"""Results explain themselves: parts add up, verdicts name what was made scarce."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from against_oracle import Given, simulate_case
from against_vllm_v1 import simulation_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.golden import read_case
from oracle.vllm_v1 import read_vllm_v1_case
from test_fast_forward import SCHEDULERS

import vidur_simpy as vs
from vidur_simpy import plots
from vidur_simpy.explanation.parts import PHASES
from vidur_simpy.kernel import EventType
from vidur_simpy.result import Result

mpl.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import saturation_errors

GOLDEN = Path(__file__).parent / "golden"
VIDUR_FOLDERS = sorted(file.parent for file in GOLDEN.glob("vidur/*/case.json"))
VLLM_FOLDERS = sorted(file.parent for file in GOLDEN.glob("vllm/*/case.json"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def assert_adds_up(result: Result) -> None:
    """The phases of each request are its time from arrival to completion, or to the end."""
    requests = result.requests[result.requests["refusal"] == ""]
    phases = result.phases
    assert list(phases["request_id"]) == list(requests["request_id"])
    parts = phases[list(PHASES)].to_numpy()
    assert (parts >= -1e-12).all()
    end = requests["completed_at"].fillna(result.info["simulated_time"]).to_numpy()
    whole = end - requests["arrived_at"].to_numpy()
    np.testing.assert_allclose(parts.sum(axis=1), whole, rtol=0, atol=1e-9)
    known = requests["scheduling_delay"].notna().to_numpy()
    delay = requests["scheduling_delay"].to_numpy()[known]
    np.testing.assert_allclose(phases["queue_time"].to_numpy()[known], delay, rtol=0, atol=1e-9)


def columns(result: Result, request_id: int) -> dict[str, float]:
    """The phases of a request that took time."""
    row = result.phases.set_index("request_id").loc[request_id, list(PHASES)]
    return {name: round(float(time), 9) for name, time in row.items() if time}


# -- the phases add up ------------------------------------------------------------------------


@pytest.mark.parametrize("folder", VIDUR_FOLDERS, ids=lambda folder: folder.name)
def test_phases_of_vidurs_cases_add_up(folder):
    """To 1e-9 s for every request of every golden case, in each event order."""
    case, workload, expected = read_case(folder)
    for event_order in expected.event_orders:
        case = replace(case, event_order=event_order)
        result = simulate_case(case, workload, record=("phases",))
        assert_adds_up(result)
        if not case.sequence_pipeline_parallel:  # whose chunks overlap
            executing = ["prefill_time", "decode_time", "decode_stall_time", "recomputation_time"]
            times = result.phases[executing].sum(axis=1)
            np.testing.assert_allclose(times, result.requests["execution_time"], atol=1e-9)


@pytest.mark.parametrize("folder", VLLM_FOLDERS, ids=lambda folder: folder.name)
def test_phases_of_vllms_cases_add_up(folder):
    """With prefix caching, asynchronous scheduling, priorities and preemptions, too."""
    simulation = simulation_of(*read_vllm_v1_case(folder), record=("phases",))
    simulation.run()
    assert_adds_up(simulation.result())


def with_trouble(cluster, rows, trouble, record):
    """Run while replicas and stages are interrupted or taken away, and stop half-way as well."""
    sim = vs.Simulation(cluster, Given(rows), record=record, progress=False)

    def troubling():
        for after, length, kind in trouble:
            yield sim.env.timeout(after)
            replica = sim.replicas[0]
            if kind == "replica":
                replica.process.interrupt(length)
            elif kind == "stage":
                replica.stages[-1].process.interrupt(length)
            else:
                with replica.stages[0].request() as taken:
                    yield taken
                    yield sim.env.timeout(length)

    sim.env.process(troubling())
    sim.run(until=1.37)
    half_way = sim.result()
    sim.run()
    return half_way, sim.result()


PIPELINES = ("vllm", "sarathi", "orca", "faster_transformer", "mnemosyne")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_phases_add_up_whatever_happens(scheduler: str, data: st.DataObject) -> None:
    """Under every scheduler, short of memory, in pipelines, interrupted, half-way and at the end;
    and where nobody was preempted they are what batches and stages tell."""
    gaps = st.sampled_from([0.0, 0.25, 0.01, 1.0])
    rows, now = [], 0.0
    for gap, prompt, output in data.draw(
        st.lists(st.tuples(gaps, st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=12)
    ):
        now += gap
        rows.append((now, prompt, output))
    block_size = 1 if scheduler == "lightllm" else data.draw(st.sampled_from([4, 16]))
    num_stages = data.draw(st.sampled_from([1, 2])) if scheduler in PIPELINES else 1
    has_spp = num_stages > 1 and scheduler in ("sarathi", "mnemosyne") and data.draw(st.booleans())
    longest = -(-256 // block_size)
    cluster = vs.Cluster(
        max_model_len=256,
        num_replicas=data.draw(st.integers(1, 2)),
        pipeline_parallel_size=num_stages,
        sequence_pipeline_parallel=has_spp,
        kv_cache=vs.KVCache(
            block_size=block_size, num_blocks=data.draw(st.integers(longest + 2, 2 * longest))
        ),
        replica_scheduler=SCHEDULERS[scheduler],
        execution_time=vs.Linear(base=0.03, per_token=1e-3, per_context_token=1e-5),
    )
    kinds = st.sampled_from(["replica", "stage", "taken"])
    trouble = data.draw(
        st.lists(st.tuples(st.sampled_from([0.0, 0.2]), st.just(0.17), kinds), max_size=3)
    )
    half_way, result = with_trouble(cluster, rows, trouble, ("phases", "batches", "stages"))
    assert_adds_up(half_way)
    assert_adds_up(result)
    if not has_spp:
        assert_phases_are_those_of_batches(
            result, num_stages, slots=not scheduler.startswith("vllm_v1")
        )


def assert_phases_are_those_of_batches(result: Result, num_stages: int, *, slots: bool) -> None:
    """Count the phases of requests that were never preempted once more, from batches and stages.

    With `slots` the output token that the prompt yields counts in the context, as in Vidur.
    """
    steps = result.stages.merge(result.batches, on=["replica_id", "batch_index"])
    phases = result.phases.set_index("request_id")
    for request in result.requests[result.requests["num_restarts"] == 0].itertuples():
        expected = dict.fromkeys(PHASES, 0.0)
        expected["queue_time"] = request.scheduled_at - request.arrived_at
        for step in steps[steps["replica_id"] == request.replica_id].itertuples():
            if request.request_id not in step.request_ids:
                continue
            position = step.request_ids.index(request.request_id)
            duration = step.ended_at - step.started_at
            is_decode = step.completed_at > request.first_token_at
            assert step.num_tokens[position] == 1 or not is_decode
            if not is_decode:
                expected["prefill_time"] += duration
                continue
            alone = duration
            if step.num_prefill_tokens_x:
                contexts = [
                    context_of(result, other, step) + slots
                    for other, tokens in zip(step.request_ids, step.num_tokens, strict=True)
                    if other in decoding(result, step)
                ]
                linear = 0.03 + 1e-3 * len(contexts) + 1e-5 * sum(contexts)
                alone = min(duration, linear / num_stages)
            expected["decode_time"] += alone
            expected["decode_stall_time"] += duration - alone
        before = request.first_token_at - request.scheduled_at
        expected["prefill_wait_time"] = before - expected["prefill_time"]
        after = request.completed_at - request.first_token_at
        on_stage = expected["decode_time"] + expected["decode_stall_time"]
        expected["decode_wait_time"] = after - on_stage
        found = phases.loc[request.request_id, list(PHASES)].to_dict()
        others_restarted = result.requests["num_restarts"].sum() > 0
        if others_restarted:  # whose contexts are not as easily counted
            for part in ("decode_time", "decode_stall_time"):
                found.pop(part), expected.pop(part)
        assert found == pytest.approx(expected, abs=1e-9)


def decoding(result: Result, step: Any) -> list[int]:
    return step.request_ids[: step.num_decode_tokens_x]


def context_of(result: Result, request_id: int, step: Any) -> int:
    """Tokens of a decoding request in the KV cache once a step is done."""
    batches = result.batches[result.batches["replica_id"] == step.replica_id]
    earlier = batches[batches["batch_index"] <= step.batch_index]
    pairs = zip(earlier["request_ids"], earlier["num_tokens"], strict=True)
    own = [tokens[ids.index(request_id)] for ids, tokens in pairs if request_id in ids]
    request = result.requests.set_index("request_id").loc[request_id]
    num_decodes = sum(own) - (request["num_prefill_tokens"] - _cached(request))
    return int(request["num_prefill_tokens"] + num_decodes)


def _cached(request: pd.Series) -> int:
    cached = request.get("num_cached_tokens", 0)
    return 0 if pd.isna(cached) else int(cached)


# -- what the phases mean ---------------------------------------------------------------------


def test_a_prompt_in_the_batch_slows_decodes(make_cluster):
    """A mixed step of 3 s, where decodes alone take 1 s, is 1 s of decode and 2 s of stall."""
    cluster = make_cluster(execution_time=lambda batch: 3.0 if batch.prefills else 1.0)
    result = vs.simulate(cluster, Given([(0.0, 10, 4), (3.5, 10, 1)]), record=("phases",))
    assert columns(result, 0) == {"prefill_time": 3.0, "decode_time": 3.0, "decode_stall_time": 2.0}
    assert columns(result, 1) == {"queue_time": 0.5, "prefill_time": 3.0}


def test_prompts_first_keeps_decodes_waiting(make_cluster):
    """vLLM of 2023 lets decodes wait while it computes a prompt: they are in no batch."""
    cluster = make_cluster(replica_scheduler=vs.Vllm())
    result = vs.simulate(cluster, Given([(0.0, 10, 4), (1.5, 10, 1)]), record=("phases",))
    assert columns(result, 0) == {"prefill_time": 1.0, "decode_time": 3.0, "decode_wait_time": 1.0}


def test_a_prompt_waits_between_its_pieces(make_cluster):
    """A replica that forms no batch for a while keeps the rest of a prompt waiting."""
    cluster = make_cluster(replica_scheduler=vs.Sarathi(chunk_size=2))
    sim = vs.Simulation(cluster, Given([(0.0, 4, 1)]), record=("phases",), progress=False)
    sim.run(until=0.5)
    sim.replicas[0].process.interrupt(4.0)
    sim.run()
    assert columns(sim.result(), 0) == {"prefill_time": 2.0, "prefill_wait_time": 3.5}


def test_bubbles_are_waits(make_cluster):
    """Between two stages a batch waits until the slower one is free."""

    def slow_second_stage(batch, stage_id):
        return 1.0 + stage_id

    cluster = make_cluster(pipeline_parallel_size=2, execution_time=slow_second_stage)
    result = vs.simulate(cluster, Given([(0.0, 10, 1), (0.5, 10, 2)]), record=("phases",))
    expected = {"queue_time": 0.5, "prefill_time": 3.0, "prefill_wait_time": 1.0}
    assert columns(result, 1) == expected | {"decode_time": 3.0}


def test_a_preemption_costs_a_wait_and_the_work_again(make_cluster):
    """One who is preempted waits until the other is done, then computes all it had once more."""
    cluster = make_cluster(
        max_model_len=16,
        kv_cache=vs.KVCache(block_size=1, num_blocks=12, watermark=0.0),
        replica_scheduler=vs.Sarathi(chunk_size=16),
    )
    result = vs.simulate(cluster, Given([(0.0, 4, 6), (0.0, 4, 6)]), record=("phases",))
    assert result.requests["num_restarts"].to_list() == [0, 1]
    phases = columns(result, 1)
    assert phases["restart_wait_time"] > 0
    assert phases["recomputation_time"] == 1.0
    assert phases["prefill_time"] == 1.0
    assert sum(phases.values()) == result.requests["e2e"][1]


def test_an_interrupt_is_a_wait_or_a_longer_step(make_cluster):
    """A replica that forms no batch keeps requests waiting; a stalled stage takes longer."""
    sim = vs.Simulation(make_cluster(), Given([(0.0, 10, 3)]), record=("phases",), progress=False)
    sim.run(until=1.5)
    sim.replicas[0].process.interrupt(4.0)
    sim.run()
    expected = {"prefill_time": 1.0, "decode_time": 2.0, "decode_wait_time": 3.5}
    assert columns(sim.result(), 0) == expected


# -- recording --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy() -> Result:
    """A run short of memory, with stalls and preemptions."""
    cluster = vs.Cluster(
        max_model_len=4_096,
        kv_cache=vs.KVCache(num_blocks=260),
        replica_scheduler=vs.Sarathi(max_num_seqs=32, chunk_size=256),
        num_replicas=2,
    )
    lengths = vs.LognormalLengths(
        prompt_median=300, prompt_sigma=1.0, output_median=60, output_sigma=0.8
    )
    workload = vs.Workload(vs.Poisson(12.0), lengths, num_requests=300, clip="prompt")
    return vs.simulate(cluster, workload, record=("phases",))


def test_recording_changes_nothing(busy):
    """Requests are what they are without the observer; without it nobody listens."""
    arguments = vs.load_config(busy.config) | {"record": ()}
    plain = vs.simulate(**arguments)
    pd.testing.assert_frame_equal(plain.requests, busy.requests)
    assert vs.Simulation(busy_cluster := arguments["cluster"], None).env.is_unobserved
    assert not vs.Simulation(busy_cluster, None, record=("phases",)).env.is_unobserved


def test_phases_go_wherever_tables_go(busy, tmp_path):
    """To files while the run goes on, through shards, to a saved result, behind a warm-up."""
    arguments = vs.load_config(busy.config)
    vs.simulate(**arguments, record_to=tmp_path / "records")
    written = vs.load_records(tmp_path / "records", "phases")
    pd.testing.assert_frame_equal(written, busy.phases)
    sharded = vs.simulate(**arguments, shards=2)
    pd.testing.assert_frame_equal(sharded.phases, busy.phases)
    busy.save(tmp_path / "saved")
    pd.testing.assert_frame_equal(vs.load_result(tmp_path / "saved").phases, busy.phases)
    later = busy.after(10.0)
    assert list(later.phases["request_id"]) == list(later.requests["request_id"])
    assert later.breakdown()["num_requests"].sum() == len(later.requests)


def test_every_column_is_in_the_dictionary():
    """With unit and meaning; all but the number are seconds."""
    words = vs.metrics_dictionary("phases").set_index("column")
    assert list(words.index[2:]) == list(PHASES)
    assert set(words.loc[list(PHASES), "unit"]) == {"s"}
    assert set(PHASES) <= set(plots.breakdown_bars.PARTS)


# -- one request explained --------------------------------------------------------------------


def test_explain_says_where_the_time_went(busy):
    """In a sentence, a table that adds up, and a waterfall whose last bar is the whole."""
    slowest = int(busy.requests["e2e"].idxmax())
    explanation = busy.explain(slowest)
    assert explanation.text.startswith(f"Request {slowest} took ")
    assert ", longer than 99.7 % of the completed requests: " in explanation.text
    assert explanation.table["time"].sum() == pytest.approx(busy.requests["e2e"][slowest], abs=1e-9)
    assert explanation.table["share"].sum() == pytest.approx(1.0)
    ax = explanation.plot()
    assert ax.patches[-1].get_width() == pytest.approx(busy.requests["e2e"][slowest])
    assert ax.get_xlabel() == "time since its arrival, part by part (s)"
    assert explanation.text in str(explanation)
    assert "<table>" in explanation._repr_html_()


def test_explain_without_phases_is_coarse_and_says_so(busy):
    """First batch, first token, last token are always known; the hint says what to record."""
    plain = Result(
        {name: getattr(busy, name) for name in ("requests", "replicas", "timeline")},
        config=busy.config,
        info=busy.info,
    )
    explanation = plain.explain(7)
    assert list(explanation.parts.index) == ["queue_time", "first_token_time", "output_time"]
    assert explanation.parts.sum() == pytest.approx(busy.requests["e2e"][7])
    assert 'record=("phases",)' in str(explanation)
    assert 'record=("phases",)' not in str(busy.explain(7))
    assert list(plain.breakdown()) == ["num_requests", "e2e", *explanation.parts.index]


@pytest.mark.parametrize("record", [(), ("phases",)])
def test_explain_is_honest_about_those_that_did_not_end(make_cluster, record):
    """A refused request has its reason; one that was cut off has what it had."""
    rows = [(0.0, 10, 3), (0.0, 5_000, 3), (0.5, 10, 20)]
    result = vs.simulate(make_cluster(), Given(rows), until=10.0, record=record)
    refused = result.explain(1)
    assert refused.text.startswith("Request 1 was refused at its arrival: its 5000 + 3 tokens")
    assert not len(refused.parts)
    assert refused._repr_html_().startswith("<p>Request 1")
    cut_off = result.explain(2)
    assert cut_off.text.startswith(
        "Request 2 was not complete when the run ended at 10.00 s; of its 9.500 s so far, it spent"
    )
    assert cut_off.parts.sum() == pytest.approx(9.5)
    assert cut_off.parts["queue_time"] == pytest.approx(0.5)


def test_explain_names_the_nearest_request(busy):
    """An unknown number, and what is no number."""
    with pytest.raises(vs.ConfigError, match=r"unknown request 1003: did you mean 299\? There are"):
        busy.explain(1003)
    with pytest.raises(vs.ConfigError, match=r"explain\('7'\): expected the number of a request"):
        busy.explain("7")


def test_html_escapes_what_users_can_name(busy):
    """A reason of the user's own may hold anything."""
    requests = busy.requests.assign(refusal="")
    requests.loc[3, "refusal"] = "<script>alert(1)</script>"
    tables = {"requests": requests, "replicas": busy.replicas, "timeline": busy.timeline}
    result = Result(tables, config=None, info=busy.info)
    assert "<script>" not in result.explain(3)._repr_html_()
    assert "<script>" not in result.bottleneck()._repr_html_()


# -- breakdown --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["e2e", "ttft", "tpot"])
def test_breakdown_adds_up(busy, metric):
    """The parts of each group are its mean latency; groups are whole and in order."""
    table = busy.breakdown(metric)
    assert list(table.index) == ["fastest 50 %", "p50 to p90", "p90 to p99", "slowest 1 %"]
    parts = table.drop(columns=["num_requests", metric])
    np.testing.assert_allclose(parts.sum(axis=1), table[metric], rtol=1e-9)
    assert (parts.to_numpy() >= 0).all()
    assert table[metric].is_monotonic_increasing
    assert table["num_requests"].sum() == busy.requests[metric].notna().sum()


def test_breakdown_has_the_groups_that_were_asked_for(busy):
    """None at all is one group; empty groups are left out."""
    assert list(busy.breakdown(quantiles=[]).index) == ["all requests"]
    assert list(busy.breakdown("ttft", [0.999]).index) == ["fastest 99.9 %", "slowest 0.1 %"]
    none = busy.after(1e9)
    assert len(none.breakdown()) == 0
    assert plots.breakdown(none).texts[0].get_text() == "no request has a value of e2e"


def test_breakdown_refuses_what_it_does_not_know(busy):
    """A metric that has no parts, quantiles in percent or out of order."""
    with pytest.raises(vs.ConfigError, match=r"unknown metric of breakdown\(\) 'tpt'"):
        busy.breakdown("tpt")
    for wrong in ([50, 90], [0.9, 0.5], [0.0]):
        with pytest.raises(vs.ConfigError, match="expected rising numbers between 0 and 1"):
            busy.breakdown(quantiles=wrong)


def test_breakdown_bars_are_the_table(busy):
    """One bar per group, as long as its mean; segments differ in more than colour."""
    for metric in ("e2e", "ttft", "tpot"):
        assert_bars_are(busy.breakdown(metric), metric, busy.plot.breakdown(metric))
    ax = busy.plot.breakdown()
    looks = {(bars[0].get_hatch(), bars[0].get_facecolor()) for bars in ax.containers}
    assert len(looks) == len(ax.containers)
    assert ax.get_xlabel() == "mean end-to-end latency (s)"
    assert busy.plot.breakdown("ttft", shares=True).get_xlabel().endswith("(%)")


def assert_bars_are(table, metric, ax):
    assert len(ax.get_yticks()) == len(table)
    for row, mean in enumerate(table[metric]):
        ends = [bars[row].get_x() + bars[row].get_width() for bars in ax.containers]
        assert max(ends) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("num_requests", [1, 100_000])
def test_breakdown_of_one_and_of_many(num_requests):
    """A request alone is a group; with many the figure has no more bars."""
    ids = np.arange(num_requests)
    wait = np.random.default_rng(0).exponential(1.0, num_requests)
    requests = {
        "request_id": ids,
        "replica_id": 0 * ids,
        "arrived_at": 1.0 * ids,
        "scheduled_at": ids + wait,
        "first_token_at": ids + wait + 0.5,
        "completed_at": ids + wait + 2.0,
        "num_prefill_tokens": 0 * ids + 10,
        "num_decode_tokens": 0 * ids + 4,
        "num_restarts": 0 * ids,
        "refusal": np.full(num_requests, ""),
    }
    tables = {"requests": requests, "replicas": {}, "timeline": {}}
    result = Result(tables, config=None, info={"simulated_time": 1e6})
    ax = result.plot.breakdown()
    assert len(ax.containers) <= 3
    assert len(ax.patches) <= 12
    assert result.explain(0).parts.sum() == pytest.approx(result.requests["e2e"][0])


# -- the verdict ------------------------------------------------------------------------------

LENGTHS = vs.LognormalLengths(
    prompt_median=700, prompt_sigma=0.8, output_median=150, output_sigma=0.7
)


def run(rate: float, num_requests: int = 400, **changes: Any) -> Result:
    usual: dict[str, Any] = {
        "device": "a100-80gb-sxm",
        "max_model_len": 8_192,
        "replica_scheduler": vs.Sarathi(max_num_seqs=128, chunk_size=512),
    }
    workload = vs.Workload(vs.Poisson(rate), LENGTHS, num_requests=num_requests, clip="prompt")
    return vs.simulate(vs.Cluster(**(usual | changes)), workload)


def one_favourite(request, replicas):
    """A router that sends every second request to replica 0."""
    return replicas[0 if request.request_id % 2 else request.request_id % 4]


@pytest.mark.parametrize(
    ("verdict", "changes"),
    [
        ("none", {"rate": 2.0}),
        ("compute", {"rate": 12.0}),
        ("kv_memory", {"rate": 6.0, "kv_cache": vs.KVCache(num_blocks=800)}),
        ("batch_limit", {"rate": 5.0, "replica_scheduler": vs.Sarathi(max_num_seqs=12)}),
        ("batch_limit", {"rate": 5.0, "replica_scheduler": vs.VllmV1(max_num_seqs=12)}),
        ("batch_limit", {"rate": 2.0, "replica_scheduler": "faster_transformer"}),
        ("router", {"rate": 20.0, "num_replicas": 4, "global_scheduler": one_favourite}),
        ("pipeline_bubbles", {"rate": 8.0, "pipeline_parallel_size": 4}),
    ],
)
def test_the_verdict_is_what_was_made_scarce(verdict, changes):
    """Each cause in turn; its share is the largest, and numbers stand behind it."""
    found = run(**changes).bottleneck()
    assert found.verdict == verdict, found
    assert 0 <= found.table["share"].sum() <= 1 + 1e-9
    assert all(found.table["evidence"].str.len() > 5)
    assert found.text in str(found)
    assert found.text in found._repr_html_()


def test_the_remedy_helps():
    """What the verdict says may help makes requests wait less."""
    short = run(5.0, replica_scheduler=vs.Sarathi(max_num_seqs=12))
    more = run(5.0, replica_scheduler=vs.Sarathi(max_num_seqs=48))
    assert short.bottleneck().verdict == "batch_limit"
    assert "a higher max_num_seqs" in short.bottleneck().text
    assert more.bottleneck().verdict == "none"


def test_a_run_without_timeline_has_no_cause(busy):
    """A measurement says that requests waited, not what for."""
    result = Result(
        {"requests": busy.requests, "replicas": busy.replicas, "timeline": {}},
        config=None,
        info=busy.info,
    )
    found = result.bottleneck()
    assert found.verdict == "unknown"
    assert "there is no timeline" in found.text
    assert "-" in str(found)
    assert Result(
        {"requests": {}, "replicas": {}, "timeline": {}}, config=None, info={"simulated_time": 0.0}
    ).bottleneck().verdict == "none"  # fmt: skip


@pytest.mark.parametrize(
    ("num_blocks", "verdict", "rest"),
    [
        (5, "refusals", "admission. Nothing limits the others: requests lose"),
        (1, "refusals", "admission."),
        (380, "kv_memory", "The others are limited by KV-cache memory: requests lose"),
    ],
)
def test_refusals_are_named_first(num_blocks, verdict, rest):
    """How many and why, before what holds up the others; a tenth of them is the verdict."""
    lengths = vs.PublishedLengths("azure-conv-2023")
    workload = vs.Workload(vs.Poisson(8.0), lengths, num_requests=400, clip="prompt")
    cluster = vs.Cluster(kv_cache=vs.KVCache(num_blocks=num_blocks))
    result = vs.simulate(cluster, workload)
    found = result.bottleneck()
    num_refused = (result.requests["refusal"] != "").sum()
    assert re.match(
        f"{num_refused} of 400 requests (was|were) refused, (most often )?for this: its prompt of",
        found.text,
    )
    assert rest in found.text
    assert found.verdict == verdict
    assert str(found).startswith(found.text)


# -- saturation -------------------------------------------------------------------------------


def test_a_queue_that_grows_is_in_the_summary():
    """As text and html, with both rates; a run below capacity has no such line."""
    result = run(12.0, replica_scheduler=vs.Sarathi(max_num_seqs=24))
    found = result.saturation()
    assert found.is_saturated
    assert found.arrival_rate > 1.5 * found.service_rate
    assert "queue grows without bound" in str(result)
    assert "queue grows without bound" in result._repr_html_()
    assert found.text in str(result.bottleneck())
    calm = run(4.0)
    assert not calm.saturation().is_saturated
    assert "queue grows" not in str(calm)


@pytest.mark.parametrize(
    ("arrivals", "num_requests", "reason"),
    [
        (vs.Poisson(50.0), 60, "60 of the 100 requests that it takes arrived"),
        (vs.AllAtOnce(), 200, "they are a burst"),
        (vs.Poisson(200.0), 200, "they are a burst"),
    ],
)
def test_too_short_to_tell(arrivals, num_requests, reason):
    """Few requests, or all of them within a moment, say nothing about a steady load."""
    workload = vs.Workload(arrivals, LENGTHS, num_requests=num_requests, clip="prompt")
    found = vs.simulate(vs.Cluster(max_model_len=8_192), workload).saturation()
    assert not found.is_saturated
    assert reason in found.text
    assert np.isnan(found.score)


def queue(arrived_at: np.ndarray, rate: float) -> Result:
    """Requests that are served for a second, and taken from the queue at a rate at most."""
    num_requests = len(arrived_at)
    scheduled_at = np.empty(num_requests)
    free_at = 0.0
    for row, instant in enumerate(arrived_at):
        scheduled_at[row] = max(instant, free_at)
        free_at = scheduled_at[row] + 1 / rate
    ids = np.arange(num_requests)
    requests = {
        "request_id": ids,
        "replica_id": 0 * ids,
        "arrived_at": arrived_at,
        "scheduled_at": scheduled_at,
        "first_token_at": scheduled_at + 0.1,
        "completed_at": scheduled_at + 1.0,
        "num_prefill_tokens": 0 * ids + 10,
        "num_decode_tokens": 0 * ids + 4,
        "num_restarts": 0 * ids,
        "refusal": np.full(num_requests, ""),
    }
    tables = {"requests": requests, "replicas": {}, "timeline": {}}
    return Result(tables, config=None, info={"simulated_time": float(scheduled_at[-1] + 1)})


@pytest.mark.slow
def test_the_rule_is_seldom_wrong(rng):
    """Poisson arrivals: at 80 and 90 % load hardly a flag in 80 runs, at 150 % hardly none."""

    def share(load, num_runs=40, num_requests=1_000):
        return np.mean([
            queue(np.cumsum(rng.exponential(1 / load, num_requests)), 1.0).saturation().is_saturated
            for _ in range(num_runs)
        ])  # fmt: skip

    assert share(0.8) <= 0.01
    assert share(0.9) <= 0.02
    assert share(1.5, num_runs=20) >= 0.97


def test_a_burst_that_drains_is_no_saturation(rng):
    """Wherever it is: in the middle, or so late that it has not drained when arrivals end."""
    for at in (300, 500, 850, 950):
        arrived_at = np.cumsum(rng.exponential(1 / 0.7, 1_000))
        arrived_at[at - 100 : at] = arrived_at[at - 100]
        assert not queue(arrived_at, 1.0).saturation().is_saturated


def test_a_queue_that_stopped_to_grow_is_no_saturation(rng):
    """A backlog from the first half that stays as it is."""
    early = np.cumsum(np.full(600, 0.5))
    late = early[-1] + np.cumsum(np.full(300, 1.0))
    assert queue(early, 1.0).saturation().is_saturated
    assert not queue(np.concatenate([early, late]), 1.0).saturation().is_saturated


def test_saturation_errors_measures_every_case():
    """A tiny run of the benchmark gives a share for each load."""
    rows = list(saturation_errors.rows(num_seeds=1, sizes=(120,)))
    assert len(rows) == len(saturation_errors.WORKLOADS)
    assert all(len(shares) == len(saturation_errors.LOADS) for _, _, shares in rows)


def test_a_listener_finds_events_as_ever(cluster):
    """The observer takes nothing away from other listeners."""
    sim = vs.Simulation(cluster, Given([(0.0, 10, 3)]), record=("phases",), progress=False)
    seen = []
    sim.on(EventType.BATCH_END, lambda event: seen.append(sim.env.now))
    sim.run()
    assert seen == [1.0, 2.0, 3.0]
