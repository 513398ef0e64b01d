"""Tables that take long to compute, kept on disk by what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ConfigError

__all__ = ["Arrays", "cache_directory", "cached"]

Arrays = dict[str, NDArray[Any]]

KEY = "key"
"""Under this name a file keeps what it was computed from."""

DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What reading a file that was cut short or changed raises."""


def cache_directory() -> Path:
    """Return where tables are kept: ``$VIDUR_SIMPY_CACHE``, or in the user's cache directory."""
    chosen = os.environ.get("VIDUR_SIMPY_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "vidur_simpy"


def cached(name: str, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
    """Return what `compute` gives, from disk if it was computed from the same `key` before.

    A file is complete or not there: it gets its name once all is written, so that a run may be
    interrupted, and several may write the same, at any time. One that was damaged since is noticed
    (a warning says so) and computed again; a directory that cannot be written costs a warning.

    Parameters
    ----------
    name : str
        What the tables are, for people who look into the directory.
    key : mapping
        All that decides the values, in what JSON can say: sizes, the version of a package, a hash
        of files read.
    compute : callable
        Gives named arrays of numbers or strings.

    Raises
    ------
    ConfigError
        If an array is called ``"key"``, or holds objects.

    Examples
    --------
    >>> import tempfile, unittest.mock
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with unittest.mock.patch.dict(os.environ, VIDUR_SIMPY_CACHE=folder):
    ...         first = cached("squares", {"up to": 3}, lambda: {"squares": np.arange(4) ** 2})
    ...         again = cached("squares", {"up to": 3}, lambda: {})
    >>> again["squares"].tolist()
    [0, 1, 4, 9]
    """
    described = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:24]
    path = cache_directory() / f"{name}-{digest}.npz"
    if path.exists():
        try:
            return _read(path, described)
        except DAMAGE as error:
            warnings.warn(f"{path} is damaged ({error}); computing it again.", stacklevel=2)
    arrays = {label: np.asarray(values) for label, values in compute().items()}
    for label, values in arrays.items():
        if label == KEY or values.dtype.hasobject:
            raise ConfigError(
                f"cached {name!r}: array {label!r} of {values.dtype}: expected a name other than "
                f"{KEY!r}, and numbers or strings."
            )
    try:
        _write(path, {**arrays, KEY: np.asarray(described)})
    except OSError as error:
        warnings.warn(f"cannot keep {path} ({error}); set VIDUR_SIMPY_CACHE.", stacklevel=2)
    return arrays


def _read(path: Path, described: str) -> Arrays:
    # Each array has a checksum in the file, which reading it compares.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        arrays: Arrays = {label: content[label] for label in content.files}
    if str(arrays.pop(KEY)) != described:
        raise ValueError("it was computed from something else")
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
