"""Instant after instant of the plain loop: ends of batches, arrivals, formations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush, heapreplace
from math import inf, nan
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vidur_simpy.plain_loop.completions import Completions, Row
from vidur_simpy.plain_loop.lane import END_ONLY, STUCK
from vidur_simpy.plain_loop.pipeline import PipelineLane
from vidur_simpy.plain_loop.single_stage import SingleStageLane
from vidur_simpy.replica_scheduler.ordering import WaitingQueue
from vidur_simpy.replica_scheduler.sarathi import SarathiScheduler
from vidur_simpy.replica_scheduler.vllm import VllmScheduler

if TYPE_CHECKING:
    from vidur_simpy.entities import Request
    from vidur_simpy.kernel import Environment
    from vidur_simpy.processes import Replica, Router
    from vidur_simpy.workload import RequestArrays

__all__ = ["ExpectedRequests", "after_plain_loop"]

# Schedulers whose rules the lanes know.
_ON_ONE_STAGE, _IN_PIPELINES = (SarathiScheduler, VllmScheduler), (SarathiScheduler,)

# Completed requests are taken away as columns when there are so many.
_FEW, _MANY = 128, 4_096

# Arrivals that are Python numbers at a time.
_ROWS_AT_A_TIME = 4_096


class ExpectedRequests(Protocol):
    """The requests of a workload, made when they are asked for."""

    @property
    def table(self) -> RequestArrays:
        """All of them as columns."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody watches how far they are."""

    def made(self, row: int) -> Request:
        """Make one request."""

    def made_from(self, first: int) -> Iterator[Request]:
        """Make each request from row `first` on when it is asked for."""

    def keep(self, columns: Mapping[str, Any]) -> None:
        """Take the columns of requests that are complete and were never made."""


def after_plain_loop(
    requests: ExpectedRequests, router: Router, env: Environment
) -> Iterable[Request]:
    """Run as far as the loop can, from instant 0 on; return the requests that are left."""
    may_run = env.is_unobserved and not router.may_look and env.peek() > env.now
    if not (may_run and all(map(_knows, router.replicas))):
        return requests.made_from(0)
    loop = _Loop(requests, router, env)
    try:
        loop.run()
    finally:
        loop.close()
    return requests.made_from(loop.num_arrived)


def _knows(replica: Replica) -> bool:
    """Whether the loop knows a replica's policy, its queue and its execution times."""
    scheduler: Any = replica.scheduler
    stage_time = replica.stages[0].stage_time
    return (
        type(scheduler) in (_IN_PIPELINES if replica.num_stages > 1 else _ON_ONE_STAGE)
        and type(scheduler.waiting) is WaitingQueue
        and not scheduler.resources.sequence_pipeline_parallel
        and hasattr(stage_time, "decode_times")
        # A model of the user's may look at more of a batch than its counts: here is nothing more.
        and str(stage_time.__module__).startswith("vidur_simpy.")
    )


