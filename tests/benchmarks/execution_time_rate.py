"""What an execution-time model costs per iteration, beside the straight line.

Run it by hand::

    python tests/benchmarks/execution_time_rate.py [--requests 2000]

The first table is nanoseconds of CPU time per call, for batches of 64 decodes with so many prefill
chunks; the second, iterations per CPU second of a whole simulation near saturation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import vidur_simpy as vs
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.execution_time import StageTime

MODELS = ("llama-3.1-8b", "mixtral-8x7b", "deepseek-v3")


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


def nanoseconds(stage_time: StageTime, counts: Batch) -> float:
    """Return the median CPU time of a call."""
    seconds = []
    for _ in range(9):
        started = time.process_time()
        for _ in itertools.repeat(None, 20_000):
            stage_time(counts, 0)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds) / 20_000 * 1e9


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
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    num_requests = parser.parse_args().requests
    device = vs.Device.from_name("h100")
    stage_times = {
        f"roofline, {name}": vs.Roofline().for_replica(
            vs.Deployment(vs.Model.from_name(name), device)
        )
        for name in MODELS
    }
    deployment = vs.Deployment(vs.Model.from_name(MODELS[0]), device)
    stage_times = {"linear": vs.Linear().for_replica(deployment)} | stage_times
    print(f"{'ns per call':<24} {'0 chunks':>9} {'1 chunk':>9} {'3 chunks':>9}")
    for name, stage_time in stage_times.items():
        times = [nanoseconds(stage_time, batch(num_chunks)) for num_chunks in (0, 1, 3)]
        print(f"{name:<24} " + " ".join(f"{value:9.0f}" for value in times))
    for name, model in (("linear", vs.Linear()), ("roofline", vs.Roofline())):
        rates = [iterations_per_second(model, num_requests) for _ in range(5)]
        print(f"{name:<24} {statistics.median(rates):9,.0f} iterations/s")


if __name__ == "__main__":
    main()
