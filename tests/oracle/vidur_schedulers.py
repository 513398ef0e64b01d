"""The reference's classic replica schedulers (section 4), each formation written out in full."""

from __future__ import annotations

from .vidur import PlainCase, PlainRequest

__all__ = ["CLASSIC_SCHEDULERS", "PlainScheduler"]

Members = list[tuple[PlainRequest, int]]


class PlainScheduler:
    """What all policies share: two lists of requests, and blocks per request."""

    def __init__(self, case: PlainCase) -> None:
        self.case = case
        self.waiting: list[PlainRequest] = []
        self.running: list[PlainRequest] = []  # in the system, not inside a batch
        self.blocks: dict[int, int] = {}  # request id -> blocks held

    @property
    def free_blocks(self) -> int:
        return self.case.num_blocks - sum(self.blocks.values())

    def refuses(self, request: PlainRequest) -> bool:
        """V2: whether the request could never be served."""
        return request.total_tokens > self.case.max_model_len

    def add(self, request: PlainRequest) -> None:
        self.waiting.append(request)

    def num_waiting(self) -> int:
        return len(self.waiting)

    def everybody(self) -> list[PlainRequest]:
        """Who is in a list, and so not inside a batch."""
        return self.waiting + self.running

    def form(self, now: float) -> Members:
        members = self.choose(now)
        self.check(members)
        return members

    def choose(self, now: float) -> Members:
        raise NotImplementedError

    def check(self, members: Members) -> None:
        """Nobody is in two places, and no block is given twice."""
        ids = [request.id for request in self.everybody()]
        ids += [request.id for request, _ in members]
        assert len(set(ids)) == len(ids)
        assert self.free_blocks >= 0
        assert all(num_tokens > 0 for _, num_tokens in members)

    def stage_time(self, members: Members) -> float:
        tokens = sum(num_tokens for _, num_tokens in members)
        context = sum(request.processed + num_tokens for request, num_tokens in members)
        return self.case.stage_time(tokens, context)

    def at_stage_zero_end(self, requests: list[PlainRequest]) -> None:
        """Nothing, but under sequence-pipeline parallelism."""

    def at_batch_end(self, requests: list[PlainRequest]) -> None:
        for request in requests:
            if request.completed:
                del self.blocks[request.id]
            else:
                self.running.append(request)

    def send_back(self, request: PlainRequest) -> None:
        """Preempt by recomputation: to the front of the waiting ones, without blocks."""
        request.restart()
        del self.blocks[request.id]
        self.waiting.insert(0, request)


class BlockwiseScheduler(PlainScheduler):
    """Block accounting of vllm and sarathi."""

    def refuses(self, request: PlainRequest) -> bool:
        prompt_blocks = self.case.blocks_for(request.num_prefill_tokens)
        return (
            super().refuses(request)
            or prompt_blocks > self.case.num_blocks - self.case.watermark_blocks
            or self.case.blocks_for(request.total_tokens - 1) > self.case.num_blocks
        )

    def is_admissible(self, request: PlainRequest) -> bool:
        if request.id in self.blocks:
            return self.free_blocks >= 1  # V1: even when none is needed
        needed = self.case.blocks_for(request.num_prefill_tokens)
        if request.num_restarts > 0 and not self.blocks:
            return needed <= self.case.num_blocks  # so that it can always come back
        return self.free_blocks - needed >= self.case.watermark_blocks

    def allocate(self, request: PlainRequest) -> None:
        if request.id not in self.blocks:
            self.blocks[request.id] = self.case.blocks_for(request.num_prefill_tokens)
        elif request.processed > self.blocks[request.id] * self.case.block_size:
            self.blocks[request.id] += 1

    def make_room(self, request: PlainRequest) -> bool:
        """Evict from the tail of `running` until the request may decode; False: it had to go."""
        while not self.is_admissible(request):
            if not self.running:
                self.send_back(request)
                return False
            self.send_back(self.running.pop())
        return True


