"""The cluster a workload runs on: what it is made of, and how it decides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SkipValidation

from vidur_simpy.deployment import Deployment
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.execution_time import EXECUTION_TIMES, Roofline, StageTime, stage_time_of
from vidur_simpy.global_scheduler import GLOBAL_SCHEDULERS, RoundRobin
from vidur_simpy.hardware import Device, Model
from vidur_simpy.kv_cache import BlockPool, KVCache
from vidur_simpy.replica_scheduler import (
    REPLICA_SCHEDULERS,
    ReplicaResources,
    ReplicaScheduler,
    Sarathi,
)
from vidur_simpy.replica_scheduler.kv_parallel import slowest_group
from vidur_simpy.validation import configuration, takes

__all__ = ["Cluster"]

# What a ReplicaScheduler has to have.
SCHEDULER_MEMBERS = (
    "num_waiting",
    "num_running",
    "refusal",
    "add",
    "schedule",
    "end_first_stage",
    "end",
)


@configuration
class Cluster:
    """Equal replicas of one model, each on its own devices.

    Attributes
    ----------
    model : str, Mapping or Model
        Catalogue name (``"llama-3.1-8b"``), path to a Hugging Face ``config.json`` or the folder
        that holds it, its content, the fields of a :class:`Model`, or one.
    device : str, Mapping or Device
        Catalogue name (``"h100-80gb-sxm"``), the fields of a :class:`Device`, or one.
    num_replicas : int
    tensor_parallel_size, pipeline_parallel_size : int
        Devices per pipeline stage, and stages per replica.
    data_parallel_size : int
        Replicas that share one set of experts; each schedules on its own.
    enable_expert_parallel : bool
        Give each device whole experts, where otherwise each expert is cut in pieces.
    quantization : str or None
        What weights are quantized with: fp8, int8, int4, awq, gptq, mxfp4, or bf16 for none; None
        takes the model as it was published. See :class:`Deployment`.
    kv_cache_dtype : str
        ``"auto"`` for bf16, or ``"fp8"``.
    max_model_len : int or None
        Longest prompt and output together, in tokens; what the model knows if None.
    kv_cache : KVCache
    replica_scheduler : ReplicaSchedulerPolicy, str or callable
        Forms batches; a callable makes a scheduler from :class:`ReplicaResources`.
    global_scheduler : GlobalScheduler, str or callable
        Routes requests; a callable is ``route(request, replicas) -> replica``.
    execution_time : ExecutionTime, str or callable
        A callable gives the seconds of a batch, ``f(batch)`` or ``f(batch, stage_id)``.
    sequence_pipeline_parallel : bool
        Let the chunks of one prompt follow each other through the pipeline (``sarathi`` and
        ``mnemosyne``).

    Raises
    ------
    ConfigError
        A setting that is unknown, of the wrong type or out of range.
    CapacityError
        The model does not fit the devices.

    Examples
    --------
    >>> cluster = Cluster(model="llama-3.1-8b", device="h100-80gb-sxm", num_replicas=4)
    >>> cluster.replica_scheduler
    Sarathi(max_num_seqs=128, chunk_size=512, ordering='fcfs')
    >>> Cluster(replica_scheduler="sarthi")
    Traceback (most recent call last):
    ...
    vidur_simpy.errors.ConfigError: unknown replica_scheduler 'sarthi': did you mean 'sarathi'? \
