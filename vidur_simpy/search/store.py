"""Finished runs on disk, each under a hash of what it was: a sweep that was cut off goes on.

A store is a directory of plain files, which several processes may use at once::

    store.json            what this is, and the newest version that wrote in it
    runs/HASH.json        a finished run: its configuration, its figures, what an SLO needs of it,
                          a checksum
    claims/HASH           held, by a lock of the operating system, while somebody computes the run
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vidur_simpy
from vidur_simpy.config import PATHS, PYTHON
from vidur_simpy.errors import VidurError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DamagedEntryError", "Entry", "Store", "key_of", "open_store", "unstorable"]

FORMAT = "vidur_simpy store"
FORMAT_VERSION = 1
MANIFEST = "store.json"
# The files of runs: finished, or left by a process that was killed while it wrote.
RUN = r"[0-9a-f]{64}\.json|\..*\.partial"
# Other packages whose versions may change figures.
DECIDING = ("numpy", "scikit-learn", "aiconfigurator-core")
HOW_TO_GO_ON = "name another directory, or upgrade vidur_simpy"


class DamagedEntryError(VidurError):
    """A stored run that is not what was written."""


@dataclass(frozen=True)
class Entry:
    """What is stored of a run.

    Attributes
    ----------
    figures : dict of str to float
    values : dict of str to float or ndarray of float64
        What an SLO needs besides, see :func:`vidur_simpy.search.observations.values_of`; empty if
        that was not kept.
    """

    figures: dict[str, float]
    values: dict[str, float | NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """The finished runs in a directory; :func:`open_store` makes one.

    Attributes
    ----------
    directory : Path
        Absolute, so that a worker elsewhere finds it.
    """

    directory: Path

    @property
    def is_here(self) -> bool:
        """Whether this machine sees the directory; a worker elsewhere may not."""
        return (self.directory / MANIFEST).exists()

    def path(self, key: str) -> Path:
        """Return the file of a run."""
        return self.directory / "runs" / f"{key}.json"

    def load(self, key: str) -> dict[str, float] | None:
        """Return the figures of a run, or None if it is not there; raises as :meth:`entry`."""
        entry = self.entry(key)
        return entry.figures if entry is not None else None

    def entry(self, key: str) -> Entry | None:
        """Return what is stored of a run, or None if it is not there.

        Raises
        ------
        DamagedEntryError
            If the file was cut short or changed since it was written.
        """
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedEntryError(f"{str(path)!r} cannot be read: {error}.") from None
        head, _, rest = text.partition("\n")
        if head != _head(rest):
            raise DamagedEntryError(f"{str(path)!r} is damaged: its checksum is another.")
        entry = json.loads(text)
        if entry["key"] != key:
            raise DamagedEntryError(f"{str(path)!r} is the run {entry['key']}.")
        values = {name: _unpacked(value) for name, value in entry.get("values", {}).items()}
        return Entry(dict(entry["figures"]), values)

    def save(
        self,
        key: str,
        described: Mapping[str, Any],
        figures: Mapping[str, float],
        values: Mapping[str, float | NDArray[np.float64]] | None = None,
    ) -> None:
        """Keep what came out of a run; whoever looks finds all of it or nothing.

        Raises
        ------
        VidurError
            If the directory cannot be written, as when the disk is full.
        """
        packed = {name: _packed(value) for name, value in (values or {}).items()}
        entry = {"key": key, "figures": dict(figures), "values": packed, "run": dict(described)}
        rest = json.dumps(entry).removeprefix("{")
        try:
            _write(self.path(key), f"{_head(rest)}\n{rest}")
        except OSError as error:
            raise VidurError(f"cannot keep a run in {str(self.directory)!r}: {error}.") from error

    @contextmanager
    def claim(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Be the only one to compute a run while the block lasts; yield whether one is.

        The operating system lets go of the claims of a process that dies. Where it knows no such
        locks every claim succeeds, and two processes may compute the same run.
        """
        path = self.directory / "claims" / key
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            is_mine = _lock(file.fileno(), wait)
            try:
                yield is_mine
            finally:
                if is_mine:
                    path.unlink(missing_ok=True)