class Vllm(BlockwiseScheduler):
    """Section 4.1."""

    def refuses(self, request: PlainRequest) -> bool:
        too_long = request.num_prefill_tokens > self.case.max_num_batched_tokens
        return super().refuses(request) or too_long

    def choose(self, now: float) -> Members:
        members = self.prompts() or self.decodes()
        if not members and not self.blocks:
            # The last request gave way to itself: nothing else would ever admit it again.
            members = self.prompts()
        return members

    def prompts(self) -> Members:
        members: Members = []
        while self.waiting and self.may_join(self.waiting[0], members):
            request = self.waiting.pop(0)
            self.allocate(request)
            members.append((request, request.num_prefill_tokens))
        return members

    def decodes(self) -> Members:
        members: Members = []
        self.running.sort(key=lambda request: request.arrived_at)
        while self.running and len(members) != self.case.max_micro_batch_size:
            request = self.running.pop(0)
            if self.make_room(request):
                self.allocate(request)
                members.append((request, 1))
        return members

    def may_join(self, request: PlainRequest, members: Members) -> bool:
        tokens = sum(num_tokens for _, num_tokens in members) + request.num_prefill_tokens
        fits = tokens <= self.case.max_num_batched_tokens
        comes_back = request.num_restarts > 0 and not members
        return (
            self.is_admissible(request)
            and (fits or comes_back)
            and len(self.blocks) != self.case.max_num_seqs
            and len(members) != self.case.max_micro_batch_size
        )


class Sarathi(BlockwiseScheduler):
    """Section 4.2, with and without sequence-pipeline parallelism."""

    def is_prefilled(self, request: PlainRequest) -> bool:
        if self.case.sequence_pipeline_parallel:
            return request.prefill_stage_complete
        return request.prefill_complete

    def chunk(self, request: PlainRequest, members: Members) -> int:
        done = request.processed
        if self.case.sequence_pipeline_parallel:
            done = request.stage_processed
        assert self.case.chunk_size is not None
        left = self.case.chunk_size - sum(num_tokens for _, num_tokens in members)
        return max(0, min(request.num_prefill_tokens - done, left))

    def choose(self, now: float) -> Members:
        members: Members = []
        prefills: list[PlainRequest] = []
        while self.running and len(members) != self.case.max_micro_batch_size:
            request = self.running.pop(0)
            if not self.is_prefilled(request):
                prefills.append(request)
            elif self.make_room(request):
                self.allocate(request)
                members.append((request, 1))
        skipped: list[PlainRequest] = []
        for request in prefills:  # B1: whatever the size of the batch
            num_tokens = self.chunk(request, members)
            if num_tokens > 0:
                members.append((request, num_tokens))
            else:
                skipped.append(request)
        self.running = sorted(skipped + self.running, key=lambda request: request.arrived_at)
        while self.waiting and self.may_join(self.waiting[0], members):
            request = self.waiting.pop(0)
            self.allocate(request)
            members.append((request, self.chunk(request, members)))
        return members

    def may_join(self, request: PlainRequest, members: Members) -> bool:
        return (
            len(self.blocks) != self.case.max_num_seqs
            and len(members) != self.case.max_micro_batch_size
            and self.is_admissible(request)
            and self.chunk(request, members) > 0
        )

    def at_stage_zero_end(self, requests: list[PlainRequest]) -> None:
        if self.case.sequence_pipeline_parallel:
            self.running += [r for r in requests if not r.prefill_stage_complete]

    def at_batch_end(self, requests: list[PlainRequest]) -> None:
        if self.case.sequence_pipeline_parallel:
            requests = [request for request in requests if request.prefill_complete]
        super().at_batch_end(requests)


class SlotScheduler(PlainScheduler):
    """Orca and FasterTransformer: every request gets the blocks of the longest sequence."""

    def admit(self, members: Members) -> None:
        slot = self.case.max_blocks_per_sequence
        while self.waiting and len(members) < self.case.max_num_seqs and self.free_blocks >= slot:
            request = self.waiting.pop(0)
            self.blocks[request.id] = slot
            members.append((request, request.next_tokens))


class Orca(SlotScheduler):
    """Section 4.3."""

    def choose(self, now: float) -> Members:
        members: Members = []
        while self.running and len(members) < self.case.max_num_seqs:
            request = self.running.pop(0)
            members.append((request, request.next_tokens))
        self.admit(members)
        return members


