"""What latencies have to keep to: service-level objectives, and whether runs meet them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import SkipValidation

from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.statistics.intervals import (
    MIN_EFFECTIVE,
    Interval,
    mean_interval,
    quantile_interval,
)
from vidur_simpy.statistics.warm_up import is_half, warm_up_length
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Assessment",
    "Requirement",
    "Slo",
    "Verdict",
    "assess",
    "combined_verdict",
    "ratios",
    "read_slo",
]

METRICS = ("ttft", "tpot", "e2e", "scheduling_delay", "itl")

Verdict = Literal["meets", "misses", "cannot tell"]

# Seconds for the 99th percentiles of TTFT and TPOT: MLPerf Inference rules, constraints of the
# closed division (github.com/mlcommons/inference_policies, inference_rules.adoc, July 2026).
MLPERF: dict[str, dict[str, tuple[float, float]]] = {
    "llama-3.1-8b": {"server": (2.0, 0.1), "interactive": (0.5, 0.03)},
    "llama-2-70b": {"server": (2.0, 0.2), "interactive": (0.45, 0.04)},
    "llama-3.1-405b": {"server": (6.0, 0.175), "interactive": (4.5, 0.08)},
    "deepseek-r1": {"server": (2.0, 0.08), "interactive": (1.5, 0.015)},
    "gpt-oss-120b": {"server": (3.0, 0.08), "interactive": (2.0, 0.02)},
}


@configuration
class Slo:
    """Limits on latencies, all of which have to be met.

    Parameters
    ----------
    limits : mapping of str to float
        Seconds by ``"metric:statistic"``: the metric one of ``ttft``, ``tpot``, ``e2e``,
        ``scheduling_delay`` and ``itl`` (needs recorded tokens), the statistic ``mean`` or a
        quantile such as ``p99``. A metric alone limits each request, of which `fraction` has to
        keep to all such limits.
    fraction : float, optional
        Share of all requests that keep to the limits given without a statistic, 0 to 1: what
        :meth:`vidur_simpy.Result.slo` calls attainment.

    Raises
    ------
    ConfigError
        If there is no limit, one is not positive or of an unknown metric or statistic, or
        `fraction` is missing or has nothing to say.

    Notes
    -----
    A request that is refused or unfinished misses every limit, and makes a mean infinite. As in
    ``vllm bench serve``, a request of one output token meets any limit on TPOT. Gaps between
    tokens are pooled over requests, so that ``itl`` is no limit on each request.

    Examples
    --------
    >>> Slo({"ttft:p99": 2.0, "tpot:mean": 0.05})
    Slo(ttft:p99 <= 2 s, tpot:mean <= 0.05 s)
    >>> Slo({"ttft": 2.0, "tpot": 0.1}, fraction=0.99)
    Slo(99 % of requests: ttft <= 2 s, tpot <= 0.1 s)
    >>> Slo.mlperf("llama-2-70b", "interactive")
    Slo(ttft:p99 <= 0.45 s, tpot:p99 <= 0.04 s)
    """

    limits: Annotated[Mapping[str, float], SkipValidation]
    fraction: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Mapping) or not self.limits:
            raise ConfigError(
                f"Slo.limits = {self.limits!r}: expected seconds as in {{'ttft:p99': 2.0}}."
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError(
                f"Slo.fraction = {self.fraction!r}: expected a share between 0 and 1."
            )
        object.__setattr__(self, "_requirements", _requirements(self.limits, self.fraction))

    def __repr__(self) -> str:
        return f"Slo({', '.join(map(str, self.requirements))})"

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """What has to be met, one by one."""
        return self._requirements  # type: ignore[attr-defined, no-any-return]

    @property
    def record(self) -> tuple[str, ...]:
        """What `simulate` has to record to tell."""
        needs_tokens = any("itl" in each.limits for each in self.requirements)
        return ("tokens",) if needs_tokens else ()

    @classmethod
    def mlperf(cls, model: str, scenario: str = "server") -> Slo:
        """Return the latency limits of the MLPerf Inference benchmark for a model.

        Both are 99th percentiles, of the time to first token and of the time per output token.

        Parameters
        ----------
        model : str
            ``llama-3.1-8b``, ``llama-2-70b``, ``llama-3.1-405b``, ``deepseek-r1`` or
            ``gpt-oss-120b``.
        scenario : {"server", "interactive"}

        Raises
        ------
        ConfigError
            For another model or scenario.
        """
        if model not in MLPERF:
            raise unknown_name("MLPerf model", model, MLPERF)
        if scenario not in MLPERF[model]:
            raise unknown_name("MLPerf scenario", scenario, MLPERF[model])
        ttft, tpot = MLPERF[model][scenario]
        return cls({"ttft:p99": ttft, "tpot:p99": tpot})


@dataclass(frozen=True)
class Requirement:
    """One thing an SLO asks for.

    Attributes
    ----------
    name : str
        ``"ttft:p99"``, or ``"fraction"``.
    limits : dict of str to float
        Seconds by metric.
    quantile : float or None
        Of the requests' worst ratio of a latency to its limit, which must not exceed 1; None for
        its mean.
    """

    name: str
    limits: dict[str, float]
    quantile: float | None

    def __str__(self) -> str:
        limits = ", ".join(f"{metric} <= {limit:g} s" for metric, limit in self.limits.items())
        if self.name != "fraction":
            return limits.replace(next(iter(self.limits)), self.name)
        return f"{100 * (self.quantile or 0):g} % of requests: {limits}"

    @property
    def scale(self) -> float:
        """Seconds that a ratio of 1 stands for; 1 where several metrics have limits."""
        return 1.0 if self.name == "fraction" else next(iter(self.limits.values()))


@dataclass(frozen=True)
class Assessment:
    """Whether runs meet a requirement.

    Attributes
    ----------
    requirement : Requirement
    ratio : Interval
        What is required not to exceed 1.
    attainment : float
        Share of the values within the limit.
    grows : bool
        Whether the values rise through half of the run or more: it has not settled.
    """

    requirement: Requirement
    ratio: Interval
    attainment: float
    grows: bool = False

    @property
    def verdict(self) -> Verdict:
        """``meets`` or ``misses`` if the whole interval does, else ``cannot tell``."""
        if self.ratio.low > 1:
            return "misses"
        return "meets" if self.ratio.high <= 1 else "cannot tell"

    @property
    def is_reliable(self) -> bool:
        """Whether there were enough independent values for the interval to be believed."""
        return self.ratio.num_effective >= MIN_EFFECTIVE


def assess(
    requirement: Requirement, runs: Sequence[NDArray[np.float64]], confidence: float = 0.95
) -> Assessment:
    """Return whether runs meet a requirement.

    Parameters
    ----------
    runs : sequence of ndarray
        Of each run, what :func:`ratios` gives.
    """
    cut = warm_up_length(runs)
    kept = [run[cut:] for run in runs]
    if requirement.quantile is None:
        ratio = mean_interval(kept, confidence=confidence)
    else:
        ratio = quantile_interval(kept, requirement.quantile, confidence=confidence)
    attainment = float(np.mean(np.concatenate(kept) <= 1))
    return Assessment(
        requirement,
        replace(ratio, num_cut=cut * len(runs)),
        attainment,
        grows=is_half(cut, runs),
    )


def combined_verdict(assessments: Iterable[Assessment]) -> Verdict:
    """Return ``meets`` if all do, ``misses`` if any does, else ``cannot tell``."""
    verdicts = {each.verdict for each in assessments}
    if "misses" in verdicts:
        return "misses"
    return "cannot tell" if "cannot tell" in verdicts else "meets"


def ratios(
    latencies: Mapping[str, NDArray[np.float64]], requirement: Requirement
) -> NDArray[np.float64]:
    """Return the worst ratio of a latency to its limit for each request, in order of arrival.

    Parameters
    ----------
    latencies : mapping of str to ndarray
        Seconds by metric, as :func:`vidur_simpy.search.observations.values_of` gives them. Those
        of ``itl`` are of gaps rather than requests.
    """
    first, *others = (latencies[metric] / limit for metric, limit in requirement.limits.items())
    return reduce(np.maximum, others, first)


def read_slo(given: Any) -> Slo:
    """Return an SLO as it was given: one, its limits, or texts as ``"ttft:p99=2"``.

    Raises
    ------
    ConfigError
        If it is none of these.

    Examples
    --------
    >>> read_slo({"e2e:p90": 30.0})
    Slo(e2e:p90 <= 30 s)
    >>> read_slo(["ttft=2", "tpot=0.1", "fraction=0.95"])
    Slo(95 % of requests: ttft <= 2 s, tpot <= 0.1 s)
    """
    if isinstance(given, Slo):
        return given
    if isinstance(given, Mapping):
        return Slo(given)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Iterable):
        raise ConfigError(f"slo = {given!r}: expected an Slo, or limits as {{'ttft:p99': 2.0}}.")
    settings: dict[str, float] = {}
    for text in texts:
        name, equals, number = str(text).partition("=")
        try:
            settings[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"slo {text!r}: expected a name and seconds, as in ttft:p99=2.")
    fraction = settings.pop("fraction", None)
    return Slo(settings, fraction=fraction)


def _requirements(limits: Mapping[str, float], fraction: float | None) -> tuple[Requirement, ...]:
    found, of_each_request = [], {}
    for name, limit in limits.items():
        metric, colon, statistic = str(name).partition(":")
        if metric not in METRICS:
            raise unknown_name("metric of an SLO", metric, METRICS)
        is_number = isinstance(limit, int | float | np.number) and not isinstance(limit, bool)
        if not (is_number and 0 < limit < math.inf):
            raise ConfigError(f"slo {name} = {limit!r}: expected a positive number of seconds.")
        if colon:
            quantile = _quantile_of(statistic, name)
            found.append(Requirement(str(name), {metric: float(limit)}, quantile))
        elif metric == "itl" or fraction is None:
            advice = "" if metric == "itl" else ", or give fraction, the share of such requests"
            raise ConfigError(f"slo {name}: say of what, as in {metric}:p99{advice}.")
        else:
            of_each_request[metric] = float(limit)
    if of_each_request:
        found.append(Requirement("fraction", of_each_request, fraction))
    elif fraction is not None:
        raise ConfigError(
            f"slo fraction = {fraction}: expected limits on each request beside it, as in ttft=2."
        )
    return tuple(found)


def _quantile_of(statistic: str, name: str) -> float | None:
    if statistic == "mean":
        return None
    match = re.fullmatch(r"p(\d{1,2}(\.\d+)?)", statistic)
    quantile = round(float(match[1]) / 100, 12) if match else 0.0
    if not 0 < quantile < 1:
        raise ConfigError(
            f"slo {name}: expected mean or a quantile such as p99, got {statistic!r}."
        )
    return quantile
