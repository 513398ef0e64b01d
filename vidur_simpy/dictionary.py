"""What every column of every table means, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidur_simpy.columns import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["metrics_dictionary"]


def metrics_dictionary(table: str | None = None) -> pd.DataFrame:
    """Return the meaning and the unit of every column of every table of a `Result`.

    Parameters
    ----------
    table : str, optional
        Only the columns of this table.

    Returns
    -------
    DataFrame
        Columns ``table``, ``column``, ``unit`` (``s``, ``tokens`` or nothing) and ``meaning``, as
        `columns.COLUMNS` has them. A notebook shows all of it.

    Raises
    ------
    ConfigError
        If there is no such table.

    Examples
    --------
    >>> words = metrics_dictionary("requests").set_index("column")
    >>> words.loc["ttft"].to_list()
    ['requests', 's', 'time to first token: first_token_at - arrived_at']
    """
    import pandas as pd

    from vidur_simpy.errors import unknown_name

    if table is not None and table not in COLUMNS:
        raise unknown_name("table", table, COLUMNS)
    rows = [
        (name, column, unit, meaning)
        for name, columns in COLUMNS.items()
        if table in (None, name)
        for column, (unit, meaning) in columns.items()
    ]

    class Dictionary(pd.DataFrame):
        """A table that shows its texts in full."""

        @property
        def _constructor(self) -> type[pd.DataFrame]:
            return pd.DataFrame

        def _repr_html_(self) -> str:
            with pd.option_context("display.max_colwidth", None):
                return str(self.to_html(index=False, max_rows=None))

    return Dictionary(rows, columns=["table", "column", "unit", "meaning"])