class _Loop:
    """The lanes of all replicas on one clock."""

    def __init__(self, requests: ExpectedRequests, router: Router, env: Environment) -> None:
        self.requests = requests
        self.router = router
        self.env = env
        # Until then the lane that was sent the present instant may go on by itself.
        self.horizon = [inf]
        self.num_arrived = 0
        # Whoever watches the progress sees requests when they are taken away.
        many = _FEW if requests.is_watched else _MANY
        self.completions = Completions(len(router.replicas), many)
        self.lanes = [
            (SingleStageLane if replica.num_stages == 1 else PipelineLane)(
                replica, self.completions, self.horizon, requests.made
            )
            for replica in router.replicas
        ]

    def close(self) -> None:
        """Leave every replica to its processes."""
        self.router.num_received += self.num_arrived
        for lane in self.lanes:
            lane.close()
        self._keep()

    def _keep(self) -> None:
        """Hand over the requests that are complete."""
        if self.completions.members:
            self.requests.keep(self.completions.columns(self.requests.table))
            self.completions.forget()

    def run(self) -> None:
        """Handle one instant after the other, until somebody else is due or it cannot go on."""
        env, lanes, horizon = self.env, self.lanes, self.horizon
        sends = [lane.send for lane in lanes]
        runs = [lane.run for lane in lanes]
        choose = self._choice()
        num_outstanding, members = self.completions.num_outstanding, self.completions.members
        many = self.completions.many
        # When the batch under way of each replica ends; in the heap those that have one. An entry
        # of the heap is void when a run was cut, since its replica has an earlier one then.
        ends = [inf] * len(lanes)
        heap: list[tuple[float, int]] = []
        arrivals = self._arrivals()
        nothing = (inf, (0, 0, 0, inf))
        arrives_at, row = next(arrivals, nothing)
        stops_at = env.peek()  # the end of `run(until)`, or an event of the user's
        while not env.is_interrupted:
            upcoming = arrives_at if arrives_at < stops_at else stops_at
            while heap and heap[0][0] < upcoming:
                now, index = heap[0]
                if now != ends[index]:
                    heappop(heap)
                    continue
                # The second and the third of a heap are the candidates for what comes next.
                until = upcoming
                if len(heap) > 1 and heap[1][0] < until:
                    until = heap[1][0]
                if len(heap) > 2 and heap[2][0] < until:
                    until = heap[2][0]
                horizon[0] = until
                ends[index] = ends_at = sends[index](now)
                if len(members) >= many:
                    self._keep()
                if ends_at == inf:
                    heappop(heap)
                elif ends_at == STUCK:
                    return
                else:
                    heapreplace(heap, (ends_at, index))
                if env.is_interrupted:
                    return
            if upcoming == stops_at:
                break
            env._now = now = horizon[0] = arrives_at
            to_form = []
            while heap and heap[0][0] == now:
                _, index = heappop(heap)
                if ends[index] == now:
                    ends[index] = sends[index](END_ONLY)  # not a number: between two batches
                    to_form.append(index)
            while arrives_at == now:
                self.num_arrived += 1
                if row[0] < 0:
                    row = (~row[0], *row[1:])
                    if self._is_refused(row[0]):
                        arrives_at, row = next(arrivals, nothing)
                        continue
                index = choose(row[0])
                num_outstanding[index] += 1
                lane = lanes[index]
                if ends[index] == inf or (lane.is_open and ends[index] == ends[index]):
                    ends[index] = nan
                    to_form.append(index)
                elif runs[index].num_steps and lane.note_arrival(now):
                    ends[index] = runs[index].ends_at
                    heappush(heap, (ends[index], index))
                lane.waiting.append(row)
                lane.arrived_at = now
                arrives_at, row = next(arrivals, nothing)
            for index in to_form:
                ends[index] = ends_at = sends[index](now)
                if ends_at == STUCK:
                    return
                if ends_at != inf:
                    heappush(heap, (ends_at, index))

    def _arrivals(self) -> Iterator[tuple[float, Row]]:
        """Each instant of arrival with its row; those that may be too long have ``~row``."""
        table = self.requests.table
        longest_prompt, longest = _admitted_lengths(self.router.replicas[0])
        for first in range(0, len(table), _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            prompts, outputs = table.num_prefill_tokens[rows], table.num_decode_tokens[rows]
            numbers = np.arange(first, first + len(prompts))
            is_long = (prompts > longest_prompt) | (prompts + outputs > longest)
            numbers[is_long] = ~numbers[is_long]
            instants = table.arrived_at[rows].tolist()
            columns = (column.tolist() for column in (numbers, prompts, outputs))
            yield from zip(instants, zip(*columns, instants, strict=True), strict=True)

    def _is_refused(self, row: int) -> bool:
        """Ask the router about a request that may be too long; it says why."""
        self.router.num_received -= 1  # all are counted at the end
        return not self.router.admits(self.requests.table.request(row))

    def _choice(self) -> Callable[[int], int]:
        """Return what chooses the replica, by number, of the request in a row."""
        lanes, num_outstanding = self.lanes, self.completions.num_outstanding
        route: Any = self.router.route
        fewest = getattr(route, "fewest", None)
        numbers = range(len(lanes))
        if len(lanes) == 1:
            return lambda row: 0
        if fewest == "num_outstanding":
            return lambda row: num_outstanding.index(min(num_outstanding))
        if fewest == "num_waiting":

            def choose(row: int) -> int:
                num_waiting = [len(lane.waiting) for lane in lanes]
                return num_waiting.index(min(num_waiting))

            return choose
        if getattr(route, "ignores_requests", False):
            return lambda row: route(None, numbers)
        # A shard's router, which looks at the request alone.
        return lambda row: route(self.requests.table.request(row), numbers)


def _admitted_lengths(replica: Replica) -> tuple[int, int]:
    """Return up to which prompt and up to which length a request is not refused, in tokens.

    Of longer ones the router knows, and says why.
    """
    pool, scheduler = replica.pool, replica.scheduler
    prompt = (pool.num_blocks - pool.num_watermark_blocks) * pool.block_size
    if isinstance(scheduler, VllmScheduler):
        prompt = min(prompt, scheduler.max_num_batched_tokens)
    assert isinstance(scheduler, SarathiScheduler | VllmScheduler)
    return prompt, min(scheduler.resources.max_model_len, pool.num_blocks * pool.block_size + 1)
