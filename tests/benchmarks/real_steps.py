"""How long single steps of real vLLM runs took beyond their kernels.

The constants of ``real_runs`` come from here. Run it by hand::

    python tests/benchmarks/real_steps.py [--only NAME] [--link-gbps GBPS] [--link-latency SECONDS]

The runs record when requests were scheduled, got their first and their last token; all of that
happens between two steps. Steps that only decode: two requests that got their first token in the
same step, and their last ones after the last prompt was done, are as many steps apart as their
lengths differ. Steps with a prefill: from the last such instant between a request's scheduling and
its first token to this token, if there is one such instant and nobody else has a prompt under way.

Of each it prints the measured time, that of the kernels (and of transfers over the link given; by
default an infinite one), and their difference, in milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from real_runs import PROFILES, RUNS, Run, profile_of, runs

from vidur_simpy.measurements.iterations import Chunk, Iteration

SAME_STEP = 4e-4
"""Seconds between what two replicas say of the end of one step, at most."""

INFINITE_GBPS = 1e9


class Steps:
    """The steps of a run, as far as its requests tell."""

    def __init__(self, run: Run, folder: Path, link_gbps: float, link_latency: float) -> None:
        table = run.requests
        instants = table[["scheduled_ts", "first_token_ts", "last_token_ts"]]
        instants = instants - table.queued_ts.min()
        self.scheduled, self.first, self.last = instants.to_numpy().T
        self.prompts, self.outputs = table.input_toks.to_numpy(), table.output_toks.to_numpy()
        queued = (table.queued_ts - table.queued_ts.min()).to_numpy()
        self.boundaries = _apart(np.sort(np.concatenate([queued, instants.to_numpy().ravel()])))
        self._num_replicas = run.num_replicas if run.shares_experts else 1
        profile = profile_of(
            run,
            folder,
            cpu_overhead=0.0,
            prefill_overhead=0.0,
            link_gbps=link_gbps,
            link_latency=link_latency,
        )
        self._stage_time: Any = profile.for_replica(run.deployment)

    def decodes(self) -> Iterator[tuple[float, float, float]]:
        """Yield tokens, measured and kernels' seconds of steps that only decode."""
        late = np.flatnonzero(self.last > self.first.max())
        for one, other in combinations(late[np.argsort(self.last[late])], 2):
            num_steps = self.outputs[other] - self.outputs[one]
            if abs(self.first[one] - self.first[other]) > SAME_STEP or num_steps < 5:
                continue
            start, end = self.last[one], self.last[other]
            middle = [self._state(t) for t in np.linspace(start + 1e-4, end - 1e-4, 50)]
            num_decodes = float(np.mean([n for n, _ in middle]))
            context = float(np.mean([mean for _, mean in middle]))
            seconds = self._seconds(round(num_decodes), context, ())
            yield num_decodes, (end - start) / num_steps, seconds

    def prefills(self) -> Iterator[tuple[float, float, float]]:
        """Yield tokens, measured and kernels' seconds of steps with one prompt."""
        for request in range(len(self.first)):
            first, last = (
                int(np.argmin(abs(self.boundaries - instant)))
                for instant in (self.scheduled[request], self.first[request])
            )
            start, end = self.boundaries[last - 1], self.first[request]
            under_way = (self.scheduled < start - 1e-3) & (self.first > start + 1e-3)
            if last - first != 2 or under_way.sum() != 1 or self.prompts[request] > 1800:
                continue
            num_decodes, context = self._state((start + end) / 2)
            if num_decodes > 1:
                prompt = int(self.prompts[request])
                seconds = self._seconds(num_decodes, context, (Chunk(prompt, prompt),))
                yield num_decodes + prompt, end - start, seconds

    def _state(self, instant: float) -> tuple[int, float]:
        """Return how many requests decode at an instant, and their mean context."""
        decode = (self.first <= instant) & (instant < self.last)
        if not decode.any():
            return 0, 0.0
        share = (instant - self.first[decode]) / (self.last[decode] - self.first[decode])
        return int(decode.sum()), float(
            np.mean(self.prompts[decode] + share * self.outputs[decode])
        )

    def _seconds(self, num_decodes: int, context: float, chunks: tuple[Chunk, ...]) -> float:
        """Return the kernels' time of a step; decodes are spread evenly over the replicas."""
        parts = [num_decodes // self._num_replicas] * self._num_replicas
        parts[-1] += num_decodes - sum(parts)
        batches: list[Iteration | None] = [
            Iteration(n, round(n * context), chunks if index == 0 else ())
            for index, n in enumerate(parts)
        ]
        batches = [batch if batch and batch.num_tokens else None for batch in batches]
        if self._num_replicas > 1:
            return self._stage_time.together(batches)
        return self._stage_time(batches[0], 0)


def _apart(instants: np.ndarray) -> np.ndarray:
    """Return the first of instants that are less than 2 ms apart."""
    return instants[np.insert(np.diff(instants) > 2e-3, 0, True)]


def show(rows: Sequence[tuple[float, float, float]], what: str, edges: Sequence[float]) -> None:
    """Print medians by the number of tokens, and the line through the differences."""
    table = 1e3 * pd.DataFrame(rows, columns=["tokens", "measured", "kernels"])
    table["tokens"] /= 1e3
    table["more"] = table.measured - table.kernels
    groups = table.groupby(pd.cut(table.tokens, list(edges)), observed=True)
    medians = groups[["measured", "kernels", "more"]].median()
    medians.insert(0, "steps", groups.size())
    kept = table[(table.more - table.more.median()).abs() < 20]
    for _ in range(5):
        # Prompts found in the prefix cache, or one more step in between: neither is known.
        slope, start = np.polyfit(kept.tokens, kept.more, 1)
        distances = (table.more - start - slope * table.tokens).abs()
        kept = table[distances < 4.0]
    print(f"{what}\n{medians.to_string(float_format='{:.2f}'.format)}")
    print(f"{len(kept)} of {len(table)}: {start:.2f} ms + {1e3 * slope:.1f} us a token, ", end="")
    print(f"median {kept.more.median():.2f} ms\n")


def main(arguments: dict[str, Any]) -> None:
    """Show the steps of all runs, or of those whose name contains a text."""
    for run in runs(arguments["runs"]):
        if arguments["only"] in run.name:
            link = arguments["link_gbps"], arguments["link_latency"]
            steps = Steps(run, arguments["profiles"], *link)
            print(run.name)
            show(list(steps.decodes()), "decodes", (0, 10, 30, 60, 90, 120, 180, 256))
            prefill_edges = (0, 384, 512, 640, 768, 896, 1024, 1536, 2048)
            show(list(steps.prefills()), "with a prefill", prefill_edges)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--only", default="")
    parser.add_argument("--link-gbps", type=float, default=INFINITE_GBPS)
    parser.add_argument("--link-latency", type=float, default=0.0)
    main(vars(parser.parse_args()))
