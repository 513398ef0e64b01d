"""Measurements: three kinds of file, told from their content, in seconds whatever the unit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy import ConfigError, TraceError, read_measurement
from vidur_simpy.exchange.vllm_bench import read_vllm_bench
from vidur_simpy.measurements import Chunk, Iteration, measured_requests

VLLM_CPU = Path("data/reference/vllm_cpu")
BENCH = {
    "model_id": "meta-llama/Llama-3.1-8B",
    "input_lens": [100, 200, 300],
    "output_lens": [3, 1, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.02, 0.04], [], []],
    "start_times": [1000.5, 1000.0, 1001.0],
    "errors": ["", "", "Connection reset"],
    "mean_ttft_ms": 150.0,
}
REQUESTS = """arrived_at,num_prefill_tokens,num_decode_tokens,first_token_at,completed_at
2.0,100,3,2.5,3.5
1.0,200,1,1.25,1.25
3.0,300,9,,
"""
COUNTED = """num_decodes,decode_context,prefills,duration
2,100 50,8:8 16:64,0.5
0,,300:300,0.25
3,90,,
"""
SCHEDULED = """segment,duration_ms,scheduled,kv_tokens
0,20,a:5 b:7,12
0,5,a b:3,16
0,5,a b,18
1,5,a:2,2
"""


@pytest.fixture
def write(tmp_path):
    """Write a file; text as it is, everything else as JSON."""

    def write_file(content, name="measured"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


# What is read


@pytest.mark.parametrize("name", ["run.json", "run", "run.txt"])
def test_a_vllm_benchmark_is_told_from_its_content(write, name):
    """Its requests count from the first; the failed one is left out."""
    measured = read_measurement(write(BENCH, name))
    assert measured.arrived_at.tolist() == [0.0, 0.5]
    assert measured.num_prefill_tokens.tolist() == [200, 100]
    assert measured.num_decode_tokens.tolist() == [1, 3]
    assert measured.ttft == pytest.approx([0.2, 0.1])
    assert measured.e2e == pytest.approx([0.2, 0.16])
    assert measured.tpot == pytest.approx([np.nan, 0.03], nan_ok=True)
    assert (measured.num_failed, measured.model) == (1, "meta-llama/Llama-3.1-8B")


def test_parsing_a_benchmark_is_a_function_of_its_own(write):
    """What another reader has parsed already becomes requests without a file."""
    bench = read_vllm_bench(write(BENCH, "run.json"))
    assert len(measured_requests(bench)) == 2


def test_requests_are_sorted_and_failed_ones_left_out(write):
    """Instants become latencies; the clock starts with the first arrival."""
    measured = read_measurement(write(REQUESTS))
    assert measured.arrived_at.tolist() == [0.0, 1.0]
    assert measured.ttft.tolist() == [0.25, 0.5]
    assert measured.e2e.tolist() == [0.25, 1.5]
    assert measured.num_failed == 1


@pytest.mark.parametrize(("suffix", "factor"), [("_s", 1), ("_ms", 1e3), ("_us", 1e6), ("", 1)])
def test_the_name_of_a_column_says_its_unit(write, suffix, factor):
    """The same requests in any unit, with latencies in place of instants."""
    header = f"submit{suffix},num_prompt_tokens,num_output_tokens,ttft{suffix},e2e{suffix}\n"
    rows = [f"{time * factor},10,5,{0.5 * factor},{1.5 * factor}\n" for time in (1.0, 2.0)]
    measured = read_measurement(write(header + "".join(rows)))
    assert measured.arrived_at == pytest.approx([0.0, 1.0])
    assert measured.ttft == pytest.approx([0.5, 0.5])
    assert measured.tpot == pytest.approx([0.25, 0.25])


def test_iterations_by_counts(write):
    """A sum or one number each; rows without a duration are left out."""
    measured = read_measurement(write(COUNTED))
    assert measured.durations.tolist() == [0.5, 0.25]
    assert measured.iterations == [
        Iteration(2, 150, (Chunk(8, 8), Chunk(16, 64))),
        Iteration(0, 0, (Chunk(300, 300),)),
    ]
    first = measured.iterations[0]
    assert (first.num_tokens, first.total_context) == (26, 222)
    assert first.num_attention_pairs == 150 + 8 * 9 // 2 + (16 * 64 - 16 * 15 // 2)


def test_iterations_by_the_names_of_their_requests(write):
    """Contexts add up from row to row, each run for itself."""
    measured = read_measurement(write(SCHEDULED))
    assert measured.durations == pytest.approx([0.02, 0.005, 0.005, 0.005])
    assert measured.runs.tolist() == [0, 0, 0, 1]
    assert measured.iterations == [
        Iteration(0, 0, (Chunk(5, 5), Chunk(7, 7))),
        Iteration(1, 6, (Chunk(3, 10),)),
        Iteration(2, 18),
        Iteration(0, 0, (Chunk(2, 2),)),
    ]


def test_gzipped_files_and_lines_of_json(tmp_path):
    """As traces may be."""
    rows = [
        {"queued_ts": 5.0, "arrival_time": 1.7e9, "input_toks": 10, "output_toks": 2}
        | {"first_token_ts": 5.5, "last_token_ts": 6.0}
    ]
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    measured = read_measurement(path)
    assert (measured.ttft.tolist(), measured.e2e.tolist()) == ([0.5], [1.0])


def test_a_saved_result_is_a_measurement(cluster, tmp_path):
    """Its table of requests gives the latencies back."""
    workload = vs.Workload(vs.Poisson(0.2), vs.UniformLengths(5, 9, 2.0), num_requests=20)
    result = vs.simulate(cluster, workload)
    result.save(tmp_path)
    measured = read_measurement(tmp_path / "requests.csv")
    assert measured.ttft == pytest.approx(result.requests["ttft"].to_numpy())
    assert measured.e2e == pytest.approx(result.requests["e2e"].to_numpy())


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=8))
def test_named_plans_say_what_counts_say(lengths):
    """Whatever is scheduled, every context is what its request has computed so far."""
    from vidur_simpy.measurements.iterations import iterations_of
    from vidur_simpy.workload.tables import Table

    plans, sums = [], []
    for step in range(max(output for _, output in lengths)):
        here = [(i, *each) for i, each in enumerate(lengths) if step < each[1]]
        plans.append(" ".join(f"r{i}:{prompt}" if step == 0 else f"r{i}" for i, prompt, _ in here))
        sums.append(sum(prompt + step for _, prompt, _ in here))
    cells = {"scheduled": plans, "duration": ["1"] * len(plans), "kv_tokens": sums}
    measured = iterations_of(Table(Path("x"), range(2, 2 + len(plans)), cells))
    assert [each.total_context for each in measured.iterations] == sums


def test_the_runs_on_a_cpu_are_read(shared):
    """All steps but the last of each busy time, whose period is not known; all requests."""
    steps = read_measurement(shared / VLLM_CPU / "cal_steps.csv")
    assert len(steps) == 5420
    assert sum(each.num_tokens for each in steps.iterations) > 70_000
    requests = read_measurement(shared / VLLM_CPU / "cal_requests.csv")
    assert (len(requests), len(list(requests.split()))) == (320, 8)


# Requests that arrive again


def test_measured_requests_are_a_workload(cluster, write):
    """They arrive when they did, with the lengths they had."""
    measured = read_measurement(write(REQUESTS))
    result = vs.simulate(cluster, measured)
    assert result.requests["arrived_at"].tolist() == [0.0, 1.0]
    assert result.requests["num_decode_tokens"].tolist() == [1, 3]
    assert "MeasuredRequests: 2 from" in result.config["workload"]["object"]


def test_several_runs_are_simulated_one_by_one(write):
    """Their clocks have nothing to do with each other."""
    header, *rows = REQUESTS.splitlines()
    text = "\n".join([f"run,{header}", f"x,{rows[0]}", f"y,{rows[1]}", f"x,{rows[0]}"])
    measured = read_measurement(write(text))
    with pytest.raises(ConfigError, match="holds 2 runs"):
        measured.requests()
    assert [len(one.requests()) for one in measured.split()] == [2, 1]


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "has the columns a, b; expected those of iterations"),
        (REQUESTS.replace("first_token_at", "first"), "no column first_token_at or .*ttft"),
        (REQUESTS.replace("2.0,100", ",100"), "line 2: .*every request to arrive"),
        (REQUESTS.replace("2.5", "-2.5"), "line 2: first_token_at = '-2.5', expected"),
        (REQUESTS.replace("2.5", "1.5"), "line 2: .* first token 1.5 s.*: expected the first"),
        (REQUESTS.replace("3.5", "2.25"), "line 2: .* end 2.25 s: expected the first token"),
        (REQUESTS.replace("100,3", "100,0"), "line 2: 100 . 0 tokens.*at least 1 token"),
        (REQUESTS.replace("100,3", "1e2.5,3"), "line 2: num_prefill_tokens = '1e2.5'"),
        (REQUESTS.splitlines()[0] + "\n3.0,300,9,,\n", "no request that was completed"),
        (COUNTED.replace("0.5", "0"), "line 2: duration = 0, expected more"),
        (COUNTED.replace("0.5", "-0.5"), "line 2: duration = '-0.5'"),
        (COUNTED.replace("0.5", "").replace("0.25", ""), "no duration in any row"),
        (COUNTED.replace("8:8", "8:4"), "line 2: prefills = '8:4 16:64', expected tokens:context"),
        (COUNTED.replace("8:8", "8"), "line 2: prefills = '8 16:64'"),
        (COUNTED.replace("100 50", "1"), "line 2: 2 decodes with a context of 1"),
        (COUNTED.replace("prefills", "chunky"), "no column prefills or chunks"),
        (SCHEDULED.replace("a b,18", "a b,17"), "line 4: kv_tokens = 17, .* make 18"),
        (SCHEDULED.replace("a:5", "a:0"), "line 2: scheduled = 'a:0 b:7'"),
        ("[]", "expected"),
    ],
)
def test_what_cannot_be_is_refused(write, content, message):
    """One sentence with the line, the value and what was expected."""
    with pytest.raises(TraceError, match=message):
        read_measurement(write(content))


def test_milliseconds_for_seconds_are_noticed(write):
    """The tool writes the mean in milliseconds, which tells."""
    entries = BENCH | {"ttfts": [100.0, 200.0, 0.0], "itls": [[20.0, 40.0], [], []]}
    with pytest.raises(TraceError, match=r"mean of ttfts is 150, mean_ttft_ms is 150.* seconds"):
        read_measurement(write(entries, "run.json"))


def test_a_benchmark_without_details_is_refused(write):
    """It says how to get them."""
    with pytest.raises(TraceError, match="--save-detailed"):
        read_measurement(write({"duration": 3.0, "mean_ttft_ms": 2.0}, "run.json"))


def test_a_file_that_is_not_there(tmp_path):
    """With the nearest one that is."""
    (tmp_path / "steps.csv").write_text(COUNTED)
    with pytest.raises(TraceError, match=r"step.csv does not exist. Did you mean 'steps.csv'"):
        read_measurement(tmp_path / "step.csv")
