"""How far the roofline is from NVIDIA's kernel measurements.

The measurements are those of aiconfigurator-core 0.12 (Apache-2.0; ``pip install
"aiconfigurator-core==0.12.*"``, for Linux on x86-64 and Python 3.11 to 3.13), composed into
iterations by its own estimator for vLLM. Run it by hand::

    python tests/benchmarks/roofline_accuracy.py [--by-split] [--reference FILE]

It prints the mean absolute error, the bias and the largest error in percent, for prefills of 128
to 32k tokens after prefixes of 0, 2k and 8k, and for decodes of 1 to 256 sequences at contexts of
128 to 32k. ``--reference`` writes the few points that the tests hold the roofline to.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import vidur_simpy as vs
from vidur_simpy.measurements.iterations import Chunk, Iteration

SYSTEMS = {
    "h100_sxm": "h100-80gb-sxm",
    "h200_sxm": "h200-141gb-sxm",
    "a100_sxm": "a100-80gb-sxm",
    "b200_sxm": "b200-sxm",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000-server",
}
REFERENCE_SYSTEMS = ("h100_sxm", "h200_sxm", "a100_sxm")
DENSE = [("llama-3.1-8b", size) for size in (1, 2, 4)] + [
    ("llama-3.1-70b", size) for size in (2, 4, 8)
]
MIXTURES = [("qwen3-30b-a3b", size) for size in (1, 2, 4)] + [
    ("mixtral-8x7b", size) for size in (2, 4, 8)
]
NAMES = {
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
}
PREFILLS = list(itertools.product([1], [2**power for power in range(7, 16)], (0, 2048, 8192)))
DECODES = list(itertools.product([2**power for power in range(9)], (128, 512, 2048, 8192, 32768)))
SOURCE = "kernel measurements of aiconfigurator-core (NVIDIA, Apache-2.0), vLLM tables"


class Point(NamedTuple):
    """One iteration as measured: its batch, and seconds by operator."""

    kind: str
    batch: Iteration
    operators: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole iteration."""
        return sum(self.operators.values())


def engine(model: str, system: str, tensor_parallel_size: int, **modes: str) -> Any:
    """Return the package's estimator; experts are split like any other MLP."""
    from aiconfigurator_core.sdk import EngineHandle

    logging.disable(logging.CRITICAL)
    settings: dict[str, Any] = {"tp_size": tensor_parallel_size, "pp_size": 1, **modes}
    if vs.Model.from_name(model).num_experts:
        settings["moe_tp_size"] = tensor_parallel_size
    if model in NAMES:
        return EngineHandle.compile(NAMES[model], system, "vllm", **settings)
    with tempfile.TemporaryDirectory() as folder:
        # The package holds this file, but not under a name that it takes.
        import aiconfigurator_core

        configs = Path(aiconfigurator_core.__file__).parent / "model_configs"
        content = (configs / "mistralai--Mixtral-8x7B-v0.1_config.json").read_text()
        (Path(folder) / "config.json").write_text(content)
        return EngineHandle.compile(folder, system, "vllm", **settings)


def measured(
    model: str,
    system: str,
    tensor_parallel_size: int,
    prefills: Iterable[tuple[int, int, int]] = PREFILLS,
    **modes: str,
) -> Iterator[Point]:
    """Yield every point: of prefills (sequences, tokens of each, prefix of each), and decodes."""
    handle = engine(model, system, tensor_parallel_size, **modes)
    for num_sequences, length, prefix in prefills:
        operators, _ = handle.run_static_per_op(
            batch_size=num_sequences, isl=length + prefix, osl=2, prefix=prefix, mode="static_ctx"
        )
        batch = Iteration(0, 0, (Chunk(length, prefix + length),) * num_sequences)
        yield Point("prefill", batch, _named(operators))
    for num_decodes, context in DECODES:
        _, operators = handle.run_static_per_op(
            batch_size=num_decodes, isl=context, osl=2, mode="static_gen"
        )
        batch = Iteration(num_decodes, num_decodes * (context + 1), ())
        yield Point("decode", batch, _named(operators))


