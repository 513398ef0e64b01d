"""The API reference: it builds without a warning, its links lead somewhere, nothing is left out."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import vidur_simpy as vs
from vidur_simpy.columns import COLUMNS
from vidur_simpy.dictionary import MEASURES
from vidur_simpy.metrics import RECORDS

pytest.importorskip("pdoc")

# The shelf, and the rooms that hold more for users than what lies on it.
PAGES = [
    "vidur_simpy",
    "vidur_simpy.plots",
    "vidur_simpy.workload",
    "vidur_simpy.global_scheduler",
    "vidur_simpy.replica_scheduler",
    "vidur_simpy.replica_scheduler.ordering",
    "vidur_simpy.execution_time",
    "vidur_simpy.kernel",
    "vidur_simpy.processes",
    "vidur_simpy.kv_cache",
    "vidur_simpy.hardware",
    "vidur_simpy.result",
    "vidur_simpy.explanation",
    "vidur_simpy.economics",
    "vidur_simpy.exchange.exports",
    "vidur_simpy.statistics",
    "vidur_simpy.search",
    "vidur_simpy.measurements",
    "vidur_simpy.calibration",
    "vidur_simpy.validation",
]
PACKAGE = Path(vs.__file__).parent
MODULES = sorted(
    ".".join(("vidur_simpy", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for file in PACKAGE.rglob("*.py")
)
ROLE = re.compile(r":(?:class|func|meth|attr|mod|exc|data):`([^`]+)`")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference as a user or the CI builds it; a warning ends the build."""
    folder = tmp_path_factory.mktemp("reference")
    options = ["-W", "error::UserWarning", "-m", "pdoc", "-d", "numpy", "--no-show-source", "-o"]
    build = subprocess.run(
        [sys.executable, *options, str(folder), *PAGES],
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    assert build.returncode == 0, build.stderr.strip().splitlines()[-1]
    assert "Warn" not in build.stderr, build.stderr
    return folder


def page_of(reference: Path, module: str) -> str:
    return (reference / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, inherited ones of this package included."""
    seen = set()
    for cls in inspect.getmro(value) if inspect.isclass(value) else ():
        if not cls.__module__.startswith("vidur_simpy"):
            continue
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(function) and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, function


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public classes and functions of a module, and what they hold."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
            for member_name, member in members(value):
                yield f"{name}.{member_name}", member


# The pages


def test_every_name_of_the_shelf_has_its_entry(reference: Path) -> None:
    """The package is lazy; its page shows each public name all the same, with its docstring."""
    page = page_of(reference, "vidur_simpy")
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    for name in vs.__all__:
        value = getattr(vs, name)
        assert name in sections, name
        if inspect.isclass(value) or inspect.isfunction(value):
            assert 'class="docstring"' in sections[name], f"{name} has no docstring"


def test_every_page_is_linked_from_the_first(reference: Path) -> None:
    """The shelf's page leads to the other pages, and names no other room."""
    page = page_of(reference, "vidur_simpy")
    for module in PAGES[1:]:
        assert f'href="{module.replace(".", "/")}.html"' in page, module
    assert sorted(re.findall(r"`(vidur_simpy\.[\w.]+)`", vs.__doc__ or "")) == sorted(PAGES[1:])


def test_every_link_leads_somewhere(reference: Path) -> None:
    """Links within the reference go to a page that is there and to a place on it."""
    pages = {file: file.read_text(encoding="utf-8") for file in reference.rglob("*.html")}
    places = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in pages.items()}
    broken = set()
    for file, text in pages.items():
        for link in re.findall(r'href="([^"]+)"', text):
            path, _, place = html.unescape(link).partition("#")
            target = (file.parent / path).resolve() if path else file
            if "://" not in link and place not in places.get(target, set()) | {""}:
                module = ".".join(target.relative_to(reference).with_suffix("").parts)
                if not is_inherited_from_others(module, place):
                    broken.add(f"{module}: {link}")
    assert not broken


def is_inherited_from_others(module: str, place: str) -> bool:
    """Whether a place is a method of a class of SimPy or of Python, which pdoc links in vain."""
    owner, _, method = place.partition(".")
    classes = inspect.getmro(getattr(importlib.import_module(module), owner, object))
    homes = [cls.__module__ for cls in classes if method in vars(cls)]
    return bool(homes) and not homes[0].startswith("vidur_simpy")


@pytest.mark.parametrize("module", PAGES)
def test_cross_references_are_links(reference: Path, module: str) -> None:
    """What a docstring refers to is a link on its page, or stands on the page itself."""
    page = page_of(reference, module)
    imported = importlib.import_module(module)
    texts = {module: imported.__doc__ or ""}
    texts |= {name: inspect.getdoc(value) or "" for name, value in public_names(imported)}
    missing = [
        f"{name}: {target}"
        for name, text in texts.items()
        for target in ROLE.findall(text)
        if not re.search(rf">{re.escape(target)}(\(\))?</a>", page)
        and f'{module}.{name.split(".")[0]}"' not in page
    ]
    assert not missing


def test_sections_are_headings(reference: Path) -> None:
    """Sections of docstrings become headings; no rule of dashes is left over."""
    for module in PAGES:
        page = page_of(reference, module)
        without_code = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
        assert not re.search(r"^\s*-{4,}\s*$", without_code, re.MULTILINE), module
        for name, value in public_names(importlib.import_module(module)):
            documented = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
            if documented and section(inspect.getdoc(value) or "", "Parameters") is not None:
                assert '<h6 id="parameters' in documented[0], f"{module}.{name}"


# The docstrings

# Parameters that mean the same wherever they occur: what has that type, and the time in seconds.
EVIDENT = ("batch", "deployment", "event_type", "now", "request", "resources", "rng")


def section(text: str, name: str) -> list[str] | None:
    """The names that a section of a docstring explains; None if there is no such section."""
    found = re.search(rf"^{name}\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    entries = re.findall(r"^([\w*]+(?:, [\w*]+)*)(?: ?:.*)?$", found[1], re.MULTILINE)
    return [entry.strip("*") for entry in ", ".join(entries).split(", ")]


def parameters_of(value: Any) -> list[str]:
    if not callable(value) or (inspect.isclass(value) and "__init__" not in dir_of(value)):
        return []
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]


def dir_of(cls: type) -> set[str]:
    """What a class of this package or its bases of this package define."""
    own = [each for each in inspect.getmro(cls) if each.__module__.startswith("vidur_simpy")]
    return {name for each in own for name in vars(each)}


def protocol_text(value: Any, text: str) -> str:
    """The docstring of the same method of a protocol that the docstring points to."""
    pointed = re.search(r"see :class:`[\w.]*?(\w+)`", text)
    owner = getattr(inspect.getmodule(value), pointed[1], None) if pointed else None
    return inspect.getdoc(getattr(owner, value.__name__, None)) or "" if owner else ""


def test_docstrings_explain_every_parameter() -> None:
    """A section of parameters has them all and no other; without one, the text names them."""
    wrong = []
    for name, value in public_names(vs):
        text = inspect.getdoc(value) or ""
        given = parameters_of(value)
        explained = section(text, "Parameters")
        if explained is None and inspect.isclass(value):
            # What users do not make themselves says what it holds.
            explained = section(text, "Attributes")
            given = given if explained is not None and is_dataclass(value) else []
        if explained is None:
            text += protocol_text(value, text)
            named = [each for each in given if re.search(rf"\b{each}\b", text)]
            wrong += [f"{name}: {each}" for each in given if each not in (*named, *EVIDENT)]
            continue
        wrong += [f"{name}: {each}" for each in given if each not in explained]
        if section(text, "Parameters") is not None:
            wrong += [f"{name}: no {each}" for each in explained if each not in given]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_references_resolve(module: str) -> None:
    """What a docstring refers to exists: beside it, in the class, on the shelf, or by its path."""
    imported = importlib.import_module(module)
    tree = ast.parse(Path(imported.__file__ or "").read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
        for target in ROLE.findall(ast.get_docstring(node) or ""):
            assert not target.startswith("~"), f"{module}: ~ shows in the reference: {target}"
            assert resolves(target, imported, tree), f"{module}: {target}"


def resolves(target: str, module: ModuleType, tree: ast.Module) -> bool:
    """Whether a name is one of the package, by its path or as seen from a module."""
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    origins = {
        alias.asname or alias.name: importlib.import_module(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vidur_simpy")
        for alias in node.names
    }
    homes = [module, vs, *(getattr(module, name, None) for name in names)]
    homes.append(origins.get(target.partition(".")[0]))
    if target.startswith("vidur_simpy."):
        longest = max((name for name in MODULES if f"{target}.".startswith(f"{name}.")), key=len)
        homes, target = [importlib.import_module(longest)], target[len(longest) + 1 :]
    return any(holds(home, target) for home in homes)


def holds(home: Any, path: str) -> bool:
    for name in path.split(".") if path else ():
        if not hasattr(home, name):
            return False
        home = getattr(home, name)
    return True


# The dictionary of metrics


@pytest.fixture(scope="module")
def result() -> vs.Result:
    """A run that records everything, with all that requests may carry."""
    cluster = vs.Cluster(replica_scheduler=vs.VllmV1(enable_prefix_caching=True))
    simulation = vs.Simulation(cluster, record=list(RECORDS))
    for number in range(4):
        request = vs.Request(
            600,
            5,
            float(number),
            priority=number,
            deadline=number + 1.0,
            session_id="one",
            hash_ids=[0, 1],
        )
        simulation.submit(request)
    simulation.run()
    return simulation.result()


def names_of(table: str) -> set[str]:
    return set(vs.metrics_dictionary(table)["column"])


def test_the_dictionary_has_every_column_of_a_run(result: vs.Result) -> None:
    """Every table of a run that records everything, column for column."""
    assert set(result.tables) == set(COLUMNS)
    for table in result.tables:
        columns = set(getattr(result, table).columns)
        assert columns <= names_of(table), table
        assert {"priority", "deadline", "session_id"} <= columns or table != "requests"


FIGURES: dict[str, Callable[[vs.Result], Any]] = {
    "summary": lambda result: [*result.summary().index, *result.summary().columns],
    "figures": lambda result: result.figures,
    "slo": lambda result: result.slo(ttft=1.0, tpot=1.0, e2e=1.0, itl=1.0).index,
    "energy": lambda result: result.energy().index,
    "cost": lambda result: result.cost(price_per_gpu_hour=2.5).index,
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_dictionary_has_every_figure_of_a_run(result: vs.Result, name: str) -> None:
    """Every name that a method of a result gives is explained, and no other."""
    assert set(FIGURES[name](result)) == names_of(name)


WORKLOAD = vs.Workload(vs.Constant(20.0), vs.FixedLengths(50, 5), num_requests=30)
GRID = {"cluster.num_replicas": [1]}
LIMITS = ["ttft:p99=1", "itl:mean=1", "e2e=5", "fraction=0.9"]
FEW: dict[str, Any] = {"max_replications": 2}


def compared() -> pd.DataFrame:
    run = vs.simulate(vs.Cluster(), WORKLOAD)
    return vs.compare({"a": run, "b": run}).table.reset_index()


SEARCHES: dict[str, Callable[[], pd.DataFrame]] = {
    "sweep": lambda: (
        vs.sweep(vs.Cluster(), WORKLOAD, GRID, slo={"ttft": 1.0}, record=("tokens",)).table
    ),
    "capacity": lambda: vs.capacity(vs.Cluster(), WORKLOAD, LIMITS, tolerance=0.9, **FEW).curve,
    "recommend": lambda: (
        vs.recommend(vs.Cluster(), WORKLOAD, LIMITS, GRID, price_per_gpu_hour=1.0, **FEW).table
    ),
    "compare": compared,
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_dictionary_has_every_column_of_several_runs(name: str) -> None:
    """Besides settings and figures: what tells runs apart, latencies, verdicts, errors."""
    statistics = r"_(mean|std|p50|p90|p95|p99|count)"
    named = {
        re.sub(
            rf"^(slo_)?({'|'.join(result_latencies())})({statistics})?(_low|_high)?$",
            lambda found: (
                f"{found[1] or ''}<latency>{'_<statistic>' if found[3] else ''}{found[5] or ''}"
            ),
            column,
        )
        for column in SEARCHES[name]().columns
    }
    missing = named - set(GRID) - names_of(name)
    assert missing <= (names_of("figures") if name != "compare" else set())
    if name != "sweep":  # whose limits may be others
        assert names_of(name) <= named


def result_latencies() -> list[str]:
    return ["ttft", "tpot", "e2e", "scheduling_delay", "itl"]


def test_every_entry_has_a_unit_that_is_known_and_a_meaning() -> None:
    """Units are those of the contract; a share or a count has none."""
    dictionary = vs.metrics_dictionary()
    known = {"", "s", "tokens", "1/s", "tokens/s", "W", "kWh", "J", "h", "money"}
    assert set(dictionary["unit"]) <= known
    assert (dictionary["meaning"].str.len() > 3).all()
    assert set(dictionary["table"]) == set(COLUMNS) | set(MEASURES)
