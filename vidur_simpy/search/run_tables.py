"""A table with a row per run, from whatever holds several runs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from vidur_simpy.errors import ConfigError
from vidur_simpy.search.runs import figures_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cell", "run_table", "settings_of"]


def cell(value: Any) -> Any:
    """Return a setting as a table shows it: numbers and texts as they are, objects as code."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # An address in memory would differ from run to run.
    kind: Any = type(value)
    named = kind if kind.__repr__ is object.__repr__ else value
    return str(getattr(named, "__qualname__", None) or repr(value))


def run_table(where: str, runs: Any, slo: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Return the figures of several runs as a table.

    Parameters
    ----------
    where : str
        The function that asks, for the message.
    runs : Sweep, Capacity, DataFrame, or mapping of results
        Results by arrival rate, a number of requests per second, or by name; these get the rate
        at which their requests arrived. Simulated and measured results may be mixed.
    slo : mapping of str to float, optional
        Limits in seconds as :meth:`vidur_simpy.Result.slo` takes them, for a mapping of results.

    Returns
    -------
    DataFrame
        `Sweep.table`, `Capacity.curve`, the table given, or for results a row each of
        :func:`vidur_simpy.search.figures_of` with the columns ``run`` and ``rate``.

    Raises
    ------
    ConfigError
        If it is none of these, or an unusable limit.
    """
    import pandas as pd

    if isinstance(runs, pd.DataFrame):
        return runs
    for name in ("table", "curve"):
        table = getattr(runs, name, None)
        if isinstance(table, pd.DataFrame):
            return table
    if not isinstance(runs, Mapping) or not all(hasattr(run, "requests") for run in runs.values()):
        raise ConfigError(
            f"{where}(): expected a Sweep, a Capacity, a table, or results by arrival rate or name "
            f"as in {{4.0: result}}, not {type(runs).__name__}."
        )
    return pd.DataFrame(
        [
            {"run": str(name), "rate": _rate(name, run)} | figures_of(run, slo)
            for name, run in runs.items()
        ]
    )


def settings_of(table: pd.DataFrame) -> list[str]:
    """Return the columns of a table that are settings of a grid, by their dotted names."""
    return [str(name) for name in table if "." in str(name) or name in ("cluster", "workload")]


def _rate(name: Any, result: Any) -> float:
    """Return the arrival rate of a run in requests per second, NaN where there is none."""
    if isinstance(name, Real):
        return float(name)
    arrived_at = result.requests["arrived_at"]
    span = float(arrived_at.max() - arrived_at.min()) if len(arrived_at) else 0.0
    return (len(arrived_at) - 1) / span if span > 0 else float("nan")
