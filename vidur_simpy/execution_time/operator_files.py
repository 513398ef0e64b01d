"""Tables of measured operators as LLMServingSim's profiler writes them, read and checked."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vidur_simpy.errors import ProfileError

__all__ = ["Measured", "OperatorFiles", "Skew", "read_operator_files"]

MICROSECOND = 1e-6

FASTEST, SLOWEST = 0.1, 1e7
"""Microseconds: no kernel starts and ends in less, none of one layer takes 10 s."""

Measured = dict[tuple[int, ...], float]
"""Seconds by the coordinates of the points where they were measured."""


class Skew(NamedTuple):
    """What uneven decode lengths cost, as fitted to batches of two lengths.

    Attention takes ``mean + alpha * (longest - mean)``, where `mean` and `longest` are its times
    if all decodes were as long as their mean, as the longest.

    Attributes
    ----------
    axes : dict
        Upper edges and labels of the bins of ``n``, ``skew_rate``, ``kv_big`` and ``kp``.
    alphas : dict of tuple to float
        By prefill chunk and the four labels.
    default : float
        Where no bin applies.
    """

    axes: dict[str, tuple[list[float], list[str]]]
    alphas: dict[tuple[int, str, str, str, str], float]
    default: float


class OperatorFiles(NamedTuple):
    """The tables of one model on one device, for one tensor parallel size.

    Attributes
    ----------
    folder : Path
    dense : dict of str to Measured
        Seconds of each operator by tokens.
    per_sequence : dict of str to Measured
        Seconds of the LM head and the sampler by sequences.
    attention : Measured
        Seconds of one layer's attention by prefill chunk, its context before, number of decodes,
        and tokens in the cache of each.
    moe : Measured
        Seconds of one layer's mixture of experts by tokens and distinct experts hit; empty for a
        dense model.
    skew : Skew or None
        None if it was not fitted.
    """

    folder: Path
    dense: dict[str, Measured]
    per_sequence: dict[str, Measured]
    attention: Measured
    moe: Measured
    skew: Skew | None


def read_operator_files(
    path: str | Path, tensor_parallel_size: int, moe_size: int | None = None
) -> OperatorFiles:
    """Read the tables for one tensor parallel size.

    Parameters
    ----------
    path : str or Path
        The folder of a model, with ``meta.yaml`` and folders ``tp1``, ``tp2``, ..., or one of
        these.
    tensor_parallel_size : int
    moe_size : int, optional
        Devices that experts were cut for in the table of experts; 1 for whole experts. None if
        there are none.

    Raises
    ------
    ProfileError
        If files or columns are missing, that size was not measured, or a value cannot be: it names
        the file, the row and the value.
    """
    folder = _folder(Path(path), tensor_parallel_size)
    moe: Measured = {}
    if moe_size is not None:
        file = _folder(Path(path), moe_size) / "moe.csv"
        moe = _measured(file, ("tokens", "activated_experts"))
    return OperatorFiles(
        folder,
        _by_layer(folder / "dense.csv", "tokens"),
        _by_layer(folder / "per_sequence.csv", "sequences"),
        _measured(
            folder / "attention.csv", ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
        ),
        moe,
        _skew(folder, tensor_parallel_size),
    )


def _folder(path: Path, tensor_parallel_size: int) -> Path:
    """Return the folder of a tensor parallel size."""
    if (path / "dense.csv").is_file():
        size = re.fullmatch(r"tp(\d+)", path.resolve().name)
        if size is None or int(size[1]) == tensor_parallel_size:
            return path
        path = path.resolve().parent
    folder = path / f"tp{tensor_parallel_size}"
    if (folder / "dense.csv").is_file():
        return folder
    sizes = sorted(int(file.parent.name[2:]) for file in path.glob("tp[0-9]*/dense.csv"))
    if not sizes:
        raise ProfileError(f"{path}: expected folders tp1, tp2, ... with dense.csv in each.")
    raise ProfileError(
        f"{path} has no tp{tensor_parallel_size}/dense.csv: tensor_parallel_size "
        f"{tensor_parallel_size} was not measured; expected one of {', '.join(map(str, sizes))}."
    )


def _by_layer(file: Path, size: str) -> dict[str, Measured]:
    """Read a table of several operators, each by one size."""
    layers: dict[str, Measured] = {}
    for where, row in _rows(file, ("layer", size, "time_us")):
        table = layers.setdefault(row["layer"], {})
        _add(table, (_count(row, size, where, least=1),), row, where)
    return layers


def _measured(file: Path, sizes: tuple[str, ...]) -> Measured:
    """Read a table of one operator by several sizes."""
    table: Measured = {}
    for where, row in _rows(file, (*sizes, "time_us")):
        _add(table, tuple(_count(row, size, where) for size in sizes), row, where)
    return table


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table, each with its place."""
    if not file.is_file():
        raise ProfileError(f"{file} is missing: expected columns {', '.join(columns)}.")
    with file.open(encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text)
        known = reader.fieldnames or ()
        missing = [column for column in columns if column not in known]
        if missing:
            raise ProfileError(
                f"{file} has no column {', '.join(map(repr, missing))}: it has "
                f"{', '.join(known) or 'none'}."
            )
        number = 0
        for number, row in enumerate(reader, start=2):
            yield f"{file}, line {number}", row
        if not number:
            raise ProfileError(f"{file} has no rows.")