def _named(operators: list[tuple[str, float, float, str]]) -> dict[str, float]:
    return {name.partition("_")[2]: milliseconds / 1e3 for name, milliseconds, *_ in operators}


def errors(model: str, system: str, tensor_parallel_size: int) -> Iterator[tuple[str, float]]:
    """Yield the kind and the relative error of every point."""
    deployment = vs.Deployment(
        vs.Model.from_name(model), vs.Device.from_name(SYSTEMS[system]), tensor_parallel_size
    )
    roofline = vs.Roofline(cpu_overhead=0.0).for_replica(deployment)
    for point in measured(model, system, tensor_parallel_size):
        yield point.kind, roofline(point.batch, 0) / point.seconds - 1


def splits(system: str) -> dict[str, list[tuple[str, int]]]:
    """Return the splits that were measured on a system."""
    if system == "l40s":
        return {"dense": DENSE[:1]}
    return {"dense": DENSE, "mixture": MIXTURES}


def show(by_split: bool) -> None:
    """Print the table."""
    print(f"{'device':<20} {'models':<17} {'kind':<8} points  MAPE   bias  largest (%)")
    for system, device in SYSTEMS.items():
        for models, chosen in splits(system).items():
            found = {split: list(errors(split[0], system, split[1])) for split in chosen}
            for (model, size), pairs in found.items() if by_split else ():
                _show(device, f"{model} {size}", pairs)
            _show(device, models, [pair for pairs in found.values() for pair in pairs])


def _show(device: str, models: str, pairs: list[tuple[str, float]]) -> None:
    for kind in ("prefill", "decode"):
        found = [100 * error for one, error in pairs if one == kind]
        mean = statistics.fmean(map(abs, found))
        largest = max(map(abs, found))
        print(
            f"{device:<20} {models:<17} {kind:<8} {len(found):6} {mean:5.1f} "
            f"{statistics.fmean(found):+6.1f} {largest:8.1f}"
        )


def reference() -> dict[str, Any]:
    """Return two points of each split, one after the other through the grids."""
    chosen = {"prefill": itertools.count(0, 7), "decode": itertools.count(0, 13)}
    sizes = {"prefill": len(PREFILLS), "decode": len(DECODES)}
    rows = []
    for system in REFERENCE_SYSTEMS:
        for model, size in DENSE + MIXTURES:
            points = list(measured(model, system, size))
            for kind, count in chosen.items():
                of_kind = [point for point in points if point.kind == kind]
                point = of_kind[next(count) % sizes[kind]]
                batch = [*point.batch[:2], [list(chunk) for chunk in point.batch.prefills]]
                milliseconds = float(f"{1e3 * point.seconds:.5g}")
                rows.append([SYSTEMS[system], model, size, *batch, milliseconds])
    return {
        "source": SOURCE,
        "version": importlib.metadata.version("aiconfigurator-core"),
        "columns": [
            "device",
            "model",
            "tensor_parallel_size",
            "num_decodes",
            "decode_context",
            "prefills (num_tokens, context)",
            "milliseconds",
        ],
        "rows": rows,
    }


def main() -> None:
    """Print the table, and write the reference if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by-split", action="store_true", help="also a row per model and split")
    parser.add_argument("--reference", type=Path, help="write the reference points to this file")
    arguments = parser.parse_args()
    if importlib.util.find_spec("aiconfigurator_core") is None:
        parser.error('needs aiconfigurator-core: pip install "aiconfigurator-core==0.12.*"')
    if arguments.reference:
        content = reference()
        rows = ",\n  ".join(json.dumps(row) for row in content.pop("rows"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        arguments.reference.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
    show(arguments.by_split)


if __name__ == "__main__":
    main()
