"""Replays of real vLLM servers come close to what these measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import real_runs

RUNS = {run.name: run for run in real_runs.runs()}
LARGEST_ERROR = 5.0  # percent

needs_runs = pytest.mark.skipif(not RUNS, reason="needs the real runs in ../shared")
every_run = pytest.mark.parametrize("name", RUNS or ["none"])


@pytest.fixture(scope="module")
def tables():
    """The table of each run."""
    return {name: real_runs.compare(run, real_runs.profile_of(run)) for name, run in RUNS.items()}


@needs_runs
@every_run
def test_the_server_figures_are_those_published(name):
    """From the instants of each request, to the digit that is printed."""
    run = RUNS[name]
    found = real_runs.statistics(real_runs.measured(run))
    lines = (run.folder / "summary.txt").read_text().replace("Latency", "E2E").splitlines()
    rows = [line.split() for line in lines if line.startswith(real_runs.METRICS)]
    assert len(rows) == 15
    for metric, statistic, server, *_ in rows:
        assert f"{found[metric, statistic]:.1f}" == server


@needs_runs
@every_run
def test_every_figure_is_close_to_the_server(name, tables):
    """Mean, median, p90, p95 and p99 of TTFT, TPOT and E2E within 5 %."""
    errors = tables[name].error.abs()
    assert len(errors) == 15
    assert errors.max() < LARGEST_ERROR, tables[name]


@needs_runs
@every_run
def test_most_figures_are_closer_than_those_of_llmservingsim(name, tables):
    """On the same run, by its own summary."""
    assert (tables[name].closer == "ours").sum() > 15 / 2, tables[name]


@needs_runs
def test_steps_of_replicas_that_share_experts_end_together():
    """As those of the server do, to a fraction of a millisecond."""
    run = next(run for run in RUNS.values() if run.shares_experts)
    short = run._replace(requests=run.requests.head(30))
    profile = real_runs.profile_of(run)
    batches = real_runs.replayed(short, profile).batches
    ends = [set(b.completed_at.round(9)) for _, b in batches.groupby("replica_id")]
    assert len(ends) == 2
    alone = ends[0] ^ ends[1]
    # Only one replica has requests at the very start and at the very end.
    assert len(ends[0] & ends[1]) > 500
    first, last = max(map(min, ends)), min(map(max, ends))
    assert not [end for end in alone if first < end < last]


def test_the_router_sends_to_the_least_loaded_as_reported():
    """Waiting requests count four times; what it sent since the last report counts as waiting."""
    clock = SimpleNamespace(now=0.0)
    replicas = [
        SimpleNamespace(env=clock, num_waiting=1, num_outstanding=3),
        SimpleNamespace(env=clock, num_waiting=0, num_outstanding=4),
    ]
    route = real_runs.balancer()
    # 6 and 4, then 6 and 8, then 10 and 8; nobody looks again before 0.1 s have passed.
    assert [replicas.index(route(None, replicas)) for _ in range(3)] == [1, 0, 1]
    clock.now = 0.1
    assert replicas.index(route(None, replicas)) == 1


@pytest.mark.parametrize(
    ("version", "known"), [("0.19.0", "0.19.1"), ("0.9.2", "0.9.2"), ("0.33.1", "0.32.0")]
)
def test_the_nearest_release_is_taken(version, known):
    """By minor and patch."""
    assert real_runs.nearest_release(version) == known