def _count(row: dict[str, str], column: str, where: str, least: int = 0) -> int:
    try:
        count = int(row[column])
    except (TypeError, ValueError):
        count = -1
    if count < least:
        raise ProfileError(
            f"{where}: {column} = {row[column]!r}: expected a whole number of at least {least}."
        )
    return count


def _add(table: Measured, point: tuple[int, ...], row: dict[str, str], where: str) -> None:
    try:
        time = float(row["time_us"])
    except (TypeError, ValueError):
        time = math.nan
    if not FASTEST <= time <= SLOWEST:
        raise ProfileError(
            f"{where}: time_us = {row['time_us']!r}: expected microseconds between {FASTEST:g} and "
            f"{SLOWEST:g}."
        )
    if point in table:
        raise ProfileError(f"{where} measures again what an earlier line does.")
    table[point] = time * MICROSECOND


def _skew(folder: Path, tensor_parallel_size: int) -> Skew | None:
    """Read what uneven decode lengths cost, if it was fitted."""
    file = folder / "skew_fit.csv"
    metas = (place / "meta.yaml" for place in (folder, folder.parent))
    meta = next((meta for meta in metas if meta.is_file()), None)
    if meta is None or not file.is_file():
        return None
    try:
        content: Any = yaml.safe_load(meta.read_text(encoding="utf-8"))
        fit = content["skew_fit"]
        if not fit["enabled"]:
            return None
        bins = fit["bucket_axes"]
        axes = {
            name: ([float(edge) for edge in bins[f"{name}_bins"][1:]], bins[f"{name}_labels"])
            for name in ("n", "skew_rate", "kv_big", "kp")
        }
        default = float(fit["per_tp"][tensor_parallel_size]["alpha_default"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{meta}: skew_fit cannot be read ({type(error).__name__}: {error}); expected enabled, "
            f"bucket_axes and per_tp with {tensor_parallel_size}."
        ) from None
    labels = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")
    alphas = {}
    for where, row in _rows(file, ("pc", *labels, "alpha")):
        try:
            alpha = float(row["alpha"])
        except (TypeError, ValueError):
            alpha = math.nan
        if not math.isfinite(alpha):
            raise ProfileError(f"{where}: alpha = {row['alpha']!r}: expected a finite number.")
        n, rate, kv_big, kp = (row[label] for label in labels)
        alphas[_count(row, "pc", where), n, rate, kv_big, kp] = alpha
    return Skew(axes, alphas, default)
