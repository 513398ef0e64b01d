"""Configuration files and the objects they describe, both ways.

A public object is its own configuration: ``Sarathi(chunk_size=512)`` is
``{type: sarathi, chunk_size: 512}``. The tables next to the policies say which name means which
class; the classes check the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml

from vidur_simpy.cluster import Cluster
from vidur_simpy.errors import ConfigError, VidurError, unknown_name
from vidur_simpy.execution_time import EXECUTION_TIMES, RooflineFactors
from vidur_simpy.global_scheduler import GLOBAL_SCHEDULERS
from vidur_simpy.kv_cache import KVCache
from vidur_simpy.replica_scheduler import REPLICA_SCHEDULERS
from vidur_simpy.validation import field_names
from vidur_simpy.workload import ARRIVALS, LENGTHS, WORKLOADS

__all__ = [
    "PATHS",
    "PYTHON",
    "dump_config",
    "load_config",
    "read_grid",
    "read_value",
    "with_settings",
]

# key of a mapping -> the names its "type" may have
TABLES: dict[str, Mapping[str, type]] = {
    "replica_scheduler": REPLICA_SCHEDULERS,
    "global_scheduler": GLOBAL_SCHEDULERS,
    "execution_time": EXECUTION_TIMES,
    "workload": WORKLOADS,
    "arrivals": ARRIVALS,
    "lengths": LENGTHS,
}

# key of a mapping -> the one class it stands for
PARTS: dict[str, type] = {"kv_cache": KVCache, "factors": RooflineFactors}

# keys of files and folders
PATHS = ("path", "network", "cpu_overheads")

# The type of an object of the user's own, which no name stands for.
PYTHON = "python"

TOP_LEVEL = ("cluster", "workload", "seed", "event_order", "until", "record")


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a configuration; the answer is the keyword arguments of :func:`simulate`.

    Parameters
    ----------
    source : str, Path or Mapping
        A YAML file, or what it would hold. Relative paths in a file are looked up from the
        current directory, then from the file's own.
    overrides : sequence of str
        ``"cluster.num_replicas=8"``: a dotted key and a YAML value that replaces what is there.

    Raises
    ------
    ConfigError
        A file that is missing or no YAML mapping, an unknown key or name, a value of the wrong
        type or out of range; the message names the place.
    CapacityError
        A model that does not fit its device.

    Examples
    --------
    >>> config = load_config(
    ...     {"cluster": {"model": "llama-3.1-8b"}, "seed": 1}, ["cluster.num_replicas=2"]
    ... )
    >>> config["cluster"].num_replicas, config["seed"]
    (2, 1)
    """
    if not isinstance(source, (str, Path, Mapping)):
        raise ConfigError(f"load_config({source!r}): expected a YAML file or a mapping.")
    if isinstance(source, Mapping):
        mapping, place, folder = dict(source), "", Path()
    else:
        mapping, place, folder = _read(Path(source)), f"{source}: ", Path(source).parent
    for override in overrides:
        _override(mapping, override)
    try:
        return _arguments(mapping, folder)
    except VidurError as error:
        raise type(error)(f"{place}{error}") from None


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as the number that it is, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        found = f" In {path.parent}: {', '.join(file.name for file in near)}." if near else ""
        raise ConfigError(f"{path}: no such configuration file.{found}")
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(mapping, dict):
        given = "is empty" if mapping is None else f"holds a {type(mapping).__name__}"
        raise ConfigError(
            f"{path} {given}: expected a mapping with the keys {', '.join(TOP_LEVEL)}."
        )
    return mapping


