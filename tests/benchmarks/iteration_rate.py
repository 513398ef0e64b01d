"""How fast the seven-event engine is, beside a bare SimPy process in the same process.

Run it by hand::

    python tests/benchmarks/iteration_rate.py [--repetitions 5] [--requests 5000] [--json FILE]

Each repetition times, in turn, a lone process yielding timeouts and every workload, so that a
machine that changes speed changes both. Times are CPU seconds, figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import simpy

import vidur_simpy as vs

LINEAR = vs.Linear(base=0.004, per_token=2e-5, per_context_token=5e-8)


def bare_timeouts(count: int = 200_000) -> float:
    """Timeouts per CPU second of a lone SimPy process."""
    env = simpy.Environment()

    def process() -> simpy.events.ProcessGenerator:
        for _ in range(count):
            yield env.timeout(1.0)

    env.process(process())
    started = time.process_time()
    env.run()
    return count / (time.process_time() - started)


def near_saturation(num_requests: int) -> vs.Simulation:
    """One replica that is just kept up with: Sarathi, chunks of 512 tokens, 128 sequences."""
    cluster = vs.Cluster(
        model="llama-3.1-8b",
        device="h100-80gb-sxm",
        max_model_len=65_536,
        replica_scheduler=vs.Sarathi(max_num_seqs=128, chunk_size=512),
        execution_time=LINEAR,
    )
    lengths = vs.LognormalLengths(
        prompt_median=1000, prompt_sigma=1.0, output_median=130, output_sigma=1.0
    )
    workload = vs.Workload(vs.Poisson(rate=16.0), lengths, num_requests=num_requests)
    return vs.Simulation(cluster, workload, progress=False)


SCHEDULERS: dict[str, Callable[[int], object]] = {
    "sarathi": lambda n: vs.Sarathi(max_num_seqs=n, chunk_size=16 * n),
    "vllm_v1": lambda n: vs.VllmV1(max_num_seqs=n, max_num_batched_tokens=16 * n),
    "mnemosyne": lambda n: vs.Mnemosyne(max_num_seqs=n, chunk_size=16 * n, target_batch_time=None),
}


def decoding(scheduler: str, num_running: int, num_iterations: int) -> vs.Simulation:
    """So many requests that decode together for so many iterations, and nothing else."""
    cluster = vs.Cluster(
        model="llama-3.1-8b",
        device="h100-80gb-sxm",
        kv_cache=vs.KVCache(num_blocks=2_000_000),
        replica_scheduler=SCHEDULERS[scheduler](num_running),
        execution_time=LINEAR,
    )
    lengths = vs.FixedLengths(num_prefill_tokens=16, num_decode_tokens=num_iterations)
    return vs.Simulation(
        cluster, vs.Workload(vs.AllAtOnce(), lengths, num_requests=num_running), progress=False
    )


def measure(make: Callable[[], vs.Simulation]) -> dict[str, float]:
    """Run a simulation and count per CPU second."""
    simulation = make()
    started = time.process_time()
    simulation.run()
    seconds = time.process_time() - started
    iterations = sum(replica.num_batches for replica in simulation.replicas)
    return {
        "iterations_per_s": iterations / seconds,
        "requests_per_s": simulation.num_expected / seconds,
        "events_per_s": simulation.env.num_events / seconds,
        "iterations": iterations,
    }


def run(num_requests: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Measure everything in turn, several times; return the medians."""
    steps = max(20, num_requests)
    workloads: dict[str, Callable[[], vs.Simulation]] = {
        "near saturation": lambda: near_saturation(num_requests),
        **{
            f"{scheduler}, {num_running} decoding": partial(decoding, scheduler, num_running, steps)
            for scheduler in SCHEDULERS
            for num_running in (8, 512)
        },
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in workloads}
    for _ in range(repetitions):
        for name, make in workloads.items():
            bare = bare_timeouts()
            row = measure(make)
            row["bare_timeouts_per_s"] = bare
            row["iterations_per_bare_timeout"] = row["iterations_per_s"] / bare
            rows[name].append(row)
    return {
        name: {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        for name, measured in rows.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = run(arguments.requests, arguments.repetitions)
    print(f"{'workload':<23} {'iterations/s':>13} {'requests/s':>11} {'events/s':>10} ", end="")
    print(f"{'bare timeouts/s':>16} {'ratio':>7}")
    for name, row in figures.items():
        print(
            f"{name:<23} {row['iterations_per_s']:>13,.0f} {row['requests_per_s']:>11,.0f} "
            f"{row['events_per_s']:>10,.0f} {row['bare_timeouts_per_s']:>16,.0f} "
            f"{row['iterations_per_bare_timeout']:>7.3f}"
        )
    for scheduler in SCHEDULERS:
        few, many = (
            figures[f"{scheduler}, {num_running} decoding"]["iterations_per_bare_timeout"]
            for num_running in (8, 512)
        )
        print(f"{scheduler}: an iteration at 512 running costs {few / many:.2f} times that at 8")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
