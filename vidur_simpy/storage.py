"""The directory of a saved result, with tables of the same types as in memory.

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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.frames import column, frame
from vidur_simpy.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_target", "make_target", "read_result", "write_result"]

FORMAT = "vidur_simpy result"
FORMAT_VERSION = 1
MANIFEST = "info.json"
CONFIG = "config.yaml"
ASIDE = ".saving-"
TABLE_FORMATS = ("csv", "parquet")
MAX_PLAIN_ROWS = 100_000

# What json, yaml, gzip and pandas raise on files that are not what they should be.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error)


def write_result(
    directory: str | os.PathLike[str],
    tables: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
    *,
    figures: Mapping[str, float],
    config: Mapping[str, Any] | None,
    info: Mapping[str, Any],
    table_format: str = "csv",
    overwrite: bool = False,
) -> None:
    """Write the files of a result, all of them or none.

    They are first written aside and then moved into place, between a manifest that says
    "incomplete" and the final one, so that a save that was cut off is never read as a result.

    Raises
    ------
    VidurError
        If the directory holds a saved result and `overwrite` is not set, holds anything else, or
        cannot be written.
    """
    if table_format not in TABLE_FORMATS:
        raise unknown_name("table_format", table_format, TABLE_FORMATS)
    target = Path(directory)
    stale = check_target(target, overwrite=overwrite)
    try:
        with _made_aside(target) as name:
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
                "checksums": {file: _checksum(aside / file) for file in files},
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
        raise _cannot_save(target, f"{error}; name a directory that can be written") from error


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
        raise VidurError(_why_no_result(source))
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
    config = _read_config(source) if CONFIG in manifest["files"] else None
    for file in [content["file"] for content in manifest["tables"].values()]:
        _check_unchanged(source / file, manifest)
    if config is not None:
        _check_unchanged(source / CONFIG, manifest)
    return tables, config, manifest["info"]


def check_target(target: Path, *, overwrite: bool = False) -> set[str]:
    """Return the files of the saved result that is there already, and may be replaced.

    Raises
    ------
    VidurError
        If there is one that may not, or anything else.
    """
    if target.exists() and not target.is_dir():
        raise _cannot_save(target, "it is a file; name a new or an empty directory")
    manifest = _manifest(target)
    if manifest is not None and overwrite:
        return set(manifest["files"])
    if manifest is not None:
        raise _cannot_save(
            target,
            "a saved result is there already; name another directory, or say overwrite=True "
            "(--overwrite on the command line) to replace it",
        )
    if target.is_dir():
        # A save that was killed before it moved anything leaves only its own directory.
        others = [path.name for path in target.iterdir() if not path.name.startswith(ASIDE)]
        if others:
            raise _cannot_save(
                target,
                f"it holds {sorted(others)[0]!r} and is not a saved result; name a new or an "
                "empty directory",
            )
    return set()


def make_target(target: Path, *, overwrite: bool = False) -> None:
    """Make the directory of a result that is to come, so that a run is not in vain.

    Raises
    ------
    VidurError
        As `write_result`.
    """
    check_target(target, overwrite=overwrite)
    try:
        with _made_aside(target):
            pass
    except OSError as error:
        raise _cannot_save(target, f"{error}; name a directory that can be written") from error


def _made_aside(target: Path) -> tempfile.TemporaryDirectory[str]:
    target.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=ASIDE, dir=target)


def _cannot_save(target: Path, reason: str) -> VidurError:
    return VidurError(f"cannot save the result in {str(target)!r}: {reason}.")


def _manifest(directory: Path) -> dict[str, Any] | None:
    """Return what info.json says, or None if it is not that of a saved result."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest if _is_whole(manifest) else None


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all its entries, with names of files in its own directory."""
    kinds = {"format_version": int, "complete": bool, "info": dict, "files": list, "tables": dict}
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    contents = list(manifest["tables"].values())
    if not all(isinstance(part, dict) for part in (*contents, manifest.get("checksums", {}))):
        return False
    files = [*manifest["files"], *(content.get("file") for content in contents)]
    return all(isinstance(file, str) and Path(file).name == file for file in files)


def _why_no_result(source: Path) -> str:
    expected = f"expected a directory with the {MANIFEST} that Result.save() wrote"
    if not source.exists():
        return f"{str(source)!r} is not a saved result, it is not there: {expected}."
    try:
        content = (source / MANIFEST).read_text(encoding="utf-8")
        is_ours = json.loads(content).get("format") == FORMAT
    except (OSError, AttributeError):
        is_ours = False
    except ValueError:
        is_ours = True
    if is_ours:
        path = str(source / MANIFEST)
        return f"{path!r} is damaged or was cut off; save the result again."
    return f"{str(source)!r} is not a saved result: {expected}."


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def _check_unchanged(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise if a file that could be read is not the one that was written."""
    expected = manifest.get("checksums", {}).get(path.name)
    if expected is not None and _checksum(path) != expected:
        raise VidurError(f"{str(path)!r} is damaged: it is not what was saved.")


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
        return frame(table, {name: column(kind, table_read[name]) for name, kind in kinds.items()})
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
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _read_config(directory: Path) -> dict[str, Any]:
    import yaml

    path = directory / CONFIG
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
