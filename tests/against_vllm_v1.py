"""Runs a case of the plain vLLM V1 engine on the package itself, and notes every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from oracle.vllm_v1 import PlainVllmV1Case, PlainVllmV1Request, PlainVllmV1Step

import vidur_simpy as vs
from vidur_simpy.replica_scheduler.vllm_v1_scheduler import VllmV1Scheduler
from vidur_simpy.workload import RequestArrays

SETTINGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_active_seqs",
    "policy",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "watermark",
    "scheduler_reserve_full_isl",
    "async_scheduling",
    "vllm_version",
)


@dataclass
class SeenStep:
    """A step with tokens or preemptions, named as the plain engine names it; times in seconds."""

    sched: float
    start: float = float("nan")
    end: float = float("nan")
    tokens: int = 0
    kv_tokens: int = 0
    scheduled: dict[int, int] = field(default_factory=dict)
    hits: dict[int, int] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    free_blocks_end: int = -1

    def assert_equals(self, theirs: PlainVllmV1Step, *, ticks: float, tolerance: float) -> None:
        """Say that it is what the plain engine did; times to `tolerance` seconds."""
        names = ["tokens", "kv_tokens", "hits", "preempted", "running", "waiting", "free_blocks"]
        times = ["sched"]
        if theirs.tokens:  # a step without tokens begins and ends nowhere
            names.append("free_blocks_end")
            times += ["start", "end"]
        for name in names:
            assert getattr(self, name) == getattr(theirs, name), (name, self, theirs)
        assert list(self.scheduled.items()) == list(theirs.scheduled.items()), (self, theirs)
        for name in times:
            expected = getattr(theirs, f"{name}_ns") / ticks
            assert abs(getattr(self, name) - expected) <= tolerance, (name, self, theirs)


class Watched(VllmV1Scheduler):
    """Notes what it plans; it decides as ever."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[SeenStep] = []
        self.open: dict[Any, SeenStep] = {}

    def _plan_step(self, now: float) -> Any:
        restarts = {request: request.num_restarts for request in self._states}
        running = set(self.running)
        batch = super()._plan_step(now)
        preempted = [
            request.request_id
            for request, count in restarts.items()
            if request.num_restarts > count
        ]
        if batch is None and not preempted:
            return None
        step = SeenStep(now, preempted=sorted(preempted), free_blocks=self.pool.num_free)
        step.running, step.waiting = self.num_running, self.num_waiting
        self.steps.append(step)
        if batch is None:
            return None
        step.tokens, step.kv_tokens = batch.num_tokens, batch.total_context
        step.scheduled = {request.request_id: count for request, count in batch.requests()}
        admitted = {state.request for state in self.running if state not in running}
        for chunk in batch.prefills:
            cached = chunk.context - chunk.num_tokens
            if chunk.request in admitted and cached:
                step.hits[chunk.request.request_id] = cached
        self.open[batch] = step
        return batch

    def end(self, batch: Any, now: float) -> Any:
        step = self.open.pop(batch)
        step.start, step.end = batch.stage_started_at, now
        completed = super().end(batch, now)
        step.free_blocks_end = self.pool.num_free
        return completed


class Given:
    """A workload of given requests, whose times are in so many ticks per second."""

    def __init__(self, workload: Sequence[PlainVllmV1Request], hash_size: int | None, ticks: float):
        self.workload = sorted(workload, key=lambda request: request.arrival_ns)
        self.hash_size = hash_size
        self.ticks = ticks

    def requests(self, *_: Any) -> RequestArrays:
        given = self.workload
        has_ids = self.hash_size is not None and any(row.hash_ids for row in given)
        return RequestArrays(
            np.array([row.arrival_ns for row in given]) / self.ticks,
            np.array([row.num_prompt_tokens for row in given]),
            np.array([row.num_output_tokens for row in given]),
            request_id=np.array([row.request_id for row in given]),
            priority=np.array([row.priority for row in given]),
            hash_ids=[np.array(row.hash_ids, np.int64) for row in given] if has_ids else None,
            hash_block_size=self.hash_size or 512,
        )


def policy_of(case: PlainVllmV1Case) -> vs.VllmV1:
    """The scheduler that a case describes."""
    return vs.VllmV1(**{name: getattr(case, name) for name in SETTINGS})


def cluster_of(case: PlainVllmV1Case, ticks: float = 1e9, **changes: Any) -> vs.Cluster:
    """The cluster that a case describes."""
    settings: dict[str, Any] = {
        "model": "llama-3.1-8b",
        "device": "h100-80gb-sxm",
        "max_model_len": case.max_model_len,
        "kv_cache": vs.KVCache(block_size=case.block_size, num_blocks=case.num_gpu_blocks),
        "replica_scheduler": policy_of(case),
        "execution_time": vs.Linear(
            base=case.base_ns / ticks,
            per_token=case.per_token_ns / ticks,
            per_context_token=case.per_kv_ns / ticks,
        ),
    }
    return vs.Cluster(**(settings | changes))


def simulation_of(
    case: PlainVllmV1Case,
    workload: Sequence[PlainVllmV1Request],
    ticks: float = 1e9,
    **options: Any,
) -> vs.Simulation:
    """A simulation whose only replica notes its steps, in ``replicas[0].scheduler.steps``.

    With ``ticks=1`` all times are whole numbers of seconds, so that sums of them are exact and
    what happens at one instant in the plain engine does so here.
    """

    def watched(resources: Any) -> Watched:
        return Watched(policy_of(case), resources)

    return vs.Simulation(
        cluster_of(case, ticks, replica_scheduler=watched),
        Given(workload, case.hash_block_size, ticks),
        progress=False,
        **options,
    )
