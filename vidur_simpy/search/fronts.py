"""Which configurations are worth considering: those that no other beats in both of two figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.search.runs import figures_of

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["as_table", "pareto"]


def pareto(
    results: pd.DataFrame | Mapping[str, Result] | Sequence[Result] | Any,
    x: str,
    y: str,
    *,
    maximise: Collection[str] = (),
) -> pd.DataFrame:
    """Return the rows that no other row beats: none is as good in both and better in one.

    Parameters
    ----------
    results : DataFrame, object with a `table`, or several Result
        A row per configuration; a `Sweep` or a `Recommendation` has such a table. Of results, by
        name or in a list, the columns are those of :func:`vidur_simpy.search.figures_of`.
    x, y : str
        Columns with numbers. Less is better, except as `maximise` says. Rows without a finite
        number in both are left out.
    maximise : collection of str
        Which of the two are better when greater.

    Returns
    -------
    DataFrame
        Those rows with all their columns and their index, in order of x. Equal rows are all kept.

    Raises
    ------
    ConfigError
        If there is no such column, or it has no numbers.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"cost": [1.0, 2.0, 3.0, 3.0], "ttft_p99": [0.9, 0.4, 0.5, 0.3]})
    >>> pareto(table, "cost", "ttft_p99")
       cost  ttft_p99
    0   1.0       0.9
    1   2.0       0.4
    3   3.0       0.3
    """
    table = as_table(results)
    for name in [maximise] if isinstance(maximise, str) else maximise:
        if name not in (x, y):
            raise ConfigError(f"pareto(): maximise = {name!r}: expected one of {x!r} and {y!r}.")
    costs = np.stack([_costs(table, name, name in maximise) for name in (x, y)], axis=1)
    rows = np.flatnonzero(np.isfinite(costs).all(axis=1))
    return table.iloc[rows[_unbeaten(costs[rows])]].sort_values([x, y], kind="stable")


def as_table(results: Any) -> pd.DataFrame:
    """Return a table as it is, or the one of figures of several results.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    import pandas as pd

    table = getattr(results, "table", results)
    if isinstance(table, pd.DataFrame):
        return table
    if isinstance(table, Mapping):
        names, several = list(table), list(table.values())
    elif isinstance(table, Sequence) and not isinstance(table, str):
        names, several = list(range(len(table))), list(table)
    else:
        names, several = [], [table]
    if not several or not all(hasattr(each, "summary") for each in several) or not names:
        raise ConfigError(f"{results!r}: expected a table, a sweep, or several results.")
    return pd.DataFrame([figures_of(each) for each in several], index=names)


def _costs(table: pd.DataFrame, name: str, is_gain: bool) -> NDArray[np.float64]:
    if name not in table:
        raise unknown_name("column", name, map(str, table.columns))
    try:
        values = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise ConfigError(f"column {name!r} has values that are no numbers.") from None
    return -values if is_gain else values


def _unbeaten(costs: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return which rows of two costs no other row beats."""
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    kept = []
    best = (np.inf, np.inf)
    for row in order.tolist():
        cost = (float(costs[row, 0]), float(costs[row, 1]))
        # Rows come with the first cost growing, so only a lower second one, or an equal row, stays.
        if cost[1] < best[1] or cost == best:
            kept.append(row)
            best = cost
    return np.array(kept, dtype=np.intp)
