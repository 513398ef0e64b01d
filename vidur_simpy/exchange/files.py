"""Files that are there complete or not at all, and never in place of another unasked."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from vidur_simpy.errors import VidurError

__all__ = ["check_new", "new_file", "new_path"]


def check_new(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return where a file may be written.

    Raises
    ------
    VidurError
        If there is such a file and `overwrite` is not set, it is a directory, or there is none to
        put it in.
    """
    target = Path(path)
    if target.is_dir():
        raise VidurError(f"cannot write {str(target)!r}: it is a directory, expected a file name.")
    if target.exists() and not overwrite:
        raise VidurError(
            f"cannot write {str(target)!r}: it is there already; give another name, or say "
            "overwrite=True (--overwrite on the command line) to replace it."
        )
    if not target.parent.is_dir():
        raise VidurError(
            f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}."
        )
    return target


@contextmanager
def new_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of a file to write, which takes its place once the block is done.

    Raises
    ------
    VidurError
        If there is such a file already, or it cannot be written.
    """
    target = check_new(path, overwrite=overwrite)
    try:
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as directory:
            aside = Path(directory) / target.name
            yield aside
            os.replace(aside, target)
    except OSError as error:
        raise VidurError(f"cannot write {str(target)!r}: {error}.") from error


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[TextIO]:
    """Open a text file to write, which takes its place once it is complete.

    Parameters
    ----------
    path : path
        Compressed with gzip if it ends in ``.gz``. Its directory must be there.
    overwrite : bool
        Replace a file that is there.

    Yields
    ------
    TextIO
        In UTF-8, line feeds as they are. If the block raises, nothing is left behind.

    Raises
    ------
    VidurError
        If there is such a file already, or it cannot be written.
    """
    with (
        new_path(path, overwrite=overwrite) as aside,
        aside.open("wb") as raw,
        _text(raw, aside.suffix == ".gz") as file,
    ):
        yield file


@contextmanager
def _text(raw: IO[bytes], is_compressed: bool) -> Iterator[TextIO]:
    """Write text to a file of bytes."""
    if not is_compressed:
        with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
            yield file
        return
    # Neither name nor time in the archive: one result gives the same bytes wherever it is written.
    with (
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as archive,
        io.TextIOWrapper(archive, encoding="utf-8", newline="\n") as file,
    ):
        yield file
