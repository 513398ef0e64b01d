"""Tables with the same types in memory and on disk, and the directory of a saved result.

A saved result is a directory of plain files::

    requests.csv, replicas.csv, ...   a file per table; ``.csv.gz`` above 100,000 rows, or .parquet
    summary.csv                       latencies in seconds
    config.yaml                       what reproduces the run, where it is known
    info.json                         figures, seed, version, and the type of every column
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["Columns", "check_target", "frame", "read_result", "write_result"]

Columns: TypeAlias = (
    "Mapping[str, Sequence[object] | NDArray[np.generic] | pd.Series[Any]] | pd.DataFrame"
)

FORMAT = "vidur_simpy result"
FORMAT_VERSION = 1
MANIFEST = "info.json"
TABLE_FORMATS = ("csv", "parquet")
MAX_PLAIN_ROWS = 100_000

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
# What json, yaml, gzip and pandas raise on files that are not what they should be.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, zlib.error)


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
        {name: _series(_kind(table, name, columns[name]), columns[name]) for name in order}
    )


def write_result(
    directory: str | os.PathLike[str],
    tables: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
    *,
    figures: Mapping[str, float],
    config: Mapping[str, Any] | None,
    info: Mapping[str, Any],
    table_format: str = "csv",
) -> None:
    """Write the files of a result, all of them or none.

    They are first written aside and then moved into place, between a manifest that says
    "incomplete" and the final one, so that a save that was cut off is never read as a result.

    Raises
    ------
    VidurError
        If the directory holds something that is not a saved result, or cannot be written.
    """
    if table_format not in TABLE_FORMATS:
        raise unknown_name("table_format", table_format, TABLE_FORMATS)
    target = Path(directory)
    stale = check_target(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
            aside = Path(name)
            write = _write_parquet if table_format == "parquet" else _write_csv
            contents = {table: write(aside, table, tables[table]) for table in tables}
            summary.to_csv(aside / "summary.csv", index_label="metric", lineterminator="\n")
            _write_config(aside, config)
            files = sorted(path.name for path in aside.iterdir())
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "complete": True,
                "figures": {key: _finite(value) for key, value in figures.items()},
                "info": dict(info),
                "files": files,
                "tables": contents,
            }
            _write_json(aside / "incomplete", manifest | {"complete": False})
            _write_json(aside / MANIFEST, manifest)
            os.replace(aside / "incomplete", target / MANIFEST)
            for file in files:
                os.replace(aside / file, target / file)
            for file in stale - set(files):
                (target / file).unlink(missing_ok=True)
            os.replace(aside / MANIFEST, target / MANIFEST)
    except OSError as error:
        raise VidurError(f"cannot save the result in {str(target)!r}: {error}.") from error


def read_result(
    directory: str | os.PathLike[str],
) -> tuple[dict[str, pd.DataFrame], dict[str, Any] | None, dict[str, Any]]:
    """Return the tables, the configuration and the information of a saved result.

    Raises
    ------
    VidurError
        If there is no saved result, or it is damaged; the message names the file.
    """
    source = Path(directory)
    manifest = _manifest(source)
    if manifest is None:
        raise VidurError(
            f"{str(source)!r} is not a saved result: expected a directory with a {MANIFEST} that "
            "Result.save() wrote."
        )
    if manifest["format_version"] > FORMAT_VERSION:
        raise VidurError(
            f"{str(source)!r} has format version {manifest['format_version']}, expected at most "
            f"{FORMAT_VERSION}: it was saved by a newer vidur_simpy."
        )
    if not manifest["complete"]:
        raise VidurError(f"{str(source)!r} is incomplete: its save was cut off; save it again.")
    tables = {
        table: _read_table(source / content["file"], table, content)
        for table, content in manifest["tables"].items()
    }
    config = _read_config(source) if "config.yaml" in manifest["files"] else None
    return tables, config, manifest["info"]


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


def _series(kind: str, values: Any) -> pd.Series[Any]:
    import pandas as pd

    if kind == "list":
        return pd.Series([_integers(row) for row in values], dtype=object)
    if kind == "str":
        return pd.Series([_text(value) for value in values], dtype=str)
    if kind == "Int64":
        array: Any = pd.array(values, dtype="Int64")
        array[(array < 0).fillna(False)] = pd.NA
        return pd.Series(array)
    return pd.Series(np.asarray(values, dtype=kind))


def _integers(row: Any) -> list[int]:
    if isinstance(row, str):
        return [int(word) for word in row.split()]
    return row if isinstance(row, list) else [int(value) for value in row]


def _text(value: Any) -> str:
    import pandas as pd

    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else str(getattr(value, "name", value))


def check_target(target: Path) -> set[str]:
    """Return the files of the saved result that is there already."""
    if target.exists() and not target.is_dir():
        raise VidurError(f"cannot save the result in {str(target)!r}: it is a file.")
    manifest = _manifest(target)
    if manifest is not None:
        return set(manifest["files"])
    if target.is_dir():
        # A save that was killed before it moved anything leaves only its own directory.
        others = [path.name for path in target.iterdir() if not path.name.startswith(".saving-")]
        if others:
            raise VidurError(
                f"cannot save the result in {str(target)!r}: it holds {sorted(others)[0]!r} and is "
                "not a saved result; name a new or an empty directory."
            )
    return set()


def _manifest(directory: Path) -> dict[str, Any] | None:
    """Return what info.json says, or None if it is not that of a saved result."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    needed = {"format_version", "complete", "info", "files", "tables"}
    return manifest if needed <= manifest.keys() else None


