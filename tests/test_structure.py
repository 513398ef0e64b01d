"""The shape of the house: layers import downwards only, and the shelf holds what it says."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vidur_simpy as vs

PACKAGE = Path(vs.__file__).parent

# The floors, lowest first: a room imports rooms of lower floors only.
FLOORS = [
    ["errors", "columns", "streams", "sums"],
    [
        "validation",
        "precision",
        "huggingface",
        "catalogue",
        "splits",
        "parallel",
        "power",
        "dictionary",
        "parquet",
    ],
    ["entities", "hardware", "kv_cache", "record_columns"],
    ["decode_set", "around_runs", "events", "frames"],
    ["deployment", "prefix_cache"],
    ["kernel", "workload", "execution_time", "global_scheduler", "replica_scheduler"],
    ["phase_log"],
    ["metrics", "fast_forward", "request_log", "series", "storage", "summary"],
    ["stage", "plain_loop"],
    ["processes", "cluster", "journal", "statistics", "exchange", "plots", "economics"],
    ["explanation"],
    ["config", "measurements", "result", "roster", "progress", "wiring"],
    ["shards", "comparison", "loading", "state"],
    ["simulation"],
    ["search", "calibration"],
    ["cli"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Where SimPy may be seen: the clock, the main loop, and what wires them.
ON_THE_CLOCK = {"events", "kernel", "fast_forward", "stage", "processes", "simulation"}


def name_of(file):
    """The dotted name of a module within the package; the package itself is ''."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
ROOMS = sorted({name.partition(".")[0] for name in FILES if name})


def imports_of(file):
    """The (module, names) that a file imports when it runs, in functions as well."""
    pending = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module, [alias.name for alias in node.names]
        pending.extend(ast.iter_child_nodes(node))


def modules_imported(file):
    """The modules of the package that a file imports; a name of the shelf is its home."""
    for module, names in imports_of(file):
        if module == "vidur_simpy":
            yield from (vs._HOME.get(name, name) for name in names if name != "__version__")
        elif module.startswith("vidur_simpy."):
            inner = module.removeprefix("vidur_simpy.")
            submodules = [f"{inner}.{name}" for name in names if f"{inner}.{name}" in FILES]
            yield from submodules or [inner]


def loaded_by(statement):
    """The modules that are loaded after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


# Layers


def test_every_room_has_its_floor():
    """A new room is written down above; a room that is gone is struck out."""
    assert sorted(FLOOR) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    """No room imports one of its own floor or a higher one."""
    for name, file in FILES.items():
        if name.partition(".")[0] == room:
            rooms = {imported.partition(".")[0] for imported in modules_imported(file)} - {room}
            upwards = [other for other in rooms if FLOOR[other] >= FLOOR[room]]
            assert not upwards, f"{name} imports {upwards}"


def test_no_imports_in_a_circle():
    """Within a room, too, files can be put in an order."""
    graph = {name: set(modules_imported(file)) - {name} for name, file in FILES.items() if name}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)


@pytest.mark.parametrize("name", sorted(set(FILES) - ON_THE_CLOCK))
def test_only_the_main_loop_knows_simpy(name):
    """Policies, workloads, tables and figures never see SimPy: time is an argument."""
    imported = {module.partition(".")[0] for module, _ in imports_of(FILES[name])}
    assert "simpy" not in imported


# What is loaded when


def test_importing_the_package_loads_nothing_heavy():
    """The shelf is lazy: `import vidur_simpy` costs nothing before something is used."""
    heavy = {"pandas", "matplotlib", "pydantic", "simpy", "numpy", "scipy", "tqdm", "yaml", "click"}
    loaded = loaded_by("import vidur_simpy")
    assert not heavy & loaded
    assert {module for module in loaded if module.startswith("vidur_simpy")} == {"vidur_simpy"}


def test_a_saved_result_opens_without_the_simulator(tmp_path, cluster):
    """Reading results needs neither the clock nor the policies."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=3)
    vs.simulate(cluster, workload).save(tmp_path / "saved")
    statement = (
        f"import vidur_simpy; vidur_simpy.load_result({str(tmp_path / 'saved')!r}).summary()"
    )
    loaded = loaded_by(statement)
    assert "pandas" in loaded
    assert not {"simpy", "pydantic", "vidur_simpy.kernel", "vidur_simpy.cluster"} & loaded


@pytest.mark.parametrize("room", ["workload", "replica_scheduler", "global_scheduler", "hardware"])
def test_policies_need_neither_tables_nor_figures(room):
    """Policies and workloads are numpy and plain Python."""
    loaded = loaded_by(f"import vidur_simpy.{room}")
    assert not {"pandas", "matplotlib", "simpy"} & loaded


# The shelf


def test_the_shelf_is_what_all_says():
    """`__all__`, the lazy table and what type checkers see are the same names, each once."""
    on_shelf = [name for names in vs._SHELF.values() for name in names]
    assert sorted(on_shelf) == sorted(vs.__all__)
    assert len(set(on_shelf)) == len(on_shelf)
    for names in vs._SHELF.values():
        assert names == sorted(names)
    tree = ast.parse(Path(vs.__file__).read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {
        node.module.removeprefix("vidur_simpy."): sorted(alias.name for alias in node.names)
        for node in guard.body
    }
    assert for_type_checkers == vs._SHELF


@pytest.mark.parametrize("name", sorted(vs.__all__))
def test_every_name_resolves_and_is_documented(name):
    """It comes from the module the table says, is public there, and says what it is."""
    value = getattr(vs, name)
    home = importlib.import_module(f"vidur_simpy.{vs._HOME[name]}")
    assert getattr(home, name) is value
    assert name in home.__all__
    assert name in dir(vs)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert len(value.__doc__.splitlines()[0]) > 20


def test_an_unknown_name_is_an_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="'vidur_simpy' has no attribute 'Sarthi'"):
        _ = vs.Sarthi


@pytest.mark.parametrize("name", sorted(set(FILES) - {""}))
def test_every_module_introduces_itself(name):
    """A docstring that opens with one sentence, and the list of its public names."""
    module = importlib.import_module(f"vidur_simpy.{name}")
    first = module.__doc__.split("\n\n")[0].strip()
    assert first.endswith((".", "::"))
    assert all(hasattr(module, public) for public in module.__all__)


def test_modules_import_public_names():
    """What a module takes from another is in its `__all__`, if it is there when code runs."""
    unlisted = set()
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("vidur_simpy."):
                continue
            home = node.module.removeprefix("vidur_simpy.")
            module = importlib.import_module(node.module)
            names = {alias.name for alias in node.names if f"{home}.{alias.name}" not in FILES}
            unlisted |= {
                (name, home, each) for each in names - set(module.__all__) if hasattr(module, each)
            }
    assert not unlisted
