"""How often each way to search a large grid finds what running all of it finds, at what effort.

Run it by hand, and again to go on where it was cut off::

    python tests/benchmarks/large_grids.py [--store runs] [--jobs 2] [--cases NAME ...] [--seeds 10]

Five grids of 140 to 216 configurations over device, TP, PP, replicas, scheduler and batch limits,
with different models, lengths, SLOs and objectives, and one of 3,840. Effort is the number of
simulated requests, relative to running every configuration in full until it is settled. ``best``
is the share of seeds that find one as good as the best of all, ``worse`` by how much what they find
is worse on average.
``asha`` is Optuna's own pruner by successive halving, ``optuna in full`` its sampler without
halving, with as many configurations as make up the effort of halving.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import vidur_simpy as vs
from vidur_simpy.search import open_store, points_of, replication_seeds
from vidur_simpy.search.candidates import Candidates
from vidur_simpy.search.narrowing import (
    ETA,
    NUM_FINALISTS,
    Rank,
    least_share,
    proposed,
    successive_halving,
)
from vidur_simpy.search.slo import read_slo

PRICES = {"h100-80gb-sxm": 3.0, "a100-80gb-sxm": 1.8, "l40s": 0.9, "h200-141gb-sxm": 3.8}
SCHEDULERS = [vs.Vllm(), vs.Sarathi(chunk_size=512), vs.Sarathi(chunk_size=2048), vs.Orca()]
DEVICE, REPLICAS = "cluster.device", "cluster.num_replicas"
TP, PP = "cluster.tensor_parallel_size", "cluster.pipeline_parallel_size"
SCHEDULER = "cluster.replica_scheduler"
CHUNK, SEQS = f"{SCHEDULER}.chunk_size", f"{SCHEDULER}.max_num_seqs"


def workload(lengths: str, rate: float, num_requests: int = 900) -> vs.Workload:
    """Poisson arrivals with published lengths."""
    return vs.Workload(
        vs.Poisson(rate), vs.PublishedLengths(lengths), num_requests=num_requests, clip="prompt"
    )


SMALL = vs.Cluster(model="llama-3.1-8b")
LARGE = vs.Cluster(model="llama-3-70b", tensor_parallel_size=8)
# cluster, workload, SLO, grid, objective
CASES: dict[str, tuple[vs.Cluster, vs.Workload, dict[str, float], dict[str, list[Any]], str]] = {
    "8b_conv_cost": (
        SMALL,
        workload("azure-conv-2023", 40.0),
        {"ttft:p90": 0.5, "tpot:p90": 0.03},
        {
            DEVICE: ["h100-80gb-sxm", "a100-80gb-sxm", "l40s"],
            TP: [1, 2, 4],
            REPLICAS: [1, 2, 3, 4, 6, 8],
            SCHEDULER: SCHEDULERS,
        },
        "cost_per_hour",
    ),
    "70b_code_cost": (
        LARGE,
        workload("azure-code-2023", 6.0),
        {"ttft:p90": 2.0, "tpot:p90": 0.1},
        {
            DEVICE: ["h100-80gb-sxm", "a100-80gb-sxm", "h200-141gb-sxm"],
            TP: [2, 4, 8],
            PP: [1, 2],
            REPLICAS: [1, 2, 3, 4],
            SCHEDULER: SCHEDULERS[:3],
        },
        "cost_per_hour",
    ),
    "8b_limits_ttft": (
        SMALL,
        workload("azure-conv-2023", 16.0),
        {"tpot:p99": 0.05, "ttft:p99": 2.0},
        {
            CHUNK: [128, 256, 384, 512, 1024, 2048, 4096, 8192],
            SEQS: [8, 16, 32, 64, 128, 256],
            REPLICAS: [1, 2],
            "cluster.global_scheduler": ["round_robin", "least_outstanding_requests"],
        },
        "ttft_p90",
    ),
    "70b_conv_energy": (
        LARGE,
        workload("azure-conv-2023", 8.0),
        {"ttft:p99": 0.6, "tpot:p99": 0.03},
        {
            DEVICE: ["h100-80gb-sxm", "a100-80gb-sxm"],
            TP: [2, 4, 8],
            REPLICAS: [1, 2, 3, 4, 5, 6],
            CHUNK: [256, 512, 1024, 2048],
        },
        "kwh_per_million_tokens",
    ),
    "8b_limits_throughput": (
        vs.Cluster(model="llama-3.1-8b", device="a100-80gb-sxm"),
        workload("azure-conv-2023", 30.0),
        {"tpot:p90": 0.06},
        {
            CHUNK: [128, 256, 512, 1024, 2048],
            SEQS: [16, 32, 64, 96, 128, 192, 256],
            TP: [1, 2],
            PP: [1, 2],
        },
        "output_token_throughput",
    ),
    "large": (
        SMALL,
        workload("azure-code-2023", 30.0, 300),
        {"ttft:p90": 0.5, "tpot:p90": 0.03},
        {
            DEVICE: list(PRICES),
            TP: [1, 2, 4],
            PP: [1, 2],
            REPLICAS: [1, 2, 3, 4, 5, 6, 7, 8],
            CHUNK: [256, 512, 1024, 2048, 4096],
            SEQS: [8, 32, 128, 256],
        },
        "cost_per_hour",
    ),
}


@dataclass
class Counted:
    """Candidates whose runs are made once, and whose effort counts every time they are asked for.

    Attributes
    ----------
    effort : float
        Full runs so far, shorter ones by their share of the requests.
    """

    candidates: Candidates
    effort: float = 0.0
    ranked: dict[tuple[int, float], Rank] = field(default_factory=dict)

    def ranks(self, numbers: Sequence[int], share: float) -> list[Rank]:
        """Return ranks as `Candidates.ranks` does."""
        keys = [(number, round(share, 6)) for number in numbers]
        new = [number for number, key in zip(numbers, keys, strict=True) if key not in self.ranked]
        for number, rank in zip(new, self.candidates.ranks(new, share), strict=True):
            self.ranked[number, round(share, 6)] = rank
        self.effort += share * sum(number not in self.candidates.errors for number in numbers)
        return [self.ranked[key] for key in keys]

    def best(self, order: Sequence[int], batch: int = NUM_FINALISTS) -> int | None:
        """Run batches in full until a configuration meets the SLO; return the best of those."""
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            trials = self.candidates.trials
            self.candidates.run([number for number in numbers if number not in trials])
            there = [number for number in numbers if number in trials]
            self.effort += sum(len(trials[number].observations) for number in there)
            meet = [number for number in there if trials[number].verdict == "meets"]
            if meet:
                value = self.candidates.value
                return min(meet, key=lambda number: (value(number), trials[number].worst))
        return None


def asha(table: Counted, share: float, seed: int) -> list[int]:
    """Return the order in which Optuna's pruner by successive halving leaves all candidates."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=ETA)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=seed))
    numbers = np.random.default_rng(seed).permutation(len(table.candidates.points)).tolist()
    left: dict[int, float] = {}
    for number in numbers:
        trial, step = study.ask(), 0
        while True:
            ((kind, value, *_),) = table.ranks([number], min(1.0, share * ETA**step))
            figure = min(value, 1e6) + 1e7 * kind
            trial.report(figure, ETA**step)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
            step += 1
            if share * ETA ** (step - 1) >= 1:
                study.tell(trial, figure)
                left[number] = figure
                break
    return sorted(left, key=lambda number: (left[number], number))


