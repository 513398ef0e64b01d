"""What many tests start from: a clock, randomness, a small cluster, and the shared folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_folder import SHARED

import vidur_simpy as vs
from vidur_simpy.search import runs


@pytest.fixture
def env() -> vs.Environment:
    """The clock, in the documented order of events."""
    return vs.Environment()


@pytest.fixture
def rng() -> np.random.Generator:
    """Reproducible randomness."""
    return np.random.default_rng(0)


@pytest.fixture
def shared() -> Path:
    """The reference material beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared folder is not there: {SHARED}")
    return SHARED


@pytest.fixture
def make_cluster() -> Callable[..., vs.Cluster]:
    """Make a cluster whose batches take one second on each stage, with some settings changed."""

    def make(**changes: object) -> vs.Cluster:
        settings = {
            "max_model_len": 4096,
            "kv_cache": vs.KVCache(num_blocks=1000),
            "execution_time": lambda batch: 1.0,
        }
        return vs.Cluster(**(settings | changes))

    return make


@pytest.fixture
def cluster(make_cluster: Callable[..., vs.Cluster]) -> vs.Cluster:
    """One replica of one stage, on which every batch takes one second."""
    return make_cluster()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the runs of a search that are made in this process."""
    seeds: list[int] = []
    simulate = runs.simulate

    def noted(*args: Any, **kwargs: Any) -> vs.Result:
        seeds.append(kwargs["seed"])
        return simulate(*args, **kwargs)

    monkeypatch.setattr(runs, "simulate", noted)
    return seeds
