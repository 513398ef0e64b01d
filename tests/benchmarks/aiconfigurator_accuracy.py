"""How far the tables of `aiconfigurator` are from the package they come from, and how fast.

Run it by hand (needs ``pip install 'vidur-simpy[aiconfigurator]'``)::

    python tests/benchmarks/aiconfigurator_accuracy.py [--points 500]

The first table is the error of random iterations in percent, against the package's own functions:
decodes, one prefill chunk and several equal ones against its static estimates (the same kernels,
so what is left is interpolation); unequal chunks and batches of chunks and decodes against its
estimate of a forward pass from sums (``RustForwardPassPerfModel``), which itself knows the chunks
only by their mean. The second is nanoseconds per call, beside the straight line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import tempfile
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from execution_time_rate import batch as recorded_batch

import vidur_simpy as vs
from vidur_simpy.execution_time import kernel_database
from vidur_simpy.execution_time.aiconfigurator import AIConfigurator
from vidur_simpy.measurements.iterations import Chunk, Iteration

DEPLOYMENTS = (
    ("llama-3.1-8b", "h100", 1, {}),
    ("llama-3.1-70b", "h200", 4, {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    ("qwen3-32b", "a100", 2, {}),
    ("qwen3-30b-a3b", "h100", 2, {}),
)


class Case(NamedTuple):
    """An iteration, and what the package says of it in seconds."""

    kind: str
    batch: Iteration
    seconds: float


def cases(
    request: kernel_database.Request, num_points: int, rng: np.random.Generator
) -> Iterator[Case]:
    """Yield random iterations of each kind."""
    from aiconfigurator_core.sdk import RustForwardPassPerfModel

    engine: Any = kernel_database.compiled(request)
    for _ in range(num_points):
        num_decodes, context = _spread(rng, 1, 512), _spread(rng, 16, 32_768)
        seconds = engine.predict_decode_latency(num_decodes, context) / 1e3
        yield Case("decodes", Iteration(num_decodes, num_decodes * (context + 1), ()), seconds)
        length, prefix = _spread(rng, 16, 16_384), int(rng.integers(2)) * _spread(rng, 16, 32_768)
        seconds = engine.predict_prefill_latency(1, length + prefix, prefix) / 1e3
        yield Case("one chunk", Iteration(0, 0, (Chunk(length, length + prefix),)), seconds)
        num_chunks, length = _spread(rng, 2, 16), _spread(rng, 16, 2048)
        seconds = engine.predict_prefill_latency(num_chunks, length + prefix, prefix) / 1e3
        chunks = (Chunk(length, length + prefix),) * num_chunks
        yield Case("equal chunks", Iteration(0, 0, chunks), seconds)
    with tempfile.TemporaryDirectory() as folder:
        model = RustForwardPassPerfModel.from_native(_native(request, Path(folder)))
        for kind, largest in (("unequal chunks", 0), ("chunks and decodes", 256)):
            for _ in range(num_points):
                mixed = _mixed(rng, largest)
                yield Case(kind, mixed, model.estimate_forward_pass_time_ms(_sums(mixed)) / 1e3)


def _spread(rng: np.random.Generator, low: int, high: int) -> int:
    """Draw a whole number, as often from each doubling."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def _mixed(rng: np.random.Generator, most_decodes: int) -> Iteration:
    chunks = []
    for _ in range(_spread(rng, 1, 8)):
        length, prefix = _spread(rng, 16, 2048), int(rng.integers(2)) * _spread(rng, 16, 8192)
        chunks.append(Chunk(length, prefix + length))
    num_decodes = _spread(rng, 1, most_decodes) if most_decodes else 0
    return Iteration(num_decodes, num_decodes * _spread(rng, 16, 16_384), tuple(chunks))


