"""How fast the two engines are: default (plain loop, in place, runs) and seven events.

Run it by hand::

    python tests/benchmarks/engines.py [--requests 5000] [--repetitions 3] [--only a b]
        [--growth] [--million 1] [--json FILE]

Each repetition times, in turn, a lone SimPy process yielding timeouts and every workload under both
engines, so that a machine that changes speed changes all. Times are CPU seconds, figures medians.
``--growth`` prints the cost against requests, replicas, running sequences and output length.
``--million N`` runs N million requests, with the peak memory of the process before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import simpy

import vidur_simpy as vs

LINEAR = vs.Linear(base=0.004, per_token=2e-5, per_context_token=5e-8)
MOONCAKE = "data/traces/mooncake_fast25_conversation.jsonl"
SHARED = Path(__file__).resolve().parents[2].parent / "shared"

Make = Callable[[], vs.Simulation]


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


def simulation(
    rate: float, num_requests: int, output_median: float = 130, **cluster: Any
) -> vs.Simulation:
    """Lognormal prompts (median 1,000) and outputs on Sarathi, 128 sequences a replica."""
    settings: dict[str, Any] = {
        "model": "llama-3.1-8b",
        "device": "h100-80gb-sxm",
        "max_model_len": 65_536,
        "replica_scheduler": vs.Sarathi(max_num_seqs=128, chunk_size=512),
        "execution_time": LINEAR,
    }
    lengths = vs.LognormalLengths(
        prompt_median=1000, prompt_sigma=1.0, output_median=output_median, output_sigma=1.0
    )
    workload = vs.Workload(vs.Poisson(rate=rate), lengths, num_requests=num_requests)
    return vs.Simulation(vs.Cluster(**settings | cluster), workload, progress=False)


def replicas(number: int, num_requests: int) -> vs.Simulation:
    """A cluster behind `least_outstanding_requests`, each replica near saturation."""
    return simulation(
        16.0 * number,
        num_requests,
        num_replicas=number,
        global_scheduler="least_outstanding_requests",
    )


def mooncake(num_requests: int) -> vs.Simulation:
    """The head of the Mooncake trace on vLLM with prefix caching."""
    cluster = vs.Cluster(
        model="llama-3.1-8b",
        device="h100-80gb-sxm",
        max_model_len=131_072,
        replica_scheduler=vs.VllmV1(enable_prefix_caching=True, max_num_batched_tokens=8_192),
        execution_time=LINEAR,
    )
    trace = vs.Trace(SHARED / MOONCAKE, num_requests=num_requests)
    return vs.Simulation(cluster, trace, progress=False)


def workloads(num_requests: int) -> dict[str, Make]:
    """Return the workloads (a) to (g) by name."""
    scarce = vs.KVCache(num_blocks=1_500)  # 191 of 5,000 requests give way
    ample = vs.KVCache(num_blocks=200_000)
    long = max(10, num_requests // 5)
    made: dict[str, Make] = {
        "a near saturation": lambda: simulation(16.0, num_requests),
        "b long outputs": lambda: simulation(1.2, long, output_median=4_000, kv_cache=ample),
        "c low load": lambda: simulation(1.0, num_requests // 2),
        "d 4 replicas": lambda: replicas(4, num_requests),
        "d 16 replicas": lambda: replicas(16, num_requests),
        "d 64 replicas": lambda: replicas(64, 2 * num_requests),
        "d 1024 replicas": lambda: replicas(1_024, 4 * num_requests),
        "e 4 stages": lambda: simulation(30.0, num_requests, pipeline_parallel_size=4),
        "f scarce memory": lambda: simulation(
            10.0, num_requests, max_model_len=8_192, kv_cache=scarce
        ),
    }
    if (SHARED / MOONCAKE).exists():
        made["g prefix caching"] = lambda: mooncake(num_requests)
    return made


def measure(make: Make, *, is_watched: bool = False) -> dict[str, float]:
    """Run a simulation and count per CPU second; with a listener it takes all seven events."""
    sim = make()
    if is_watched:
        sim.on(vs.EventType.BATCH_END, lambda event: None)
    started = time.process_time()
    sim.run()
    seconds = time.process_time() - started
    iterations = sum(replica.num_batches for replica in sim.replicas)
    return {
        "seconds": seconds,
        "requests_per_s": sim.num_expected / seconds,
        "iterations_per_s": iterations / seconds,
        "events_per_iteration": sim.env.num_events / iterations,
        "restarts": sum(replica.num_restarts for replica in sim.replicas),
    }


def compared(made: dict[str, Make], repetitions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure each workload under both engines, interleaved; return medians by engine."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {"default": [], "seven events": []} for name in made
    }
    for _ in range(repetitions):
        for name, make in made.items():
            for engine, measured in rows[name].items():
                bare = bare_timeouts()
                row = measure(make, is_watched=engine == "seven events")
                row["iterations_per_bare_timeout"] = row["iterations_per_s"] / bare
                measured.append(row)
    return {
        name: {
            engine: {key: statistics.median(row[key] for row in found) for key in found[0]}
            for engine, found in engines.items()
        }
        for name, engines in rows.items()
    }


def growth(num_requests: int) -> dict[str, dict[int, float]]:
    """Return microseconds of CPU, per request or per iteration, against what grows."""
    few = max(20, num_requests // 10)
    return {
        "us/request, by requests": {
            count: 1e6 / measure(lambda: simulation(12.0, count))["requests_per_s"]  # noqa: B023
            for count in (few, num_requests, 10 * num_requests)
        },
        "us/request, by replicas": {
            count: 1e6 / measure(lambda: replicas(count, num_requests))["requests_per_s"]  # noqa: B023
            for count in (1, 16, 256)
        },
        "us/iteration, by running": {
            count: 1e6
            / measure(lambda: decoding(count, 4_000), is_watched=True)["iterations_per_s"]  # noqa: B023
            for count in (8, 128, 1_024)
        },
        "us/request, by output tokens": {
            count: 1e6 / measure(lambda: simulation(1.0, few, count))["requests_per_s"]  # noqa: B023
            for count in (100, 1_000, 4_000)
        },
    }


def decoding(num_running: int, num_iterations: int) -> vs.Simulation:
    """So many requests that decode together, and nothing else."""
    cluster = vs.Cluster(
        kv_cache=vs.KVCache(num_blocks=2_000_000),
        replica_scheduler=vs.Sarathi(max_num_seqs=num_running, chunk_size=16 * num_running),
        execution_time=LINEAR,
    )
    lengths = vs.FixedLengths(num_prefill_tokens=16, num_decode_tokens=num_iterations)
    workload = vs.Workload(vs.AllAtOnce(), lengths, num_requests=num_running)
    return vs.Simulation(cluster, workload, progress=False)


def peak_bytes() -> int:
    """Return the most memory that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def of_many(num_requests: int) -> dict[str, float]:
    """Run many requests below saturation; return seconds and bytes, in all and per request."""
    measure(lambda: simulation(12.0, 1_000))
    before = peak_bytes()
    started = time.process_time()
    sim = simulation(12.0, num_requests)
    sim.run()
    seconds = time.process_time() - started
    return {
        "requests": num_requests,
        "seconds": seconds,
        "requests_per_s": num_requests / seconds,
        "bytes_per_request": (peak_bytes() - before) / num_requests,
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="LETTER", help="workloads, such as: a b")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--million", type=float, default=0.0, metavar="N")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    made = {
        name: make
        for name, make in workloads(arguments.requests).items()
        if not arguments.only or name[0] in arguments.only
    }
    figures: dict[str, Any] = {"engines": compared(made, arguments.repetitions)}
    print(f"{'workload':<18} {'engine':<13} {'requests/s':>11} {'iterations/s':>13} ", end="")
    print(f"{'events/iteration':>17} {'iterations/timeout':>19}")
    for name, engines in figures["engines"].items():
        for engine, row in engines.items():
            print(
                f"{name:<18} {engine:<13} {row['requests_per_s']:>11,.0f} "
                f"{row['iterations_per_s']:>13,.0f} {row['events_per_iteration']:>17.2f} "
                f"{row['iterations_per_bare_timeout']:>19.3f}"
            )
    if find_spec("vidur") is None:
        print("the reference (package vidur) is not importable here: no ratio to it")
    if arguments.growth:
        figures["growth"] = growth(arguments.requests)
        for name, costs in figures["growth"].items():
            print(f"{name}: " + ", ".join(f"{at:,} {cost:.1f}" for at, cost in costs.items()))
    if arguments.million:
        row = figures["million"] = of_many(round(1e6 * arguments.million))
        print(
            f"{row['requests']:,} requests: {row['seconds']:.0f} s, {row['requests_per_s']:,.0f} "
            f"requests/s, {row['bytes_per_request']:.0f} bytes a request on top, "
            f"{row['peak_bytes'] / 1e9:.2f} GB at the peak"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
