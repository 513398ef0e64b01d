"""The configurations of a sweep: a grid or a list of settings, on a cluster and a workload."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from vidur_simpy.cluster import Cluster
from vidur_simpy.config import read_value, with_settings
from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.validation import field_names
from vidur_simpy.workload import Trace, Workload

__all__ = ["Grid", "Point", "check_inputs", "points_of"]

Grid: TypeAlias = Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]]

# What a dotted name begins with, and whose fields may follow.
ROOTS: dict[str, tuple[type, ...]] = {"cluster": (Cluster,), "workload": (Workload, Trace)}

# What configuration files say besides.
OF_THE_SWEEP = ("seed", "event_order", "until", "record")


class _UnknownFieldError(ConfigError):
    """A dotted name that leads nowhere, which is wrong whatever the other settings are."""


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep.

    Attributes
    ----------
    settings : dict of str to object
        What is set, by dotted name.
    cluster : Cluster
    workload : Workload or Trace
        With the settings; as they were given to the sweep, if there is an error.
    error : VidurError or None
        Why the settings make no cluster or workload, as when a model does not fit its devices.
    """

    settings: dict[str, Any]
    cluster: Cluster
    workload: Workload | Trace
    error: VidurError | None = field(default=None, compare=False)

    def setting(self, name: str) -> Any:
        """Return the value at a dotted name, given or not; None where there is no such field."""
        if name in self.settings:
            return self.settings[name]
        root, *path = name.split(".")
        value: Any = getattr(self, root)
        for step in path:
            value = getattr(value, step, None)
        return value


def check_inputs(cluster: Any, workload: Any) -> None:
    """Refuse what is no cluster or no workload, such as the two in the wrong order.

    Raises
    ------
    ConfigError
        What was given, and what was expected.
    """
    if not isinstance(cluster, Cluster):
        raise ConfigError(f"cluster = {cluster!r}: expected a Cluster.")
    if not callable(getattr(workload, "requests", None)):
        raise ConfigError(f"workload = {workload!r}: expected a Workload or a Trace.")


def points_of(cluster: Cluster, workload: Workload | Trace, grid: Grid) -> list[Point]:
    """Return the points of a grid (the last name varies fastest), or of a list of settings.

    Raises
    ------
    ConfigError
        If the cluster or the workload is something else, the grid is empty, a name leads nowhere,
        a value stands for nothing, or no point has settings that are possible together.
    """
    check_inputs(cluster, workload)
    points = [_point(cluster, workload, settings) for settings in _all_settings(grid)]
    errors = [str(point.error) for point in points if isinstance(point.error, ConfigError)]
    if len(errors) == len(points):
        raise ConfigError(f"no configuration of the grid can run; of the first: {errors[0]}")
    return points


def _all_settings(grid: Grid) -> list[dict[str, Any]]:
    if isinstance(grid, Mapping):
        values = {name: _values(name, given) for name, given in grid.items()}
        if not values:
            raise ConfigError(
                "the grid is empty: expected values by name, as in {'cluster.num_replicas': "
                "[1, 2]}; [{}] runs the cluster and the workload as they are."
            )
        return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    rows: list[Any] = list(grid) if _is_several(grid) else [grid]
    for row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(
                f"the grid holds {reprlib.repr(row)}: expected values by name, as in "
                "{'cluster.num_replicas': 2} or {'cluster': Cluster(...)}."
            )
    if not rows:
        raise ConfigError("the grid is empty: expected at least one set of settings.")
    return [{name: _value(name, value) for name, value in row.items()} for row in rows]


def _values(name: str, given: Any) -> list[Any]:
    if not _is_several(given):
        raise ConfigError(f"the grid has {name} = {given!r}: expected a list of values.")
    values = [_value(name, value) for value in given]
    if not values:
        raise ConfigError(f"the grid is empty: {name} has no values.")
    return values


def _is_several(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))


def _value(name: str, value: Any) -> Any:
    """Return what a value stands for, so that a misspelt name is told before anything runs."""
    if name in OF_THE_SWEEP:
        raise ConfigError(
            f"the grid has {name!r}, which is the same for all runs of a sweep: give it beside the "
            "grid."
        )
    if not isinstance(name, str) or name.split(".")[0] not in ROOTS:
        known = [f"{root}.{field}" for root in ROOTS for field in _fields_of(*ROOTS[root])]
        raise unknown_name("setting of a grid", name, known)
    return read_value(name, value.item() if isinstance(value, np.generic) else value)


def _point(cluster: Cluster, workload: Workload | Trace, settings: dict[str, Any]) -> Point:
    paths = {tuple(name.split(".")): value for name, value in settings.items()}
    try:
        made = {
            root: _changed(given, root, _below(paths, root))
            for root, given in (("cluster", cluster), ("workload", workload))
        }
    except _UnknownFieldError as error:
        raise ConfigError(str(error)) from None
    except VidurError as error:
        return Point(settings, cluster, workload, error)
    return Point(settings, made["cluster"], made["workload"])


def _changed(given: Any, place: str, paths: Mapping[tuple[str, ...], Any]) -> Any:
    """Return an object with what lies below its place changed, all of one object at once."""
    given = paths.get((), given)
    names = list(dict.fromkeys(path[0] for path in paths if path))
    if not names:
        return given
    known = field_names(type(given)) if hasattr(given, "__dataclass_fields__") else []
    for name in names:
        if not known:
            raise _UnknownFieldError(f"{place}.{name}: {place} is {given!r}, which has no fields.")
        if name not in known:
            raise _UnknownFieldError(str(unknown_name(f"field of {place}", name, known)))
    changes = {
        name: _changed(_part(given, name), f"{place}.{name}", _below(paths, name)) for name in names
    }
    return with_settings(given, changes, place)


def _part(given: Any, name: str) -> Any:
    """Return what a field holds; a model or a device that was named is looked up."""
    is_named = isinstance(given, Cluster) and name in ("model", "device")
    return getattr(given.deployment if is_named else given, name)


def _fields_of(*classes: type) -> list[str]:
    return list(dict.fromkeys(name for cls in classes for name in field_names(cls)))


def _below(paths: Mapping[tuple[str, ...], Any], name: str) -> dict[tuple[str, ...], Any]:
    return {path[1:]: value for path, value in paths.items() if path and path[0] == name}
