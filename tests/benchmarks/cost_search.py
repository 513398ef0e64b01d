"""Which deployment of Llama-3-70B serves most per dollar under an SLO, as Vidur-Search asks.

Run it by hand::

    python tests/benchmarks/cost_search.py [--jobs 2] [--requests 4000] [--out FOLDER]

A fleet of 16 GPUs is cut into replicas by every tensor and pipeline parallel size that fits. For
each of those and each scheduler, capacity is the highest Poisson rate that meets the SLO; the best
serves most requests per dollar. Successive halving gives few requests to all configurations and
many to the best; `--exhaustive` gives all of them many, as the check. Prices are examples.

The whole search (two devices, two workloads, 50 deployments each) was 3,101 runs in 8 minutes on
two cores that were shared with other work.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import vidur_simpy as vs
from vidur_simpy.search.narrowing import successive_halving
from vidur_simpy.search.trials import outcomes

NUM_GPUS = 16
PRICES = {"h100-80gb-sxm": 4.0, "a100-80gb-sxm": 2.0}
TRACES = ("azure-conv-2023", "azure-code-2023")
SLO = vs.Slo({"ttft:p90": 2.0, "tpot:p99": 0.2})
SCHEDULERS: dict[str, Any] = {
    "vllm": vs.Vllm(max_num_batched_tokens=16_384),
    "orca": vs.Orca(),
    "sarathi 512": vs.Sarathi(chunk_size=512),
    "sarathi 1024": vs.Sarathi(chunk_size=1024),
    "sarathi 2048": vs.Sarathi(chunk_size=2048),
}


@dataclass(frozen=True)
class Deployment:
    """A cluster, and what to call it."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    num_replicas: int
    scheduler: str
    cluster: vs.Cluster

    def __str__(self) -> str:
        sizes = f"TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size}"
        return f"{sizes} x {self.num_replicas:>2} replicas, {self.scheduler}"


def deployments(device: str) -> list[Deployment]:
    """Every way to use the fleet that fits the memory."""
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4):
            replicas = NUM_GPUS // (tensor * pipeline)
            for name, scheduler in SCHEDULERS.items():
                try:
                    cluster = vs.Cluster(
                        model="llama-3-70b",
                        device=device,
                        tensor_parallel_size=tensor,
                        pipeline_parallel_size=pipeline,
                        num_replicas=max(1, replicas),
                        replica_scheduler=scheduler,
                    )
                except vs.CapacityError:
                    continue
                if replicas:
                    found.append(Deployment(tensor, pipeline, replicas, name, cluster))
    return found


def capacity_of(
    trace: str,
    num_requests: int,
    share: float,
    start: dict[int, float],
    task: tuple[int, vs.Cluster],
) -> vs.Capacity:
    """Capacity of a cluster, the rougher the smaller the share of the effort."""
    number, cluster = task
    workload = vs.Workload(
        vs.Poisson(start.get(number, 4.0)),
        vs.PublishedLengths(trace),
        num_requests=round(share * num_requests),
        clip="prompt",
    )
    rough = share < 1
    return vs.capacity(
        cluster,
        workload,
        SLO,
        tolerance=0.2 if rough else 0.05,
        max_replications=1 if rough else 4,
        jobs=1,
    )


def search(
    device: str, trace: str, num_requests: int, *, jobs: int | None, exhaustive: bool
) -> dict[str, Any]:
    """Find the cost-optimal deployments of a device for a trace."""
    started = time.perf_counter()
    fleet = deployments(device)
    found: dict[int, vs.Capacity] = {}
    num_runs = 0

    def rank(numbers: list[int], share: float) -> list[tuple[int, float]]:
        nonlocal num_runs
        start = {number: found[number].rate for number in numbers if number in found}
        start = {number: rate for number, rate in start.items() if 0 < rate < 1e6}
        function = partial(capacity_of, trace, num_requests, share, start)
        tasks = [(number, fleet[number].cluster) for number in numbers]
        made = outcomes(function, tasks, jobs)
        found.update(zip(numbers, made, strict=True))
        num_runs += sum(each.num_runs for each in made)
        return [(0, -each.rate) for each in made]

    numbers = list(range(len(fleet)))
    if not exhaustive:
        numbers = successive_halving(numbers, rank, share=0.15)[:3]
    rank(numbers, 1.0)
    price = PRICES[device] * NUM_GPUS
    best = sorted(numbers, key=lambda number: -found[number].rate)
    return {
        "device": device,
        "trace": trace,
        "num_deployments": len(fleet),
        "num_runs": num_runs,
        "seconds": time.perf_counter() - started,
        "best": [(str(fleet[number]), found[number]) for number in best],
        "requests_per_dollar": [3600 * found[number].rate / price for number in best],
    }


def show(row: dict[str, Any]) -> None:
    """Print what was found for a device and a trace."""
    print(f"\n{NUM_GPUS} x {row['device']}, {row['trace']}:", end=" ")
    print(f"{row['num_deployments']} deployments, {row['num_runs']} runs, {row['seconds']:.0f} s")
    for (name, found), per_dollar in list(
        zip(row["best"], row["requests_per_dollar"], strict=True)
    )[:3]:
        low, high = found.low, found.high
        print(f"  {name:<42} {found.rate:6.2f} requests/s ({low:.2f} to {high:.2f})", end="")
        print(f"  {per_dollar:7.0f} requests/$", flush=True)


def main() -> None:
    """Search for every device and trace, and say how many runs and how long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=4_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--devices", nargs="*", choices=sorted(PRICES), default=list(PRICES))
    parser.add_argument("--traces", nargs="*", choices=TRACES, default=list(TRACES))
    parser.add_argument("--out", type=Path, help="folder for the capacity curves as figures")
    arguments = parser.parse_args()
    print(f"Llama-3-70B under {SLO}", flush=True)
    rows = []
    for trace in arguments.traces:
        for device in arguments.devices:
            rows.append(
                search(
                    device,
                    trace,
                    arguments.requests,
                    jobs=arguments.jobs,
                    exhaustive=arguments.exhaustive,
                )
            )
            show(rows[-1])
    for trace in arguments.traces:
        of_trace = [row for row in rows if row["trace"] == trace]
        best = max(of_trace, key=lambda row: row["requests_per_dollar"][0])
        print(f"\n{trace}: {best['best'][0][0]} on {best['device']},", end=" ")
        print(f"{best['requests_per_dollar'][0]:.0f} requests/$")
    print(f"\n{sum(row['num_runs'] for row in rows)} runs", end=" ")
    print(f"in {sum(row['seconds'] for row in rows):.0f} s")
    if arguments.out:
        save(rows, arguments.out)


def save(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw the capacity curve of each best deployment."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        axes = row["best"][0][1].plot()
        axes.figure.savefig(folder / f"{row['device']}_{row['trace']}.png", dpi=150)


if __name__ == "__main__":
    main()