def compare(name: str, store: Path | None, jobs: int | None, num_seeds: int) -> None:
    """Search a grid in every way, and print a line for each."""
    cluster, requests, slo, grid, column = CASES[name]
    points = points_of(cluster, requests, grid)
    table = Counted(
        Candidates(
            points,
            [PRICES[point.cluster.deployment.device.name] for point in points],
            read_slo(slo),
            column,
            replication_seeds(0, 8),
            0.95,
            jobs,
            None if store is None else open_store(store),
        )
    )
    share = least_share(table.candidates.num_requests)
    settings = [point.settings for point in points]
    truth = table.best(range(len(points)), len(points))
    assert truth is not None, f"no configuration of {name} meets its SLO"
    whole, limit = table.effort, table.candidates.value(truth)

    def left_to_optuna(tried: int, effort: float) -> Callable[[int], list[int]]:
        return lambda seed: proposed(
            settings, table.ranks, share=effort, num_tried=tried, seed=seed
        )

    def halved(_: int) -> list[int]:
        return successive_halving(range(len(points)), table.ranks, share=share)

    print(f"\n{name}: {len(points)} configurations, {whole:.0f} runs in full", flush=True)

    def show(way: str, order: Callable[[int], list[int]], seeds: int) -> float:
        efforts, found = [], []
        for seed in range(seeds):
            table.effort = 0.0
            found.append(table.best(order(seed)))
            efforts.append(table.effort / whole)
        values = [math.inf if each is None else table.candidates.value(each) for each in found]
        worse = np.mean([(value - limit) / abs(limit) for value in values])
        best = np.mean([value == limit for value in values])
        print(f"  {way:<20} best {best:4.0%}  worse {worse:6.2%}  effort {np.mean(efforts):6.2%}")
        sys.stdout.flush()
        return float(np.mean(efforts))

    effort = show("halving", halved, 1)
    show("asha", lambda seed: asha(table, share, seed), num_seeds)
    in_full = max(NUM_FINALISTS, round(effort * whole) - 3 * NUM_FINALISTS)
    if name != "large":
        show(f"optuna in full, {in_full}", left_to_optuna(in_full, 1.0), num_seeds)
    for tried in (64, 96) if name != "large" else (128, 256, 512):
        show(f"optuna, {tried}", left_to_optuna(tried, share), num_seeds)


def main() -> None:
    """Compare the ways on each grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES)[:-1])
    parser.add_argument("--store", type=Path, help="folder that keeps the runs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in arguments.cases:
        compare(name, arguments.store, arguments.jobs, arguments.seeds)


if __name__ == "__main__":
    main()
