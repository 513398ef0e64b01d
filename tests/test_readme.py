"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import vidur_simpy as vs

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """What the examples leave behind, run one after the other as a reader would."""
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    return names


def test_the_notebook_example_simulates_its_requests(namespace: dict[str, Any]) -> None:
    """Fifteen lines give a result in which every request is complete."""
    assert len(BLOCKS[0].strip().splitlines()) <= 16
    assert namespace["result"].figures["completed"] == 4_000


def test_the_client_example_serves_its_client(namespace: dict[str, Any]) -> None:
    """The client on the shared clock gets its ten answers, five seconds apart at least."""
    requests = namespace["sim"].result().requests
    assert len(requests) == 10
    assert (requests.arrived_at.diff().dropna() > 5.0).all()


def test_the_example_policies_make_a_cluster_that_runs(namespace: dict[str, Any]) -> None:
    """A router and an execution time written as lambdas are taken as they are."""
    workload = vs.Workload(vs.Poisson(5.0), vs.FixedLengths(100, 10), num_requests=20)
    assert vs.simulate(namespace["cluster"], workload).figures["completed"] == 20


def test_the_map_has_every_room() -> None:
    """A file or folder of the package that is not on the map is hard to find."""
    shown = README.read_text(encoding="utf-8").split("## What is where")[1].split("## Licence")[0]
    package = Path(vs.__file__).parent
    rooms = [path.name for path in package.iterdir() if not path.name.startswith(("_", "."))]
    assert [name for name in rooms if name not in shown and name != "py.typed"] == []


def test_every_configuration_is_sound() -> None:
    """Each file in configs/ makes a cluster and a workload."""
    folder = README.parent / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 9
    for file in files:
        arguments = vs.load_config(file)
        assert {"cluster", "workload"} <= arguments.keys(), file
