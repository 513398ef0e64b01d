"""A table with a row per run, from whatever holds several runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time import EXECUTION_TIMES
from vidur_simpy.global_scheduler import GLOBAL_SCHEDULERS
from vidur_simpy.replica_scheduler import REPLICA_SCHEDULERS
from vidur_simpy.search.runs import figures_of
from vidur_simpy.workload import ARRIVALS, LENGTHS, WORKLOADS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cell", "run_table", "settings_of"]


# What a configuration file calls a class.
_NAMES = {
    cls: name
    for table in (
        REPLICA_SCHEDULERS,
        GLOBAL_SCHEDULERS,
        EXECUTION_TIMES,
        WORKLOADS,
        ARRIVALS,
        LENGTHS,
    )
    for name, cls in table.items()
}


def cell(value: Any) -> Any:
    """Return a setting as a table shows it: numbers and texts as they are, objects in short.

    Examples
    --------
    >>> from vidur_simpy import Calibrated, Linear, Sarathi
    >>> cell(Sarathi())
    'sarathi'
    >>> cell(Sarathi(chunk_size=256))
    'Sarathi(chunk_size=256)'
    >>> cell(Calibrated(Linear(), overhead=0.001))
    'Calibrated(base=Linear(), overhead=0.001)'
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    code = _code(value)
    return _NAMES.get(type(value), code) if code.endswith("()") else code


def _code(value: Any) -> str:
    """Return what makes an object, with the settings that are not its defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({', '.join(_unusual_settings(value))})"
    # An address in memory would differ from run to run.
    kind: Any = type(value)
    named = kind if kind.__repr__ is object.__repr__ else value
    return str(getattr(named, "__qualname__", None) or repr(value))


def _unusual_settings(value: Any) -> Iterator[str]:
    # A field of pydantic's hides its default, which the signature tells.
    parameters = inspect.signature(type(value)).parameters
    for field in fields(value):
        code = _code(getattr(value, field.name))
        if field.repr and (
            field.name not in parameters or code != _code(parameters[field.name].default)
        ):
            yield f"{field.name}={code}"


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
