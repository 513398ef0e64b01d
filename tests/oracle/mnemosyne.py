"""The reference's Mnemosyne schedulers (sections 4.6 and 4.7), written out in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .vidur import PlainCase, PlainRequest
from .vidur_schedulers import Members, PlainScheduler

__all__ = ["PlainMnemosyne"]

MOST_SKIPPED = 10
MOST_TRIED = 1024  # tokens the search for a chunk looks at
MOST_CHUNK = 4096
CHUNK_MULTIPLE = 32
TABLE_STEP = 256


@dataclass
class Share:
    """A request's part in the sub-batch of one KV-parallel group."""

    request: PlainRequest
    num_tokens: int
    resident: int  # tokens of the request that the group holds already
    processed: int


class PlainMnemosyne(PlainScheduler):
    """Decodes first, then prefills as long as the batch keeps its time.

    `blocks` is request id -> {group: blocks}, in the order the groups hold the prompt.
    """

    def __init__(self, case: PlainCase) -> None:
        super().__init__(case)
        self.blocks: dict[int, dict[int, int]] = {}  # type: ignore[assignment]
        self.partial: list[PlainRequest] = []
        self.num_groups = case.kv_parallel_size
        if self.num_groups > 1:
            assert case.max_num_tokens_per_kvp_group is not None
            assert case.max_num_tokens_per_kvp_group % case.block_size == 0
            self.group_tokens = case.max_num_tokens_per_kvp_group
            self.group_blocks = case.blocks_for(self.group_tokens)
            assert self.group_blocks < case.num_blocks
        else:
            self.group_tokens = min(case.max_model_len, case.num_blocks * case.block_size)
            self.group_blocks = min(case.max_blocks_per_sequence, case.num_blocks)
        self.pending_work = [0] * self.num_groups
        self.sub_batches: list[list[Share]] = []  # of the batch being formed, by group
        self.predicted: list[float] = []
        self.batches_in_flight: list[list[list[Share]]] = []  # they end in order of formation
        self.prefill_times: list[float] = []
        if case.ordering != "fcfs":
            self.prefill_times = self.prefill_time_table()

    # --- requests -----------------------------------------------------------------------------

    def refuses(self, request: PlainRequest) -> bool:
        """V2; with several groups: what an empty replica could not hold."""
        case = self.case
        prompt_blocks = case.blocks_for(request.num_prefill_tokens)
        usable = case.num_blocks - case.watermark_blocks
        if super().refuses(request):
            return True
        if self.num_groups == 1:
            final_blocks = case.blocks_for(request.total_tokens - 1)
            return prompt_blocks > usable or final_blocks > case.num_blocks
        return (
            min(prompt_blocks, self.group_blocks) > usable
            or request.total_tokens - 1 > self.num_groups * self.group_tokens
        )

    def add(self, request: PlainRequest) -> None:
        self.waiting.append(request)
        if self.case.ordering != "fcfs":
            prefill_time = self.prefill_time(request.num_prefill_tokens, 0)
            request.deadline_time = max(  # E1: the multiplier counts
                prefill_time * self.case.deadline_multiplier, self.case.min_deadline
            )
            request.deadline = request.arrived_at + request.deadline_time

    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.partial)

    def everybody(self) -> list[PlainRequest]:
        return self.waiting + self.partial + self.running

    def is_prefilled(self, request: PlainRequest) -> bool:
        if self.case.sequence_pipeline_parallel:
            return request.prefill_stage_complete
        return request.prefill_complete

    def done(self, request: PlainRequest) -> int:
        """Mnemosyne's notion of processed tokens."""
        if self.case.sequence_pipeline_parallel and not request.prefill_stage_complete:
            return request.stage_processed
        return request.processed

    def at_stage_zero_end(self, requests: list[PlainRequest]) -> None:
        if self.case.sequence_pipeline_parallel:
            self.partial += [r for r in requests if not r.prefill_stage_complete]

    def at_batch_end(self, requests: list[PlainRequest]) -> None:
        for request in requests:
            if request.completed:
                del self.blocks[request.id]
            elif request.prefill_complete:
                self.running.append(request)
            elif not self.case.sequence_pipeline_parallel:
                self.partial.append(request)
        for group, shares in enumerate(self.batches_in_flight.pop(0)):
            for request in [share.request for share in shares]:
                if request.processed - request.num_prefill_tokens <= 1:  # K2: assigned
                    work = request.num_prefill_tokens**2 - self.done(request) ** 2
                    self.pending_work[group] = work

    # --- blocks -------------------------------------------------------------------------------

    def free_in(self, group: int) -> int:
        held = sum(groups.get(group, 0) for groups in self.blocks.values())
        return self.case.num_blocks - held

    @property
    def free_blocks(self) -> int:
        return min(self.free_in(group) for group in range(self.num_groups))

    def has_blocks(self, request: PlainRequest) -> bool:
        """Whether the whole prompt has its blocks, reserved now if it had not and may."""
        if request.id in self.blocks:
            return True
        if request.num_prefill_tokens > self.num_groups * self.group_tokens:
            return False
        # so that a restarted request can always come back
        spare = 0 if request.num_restarts > 0 and not self.blocks else self.case.watermark_blocks
        needed = self.case.blocks_for(request.num_prefill_tokens)
        num_groups = min(self.num_groups, -(-needed // self.group_blocks))
        order = sorted(range(self.num_groups), key=lambda group: self.pending_work[group])
        if num_groups == 1:
            for group in order:
                if self.free_in(group) - needed >= spare:
                    self.blocks[request.id] = {group: needed}
                    return True
            return False
        last_blocks = needed - self.group_blocks * (num_groups - 1)
        full: list[int] = []
        last: int | None = None
        for group in order:
            if self.free_in(group) - self.group_blocks >= spare:
                full.append(group)
            elif last is None and self.free_in(group) - last_blocks >= spare:
                last = group
            if len(full) + (last is not None) == num_groups:
                break
        else:
            return False
        if last:  # K1: group 0 is forgotten, and the request gets a group less
            full.append(last)
        self.blocks[request.id] = dict.fromkeys(full, self.group_blocks)
        self.blocks[request.id][full[-1]] = last_blocks
        for group in full:
            self.pending_work[group] += request.num_prefill_tokens**2
        return True

    def last_group(self, request: PlainRequest) -> int:
        return list(self.blocks[request.id])[-1]

    def send_back(self, request: PlainRequest) -> None:
        request.restart()
        del self.blocks[request.id]
        self.waiting.append(request)  # sorted before it is looked at

    def make_room(self, request: PlainRequest) -> bool:
        """Evict until the request may decode; False: it had to go itself."""
        group = self.last_group(request)
        while self.free_in(group) < 1:  # V1: even when no block is needed
            victims = [other for other in self.running if group in self.blocks[other.id]]
            if not victims:  # K3: also when others run, but not in this group
                self.send_back(request)
                return False
            self.running.remove(victims[-1])
            self.send_back(victims[-1])
        return True

    def grow(self, request: PlainRequest) -> None:
        held = sum(self.blocks[request.id].values())
        if request.processed > held * self.case.block_size:
            self.blocks[request.id][self.last_group(request)] += 1

    # --- batches ------------------------------------------------------------------------------

    def choose(self, now: float) -> Members:
        members: Members = []
        self.sub_batches = [[] for _ in range(self.num_groups)]
        self.predicted = [0.0] * self.num_groups
        while self.running and len(members) < self.case.max_micro_batch_size:
            request = self.running.pop(0)
            if self.make_room(request):
                self.grow(request)
                self.join(request, 1, members)
        for queue in (self.waiting, self.partial):
            queue.sort(key=lambda request: self.priority(request, now))
        for queue in (self.partial, self.waiting):
            self.scan(queue, members, now, MOST_SKIPPED)
        if not members and not self.batches_in_flight:
            # Ten that need blocks may stand before one that holds them: the reference stops here.
            self.scan(self.waiting, members, now, len(self.waiting))
        if members:
            self.batches_in_flight.append(self.sub_batches)
        return members

    def priority(self, request: PlainRequest, now: float) -> tuple[float, int]:
        if self.case.ordering == "fcfs":
            return request.arrived_at, request.id
        if self.case.ordering == "edf":
            assert request.deadline is not None
            return request.deadline, request.id
        return self.slack_fraction(request, now), 0  # lrs, st: ties keep their order

    def scan(
        self, queue: list[PlainRequest], members: Members, now: float, most_skipped: int
    ) -> None:
        position = 0
        while position < len(queue) and position < most_skipped:
            request = queue[position]
            num_tokens = self.tokens_if_it_may_join(request, members, now)
            if num_tokens == 0:
                position += 1
            else:
                queue.pop(position)
                self.join(request, num_tokens, members)

    def tokens_if_it_may_join(self, request: PlainRequest, members: Members, now: float) -> int:
        if request.id not in self.blocks and len(self.blocks) == self.case.max_num_seqs:
            return 0
        if len(members) == self.case.max_micro_batch_size:
            return 0
        if not self.has_blocks(request):
            return 0
        return self.chunk(request, now)

    def active_groups(self, request: PlainRequest) -> list[int]:
        groups = list(self.blocks[request.id])
        if self.is_prefilled(request):
            return groups
        return groups[: self.done(request) // self.group_tokens + 1]

    def resident_in(self, request: PlainRequest, group: int) -> int:
        active = self.active_groups(request)
        if group == active[-1]:
            return self.done(request) - self.group_tokens * (len(active) - 1)
        return self.group_tokens

    def join(self, request: PlainRequest, num_tokens: int, members: Members) -> None:
        members.append((request, num_tokens))
        for group in self.active_groups(request):
            resident = self.resident_in(request, group)
            share = Share(request, num_tokens, resident, self.done(request))
            self.sub_batches[group].append(share)
        if num_tokens != 1:  # C3: decodes, and tails of one token, are not predicted
            self.predicted = [
                self.sub_batch_time(shares) * self.case.pipeline_parallel_size if shares else 0.0
                for shares in self.sub_batches
            ]

    def sub_batch_time(self, shares: list[Share], tokens: int = 0, context: int = 0) -> float:
        """Per stage; `tokens` and `context` are those of a candidate."""
        return self.case.stage_time(
            sum(share.num_tokens for share in shares) + tokens,
            sum(share.resident + share.num_tokens for share in shares) + context,
        )

    def stage_time(self, members: Members) -> float:
        return max(self.sub_batch_time(shares) for shares in self.sub_batches if shares)

    # --- chunks (4.7) -------------------------------------------------------------------------

    def chunk(self, request: PlainRequest, now: float) -> int:
        """Tokens of the prompt to compute next, 0 for none in this batch."""
        active = self.active_groups(request)
        left = request.num_prefill_tokens - self.done(request)
        if self.case.chunk_size is not None:
            used = [sum(share.num_tokens for share in self.sub_batches[g]) for g in active]
            return max(0, min(left, self.case.chunk_size - max(used)))
        target = self.target(request, active, now)
        if target is None:
            return 0
        busiest = max(active, key=lambda group: self.predicted[group])  # the first of equals
        if self.predicted[busiest] > 0.9 * target:
            return 0
        resident = self.resident_in(request, busiest)

        def time_of(num_tokens: int) -> float:
            shares = self.sub_batches[busiest]
            per_stage = self.sub_batch_time(shares, num_tokens, resident + num_tokens)
            return per_stage * self.case.pipeline_parallel_size

        return search(left, target, time_of)

    def target(self, request: PlainRequest, active: list[int], now: float) -> float | None:
        """The time the batch should take; None when st lets no other long request in."""
        assert self.case.target_batch_time is not None
        threshold = self.case.long_request_threshold
        if self.case.ordering != "st" or self.done(request) < threshold:
            return self.case.target_batch_time
        shares = [share for group in active for share in self.sub_batches[group]]
        if any(share.processed > threshold for share in shares):  # T2: decodes too
            return None
        slack = min(0.5, max(0.0, self.slack_fraction(request, now)))
        return self.case.target_batch_time * (1 - slack)

    # --- deadlines ----------------------------------------------------------------------------

    def prefill_time_table(self) -> list[float]:
        """Seconds to prefill 0, 256, 512, ... tokens alone; T1: up to the longest request."""
        assert self.case.target_batch_time is not None
        table = [0.0]
        while (len(table) - 1) * TABLE_STEP < self.case.max_model_len:
            length, done, seconds = len(table) * TABLE_STEP, 0, 0.0
            while done < length:
                resident = done if done < self.group_tokens else self.group_tokens

                def time_of(num_tokens: int, resident: int = resident) -> float:
                    per_stage = self.case.stage_time(num_tokens, resident + num_tokens)
                    return per_stage * self.case.pipeline_parallel_size

                num_tokens = search(length - done, self.case.target_batch_time, time_of)
                seconds += time_of(num_tokens)
                done += num_tokens
            table.append(seconds)
        return table

    def prefill_time(self, num_tokens: int, done: int) -> float:
        until = self.prefill_times[-(-num_tokens // TABLE_STEP)]
        seconds = until - self.prefill_times[done // TABLE_STEP]
        if self.case.sequence_pipeline_parallel:
            return seconds / self.case.pipeline_parallel_size
        return seconds

    def slack_fraction(self, request: PlainRequest, now: float) -> float:
        assert request.deadline is not None
        assert request.deadline_time is not None
        left = self.prefill_time(request.num_prefill_tokens, self.done(request))
        return (request.deadline - now - left) / request.deadline_time


def search(left: int, target: float, time_of: Callable[[int], float]) -> int:
    """The number of tokens that brings the batch near its target time.

    C2: it halves an interval whose ends it never tries, in multiples of 32.
    """
    low, high = 0, min(left, MOST_TRIED, MOST_CHUNK)
    best, best_time = 0, 0.0
    seen = set()
    while low <= high:
        middle = (low + high) // 2
        if middle < left:
            middle = middle // CHUNK_MULTIPLE * CHUNK_MULTIPLE or min(left, CHUNK_MULTIPLE)
        middle = min(middle, MOST_CHUNK)
        if middle in seen or middle == 0:
            break
        seen.add(middle)
        time = time_of(middle)
        if 0.9 * target <= time <= 1.1 * target:
            return middle
        if best == 0 or abs(time - target) < abs(best_time - target):
            best, best_time = middle, time
        if time < 0.9 * target:
            low = middle
        else:
            high = middle
    return best
