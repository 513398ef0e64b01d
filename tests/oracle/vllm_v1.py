"""The vLLM V1 scheduler and its engine loop, restated plainly, request by request.

Slow and obvious on purpose: every decision walks the lists that vLLM walks. It knows nothing of
the package it is compared with, nor of SimPy. All times are integer nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from .vllm_v1_blocks import PlainBlockPool
from .vllm_v1_case import (
    VLLM_VERSIONS,
    PlainVllmV1Case,
    PlainVllmV1Request,
    PlainVllmV1RequestRow,
    PlainVllmV1Run,
    PlainVllmV1Step,
    read_vllm_v1_case,
)

__all__ = [
    "VLLM_VERSIONS",
    "PlainVllmV1Case",
    "PlainVllmV1Request",
    "PlainVllmV1RequestRow",
    "PlainVllmV1Run",
    "PlainVllmV1Scheduler",
    "PlainVllmV1Step",
    "read_vllm_v1_case",
    "run_plainly",
]


class RequestState:
    """One request inside the engine; the letters are those of the rules.

    P prompt tokens, G generated ones, T = P + G known ones, C computed ones (their KV is, or is
    being, written), and the placeholders: outputs planned but not yet known.
    """

    def __init__(self, request: PlainVllmV1Request, case: PlainVllmV1Case) -> None:
        self.request, self.case = request, case
        self.row = PlainVllmV1RequestRow(request.request_id, request.arrival_ns)
        self.computed = 0
        self.placeholders = 0
        self.blocks: list[int] = []
        self.num_registered = 0
        self.keys: list[int] = []

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.row.output_tokens

    @property
    def is_finished(self) -> bool:
        enough = self.row.output_tokens >= self.request.num_output_tokens
        return enough or self.num_tokens >= self.case.max_model_len

    @property
    def last_token_in_flight(self) -> bool:
        """Whether a step in flight already yields the last token (asynchronous engine only)."""
        end = self.request.num_prompt_tokens + self.request.num_output_tokens
        return self.placeholders > 0 and self.computed + 2 - self.placeholders >= end

    def token(self, position: int) -> tuple[object, ...]:
        """Name the token at `position`: two names are equal iff the tokens are."""
        if position >= self.request.num_prompt_tokens:
            return ("output", self.request_id, position)
        size = self.case.hash_block_size
        if size is None or not self.request.hash_ids:
            return ("own prompt", self.request_id, position)
        return ("prompt", self.request.hash_ids[position // size], position % size)

    def full_block_keys(self, pool: PlainBlockPool, num_tokens: int) -> list[int]:
        """Return the keys of all blocks that the first `num_tokens` known tokens fill."""
        assert num_tokens <= self.num_tokens, "the tokens of a block must be known"
        size = self.case.block_size
        for index in range(len(self.keys), num_tokens // size):
            tokens = tuple(self.token(index * size + offset) for offset in range(size))
            self.keys.append(pool.chain_key(self.keys[-1] if self.keys else None, tokens))
        return self.keys[: num_tokens // size]


class PlainVllmV1Scheduler:
    """The scheduler's state, schedule() and the application of a step's outputs."""

    def __init__(self, case: PlainVllmV1Case) -> None:
        self.case = case
        self.pool = PlainBlockPool(case.num_gpu_blocks, unhashed_first=case.since("0.23.0"))
        self.running: list[RequestState] = []
        self.waiting: list[RequestState] = []  # in the order of service
        self.states: dict[int, RequestState] = {}
        self.budget = 0
        self.cap = 0

    @property
    def patience(self) -> int:
        """Return how many calls may pass without a token, far above what computing all takes."""
        return 100 + 10 * sum(state.num_tokens for state in self.running + self.waiting)

    def add(self, request: PlainVllmV1Request) -> None:
        """Take a request in, at the end of its queue."""
        assert 0 < request.num_prompt_tokens < self.case.max_model_len, f"{request}: prompt"
        assert request.num_output_tokens > 0, f"{request}: output"
        self.states[request.request_id] = state = RequestState(request, self.case)
        self.waiting.append(state)
        self._order_waiting()

    def schedule(self) -> PlainVllmV1Step:
        """Plan the next step."""
        step = PlainVllmV1Step()
        self.budget = self.case.max_num_batched_tokens
        self.cap = self._long_prefill_cap()
        self._plan_running(step)
        if not step.preempted:
            self._plan_waiting(step)
        for request_id, count in step.scheduled.items():
            self._advance(self.states[request_id], count, step)
        step.tokens = sum(step.scheduled.values())
        step.preempted.sort()
        step.running, step.waiting = len(self.running), len(self.waiting)
        step.free_blocks = self.pool.num_free
        return step

    def apply(self, step: PlainVllmV1Step) -> None:
        """Give every request that the step sampled its token; let the finished ones go."""
        for request_id in step.scheduled:
            if request_id in step.sampled:
                self._deliver(self.states[request_id], step.end_ns)
        step.free_blocks_end = self.pool.num_free

    # ---- the running requests, in list order -------------------------------------------------

    def _plan_running(self, step: PlainVllmV1Step) -> None:
        self.position = 0
        while self.position < len(self.running) and self.budget > 0:
            state = self.running[self.position]
            count = self._wanted(state)
            if count == 0:
                self.position += 1
                continue
            if not self._make_room(state, count, step):
                return  # the request was its own victim: nobody behind it is looked at
            self._plan(state, count, step)
            self.position += 1

    def _wanted(self, state: RequestState) -> int:
        if state.last_token_in_flight:
            return 0
        count = self._capped(state.num_tokens + state.placeholders - state.computed)
        return min(count, self.budget, self.case.max_model_len - state.computed - 1)

    def _make_room(self, state: RequestState, count: int, step: PlainVllmV1Step) -> bool:
        """Preempt until the blocks of `count` further tokens are free; False: itself went."""
        while self._missing_blocks(state, count) > self.pool.num_free:
            victim = self._victim()
            self._take_back(victim, step)
            self._preempt(victim, step)
            if victim is state:
                return False
        return True

    def _victim(self) -> RequestState:
        if self.case.policy == "fcfs":
            return self.running[-1]
        # max() keeps the first of equals: the one earliest in `running`
        return max(self.running, key=lambda state: _priority_key(state)[:2])

    def _take_back(self, victim: RequestState, step: PlainVllmV1Step) -> None:
        """Take the victim out of `running`, of this plan and of the budget spent so far."""
        index = self.running.index(victim)
        self.running.remove(victim)
        was_planned = victim.request_id in step.scheduled
        count = step.scheduled.pop(victim.request_id, 0)
        if self.case.since("0.11.2"):
            self.budget += count
        if index < self.position and (
            self.case.since("0.32.0") or (was_planned and self.case.since("0.11.2"))
        ):
            self.position -= 1

    def _preempt(self, victim: RequestState, step: PlainVllmV1Step) -> None:
        self._free(victim)
        victim.computed = victim.placeholders = 0
        victim.row.num_preemptions += 1
        step.preempted.append(victim.request_id)
        self.waiting.insert(0, victim)
        self._order_waiting()

    # ---- the waiting requests, from the head of the queue ------------------------------------

    def _plan_waiting(self, step: PlainVllmV1Step) -> None:
        limit = self.case.max_num_active_seqs or self.case.max_num_seqs
        position = 0
        while position < len(self.waiting) and self.budget > 0 and len(self.running) < limit:
            state = self.waiting[position]
            hits = self._lookup(state)
            num_cached = len(hits) * self.case.block_size
            count = self._capped(state.num_tokens - num_cached)
            if not self.case.enable_chunked_prefill and count > self.budget:
                if self.case.since("0.15.1"):
                    return
                position += 1  # 0.11.2 tries the next one
                continue
            count = min(count, self.budget)
            if not self._may_admit(state, hits, num_cached + count):
                return
            self.waiting.remove(state)
            self._admit(state, hits)
            self._plan(state, count, step)
            if hits:
                step.hits[state.request_id] = num_cached

    def _lookup(self, state: RequestState) -> list[int]:
        """Return the cached blocks to start from; the last token is never among them."""
        if not self.case.enable_prefix_caching:
            return []
        return self.pool.longest_hit(state.full_block_keys(self.pool, state.num_tokens - 1))

    def _may_admit(self, state: RequestState, hits: list[int], num_tokens: int) -> bool:
        """Say whether blocks for `num_tokens` tokens, and for the whole sequence, are free."""
        if self.case.scheduler_reserve_full_isl and self.case.since("0.19.1"):
            num_tokens = max(num_tokens, min(state.num_tokens, self.case.max_model_len))
        watermark = int(self.case.watermark * self.case.num_gpu_blocks) if self.running else 0
        needed = self.case.blocks_for(num_tokens) - len(hits)
        return needed + self.pool.num_unreferenced(hits) + watermark <= self.pool.num_free

    def _admit(self, state: RequestState, hits: list[int]) -> None:
        self.running.append(state)
        self.pool.touch(hits)
        state.blocks = list(hits)
        state.num_registered = len(hits)
        state.computed = len(hits) * self.case.block_size
        if state.row.cached_tokens_first_admission is None:
            state.row.cached_tokens_first_admission = state.computed

    # ---- both ---------------------------------------------------------------------------------

    def _long_prefill_cap(self) -> int:
        """Return the most tokens one request may get in this call; 0 is no limit."""
        cap = self.case.long_prefill_token_threshold
        num_requests = len(self.running) + len(self.waiting)
        if cap == 0 or not self.case.since("0.32.0"):
            return cap
        if num_requests <= 1:
            return 0
        if self.case.long_prefill_token_threshold_adaptive:
            return max(cap, self.case.max_num_batched_tokens // num_requests)
        return cap

    def _capped(self, count: int) -> int:
        return min(count, self.cap) if self.cap > 0 else count

    def _missing_blocks(self, state: RequestState, count: int) -> int:
        return max(0, self.case.blocks_for(state.computed + count) - len(state.blocks))

    def _plan(self, state: RequestState, count: int, step: PlainVllmV1Step) -> None:
        """Take the blocks, register the ones that the known tokens fill, spend the budget."""
        state.blocks += self.pool.take(self._missing_blocks(state, count))
        self._register(state, min(state.computed + count, state.num_tokens))
        step.scheduled[state.request_id] = count
        self.budget -= count

    def _register(self, state: RequestState, num_tokens: int) -> None:
        """Enter the blocks that the first `num_tokens` tokens fill in the cache."""
        if not self.case.enable_prefix_caching:
            return
        keys = state.full_block_keys(self.pool, num_tokens)
        for index in range(state.num_registered, len(keys)):
            self.pool.register(state.blocks[index], keys[index])
        state.num_registered = max(state.num_registered, len(keys))

    def _advance(self, state: RequestState, count: int, step: PlainVllmV1Step) -> None:
        """Count planned tokens as computed; a request that caught up will yield a token."""
        state.computed += count
        step.kv_tokens += state.computed
        state.row.scheduled_tokens_total += count
        if state.computed >= state.num_tokens + state.placeholders:
            state.placeholders += 1
            step.sampled.append(state.request_id)

    def _deliver(self, state: RequestState, now: int) -> None:
        """Append one token; a request preempted meanwhile (in `waiting`) gets it all the same."""
        state.placeholders = max(0, state.placeholders - 1)
        state.row.output_tokens += 1
        if state.row.first_token_ns is None:
            state.row.first_token_ns = now
        if state in self.running:
            self._register(state, state.computed - state.placeholders)
        if state.is_finished:
            state.row.finish_ns = now
            (self.running if state in self.running else self.waiting).remove(state)
            self._free(state)

    def _free(self, state: RequestState) -> None:
        self.pool.release(state.blocks)
        state.blocks, state.num_registered = [], 0

    def _order_waiting(self) -> None:
        if self.case.policy == "priority":
            self.waiting.sort(key=_priority_key)


def _priority_key(state: RequestState) -> tuple[int, int, int]:
    return (state.request.priority, state.request.arrival_ns, state.request_id)


def run_plainly(
    case: PlainVllmV1Case,
    workload: Sequence[PlainVllmV1Request],
    *,
    watch: Callable[[PlainVllmV1Scheduler], object] | None = None,
) -> PlainVllmV1Run:
    """Serve `workload` on the virtual clock until every request has finished.

    The synchronous engine keeps one step in flight, the asynchronous one up to two; steps run
    one after the other. Scheduling and output handling take no time.

    Parameters
    ----------
    case, workload
        The engine, and its requests (any order; equal arrivals are taken in the given order).
    watch : callable, optional
        Called with the scheduler after every plan and after every step's outputs.

    Raises
    ------
    RuntimeError
        If no request gets on any more: under the priority policy, requests that are equal in
        priority and arrival may evict one another for ever.
    """
    scheduler = PlainVllmV1Scheduler(case)
    arrivals = deque(sorted(workload, key=lambda request: request.arrival_ns))
    in_flight: deque[PlainVllmV1Step] = deque()
    steps: list[PlainVllmV1Step] = []
    now = free_at = num_fruitless_calls = 0
    while True:
        while arrivals and arrivals[0].arrival_ns <= now:
            scheduler.add(arrivals.popleft())
        has_requests = bool(scheduler.running or scheduler.waiting)
        if not has_requests and not in_flight:
            if not arrivals:
                break
            now = arrivals[0].arrival_ns
            continue
        if has_requests:
            step = scheduler.schedule()
            _run(step, case, now, free_at)
            free_at = step.end_ns
            in_flight.append(step)
            _note(step, steps, scheduler)
            num_fruitless_calls = 0 if step.sampled else num_fruitless_calls + 1
            if num_fruitless_calls > scheduler.patience:
                raise RuntimeError(f"no request gets on at {now} ns: they evict one another")
            if watch:
                watch(scheduler)
            if len(in_flight) < (2 if case.async_scheduling else 1):
                continue
        oldest = in_flight.popleft()
        now = oldest.end_ns
        scheduler.apply(oldest)
        if watch:
            watch(scheduler)
    return PlainVllmV1Run(steps, [scheduler.states[request.request_id].row for request in workload])


def _run(step: PlainVllmV1Step, case: PlainVllmV1Case, now: int, free_at: int) -> None:
    step.sched_ns, step.start_ns = now, max(now, free_at)
    duration = case.base_ns + case.per_token_ns * step.tokens + case.per_kv_ns * step.kv_tokens
    step.end_ns = step.start_ns + (duration if step.tokens else 0)


def _note(
    step: PlainVllmV1Step, steps: list[PlainVllmV1Step], scheduler: PlainVllmV1Scheduler
) -> None:
    """Keep the step if anything happened in it, and note each request's first start."""
    if not (step.tokens or step.preempted):
        return
    step.step = len(steps)
    steps.append(step)
    for request_id in step.scheduled:
        row = scheduler.states[request_id].row
        if row.first_scheduled_ns is None:
            row.first_scheduled_ns = step.start_ns