def open_store(directory: str | os.PathLike[str]) -> Store:
    """Open a store, or make an empty one.

    Raises
    ------
    VidurError
        If the directory holds something else, was written by a newer version, or cannot be
        written.
    """
    folder = Path(directory).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        version = _check(folder)
        if version is None or _as_numbers(version) < _as_numbers(vidur_simpy.__version__):
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "version": vidur_simpy.__version__,
            }
            _write(folder / MANIFEST, json.dumps(manifest))
        (folder / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise VidurError(f"cannot keep runs in {str(folder)!r}: {error}.") from error
    return Store(folder)


def _check(folder: Path) -> str | None:
    """Return the version of the package that wrote in a store last; None if it is empty."""
    path = folder / MANIFEST
    if not path.exists():
        strangers = _strangers(folder)
        if strangers and not path.exists():
            raise VidurError(
                f"{str(folder)!r} is not a store of runs: it holds {strangers[0]!r} and no "
                f"{MANIFEST}; name a new or an empty directory."
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, format_version = manifest["format"], int(manifest["format_version"])
        version = str(manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise VidurError(
            f"{str(path)!r} is damaged ({error!r}); delete it if {str(folder)!r} is a store of "
            "runs: nothing is lost."
        ) from None
    if kind != FORMAT:
        raise VidurError(f"{str(folder)!r} holds a {kind!r}, expected a {FORMAT!r}.")
    if format_version > FORMAT_VERSION:
        raise VidurError(
            f"the store {str(folder)!r} has format version {format_version}, expected at most "
            f"{FORMAT_VERSION}: it was written by vidur_simpy {version}, this is "
            f"{vidur_simpy.__version__}; {HOW_TO_GO_ON}."
        )
    if _as_numbers(version) > _as_numbers(vidur_simpy.__version__):
        raise VidurError(
            f"the store {str(folder)!r} was written by vidur_simpy {version}, this is "
            f"{vidur_simpy.__version__}, which would compute every run again; {HOW_TO_GO_ON}."
        )
    return version


def _strangers(folder: Path) -> list[str]:
    """Return what is in a folder and not in a store, which may have lost its manifest."""
    runs = folder / "runs"
    names = {path.name for path in folder.iterdir()}
    if runs.is_dir() and all(re.fullmatch(RUN, path.name) for path in runs.iterdir()):
        names -= {"runs", "claims"}
    return sorted(name for name in names if not name.startswith("."))


def _as_numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def key_of(described: Mapping[str, Any]) -> str:
    """Return the name of a run: a hash of its configuration, of what files say, and of versions.

    Two installations of one version whose code differs have different names for it, too, so that
    figures of code that was changed since are not taken for those of the present one. So do two
    versions of the packages that draw random numbers or know execution times.

    Parameters
    ----------
    described : mapping
        Plain data, as :func:`vidur_simpy.config.dump_config` gives it.
    """
    content = {"run": _with_files(dict(described)), "code": _code()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unstorable(described: Any) -> list[str]:
    """Return the objects of a configuration that no name stands for, as it tells them."""
    if isinstance(described, Mapping):
        if described.get("type") == PYTHON:
            return [str(described.get("object"))]
        described = list(described.values())
    if isinstance(described, list):
        return [name for item in described for name in unstorable(item)]
    is_plain = described is None or isinstance(described, (str, int, float))
    return [] if is_plain else [repr(described)]


def _with_files(described: Any, key: str = "") -> Any:
    """Put what a file holds in place of its name: a trace may move, or change."""
    if isinstance(described, Mapping):
        return {str(name): _with_files(item, str(name)) for name, item in described.items()}
    if isinstance(described, list):
        return [_with_files(item, key) for item in described]
    is_path = isinstance(described, str) and key in (*PATHS, "model")
    if is_path and Path(described).exists():
        return {"sha256": _content(Path(described))}
    return described


def _content(path: Path) -> str:
    """Return the hash of a file, or of all files of a folder and their names."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _content_as_of(stamps, str(path))


@functools.lru_cache(maxsize=256)
def _content_as_of(stamps: tuple[tuple[str, int, int], ...], root: str) -> str:
    """Hash files; the stamps say when they were written, so that they are read once."""
    digest = hashlib.sha256()
    for name, _, size in stamps:
        digest.update(f"{Path(name).relative_to(root).as_posix()}\0{size}\0".encode())
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """Return the versions of all packages that decide figures, and a hash of our own files."""
    package = Path(vidur_simpy.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    others = "".join(f" {name} {_version_of(name)}" for name in DECIDING)
    return f"{vidur_simpy.__version__}+{digest.hexdigest()[:16]}{others}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _packed(value: float | NDArray[np.float64]) -> float | str:
    """Return a number as it is, and an array as the text of its bytes, exact and quick to read."""
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.astype("<f8").tobytes()).decode()
    return value


def _unpacked(value: float | str) -> float | NDArray[np.float64]:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), "<f8").astype(np.float64)
    return value


def _head(rest: str) -> str:
    """Return the first line of an entry: a checksum of all that follows it."""
    return f'{{"checksum": "{hashlib.sha256(rest.encode()).hexdigest()}",'


def _write(path: Path, text: str) -> None:
    """Write a file that is there complete or not at all, whenever the process is killed."""
    handle, aside = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _lock(file: int, wait: bool) -> bool:
    """Lock an open file; return whether that was possible, or not needed."""
    try:
        import fcntl
    except ImportError:  # not a system with such locks
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