def _sums(batch: Iteration) -> dict[str, Any]:
    """Return a batch as the package takes it; the prefix counts as already in the KV cache."""
    tokens = sum(chunk.num_tokens for chunk in batch.prefills)
    return {
        "version": 1,
        "scheduled_requests": {
            "num_prefill_requests": len(batch.prefills),
            "sum_prefill_tokens": tokens,
            "sum_prefill_kv_tokens": sum(chunk.context for chunk in batch.prefills) - tokens,
            "num_decode_requests": batch.num_decodes,
            "sum_decode_kv_tokens": batch.decode_context,
        },
    }


def _native(request: kernel_database.Request, folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(request.config))
    from aiconfigurator_core.sdk import perf_database

    settings = dict(request.settings)
    version = request.backend_version or perf_database.resolve_query_version(
        request.system, request.backend, "current"
    )
    native = {
        "schema_version": 1,
        "model_name": str(folder),
        "system_name": request.system,
        "backend": request.backend,
        "backend_version": version,
        "weight_dtype": settings["gemm_quant_mode"],
        "moe_dtype": settings["moe_quant_mode"],
        "kv_cache_dtype": settings["kvcache_quant_mode"],
        "activation_dtype": settings["fmha_quant_mode"],
    }
    sizes = ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size", "attention_dp_size")
    return native | {name: settings[name] for name in sizes}


def show_errors(num_points: int) -> None:
    """Print the first table."""
    print(f"{'model':<16} {'device':<16} {'kind':<20} {'mean':>6} {'p99':>6} {'bias':>6} (%)")
    for model, device, size, settings in DEPLOYMENTS:
        deployment = vs.Deployment(
            vs.Model.from_name(model), vs.Device.from_name(device), size, **settings
        )
        execution_time = AIConfigurator(cpu_overhead=0.0)
        stage_time = execution_time.for_replica(deployment)
        errors: dict[str, list[float]] = {}
        rng = np.random.default_rng(0)
        for case in cases(execution_time.request(deployment), num_points, rng):
            error = 100 * (stage_time(case.batch, 0) / case.seconds - 1)
            errors.setdefault(case.kind, []).append(error)
        for kind, found in errors.items():
            mean, tail = np.mean(np.abs(found)), np.percentile(np.abs(found), 99)
            name = deployment.device.name
            print(
                f"{model:<16} {name:<16} {kind:<20} {mean:6.2f} {tail:6.2f} {np.mean(found):+6.2f}"
            )


def nanoseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    return statistics.median(timeit.repeat(call, number=20_000, repeat=7)) / 20_000 * 1e9


def show_speed() -> None:
    """Print the second table."""
    model, device, size, settings = DEPLOYMENTS[0]
    deployment = vs.Deployment(
        vs.Model.from_name(model), vs.Device.from_name(device), size, **settings
    )
    models = {"linear": vs.Linear(), "aiconfigurator": AIConfigurator()}
    stage_times = {name: model.for_replica(deployment) for name, model in models.items()}
    print(f"\n{'ns per call':<20} {'linear':>8} {'aiconfigurator':>15} {'ratio':>6}")
    for num_chunks in (0, 1, 3):
        counts = recorded_batch(num_chunks)
        times = [
            nanoseconds(lambda counts=counts, stage_time=stage_time: stage_time(counts, 0))
            for stage_time in stage_times.values()
        ]
        label = f"64 decodes, {num_chunks} chunks"
        print(f"{label:<20} {times[0]:8.0f} {times[1]:15.0f} {times[1] / times[0]:6.2f}")
    runs = [
        nanoseconds(lambda stage_time=stage_time: stage_time.decode_times(64, 64_000, 256, 0)) / 256
        for stage_time in stage_times.values()
    ]
    print(f"{'each of 256 decodes':<20} {runs[0]:8.1f} {runs[1]:15.1f} {runs[1] / runs[0]:6.2f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500, help="random iterations of each kind")
    arguments = parser.parse_args()
    if importlib.util.find_spec("aiconfigurator_core") is None:
        parser.error("needs pip install 'vidur-simpy[aiconfigurator]'")
    logging.disable(logging.CRITICAL)
    show_errors(arguments.points)
    show_speed()


if __name__ == "__main__":
    main()
