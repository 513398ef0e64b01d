"""Discrete-event simulation of LLM inference clusters on SimPy.

>>> import vidur_simpy as vs
>>> cluster = vs.Cluster(model="llama-3.1-8b", device="h100-80gb-sxm", num_replicas=2)
>>> lengths = vs.PublishedLengths("azure-conv-2023")
>>> workload = vs.Workload(arrivals=vs.Poisson(rate=3.0), lengths=lengths, num_requests=50)
>>> result = vs.simulate(cluster, workload, seed=0)
>>> len(result.requests)
50

Everything that most users need is a name of this module. Its rooms hold more:

- to write your own: `vidur_simpy.workload`, `vidur_simpy.global_scheduler`,
  `vidur_simpy.replica_scheduler`, `vidur_simpy.replica_scheduler.ordering`,
  `vidur_simpy.execution_time`, `vidur_simpy.validation`;
- on the clock: `vidur_simpy.kernel`, `vidur_simpy.processes`, `vidur_simpy.kv_cache`;
- what is simulated: `vidur_simpy.hardware`;
- results: `vidur_simpy.result`, `vidur_simpy.plots`, `vidur_simpy.explanation`,
  `vidur_simpy.economics`, `vidur_simpy.exchange.exports`, `vidur_simpy.statistics`;
- decisions and measurements: `vidur_simpy.search`, `vidur_simpy.calibration`,
  `vidur_simpy.measurements`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The shelf: module -> the public names it holds. Nothing is imported before it is used.
_SHELF = {
    "calibration": ["Calibration", "calibrate", "simulate_with_uncertainty"],
    "cluster": ["Cluster"],
    "columns": ["COLUMNS"],
    "comparison": ["Comparison", "compare"],
    "config": ["dump_config", "load_config"],
    "decode_set": ["DecodeSet"],
    "deployment": ["Deployment"],
    "dictionary": ["metrics_dictionary"],
    "entities": ["Batch", "PrefillChunk", "Request"],
    "errors": [
        "CapacityError",
        "ConfigError",
        "ProfileError",
        "SimulationError",
        "TraceError",
        "VidurError",
    ],
    "execution_time": [
        "AIConfigurator",
        "Calibrated",
        "Linear",
        "Profile",
        "Roofline",
        "RooflineFactors",
    ],
    "global_scheduler": [
        "LeastOutstandingRequests",
        "LeastWaitingRequests",
        "RandomRouting",
        "RoundRobin",
    ],
    "hardware": ["Device", "Model"],
    "kernel": ["Environment", "EventType"],
    "kv_cache": ["KVCache"],
    "loading": ["load_records", "load_result", "load_vllm_bench"],
    "measurements": ["MeasuredIterations", "MeasuredRequests", "read_measurement"],
    "replica_scheduler": [
        "ContinuousBatching",
        "FasterTransformer",
        "LightLLM",
        "Mnemosyne",
        "Orca",
        "ReplicaResources",
        "Sarathi",
        "Vllm",
        "VllmV1",
    ],
    "result": ["Result"],
    "search": [
        "Capacity",
        "Recommendation",
        "Slo",
        "Sweep",
        "capacity",
        "pareto",
        "plot_attainment",
        "plot_front",
        "plot_throughput_latency",
        "recommend",
        "replicate",
        "sweep",
    ],
    "simulation": ["Simulation", "simulate"],
    "statistics": ["Interval", "interval", "paired_difference"],
    "workload": [
        "AllAtOnce",
        "Constant",
        "FixedLengths",
        "Gamma",
        "LognormalLengths",
        "Poisson",
        "PublishedLengths",
        "Trace",
        "TraceArrivals",
        "TraceLengths",
        "UniformLengths",
        "Workload",
        "ZipfLengths",
    ],
}

_HOME = {name: module for module, names in _SHELF.items() for name in names}

__all__ = [
    "COLUMNS",
    "AIConfigurator",
    "AllAtOnce",
    "Batch",
    "Calibrated",
    "Calibration",
    "Capacity",
    "CapacityError",
    "Cluster",
    "Comparison",
    "ConfigError",
    "Constant",
    "ContinuousBatching",
    "DecodeSet",
    "Deployment",
    "Device",
    "Environment",
    "EventType",
    "FasterTransformer",
    "FixedLengths",
    "Gamma",
    "Interval",
    "KVCache",
    "LeastOutstandingRequests",
    "LeastWaitingRequests",
    "LightLLM",
    "Linear",
    "LognormalLengths",
    "MeasuredIterations",
    "MeasuredRequests",
    "Mnemosyne",
    "Model",
    "Orca",
    "Poisson",
    "PrefillChunk",
    "Profile",
    "ProfileError",
    "PublishedLengths",
    "RandomRouting",
    "Recommendation",
    "ReplicaResources",
    "Request",
    "Result",
    "Roofline",
    "RooflineFactors",
    "RoundRobin",
    "Sarathi",
    "Simulation",
    "SimulationError",
    "Slo",
    "Sweep",
    "Trace",
    "TraceArrivals",
    "TraceError",
    "TraceLengths",
    "UniformLengths",
    "VidurError",
    "Vllm",
    "VllmV1",
    "Workload",
    "ZipfLengths",
    "calibrate",
    "capacity",
    "compare",
    "dump_config",
    "interval",
    "load_config",
    "load_records",
    "load_result",
    "load_vllm_bench",
    "metrics_dictionary",
    "paired_difference",
    "pareto",
    "plot_attainment",
    "plot_front",
    "plot_throughput_latency",
    "read_measurement",
    "recommend",
    "replicate",
    "simulate",
    "simulate_with_uncertainty",
    "sweep",
]

if TYPE_CHECKING:
    from vidur_simpy.calibration import Calibration, calibrate, simulate_with_uncertainty
    from vidur_simpy.cluster import Cluster
    from vidur_simpy.columns import COLUMNS
    from vidur_simpy.comparison import Comparison, compare
    from vidur_simpy.config import dump_config, load_config
    from vidur_simpy.decode_set import DecodeSet
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.dictionary import metrics_dictionary
    from vidur_simpy.entities import Batch, PrefillChunk, Request
    from vidur_simpy.errors import (
        CapacityError,
        ConfigError,
        ProfileError,
        SimulationError,
        TraceError,
        VidurError,
    )
    from vidur_simpy.execution_time import (
        AIConfigurator,
        Calibrated,
        Linear,
        Profile,
        Roofline,
        RooflineFactors,
    )
    from vidur_simpy.global_scheduler import (
        LeastOutstandingRequests,
        LeastWaitingRequests,
        RandomRouting,
        RoundRobin,
    )
    from vidur_simpy.hardware import Device, Model
    from vidur_simpy.kernel import Environment, EventType
    from vidur_simpy.kv_cache import KVCache
    from vidur_simpy.loading import load_records, load_result, load_vllm_bench
    from vidur_simpy.measurements import MeasuredIterations, MeasuredRequests, read_measurement
    from vidur_simpy.replica_scheduler import (
        ContinuousBatching,
        FasterTransformer,
        LightLLM,
        Mnemosyne,
        Orca,
        ReplicaResources,
        Sarathi,
        Vllm,
        VllmV1,
    )
    from vidur_simpy.result import Result
    from vidur_simpy.search import (
        Capacity,
        Recommendation,
        Slo,
        Sweep,
        capacity,
        pareto,
        plot_attainment,
        plot_front,
        plot_throughput_latency,
        recommend,
        replicate,
        sweep,
    )
    from vidur_simpy.simulation import Simulation, simulate
    from vidur_simpy.statistics import Interval, interval, paired_difference
    from vidur_simpy.workload import (
        AllAtOnce,
        Constant,
        FixedLengths,
        Gamma,
        LognormalLengths,
        Poisson,
        PublishedLengths,
        Trace,
        TraceArrivals,
        TraceLengths,
        UniformLengths,
        Workload,
        ZipfLengths,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