class FasterTransformer(SlotScheduler):
    """Section 4.4, but F1: the blocks of a request are free when it completes."""

    def __init__(self, case: PlainCase) -> None:
        super().__init__(case)
        self.unfinished_batches: list[list[PlainRequest]] = []

    def everybody(self) -> list[PlainRequest]:
        between_batches = [request for batch in self.unfinished_batches for request in batch]
        return self.waiting + between_batches

    def choose(self, now: float) -> Members:
        if self.unfinished_batches:
            return [(request, request.next_tokens) for request in self.unfinished_batches.pop(0)]
        members: Members = []
        self.admit(members)
        return members

    def at_batch_end(self, requests: list[PlainRequest]) -> None:
        for request in requests:
            if request.completed:
                del self.blocks[request.id]
        unfinished = [request for request in requests if not request.completed]
        if unfinished:
            self.unfinished_batches.append(unfinished)


class Lightllm(PlainScheduler):
    """Section 4.5, but L1: a decode batch that lacks blocks sends requests back."""

    def __init__(self, case: PlainCase) -> None:
        super().__init__(case)
        self.waiting_iterations = 0

    def refuses(self, request: PlainRequest) -> bool:
        prompt, total = request.num_prefill_tokens, request.total_tokens
        return (
            super().refuses(request)
            or prompt > self.case.max_num_batched_tokens
            # the estimate of a lone request, which for one output token is prompt + 1
            or max(total - 1, prompt + 1) >= self.case.num_blocks
        )

    def choose(self, now: float) -> Members:
        if not self.running:
            members = self.prefills()
            if members:
                self.waiting_iterations = 0
            return members
        if self.waiting_iterations >= self.case.max_waiting_iterations:
            self.waiting_iterations = 0
            members = self.prefills()
            if members:
                return members
        while self.free_blocks < len(self.running):
            self.send_back(self.running.pop())
        if not self.running:
            return []
        self.waiting_iterations += 1
        members = [(request, 1) for request in self.running]
        self.running = []
        for request, _ in members:
            self.blocks[request.id] += 1
        return members

    def prefills(self) -> Members:
        members: Members = []
        while self.waiting and self.may_join(self.waiting[0], members):
            request = self.waiting.pop(0)
            self.blocks[request.id] = request.num_prefill_tokens
            members.append((request, request.num_prefill_tokens))
        return members

    def may_join(self, request: PlainRequest, members: Members) -> bool:
        prompt = request.num_prefill_tokens
        tokens = sum(num_tokens for _, num_tokens in members) + prompt
        fits = tokens <= self.case.max_num_batched_tokens
        comes_back = request.num_restarts > 0 and not members
        needed = self.tokens_needed([*(admitted for admitted, _ in members), request])
        return (
            (fits or comes_back)
            and len(self.blocks) != self.case.max_num_seqs
            and len(members) != self.case.max_micro_batch_size
            and (needed < self.case.num_blocks or (comes_back and not self.blocks))
            and prompt <= self.free_blocks  # says something only with several stages
        )

    def tokens_needed(self, prefills: list[PlainRequest]) -> int:
        """The most tokens held at once from now on, if these prefills joined those running."""
        held_and_left = []
        for request in self.running:
            decoded = max(request.processed - request.num_prefill_tokens, 0)
            left = max(0, request.num_decode_tokens - decoded - 1)
            held_and_left.append((request.processed, left))
        for request in prefills:
            left = max(0, request.num_decode_tokens - 2)
            held_and_left.append((request.num_prefill_tokens + 1, left))
            # sorted after each one, as the reference does: it decides between equals
            held_and_left.sort(key=lambda pair: pair[1], reverse=True)
        return max(
            left * (index + 1) + sum(held for held, _ in held_and_left[: index + 1])
            for index, (_, left) in enumerate(held_and_left)
        )


CLASSIC_SCHEDULERS = {
    "vllm": Vllm,
    "sarathi": Sarathi,
    "orca": Orca,
    "faster_transformer": FasterTransformer,
    "lightllm": Lightllm,
}