Known: faster_transformer, lightllm, mnemosyne, orca, sarathi, vllm, \
vllm_v1.
    """

    model: Annotated[str | Mapping[str, Any] | Model, SkipValidation] = "llama-3.1-8b"
    device: Annotated[str | Mapping[str, Any] | Device, SkipValidation] = "h100-80gb-sxm"
    num_replicas: int = Field(default=1, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1)
    enable_expert_parallel: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=2)
    kv_cache: KVCache = KVCache()
    replica_scheduler: Annotated[Any, SkipValidation] = Sarathi()
    global_scheduler: Annotated[Any, SkipValidation] = RoundRobin()
    execution_time: Annotated[Any, SkipValidation] = Roofline()
    sequence_pipeline_parallel: bool = False

    def __post_init__(self) -> None:
        for field, table, method in (
            ("replica_scheduler", REPLICA_SCHEDULERS, "for_replica"),
            ("global_scheduler", GLOBAL_SCHEDULERS, "router"),
            ("execution_time", EXECUTION_TIMES, "for_replica"),
        ):
            policy = named(field, getattr(self, field), table)
            is_class_of_policies = isinstance(policy, type) and hasattr(policy, method)
            if is_class_of_policies or not (hasattr(policy, method) or callable(policy)):
                hint = f"; write {policy.__name__}(...)" if is_class_of_policies else ""
                raise ConfigError(
                    f"Cluster.{field} = {policy!r}: expected a name, a callable or an object with "
                    f"a method {method!r}{hint}."
                )
            object.__setattr__(self, field, policy)
        route = self.global_scheduler
        if not (hasattr(route, "router") or takes(route, "request", "replicas")):
            raise ConfigError(
                f"Cluster.global_scheduler = {route!r}: expected a function of (request, replicas)."
            )
        deployment = self._deployment()
        if self.num_replicas % self.data_parallel_size:
            raise ConfigError(
                f"Cluster.data_parallel_size = {self.data_parallel_size} does not divide the "
                f"num_replicas = {self.num_replicas}, which share experts in such groups."
            )
        max_model_len = self.max_model_len or deployment.model.max_position
        if not max_model_len:
            raise ConfigError(
                f"Cluster.max_model_len = None: {deployment.model.name} does not say how long "
                "sequences may be; expected a number of tokens."
            )
        num_blocks = self.kv_cache.num_blocks
        if num_blocks is None:
            num_blocks = deployment.plan_num_blocks(
                block_size=self.kv_cache.block_size,
                gpu_memory_utilization=self.kv_cache.gpu_memory_utilization,
                max_model_len=max_model_len,
            )
        object.__setattr__(self, "_plan", (deployment, max_model_len, num_blocks))
        self.make_scheduler(self.make_pool(), self.stage_time())

    def _deployment(self) -> Deployment:
        try:
            return Deployment(
                model=_model(self.model),
                device=_device(self.device),
                tensor_parallel_size=self.tensor_parallel_size,
                pipeline_parallel_size=self.pipeline_parallel_size,
                data_parallel_size=self.data_parallel_size,
                enable_expert_parallel=self.enable_expert_parallel,
                quantization=self.quantization,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        except ConfigError as error:
            # Those are settings of the cluster; nobody wrote a deployment.
            raise ConfigError(str(error).replace("Deployment.", "Cluster.", 1)) from None

    @property
    def deployment(self) -> Deployment:
        """The model on the devices of one replica."""
        return self._plan[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def max_tokens(self) -> int:
        """Longest prompt and output together: `max_model_len`, or what the model knows."""
        return self._plan[1]  # type: ignore[attr-defined, no-any-return]

    @property
    def num_blocks(self) -> int:
        """KV-cache blocks per replica, given or planned."""
        return self._plan[2]  # type: ignore[attr-defined, no-any-return]

    @property
    def num_devices(self) -> int:
        """Devices of all replicas."""
        return self.num_replicas * self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_time(self) -> StageTime:
        """Make the function that gives the seconds of a batch on a stage."""
        stage_time = stage_time_of(self.execution_time, self.deployment)
        if getattr(self.replica_scheduler, "kv_parallel_size", 1) > 1:
            return slowest_group(stage_time)
        return stage_time

    def make_pool(self) -> BlockPool:
        """Make the KV-cache blocks of one replica."""
        return BlockPool(self.num_blocks, self.kv_cache.block_size, self.kv_cache.watermark)

    def make_scheduler(
        self, pool: BlockPool, stage_time: StageTime | None = None
    ) -> ReplicaScheduler:
        """Make the scheduler of a replica with this `pool`; it may predict by `stage_time`."""
        resources = ReplicaResources(
            pool=pool,
            max_model_len=self.max_tokens,
            pipeline_parallel_size=self.pipeline_parallel_size,
            sequence_pipeline_parallel=self.sequence_pipeline_parallel,
            stage_time=stage_time,
        )
        make = getattr(self.replica_scheduler, "for_replica", self.replica_scheduler)
        scheduler: ReplicaScheduler = make(resources)
        for name in SCHEDULER_MEMBERS:
            if not hasattr(scheduler, name):
                raise ConfigError(
                    f"Cluster.replica_scheduler gave {scheduler!r}, which has no {name!r}: "
                    f"expected {', '.join(SCHEDULER_MEMBERS)}."
                )
        return scheduler


def named(field: str, policy: Any, table: Mapping[str, type]) -> Any:
    """Return a policy; a name stands for the policy of the table with its usual settings."""
    if not isinstance(policy, str):
        return policy
    if policy not in table:
        raise unknown_name(field, policy, table)
    return table[policy]()


def _model(model: str | Mapping[str, Any] | Model) -> Model:
    """Return the model that a name, a path, a ``config.json`` or our own fields describe."""
    if isinstance(model, Model):
        return model
    if isinstance(model, Mapping):
        huggingface = "model_type" in model or "num_hidden_layers" in model
        return Model.from_huggingface(model) if huggingface else Model(**_by_name(model))
    if str(model).endswith(".json") or (Path(str(model)) / "config.json").is_file():
        return Model.from_huggingface(model)
    return Model.from_name(model)


def _device(device: str | Mapping[str, Any] | Device) -> Device:
    """Return the device that a name or our own fields describe."""
    if isinstance(device, Device):
        return device
    return Device(**_by_name(device)) if isinstance(device, Mapping) else Device.from_name(device)


def _by_name(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Return keyword arguments; YAML also knows keys that are no names."""
    return {str(name): value for name, value in fields.items()}