def _override(mapping: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, as in cluster.num_replicas=8.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value.") from None
    *parents, last = key.split(".")
    place: dict[str, Any] = mapping
    for parent in parents:
        inner = place.get(parent)
        if isinstance(inner, str) and _key(parent, inner) in TABLES:
            inner = {"type": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"--set {override!r}: {parent} is {inner!r}, which has no keys.")
        place[parent] = dict(inner)
        place = place[parent]
    place[last] = value


def _arguments(mapping: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    for key in mapping:
        if key not in TOP_LEVEL:
            raise unknown_name("key", key, TOP_LEVEL)
    # A key without a value is a key that is not there.
    arguments = {key: value for key, value in mapping.items() if value is not None}
    arguments["cluster"] = _build(Cluster, arguments.get("cluster", {}), "cluster", folder)
    if "workload" in arguments:
        arguments["workload"] = _value("workload", arguments["workload"], "workload", folder)
    until = arguments.get("until", 1.0)
    if isinstance(until, bool) or not (isinstance(until, (int, float)) and 0 < until < inf):
        raise ConfigError(f"until = {until!r}: expected an instant in seconds, after 0.")
    return arguments


def _key(key: str, value: Any) -> str:
    """Return the key that tells what a value is.

    The base of a calibrated execution time is another one; that of a linear one is a number.
    """
    return "execution_time" if key == "base" and not isinstance(value, (int, float)) else key


def _value(key: str, value: Any, place: str, folder: Path) -> Any:
    """Return what a key's value stands for: an object where the key has a table of names."""
    key = _key(key, value)
    if isinstance(value, Mapping) and value.get("type") == PYTHON:
        raise ConfigError(
            f"{place} was the Python object {value.get('object')}, which a file cannot hold: pass "
            f"it to simulate()."
        )
    if key in TABLES and isinstance(value, str):
        value = {"type": value}
    if key in TABLES and isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("type", None)
        if name is None:
            raise ConfigError(f"{place} needs a type, one of {', '.join(TABLES[key])}.")
        if not isinstance(name, str) or name not in TABLES[key]:
            raise unknown_name(f"{place}.type", name, TABLES[key])
        return _build(TABLES[key][name], settings, place, folder)
    if key in PARTS and isinstance(value, Mapping):
        return _build(PARTS[key], value, place, folder)
    if key in PATHS or (key == "model" and str(value).endswith(".json")):
        return _found(value, folder)
    return value


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return values by dotted name, as the command line writes them.

    Examples
    --------
    >>> read_grid(["cluster.num_replicas=1,2", "cluster.replica_scheduler=vllm,{type: sarathi}"])
    {'cluster.num_replicas': [1, 2], 'cluster.replica_scheduler': ['vllm', {'type': 'sarathi'}]}
    """
    grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            grid[key] = yaml.load(f"[{values}]", _Loader)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            raise ConfigError(
                f"--grid {text!r}: expected key=value,value, as in cluster.num_replicas=1,2,4."
            )
    return grid


def read_value(place: str, value: Any) -> Any:
    """Return what the value at a dotted place of a configuration stands for.

    An object stands for itself.

    Raises
    ------
    VidurError
        As :func:`load_config` raises it.

    Examples
    --------
    >>> read_value("workload.arrivals", {"type": "poisson", "rate": 2.0})
    Poisson(rate=2.0)
    """
    if place == "cluster" and isinstance(value, Mapping):
        return _build(Cluster, value, place, Path())
    return _value(place.rpartition(".")[2], value, place, Path())


def with_settings(given: Any, settings: Mapping[str, Any], place: str) -> Any:
    """Return a copy of an object with some settings changed, as a configuration writes them.

    Raises
    ------
    VidurError
        As :func:`load_config` raises it; `place` is how messages name the object.

    Examples
    --------
    >>> with_settings(Cluster(), {"global_scheduler": "random"}, "cluster").global_scheduler
    RandomRouting()
    """
    present = {name: getattr(given, name) for name in field_names(type(given))}
    return _build(type(given), present | dict(settings), place, Path())


def _build(cls: type, settings: Any, place: str, folder: Path) -> Any:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{place} = {settings!r}: expected a mapping.")
    known = field_names(cls)
    for key in settings:
        if key not in known:
            raise unknown_name(f"{place} key", key, known)
    values = {key: _value(key, value, f"{place}.{key}", folder) for key, value in settings.items()}
    try:
        return cls(**values)
    except VidurError as error:
        message = str(error).replace(f"{cls.__name__}.", f"{place}.")
        message = message if place in message else f"{place}: {message}"
        raise type(error)(message) from None


def _found(path: Any, folder: Path) -> Any:
    if isinstance(path, str) and not Path(path).exists() and (folder / path).exists():
        return str(folder / path)
    return path


def dump_config(**arguments: Any) -> dict[str, Any]:
    """Return plain data that :func:`load_config` turns into equal keyword arguments.

    An object of the user's own, which no name stands for, becomes ``{type: python, object: ...}``:
    it is told, not stored.

    Examples
    --------
    >>> from vidur_simpy import Linear
    >>> config = dump_config(cluster=Cluster(execution_time=Linear(base=0.01)))
    >>> config["cluster"]["execution_time"]
    {'type': 'linear', 'base': 0.01, 'per_token': 2e-05, 'per_context_token': 5e-08}
    """
    return {key: _plain(key, value) for key, value in arguments.items() if value is not None}


def _plain(key: str, value: Any) -> Any:
    key = _key(key, value)
    if key in TABLES:
        for name, cls in TABLES[key].items():
            if type(value) is cls:
                return {"type": name, **_settings(value)}
        return _told(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _settings(value)
    if callable(value):
        return _told(value)
    if isinstance(value, Mapping):
        return {inner: _plain(inner, item) for inner, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain("", item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _told(value: Any) -> dict[str, Any]:
    return {"type": PYTHON, "object": getattr(value, "__qualname__", repr(value))}


def _settings(value: Any) -> dict[str, Any]:
    return {field.name: _plain(field.name, getattr(value, field.name)) for field in fields(value)}
