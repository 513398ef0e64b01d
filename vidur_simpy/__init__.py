"""Discrete-event simulation of LLM inference clusters on SimPy.

>>> import vidur_simpy as vs
>>> cluster = vs.Cluster(model="llama-3.1-8b", device="h100-80gb-sxm", num_replicas=2)
>>> lengths = vs.PublishedLengths("azure-conv-2023")
>>> workload = vs.Workload(arrivals=vs.Poisson(rate=3.0), lengths=lengths, num_requests=50)
>>> result = vs.simulate(cluster, workload, seed=0)
>>> len(result.requests)
50
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The shelf: module -> the public names it holds. Nothing is imported before it is used.
_SHELF = {
    "cluster": ["Cluster"],
    "columns": ["COLUMNS"],
    "config": ["dump_config", "load_config"],
    "decode_set": ["DecodeSet"],
    "entities": ["Batch", "PrefillChunk", "Request"],
    "errors": [
        "CapacityError",
        "ConfigError",
        "ProfileError",
        "SimulationError",
        "TraceError",
        "VidurError",
    ],
    "execution_time": ["Linear", "Roofline", "RooflineFactors"],
    "global_scheduler": [
        "LeastOutstandingRequests",
        "LeastWaitingRequests",
        "RandomRouting",
        "RoundRobin",
    ],
    "deployment": ["Deployment"],
    "hardware": ["Device", "Model"],
    "kernel": ["Environment", "EventType"],
    "kv_cache": ["KVCache"],
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
    "result": ["Result", "load_result"],
    "simulation": ["Simulation", "simulate"],
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
    "AllAtOnce",
    "Batch",
    "CapacityError",
    "Cluster",
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
    "KVCache",
    "LeastOutstandingRequests",
    "LeastWaitingRequests",
    "LightLLM",
    "Linear",
    "LognormalLengths",
    "Mnemosyne",
    "Model",
    "Orca",
    "Poisson",
    "PrefillChunk",
    "ProfileError",
    "PublishedLengths",
    "RandomRouting",
    "ReplicaResources",
    "Request",
    "Result",
    "Roofline",
    "RooflineFactors",
    "RoundRobin",
    "Sarathi",
    "Simulation",
    "SimulationError",
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
    "dump_config",
    "load_config",
    "load_result",
    "simulate",
]

if TYPE_CHECKING:
    from vidur_simpy.cluster import Cluster
    from vidur_simpy.columns import COLUMNS
    from vidur_simpy.config import dump_config, load_config
    from vidur_simpy.decode_set import DecodeSet
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import Batch, PrefillChunk, Request
    from vidur_simpy.errors import (
        CapacityError,
        ConfigError,
        ProfileError,
        SimulationError,
        TraceError,
        VidurError,
    )
    from vidur_simpy.execution_time import Linear, Roofline, RooflineFactors
    from vidur_simpy.global_scheduler import (
        LeastOutstandingRequests,
        LeastWaitingRequests,
        RandomRouting,
        RoundRobin,
    )
    from vidur_simpy.hardware import Device, Model
    from vidur_simpy.kernel import Environment, EventType
    from vidur_simpy.kv_cache import KVCache
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
    from vidur_simpy.result import Result, load_result
    from vidur_simpy.simulation import Simulation, simulate
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