def _write_parquet(directory: Path, table: str, content: pd.DataFrame) -> dict[str, Any]:
    kinds = {str(name): _kind_of(content[name]) for name in content.columns}
    write_parquet(content, directory / f"{table}.parquet")
    return {"file": f"{table}.parquet", "rows": len(content), "columns": kinds}


def _write_csv(directory: Path, table: str, content: pd.DataFrame) -> dict[str, Any]:
    kinds = {str(name): _kind_of(content[name]) for name in content.columns}
    lists = {
        name: content[name].map(lambda row: " ".join(str(value) for value in row))
        for name, kind in kinds.items()
        if kind == "list"
    }
    is_large = len(content) > MAX_PLAIN_ROWS
    file = f"{table}.csv.gz" if is_large else f"{table}.csv"
    # No time stamp inside the archive: one result gives the same bytes whenever it is saved.
    compression: Any = {"method": "gzip", "compresslevel": 1, "mtime": 0} if is_large else None
    content.assign(**lists).to_csv(
        directory / file, index=False, lineterminator="\n", compression=compression
    )
    return {"file": file, "rows": len(content), "columns": kinds}


def _kind_of(series: pd.Series[Any]) -> str:
    name = str(series.dtype)
    if name in ("int64", "Int64", "float64", "bool"):
        return name
    return "list" if len(series) and isinstance(series.iloc[0], list) else "str"


def _read_table(path: Path, table: str, content: Mapping[str, Any]) -> pd.DataFrame:
    try:
        kinds: dict[str, str] = content["columns"]
        table_read = read_parquet(path) if path.suffix == ".parquet" else _read_csv(path, kinds)
        if list(table_read.columns) != list(kinds) or len(table_read) != content["rows"]:
            raise ValueError(
                f"expected {content['rows']} rows of {len(kinds)} columns, found "
                f"{len(table_read)} rows of {len(table_read.columns)}"
            )
        return frame(table, {name: _series(kind, table_read[name]) for name, kind in kinds.items()})
    except ConfigError:  # which is a ValueError: what reads Parquet is not installed
        raise
    except _DAMAGE as error:
        raise VidurError(f"{str(path)!r} is damaged or missing: {error}.") from error


def _read_csv(path: Path, kinds: Mapping[str, str]) -> pd.DataFrame:
    import pandas as pd

    texts = {"list", "str"}
    table: pd.DataFrame = pd.read_csv(
        path,
        dtype={name: "str" if kind in texts else kind for name, kind in kinds.items()},
        keep_default_na=False,
        lineterminator="\n",  # a text may hold the others
        na_values={name: [""] for name, kind in kinds.items() if kind not in texts},
        **_exact_floats(),
    )
    return table


def _exact_floats() -> dict[str, Any]:
    """Return the option without which pandas before 3.1 rounds some floats it reads."""
    import pandas as pd

    version = tuple(int(part) for part in pd.__version__.split(".")[:2])
    return {"float_precision": "round_trip"} if version < (3, 1) else {}


def _write_config(directory: Path, config: Mapping[str, Any] | None) -> None:
    import yaml

    if config is None:
        return
    try:
        text = yaml.safe_dump(dict(config), sort_keys=False)
    except yaml.YAMLError as error:
        raise VidurError(f"the configuration cannot be written as YAML: {error}.") from error
    (directory / "config.yaml").write_text(text, encoding="utf-8")


def _read_config(directory: Path) -> dict[str, Any]:
    import yaml

    path = directory / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise VidurError(f"{str(path)!r} is damaged or missing: {error}.") from error
    if not isinstance(config, dict):
        raise VidurError(f"{str(path)!r} is damaged: expected a mapping.")
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, default=_json_value)
    path.write_text(text + "\n", encoding="utf-8")


def _json_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _finite(value: float) -> float | None:
    """Return None for NaN, which JSON does not know."""
    return value if math.isfinite(value) else None
