"""Fit the roofline's factors to NVIDIA's kernel measurements.

Run it by hand, with what ``roofline_accuracy.py`` needs and SciPy::

    python tests/benchmarks/roofline_fit.py [SET ...] > factors.json

It prints the sets of ``vidur_simpy/data/roofline_factors.json``. The factors of dense models are
fitted first, then, on top of them, those of experts, of products in fp8 and of latent attention.
What is made small is the error of whole iterations, and half as much the share that each operator
is off; both robustly, as some measurements stand out.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from roofline_accuracy import DENSE, MIXTURES, PREFILLS, SYSTEMS, Point, measured
from scipy.optimize import least_squares

import vidur_simpy as vs
from vidur_simpy.execution_time import RooflineFactors

ALL_PREFILLS = [*PREFILLS, *itertools.product((4, 16), (128, 512, 2048), (0, 2048))]

# Our operator -> those of the measurements that it stands for.
OPERATORS = {
    "attention_projections": ("qkv_gemm", "proj_gemm"),
    "norms": ("add_norm_1", "add_norm_2"),
    "mlp": ("gate_ffn1_gemm", "act_gate", "ffn2_gemm"),
    "all_reduce": ("ar_1", "ar_2", "moe_pre_dispatch", "moe_post_dispatch"),
    "router": ("router_gemm",),
    "experts": ("moe",),
    "lm_head": ("logits_gemm",),
}

START = {
    "gemm_compute": 0.8,
    "gemm_memory": 0.85,
    "prefill_compute": 0.6,
    "decode_memory": 0.9,
    "elementwise_memory": 0.7,
    "kernel_time": 4e-6,
    "attention_time": 1.4e-5,
    "prefill_extra_context": 300.0,
    "smoothness": 3.5,
}
ALL_REDUCE = {
    "all_reduce_time": 5e-6,
    "all_reduce_link": 0.6,
    "all_reduce_time_growth": 0.0,
    "all_reduce_link_growth": 0.0,
}
EXPERTS = {"expert_compute": 0.78, "expert_memory": 0.8, "expert_time": 2e-5}
LATENT = {"latent_memory": 0.8, "latent_time": 4e-5}
NO_LINK = {"all_reduce_time": 0.0, "all_reduce_link": 1.0}
LOWEST = {
    "smoothness": 1.2,
    "kernel_time": 1.5e-6,
    "attention_time": 5e-6,
    "all_reduce_time_growth": -2.0,
    "all_reduce_link_growth": -2.0,
}
HIGHEST = {"smoothness": 12.0}

# What else each set has. Of the L40S only the dense model on one device was measured; it takes
# the all-reduce and the experts of the RTX PRO 6000, which is also on PCIe.
SETS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "a100": (
        ("a100_sxm",),
        ALL_REDUCE | {"gemm_half_efficiency_rows": 100.0, "large_all_reduce_time": 5e-5},
    ),
    "h100": (("h100_sxm",), ALL_REDUCE),
    "h200": (("h200_sxm",), ALL_REDUCE),
    "hopper": (("h100_sxm", "h200_sxm"), ALL_REDUCE),
    "b200": (("b200_sxm",), ALL_REDUCE),
    "l40s": (("l40s",), {}),
    "rtx-pro-6000": (("rtx_pro_6000_server",), ALL_REDUCE | {"gemm_half_efficiency_rows": 50.0}),
}

# Latent attention was measured in bf16 on these; the H100 takes the H200's figures.
LATENT_SYSTEM = {
    "a100": "a100_sxm",
    "h100": "h200_sxm",
    "h200": "h200_sxm",
    "hopper": "h200_sxm",
    "b200": "b200_sxm",
}


class Run(NamedTuple):
    """The measurements of one deployment."""

    deployment: vs.Deployment
    points: list[Point]


def runs(system: str, splits: Iterable[tuple[str, int]], **modes: str) -> list[Run]:
    """Measure splits on a system."""
    found = []
    for name, size in splits:
        deployment = vs.Deployment(
            vs.Model.from_name(name),
            vs.Device.from_name(SYSTEMS[system]),
            size,
            quantization="fp8" if modes.get("gemm_quant_mode") == "fp8" else "bf16",
        )
        found.append(Run(deployment, list(measured(name, system, size, ALL_PREFILLS, **modes))))
    return found


def iteration_errors(run: Run, factors: RooflineFactors) -> list[float]:
    """Return errors of whole iterations, and of operators as shares of these."""
    roofline = vs.Roofline(cpu_overhead=0.0, factors=factors).for_replica(run.deployment)
    errors = []
    for point in run.points:
        modelled, seconds = roofline.operators(point.batch, 0), point.seconds
        errors.append(math.log(sum(modelled.values()) / seconds))
        names = OPERATORS | {f"{point.kind}_attention": ("attention",)}
        for ours, theirs in names.items():
            actual = sum(point.operators.get(name, 0.0) for name in theirs)
            if actual:
                errors.append(0.5 * (modelled.get(ours, 0.0) - actual) / seconds)
    return errors


def latent_errors(run: Run, factors: RooflineFactors) -> list[float]:
    """Return errors of latent attention with its projections."""
    roofline = vs.Roofline(cpu_overhead=0.0, factors=factors).for_replica(run.deployment)
    errors = []
    for point in run.points:
        modelled = roofline.operators(point.batch, 0)
        seconds = modelled["attention_projections"] + modelled[f"{point.kind}_attention"]
        errors.append(math.log(seconds / point.operators["mla_block"]))
    return errors


def fitted(
    known: dict[str, float],
    start: dict[str, float],
    measurements: list[Run],
    errors_of: Callable[[Run, RooflineFactors], list[float]] = iteration_errors,
) -> dict[str, float]:
    """Return `known` factors and those fitted to measurements from a start."""

    # Steps are relative to the coordinates, so that these are kept away from 0.
    def coordinate(name: str, value: float) -> float:
        return 10 + (value if name.endswith("growth") else math.log(value / start[name]))

    def factors(coordinates: Iterable[float]) -> dict[str, float]:
        found = dict(known)
        for name, value in zip(start, coordinates, strict=True):
            is_exponent = name.endswith("growth")
            found[name] = float(value - 10 if is_exponent else start[name] * math.exp(value - 10))
        found["prefill_memory"] = found["decode_memory"]
        return found

    def errors(coordinates: Iterable[float]) -> list[float]:
        candidate = RooflineFactors(**factors(coordinates))
        return [error for run in measurements for error in errors_of(run, candidate)]

    lowest = [coordinate(name, LOWEST.get(name, 1e-9)) for name in start]
    highest = [coordinate(name, HIGHEST.get(name, 1e5)) for name in start]
    found = least_squares(
        errors,
        [coordinate(name, value) for name, value in start.items()],
        bounds=(lowest, highest),
        loss="soft_l1",
        f_scale=0.03,
        diff_step=1e-5,
        x_scale="jac",
    )
    return factors(found.x)


def fit(name: str) -> dict[str, float]:
    """Return one set of factors."""
    systems, extra = SETS[name]
    num_splits = 1 if name == "l40s" else None
    dense = [run for system in systems for run in runs(system, DENSE[:num_splits])]
    known = fitted(NO_LINK, START | extra, dense)
    if num_splits:
        other = fit("rtx-pro-6000")
        known |= {key: other[key] for key in ALL_REDUCE | EXPERTS}
    else:
        mixtures = [run for system in systems for run in runs(system, MIXTURES)]
        known = fitted(known, EXPERTS, mixtures)
    if name != "a100":
        splits = [("llama-3.1-8b", 1), ("llama-3.1-70b", 4)][:num_splits]
        modes = {"gemm_quant_mode": "fp8"}
        in_fp8 = [run for system in systems for run in runs(system, splits, **modes)]
        known = fitted(known, {"quantized_compute": 0.8}, in_fp8)
    if name in LATENT_SYSTEM:
        modes = dict.fromkeys(
            ("gemm_quant_mode", "moe_quant_mode", "kvcache_quant_mode", "fmha_quant_mode"),
            "bfloat16",
        )
        latent = runs(LATENT_SYSTEM[name], [("deepseek-v3", 8)], **modes)
        known = fitted(known, LATENT, latent, latent_errors)
    return {key: float(f"{value:.5g}") for key, value in known.items()}


def main() -> None:
    """Print the sets that were asked for, or all."""
    sets: dict[str, Any] = {name: fit(name) for name in sys.argv[1:] or SETS}
    print(json.dumps(sets, indent=1))


if __name__ == "__main__":
    main()
