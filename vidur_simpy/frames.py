"""Tables with the columns and types of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import VidurError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Columns: TypeAlias = (
        Mapping[str, Sequence[object] | NDArray[np.generic] | pd.Series] | pd.DataFrame
    )

__all__ = ["column", "frame"]

# Types of the contract's columns that are neither times (float64) nor counts (int64).
_KINDS = {
    **dict.fromkeys(("utilisation", "kv_cache_usage", "mfu"), "float64"),
    **dict.fromkeys(("kv_cache_usage_mean", "kv_cache_usage_peak"), "float64"),
    **dict.fromkeys(("prefix_cache_hit_rate", "mbu", "tdp_w", "energy_kwh", "share"), "float64"),
    **dict.fromkeys(("refusal", "event_type", "batch_kind", "operator"), "str"),
}
_KINDS_BY_TABLE = {
    "requests": {"replica_id": "Int64", "num_cached_tokens": "Int64"},
    "batches": dict.fromkeys(("request_ids", "num_tokens"), "list"),
    "events": dict.fromkeys(("replica_id", "stage_id", "batch_index", "request_id"), "Int64"),
}


def frame(table: str, columns: Columns) -> pd.DataFrame:
    """Return a table as a DataFrame, in the column order and with the types of the contract.

    Times and shares are ``float64``, counts ``int64``, ids that can be missing ``Int64`` (there
    a negative id, None or NaN is missing), lists of integers are Python lists. Columns that the
    contract does not name come last, with the type of their values.

    Parameters
    ----------
    table : str
        One of the tables of `columns.COLUMNS`.
    columns : mapping of str to sequence or ndarray, or DataFrame
        Columns of one length. No columns at all make an empty table.

    Raises
    ------
    VidurError
        If the columns differ in length.

    Examples
    --------
    >>> frame("tokens", {"replica_id": [0], "time": [1], "num_tokens": [3]}).dtypes.to_dict()
    {'time': dtype('float64'), 'replica_id': dtype('int64'), 'num_tokens': dtype('int64')}
    """
    import pandas as pd

    known = COLUMNS[table]
    if len(columns.keys()) == 0:
        columns = {name: [] for name in known}
    order = [name for name in known if name in columns]
    order += [str(name) for name in columns if name not in known]
    lengths = {name: len(columns[name]) for name in order}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise VidurError(f"table {table!r}: expected columns of one length, given {listed}.")
    return pd.DataFrame(
        {name: column(_kind(table, name, columns[name]), columns[name]) for name in order}
    )


def _kind(table: str, name: str, values: Any) -> str:
    """Return the type of a column: int64, Int64, float64, bool, str or list (of integers)."""
    contract = COLUMNS[table]
    if name in contract and contract[name][0] == "s":
        return "float64"
    kind = _KINDS_BY_TABLE.get(table, {}).get(name) or _KINDS.get(name)
    if kind is None:
        return "int64" if len(values) == 0 else _suggested_kind(name, values)
    return kind


def _suggested_kind(name: str, values: Any) -> str:
    """Return the type that the values of a column of the user's own suggest."""
    import pandas as pd

    series = pd.Series(values if hasattr(values, "dtype") else list(values))
    if isinstance(series.dtype, pd.Int64Dtype):
        return "Int64"
    match series.dtype.kind:
        case "b":
            return "bool"
        case "i" | "u":
            return "int64"
        case "f":
            return "Int64" if name.endswith("_id") else "float64"
    first = next(iter(series.dropna()), "")
    return "list" if isinstance(first, list | tuple | np.ndarray) else "str"


def column(kind: str, values: Any) -> Any:
    """Return an array of a type: int64, Int64, float64, bool, str or list (of integers)."""
    import pandas as pd

    if kind == "list":
        return pd.Series([_integers(row) for row in values], dtype=object).array
    if kind == "str":
        return pd.Series([_text(value) for value in values], dtype=str).array
    if kind == "Int64":
        array: Any = pd.array(values, dtype="Int64")
        array[(array < 0).fillna(False)] = pd.NA
        return array
    return np.asarray(values, dtype=kind)


def _integers(row: Any) -> list[int]:
    if isinstance(row, str):
        return [int(word) for word in row.split()]
    return row if isinstance(row, list) else [int(value) for value in row]


def _text(value: Any) -> str:
    import pandas as pd

    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else str(getattr(value, "name", value))
