"""Which requests of a replica run next: one file per published policy.

To add one, write a class with the methods of :class:`ReplicaScheduler` (subclassing
:class:`ContinuousBatching` gives all but ``schedule``), and pass it to ``Cluster`` as it is; a row
in the table below lets configuration files say its name.
"""

from vidur_simpy.replica_scheduler.batching import ContinuousBatching
from vidur_simpy.replica_scheduler.faster_transformer import FasterTransformer
from vidur_simpy.replica_scheduler.interface import (
    ReplicaResources,
    ReplicaScheduler,
    ReplicaSchedulerPolicy,
)
from vidur_simpy.replica_scheduler.lightllm import LightLLM
from vidur_simpy.replica_scheduler.mnemosyne import Mnemosyne
from vidur_simpy.replica_scheduler.orca import Orca
from vidur_simpy.replica_scheduler.sarathi import Sarathi
from vidur_simpy.replica_scheduler.vllm import Vllm
from vidur_simpy.replica_scheduler.vllm_v1 import VllmV1

__all__ = [
    "REPLICA_SCHEDULERS",
    "ContinuousBatching",
    "FasterTransformer",
    "LightLLM",
    "Mnemosyne",
    "Orca",
    "ReplicaResources",
    "ReplicaScheduler",
    "ReplicaSchedulerPolicy",
    "Sarathi",
    "Vllm",
    "VllmV1",
]

REPLICA_SCHEDULERS: dict[str, type] = {
    "faster_transformer": FasterTransformer,
    "lightllm": LightLLM,
    "mnemosyne": Mnemosyne,
    "orca": Orca,
    "sarathi": Sarathi,
    "vllm": Vllm,
    "vllm_v1": VllmV1,
}
