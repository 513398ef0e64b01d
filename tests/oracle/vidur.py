"""A plain, slow re-statement of the reference simulator: a heap of events, lists of requests.

Nothing here is clever, and nothing comes from the package. Section numbers are those of the
reference's description beside the golden cases (``SEMANTICS.md``); letter and number (R1, S1, V2)
name the reference's bugs listed in its section 9, and say where this file deliberately differs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PlainBatch", "PlainCase", "PlainRequest", "PlainRun", "run_plainly"]

TYPE_NUMBERS = {
    "BATCH_STAGE_ARRIVAL": 1,
    "REQUEST_ARRIVAL": 2,
    "BATCH_STAGE_END": 3,
    "BATCH_END": 4,
    "GLOBAL_SCHEDULE": 5,
    "REPLICA_STAGE_SCHEDULE": 6,
    "REPLICA_SCHEDULE": 7,
}


@dataclass(frozen=True)
class PlainCase:
    """All that decides a run but its workload; names as in the package."""

    scheduler: str  # vllm | sarathi | orca | faster_transformer | lightllm | mnemosyne
    max_num_seqs: int = 128  # orca, faster_transformer: the resolved largest batch
    max_num_batched_tokens: int = 4096  # vllm, lightllm
    chunk_size: int | None = None  # sarathi; mnemosyne: given means fixed chunks
    max_waiting_iterations: int = 10  # lightllm
    ordering: str = "fcfs"  # mnemosyne: fcfs | edf | lrs | st
    target_batch_time: float | None = None  # mnemosyne without chunk_size
    deadline_multiplier: float = 1.5  # mnemosyne edf, lrs, st
    min_deadline: float = 0.5
    long_request_threshold: int = 256 * 1024  # mnemosyne st
    kv_parallel_size: int = 1  # mnemosyne
    max_num_tokens_per_kvp_group: int | None = None  # mnemosyne with several groups
    global_scheduler: str = "round_robin"
    num_replicas: int = 1
    pipeline_parallel_size: int = 1
    sequence_pipeline_parallel: bool = False  # sarathi, mnemosyne
    block_size: int = 16
    num_blocks: int = 1500
    watermark: float = 0.01
    max_model_len: int = 2048
    base: float = 0.004
    per_token: float = 2e-5
    per_context_token: float = 5e-8
    event_order: str = "type"

    def __post_init__(self) -> None:
        assert self.event_order in ("type", "id")
        assert self.max_num_seqs >= self.pipeline_parallel_size
        assert not self.sequence_pipeline_parallel or self.scheduler in ("sarathi", "mnemosyne")
        assert self.scheduler != "lightllm" or self.block_size == 1

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.num_blocks)

    @property
    def max_blocks_per_sequence(self) -> int:
        return self.max_model_len // self.block_size

    @property
    def max_micro_batch_size(self) -> int:
        return self.max_num_seqs // self.pipeline_parallel_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def stage_time(self, sum_tokens: int, sum_context: int) -> float:
        """One pipeline stage of a batch, in seconds; both sums are integers."""
        return (
            self.base + self.per_token * sum_tokens + self.per_context_token * sum_context
        ) / self.pipeline_parallel_size


@dataclass(eq=False)
class PlainRequest:
    """Section 2: a request and how far it has come."""

    id: int
    arrived_at: float
    num_prefill_tokens: int  # grows at restarts: what has to be computed again
    total_tokens: int
    processed: int = 0
    prefill_complete: bool = False
    stage_processed: int = 0
    prefill_stage_complete: bool = False
    replica_id: int | None = None
    refusal: bool = False
    scheduled_at: float | None = None
    first_token_at: float | None = None
    completed_at: float | None = None
    num_restarts: int = 0
    execution_time: float = 0.0
    preempted_time: float = 0.0
    last_stage_end: float | None = None
    deadline: float | None = None
    deadline_time: float | None = None

    @property
    def num_decode_tokens(self) -> int:
        return self.total_tokens - self.num_prefill_tokens

    @property
    def completed(self) -> bool:
        return self.completed_at is not None

    @property
    def next_tokens(self) -> int:
        """How much an unchunked policy computes next."""
        return 1 if self.prefill_complete else self.num_prefill_tokens

    def restart(self) -> None:
        """Throw the computed tokens away; S1: an unfinished prompt keeps its length."""
        if self.prefill_complete:
            self.num_prefill_tokens = self.processed
        self.processed = self.stage_processed = 0  # R1: the stage counters too
        self.prefill_complete = self.prefill_stage_complete = False
        self.num_restarts += 1

    def advance_stage(self, num_tokens: int) -> None:
        self.stage_processed += num_tokens
        if self.stage_processed == self.num_prefill_tokens:
            self.prefill_stage_complete = True
            self.stage_processed += 1

    def advance(self, num_tokens: int, now: float) -> None:
        self.processed += num_tokens
        if self.processed == self.num_prefill_tokens:
            self.prefill_complete = True
            self.processed += 1  # the end of the prefill yields one output token
            if self.first_token_at is None:
                self.first_token_at = now
        assert self.processed <= self.total_tokens
        if self.processed == self.total_tokens:
            self.completed_at = now


@dataclass(eq=False)
class PlainBatch:
    """Requests computed together; a member restarted since is of no account at the ends (R1)."""

    replica_id: int
    batch_index: int
    scheduled_at: float
    requests: list[PlainRequest]
    num_tokens: list[int]
    stage_time: float
    restarts: list[int]
    stage_starts: list[float] = field(default_factory=list)
    stage_ends: list[float] = field(default_factory=list)
    completed_at: float | None = None

    def members(self) -> list[tuple[PlainRequest, int]]:
        """(request, tokens) of those not restarted since the batch was formed."""
        return [
            (request, num_tokens)
            for request, num_tokens, restarts in zip(
                self.requests, self.num_tokens, self.restarts, strict=True
            )
            if request.num_restarts == restarts
        ]


@dataclass
class PlainRun:
    """What happened, as plain rows: requests by id, batches as formed, events as handled."""

    requests: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    events: list[tuple[float, str, int | None, int | None]]
    schedulers: list[Any]


class PlainReplica:
    """One replica: its scheduler, and a FIFO and a busy mark per pipeline stage."""

    def __init__(self, case: PlainCase) -> None:
        from .mnemosyne import PlainMnemosyne
        from .vidur_schedulers import CLASSIC_SCHEDULERS

        schedulers = {**CLASSIC_SCHEDULERS, "mnemosyne": PlainMnemosyne}
        self.scheduler = schedulers[case.scheduler](case)
        self.num_running_batches = 0
        self.num_batches = 0
        self.batch_before_stage_zero_end: PlainBatch | None = None
        self.queues: list[list[PlainBatch]] = [[] for _ in range(case.pipeline_parallel_size)]
        self.busy = [False] * case.pipeline_parallel_size


class PlainSimulation:
    """Section 1: the event loop and its handlers."""

    def __init__(self, case: PlainCase, workload: list[tuple[float, int, int]]) -> None:
        self.case = case
        self.requests = [
            PlainRequest(index, arrived_at, prefill, prefill + decode)
            for index, (arrived_at, prefill, decode) in enumerate(workload)
        ]
        self.replicas = [PlainReplica(case) for _ in range(case.num_replicas)]
        self.global_queue: list[PlainRequest] = []
        self.num_routed = 0
        self.batches: list[PlainBatch] = []
        self.events: list[tuple[float, str, int | None, int | None]] = []
        self.heap: list[Any] = []
        self.num_pushed = 0
        self.now = 0.0

    def push(self, time: float, event_type: str, *arguments: Any) -> None:
        type_number = TYPE_NUMBERS[event_type] if self.case.event_order == "type" else 0
        heapq.heappush(self.heap, (time, type_number, self.num_pushed, event_type, arguments))
        self.num_pushed += 1

    def run(self) -> None:
        for request in self.requests:
            self.push(request.arrived_at, "REQUEST_ARRIVAL", request)
        handlers = {name: getattr(self, name.lower()) for name in TYPE_NUMBERS}
        while self.heap:
            self.now, _, _, event_type, arguments = heapq.heappop(self.heap)
            handlers[event_type](*arguments)

    def record(self, name: str, replica_id: int | None = None, stage_id: int | None = None) -> None:
        self.events.append((self.now, name, replica_id, stage_id))

    def request_arrival(self, request: PlainRequest) -> None:
        self.record("REQUEST_ARRIVAL")
        if self.replicas[0].scheduler.refuses(request):
            request.refusal = True  # V2: the reference would let it block its queue for ever
            return
        self.global_queue.append(request)
        self.push(self.now, "GLOBAL_SCHEDULE")

    def global_schedule(self) -> None:
        self.record("GLOBAL_SCHEDULE")
        queue = sorted(self.global_queue, key=lambda request: request.arrived_at)
        self.global_queue = []
        loads = self.loads()
        affected = set()
        for request in queue:
            if self.case.global_scheduler == "round_robin":
                replica_id = self.num_routed % len(self.replicas)
            else:
                replica_id = loads.index(min(loads))
                loads[replica_id] += 1
            self.num_routed += 1
            affected.add(replica_id)
            request.replica_id = replica_id
            self.replicas[replica_id].scheduler.add(request)
        for replica_id in sorted(affected):
            self.push(self.now, "REPLICA_SCHEDULE", replica_id)

    def loads(self) -> list[int]:
        """Section 6: what each replica has, counted once per call of the global scheduler."""
        if self.case.global_scheduler == "least_waiting_requests":  # the reference's "lor"
            return [replica.scheduler.num_waiting() for replica in self.replicas]
        if self.case.global_scheduler == "least_outstanding_requests":
            on = [
                r.replica_id for r in self.requests if r.replica_id is not None and not r.completed
            ]
            return [on.count(index) for index in range(len(self.replicas))]
        assert self.case.global_scheduler == "round_robin"
        return []

    def replica_schedule(self, replica_id: int) -> None:
        self.record("REPLICA_SCHEDULE", replica_id)
        replica = self.replicas[replica_id]
        if replica.num_running_batches == self.case.pipeline_parallel_size:
            return
        if replica.batch_before_stage_zero_end is not None:
            return
        members = replica.scheduler.form(self.now)
        if not members:
            return
        requests = [request for request, _ in members]
        assert len({request.id for request in requests}) == len(requests)
        batch = PlainBatch(
            replica_id=replica_id,
            batch_index=replica.num_batches,
            scheduled_at=self.now,
            requests=requests,
            num_tokens=[num_tokens for _, num_tokens in members],
            stage_time=replica.scheduler.stage_time(members),
            restarts=[request.num_restarts for request in requests],
        )
        for request in requests:
            if request.scheduled_at is None:
                request.scheduled_at = self.now
        replica.num_running_batches += 1
        replica.num_batches += 1
        replica.batch_before_stage_zero_end = batch
        self.batches.append(batch)
        self.push(self.now, "BATCH_STAGE_ARRIVAL", batch, 0)

    def batch_stage_arrival(self, batch: PlainBatch, stage: int) -> None:
        self.record("BATCH_STAGE_ARRIVAL", batch.replica_id, stage)
        self.replicas[batch.replica_id].queues[stage].append(batch)
        self.push(self.now, "REPLICA_STAGE_SCHEDULE", batch.replica_id, stage)

    def replica_stage_schedule(self, replica_id: int, stage: int) -> None:
        self.record("REPLICA_STAGE_SCHEDULE", replica_id, stage)
        replica = self.replicas[replica_id]
        if replica.busy[stage] or not replica.queues[stage]:
            return
        batch = replica.queues[stage].pop(0)
        replica.busy[stage] = True
        batch.stage_starts.append(self.now)
        for request in batch.requests:
            if request.last_stage_end is not None:
                request.preempted_time += self.now - request.last_stage_end
        self.push(self.now + batch.stage_time, "BATCH_STAGE_END", batch, stage)

    def batch_stage_end(self, batch: PlainBatch, stage: int) -> None:
        self.record("BATCH_STAGE_END", batch.replica_id, stage)
        replica = self.replicas[batch.replica_id]
        replica.busy[stage] = False
        batch.stage_ends.append(self.now)
        for request in batch.requests:  # also of restarted ones: the work was done
            request.execution_time += batch.stage_time
            request.last_stage_end = self.now
        self.push(self.now, "REPLICA_STAGE_SCHEDULE", batch.replica_id, stage)
        if stage == self.case.pipeline_parallel_size - 1:
            self.push(self.now, "BATCH_END", batch)
        else:
            self.push(self.now, "BATCH_STAGE_ARRIVAL", batch, stage + 1)
        if stage == 0:
            replica.batch_before_stage_zero_end = None
            for request, num_tokens in batch.members():
                request.advance_stage(num_tokens)
            replica.scheduler.at_stage_zero_end([request for request, _ in batch.members()])
            self.push(self.now, "REPLICA_SCHEDULE", batch.replica_id)

    def batch_end(self, batch: PlainBatch) -> None:
        self.record("BATCH_END", batch.replica_id)
        replica = self.replicas[batch.replica_id]
        batch.completed_at = self.now
        replica.num_running_batches -= 1
        for request, num_tokens in batch.members():
            request.advance(num_tokens, self.now)
        replica.scheduler.at_batch_end([request for request, _ in batch.members()])
        self.push(self.now, "REPLICA_SCHEDULE", batch.replica_id)


def run_plainly(case: PlainCase, workload: list[tuple[float, int, int]]) -> PlainRun:
    """Simulate requests (arrived_at, num_prefill_tokens, num_decode_tokens), in id order."""
    simulation = PlainSimulation(case, workload)
    simulation.run()
    stuck = [r.id for r in simulation.requests if not r.completed and not r.refusal]
    assert not stuck, f"requests {stuck} are neither completed nor refused"
    requests = [
        {
            "request_id": request.id,
            "replica_id": request.replica_id,
            "arrived_at": request.arrived_at,
            "scheduled_at": request.scheduled_at,
            "first_token_at": request.first_token_at,
            "completed_at": request.completed_at,
            "num_restarts": request.num_restarts,
            "execution_time": request.execution_time,
            "preempted_time": request.preempted_time,
            "refusal": request.refusal,
            "deadline": request.deadline,
        }
        for request in simulation.requests
    ]
    batches = [
        {
            "replica_id": batch.replica_id,
            "batch_index": batch.batch_index,
            "scheduled_at": batch.scheduled_at,
            "stage0_start": batch.stage_starts[0],
            "stage0_end": batch.stage_ends[0],
            "completed_at": batch.completed_at,
            "request_ids": [request.id for request in batch.requests],
            "num_tokens": batch.num_tokens,
        }
        for batch in simulation.batches
    ]
    schedulers = [replica.scheduler for replica in simulation.replicas]
    return PlainRun(requests, batches, simulation.events, schedulers)
