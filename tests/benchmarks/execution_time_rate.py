"""What an execution-time model costs per iteration, beside the straight line.

Run it by hand::

    python tests/benchmarks/execution_time_rate.py [--calls 100000] [--requests 2000]

The first table is nanoseconds of CPU time per call, for batches of 64 decodes with so many prefill
chunks, and in brackets how many times that is what the straight line takes. All calls take turns,
so that whatever else the machine does hits them alike, and the fastest turn counts. The second
table is nanoseconds per iteration when a run of decodes is looked up at once, the third,
iterations per CPU second of a whole simulation near saturation.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import vidur_simpy as vs
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.execution_time import StageTime

MODELS = ("llama-3.1-8b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3")
NUM_CHUNKS = (0, 1, 3)
RUNS = (4, 16, 64, 256, 1024)
TURNS = 25


def batch(num_chunks: int) -> Batch:
    """Make a batch of 64 decodes and some chunks."""
    decodes = vs.DecodeSet(block_size=16)
    for request_id in range(64):
        request = Request(1000, 100, 0.0, request_id=request_id)
        request.schedule_chunk(1000)
        request.end_chunk(1000)
        decodes.join(request)
    each = 448 // max(num_chunks, 1)
    chunks = [PrefillChunk(Request(2048, 1), each, 1000) for _ in range(num_chunks)]
    return Batch(decodes, chunks)


def nanoseconds(functions: Mapping[str, Any], arguments: tuple[Any, ...], num_calls: int) -> Any:
    """Return the CPU time per call of each function, in the fastest of its turns."""
    each = max(1, num_calls // TURNS)
    fastest = dict.fromkeys(functions, float("inf"))
    for _ in range(TURNS):
        for name, function in functions.items():
            started = time.process_time()
            for _ in itertools.repeat(None, each):
                function(*arguments)
            fastest[name] = min(fastest[name], time.process_time() - started)
    return {name: seconds / each * 1e9 for name, seconds in fastest.items()}


def stage_times() -> dict[str, StageTime]:
    """Make the stage times of the straight line and of several models on an H100."""
    device = vs.Device.from_name("h100")
    deployments = {name: vs.Deployment(vs.Model.from_name(name), device) for name in MODELS}
    made = {"linear": vs.Linear().for_replica(deployments[MODELS[0]])}
    for name, deployment in deployments.items():
        made[f"roofline, {name}"] = vs.Roofline().for_replica(deployment)
    return made


def call_times(num_calls: int) -> list[dict[str, float]]:
    """Return nanoseconds per call by model, for each number of chunks."""
    made = stage_times()
    return [nanoseconds(made, (batch(chunks), 0), num_calls) for chunks in NUM_CHUNKS]


def run_times(num_calls: int) -> list[dict[str, float]]:
    """Return nanoseconds per iteration by model, for each length of a run."""
    made = {
        name: functools.partial(stage_time.decode_times, 64, 64_000)  # type: ignore[attr-defined]
        for name, stage_time in stage_times().items()
    }
    rows = []
    for length in RUNS:
        times = nanoseconds(made, (length, 0), max(1, num_calls // length))
        rows.append({name: value / length for name, value in times.items()})
    return rows


def iterations_per_second(execution_time: object, num_requests: int) -> float:
    """Return the rate of a simulation near saturation."""
    cluster = vs.Cluster(max_model_len=65_536, execution_time=execution_time)
    lengths = vs.LognormalLengths(
        prompt_median=1000, prompt_sigma=1.0, output_median=130, output_sigma=1.0
    )
    workload = vs.Workload(vs.Poisson(rate=16.0), lengths, num_requests=num_requests)
    simulation = vs.Simulation(cluster, workload, progress=False)
    started = time.process_time()
    simulation.run()
    seconds = time.process_time() - started
    return sum(replica.num_batches for replica in simulation.replicas) / seconds


def main() -> None:
    """Print all three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    calls = call_times(arguments.calls)
    print(f"{'ns per call':<24}" + "".join(f"{chunks:>9} chunks" for chunks in NUM_CHUNKS))
    for name in calls[0]:
        cells = (f"{row[name]:9.0f} ({row[name] / row['linear']:.1f})" for row in calls)
        print(f"{name:<24} " + " ".join(cells))
    runs = run_times(arguments.calls)
    print(f"\n{'ns per iteration, of':<24} " + " ".join(f"{length:>9}" for length in RUNS))
    for name in runs[0]:
        print(f"{name:<24} " + " ".join(f"{row[name]:9.0f}" for row in runs))
    print()
    for name, model in (("linear", vs.Linear()), ("roofline", vs.Roofline())):
        rates = [iterations_per_second(model, arguments.requests) for _ in range(5)]
        print(f"{name:<24} {statistics.median(rates):9,.0f} iterations/s")


if __name__ == "__main__":
    main()
