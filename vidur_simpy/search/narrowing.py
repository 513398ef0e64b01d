"""Which points of a large grid deserve full runs: by halving, of all or of what Optuna proposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vidur_simpy.errors import ConfigError

__all__ = ["NUM_FINALISTS", "Rank", "least_share", "proposed", "successive_halving"]

Rank = tuple[float, ...]
"""How good a point looks, lower for better: 0, its objective, and what else decides; 1 and how many
times it exceeds an SLO that it misses; 2 and 0 where it cannot run."""

Ranking = Callable[[list[int], float], list[Rank]]

# Each round of halving keeps one in so many, with so many times the requests.
ETA = 3
# Halving ends when so few are left.
NUM_FINALISTS = 8
# Shorter runs say too little to choose by.
MIN_REQUESTS = 100
# Optuna proposes so many points at a time, whatever the number of workers, so that the answer does
# not depend on it; the first two batches are random.
BATCH = 16
# Proposals for each point that is to be tried: more and more of them were tried before.
PATIENCE = 8
# To the sampler, what cannot run violates its constraint more than anything that misses an SLO.
IMPOSSIBLE = 1e3


def least_share(num_requests: int) -> float:
    """Return the share of the requests that the shortest runs get."""
    return min(1.0, max(MIN_REQUESTS / num_requests, ETA**-3))


def successive_halving(candidates: Sequence[int], rank: Ranking, *, share: float) -> list[int]:
    """Return candidates, the most promising first, after ever more effort on ever fewer of them.

    Parameters
    ----------
    candidates : sequence of int
    rank : callable
        ``rank(candidates, share)`` gives a rank for each, lower for better, with a share of the
        full effort.
    share : float
        Effort of the first round.

    Returns
    -------
    list of int
        All candidates: those of the last round first, in the order of their last ranks.

    Notes
    -----
    Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter
    optimization. Optuna's own ``SuccessiveHalvingPruner`` decides about one candidate at a time, as
    they come, so that what it finds depends on their order and on the number of workers; it also
    missed the best more often (``tests/benchmarks/large_grids.py``).

    Examples
    --------
    >>> successive_halving(range(50), lambda numbers, share: [(0, abs(n - 7)) for n in numbers],
    ...     share=0.1)[:3]
    [7, 6, 8]
    """
    kept: list[int] = list(candidates)
    dropped: list[int] = []
    while share < 1 and len(kept) > NUM_FINALISTS:
        ranks = dict(zip(kept, rank(kept, share), strict=True))
        ordered = sorted(kept, key=lambda number: (ranks[number], number))
        num_kept = _num_kept(len(kept))
        kept, dropped = ordered[:num_kept], ordered[num_kept:] + dropped
        share *= ETA
    return kept + dropped


def proposed(
    settings: Sequence[Mapping[str, Any]],
    rank: Ranking,
    *,
    share: float,
    num_tried: int,
    seed: int,
) -> list[int]:
    """Return candidates that Optuna proposes, the most promising first, halved like the others.

    Parameters
    ----------
    settings : sequence of mapping
        Of each candidate, values by name: its place among the others.
    rank, share
        As :func:`successive_halving` takes them.
    num_tried : int
        Candidates that are ranked at most.
    seed : int
        Of the sampler.

    Raises
    ------
    ConfigError
        If Optuna is not installed.

    Notes
    -----
    Bergstra et al. (2011), Algorithms for hyper-parameter optimization: the tree-structured Parzen
    estimator, here of all settings together, under the constraint that the SLO is met.
    """
    ranks = _ranks_of_proposals(settings, rank, share=share, num_tried=num_tried, seed=seed)
    ordered = sorted(ranks, key=lambda number: (ranks[number], number))
    num_kept = _num_kept(len(ordered))
    kept, dropped = ordered[:num_kept], ordered[num_kept:]
    return successive_halving(kept, rank, share=ETA * share) + dropped


def _num_kept(count: int) -> int:
    return max(NUM_FINALISTS, math.ceil(count / ETA))


def _ranks_of_proposals(
    settings: Sequence[Mapping[str, Any]],
    rank: Ranking,
    *,
    share: float,
    num_tried: int,
    seed: int,
) -> dict[int, Rank]:
    axes = _axes(settings)
    numbers: dict[tuple[str, ...], int] = {}
    for number, each in enumerate(settings):
        numbers.setdefault(tuple(repr(each.get(name)) for name in axes), number)
    study, ranks = _study(seed), dict[int, Rank]()
    for _ in range(math.ceil(PATIENCE * num_tried / BATCH)):
        trials = [study.ask() for _ in range(BATCH)]
        asked = [numbers.get(_place(trial, axes)) for trial in trials]
        unknown = [number for number in asked if number is not None and number not in ranks]
        new = list(dict.fromkeys(unknown))[: num_tried - len(ranks)]
        ranks |= zip(new, rank(new, share), strict=True)
        for trial, proposal in zip(trials, asked, strict=True):
            _tell(study, trial, None if proposal is None else ranks.get(proposal))
        if len(ranks) >= min(num_tried, len(numbers)):
            break
    return ranks


def _axes(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each setting, numbers in their order."""
    axes: dict[str, dict[str, Any]] = {}
    for each in settings:
        for name in each:
            axes.setdefault(name, {})
    for each in settings:
        for name, values in axes.items():
            values.setdefault(repr(each.get(name)), each.get(name))
    return {
        name: sorted(values.values()) if _is_ordered(values.values()) else list(values.values())
        for name, values in axes.items()
    }


def _is_ordered(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _place(trial: Any, axes: Mapping[str, list[Any]]) -> tuple[str, ...]:
    """Return what the sampler proposes, as a value of each setting."""
    place = []
    for name, values in axes.items():
        if _is_ordered(values):
            index = trial.suggest_int(name, 0, len(values) - 1)
        else:
            index = trial.suggest_categorical(name, range(len(values)))
        place.append(repr(values[index]))
    return tuple(place)


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "method 'optuna' needs Optuna, which is not installed: "
            "pip install 'vidur-simpy[search]'."
        ) from None
    sampler = optuna.samplers.TPESampler(
        multivariate=True,
        constant_liar=True,
        n_startup_trials=2 * BATCH,
        seed=seed % 2**32,
    )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell that it made a study
    try:
        return optuna.create_study(sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _tell(study: Any, trial: Any, rank: Rank | None) -> None:
    """Tell the sampler how good a proposal looks; no rank says that there is no such point."""
    kind, value, *_ = rank or (2, 0.0)
    if kind == 0 and not math.isfinite(value):
        kind = 2
    violation = -1.0 if kind == 0 else math.log(min(max(value, 1.0), IMPOSSIBLE))
    trial.set_constraint("slo", math.log(IMPOSSIBLE) if kind == 2 else violation)
    study.tell(trial, value if kind == 0 else 0.0)
