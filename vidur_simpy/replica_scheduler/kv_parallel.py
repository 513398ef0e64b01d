"""KV-parallel groups: the KV cache of a long request spread over groups that attend in parallel.

A request fills one group after the other; all groups that hold some of it compute its tokens, and
the batch lasts as long as the slowest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vidur_simpy.decode_set import DecodeSet
from vidur_simpy.entities import Batch, PrefillChunk, Request
from vidur_simpy.errors import ConfigError
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.replica_scheduler.chunk_sizing import Draft, GrowingBatch, chunk_of

if TYPE_CHECKING:
    from vidur_simpy.execution_time import BatchCounts, StageTime

__all__ = ["GroupedBatch", "GroupedDraft", "KVParallelBlocks", "slowest_group"]


class KVParallelBlocks:
    """Who holds which blocks of which group.

    Parameters
    ----------
    pool : BlockPool
        Blocks of one group; from then on it stands for those of all groups together.
    num_groups : int
    num_tokens_each : int
        Tokens of one request that a group holds at most.

    Attributes
    ----------
    num_free : list of int
        Blocks nobody holds, by group.
    pending_work : list of int
        Prompt tokens squared that were given to each group, as Vidur counts them: only prompts of
        several groups add to it, and the end of every batch overwrites it.

    Raises
    ------
    ConfigError
        If the groups' size is no multiple of the block size, or not less than all blocks.

    Notes
    -----
    Vidur's bookkeeping is kept with its quirks: where some groups can take only the last part of a
    prompt and the first of these is group 0, it is forgotten, and the request is spread over one
    group less.
    """

    def __init__(self, pool: BlockPool, num_groups: int, num_tokens_each: int) -> None:
        if num_tokens_each % pool.block_size:
            raise ConfigError(
                f"max_num_tokens_per_kvp_group = {num_tokens_each}: expected a multiple of "
                f"kv_cache.block_size = {pool.block_size}."
            )
        if num_tokens_each >= pool.num_blocks * pool.block_size:
            raise ConfigError(
                f"max_num_tokens_per_kvp_group = {num_tokens_each}: expected less than the "
                f"{pool.num_blocks * pool.block_size} tokens that a group's {pool.num_blocks} "
                f"KV-cache blocks hold."
            )
        self.block_size = pool.block_size
        self.num_groups = num_groups
        self.num_tokens_each = num_tokens_each
        self.num_blocks_each = num_tokens_each // pool.block_size
        self.num_blocks = pool.num_blocks
        self.num_watermark_blocks = pool.num_watermark_blocks
        self.num_free = [pool.num_blocks] * num_groups
        self.pending_work = [0] * num_groups
        self._held: dict[Request, dict[int, int]] = {}  # blocks by group, in order of the prompt
        pool.num_blocks *= num_groups
        pool.num_free = pool.num_free_least = pool.num_blocks

    def reserve_prompt(self, request: Request) -> bool:
        """Reserve the blocks of the whole prompt, if enough groups have them beside the watermark.

        A restarted prompt that is alone on the replica may use the watermark.
        """
        if request.prefill_target > self.num_groups * self.num_tokens_each:
            return False
        is_alone = request.num_restarts > 0 and not self._held
        spare = 0 if is_alone else self.num_watermark_blocks
        num_blocks = -(-request.prefill_target // self.block_size)
        order = sorted(range(self.num_groups), key=self.pending_work.__getitem__)
        if num_blocks <= self.num_blocks_each:
            groups = [g for g in order if self.num_free[g] - num_blocks >= spare][:1]
            last_blocks = num_blocks
        else:
            groups, last_blocks = self._spread(num_blocks, order, spare)
            for group in groups:
                self.pending_work[group] += request.prefill_target**2
        if not groups:
            return False
        held = dict.fromkeys(groups, self.num_blocks_each)
        held[groups[-1]] = last_blocks
        self._held[request] = held
        for group, blocks in held.items():
            self.num_free[group] -= blocks
        return True

    def _spread(self, num_blocks: int, order: Sequence[int], spare: int) -> tuple[list[int], int]:
        """Choose groups for a prompt that needs several, and say what the last one gets of it.

        No groups where there are not enough.
        """
        num_groups = -(-num_blocks // self.num_blocks_each)
        last_blocks = num_blocks - self.num_blocks_each * (num_groups - 1)
        full: list[int] = []
        last: int | None = None
        for group in order:
            if self.num_free[group] - self.num_blocks_each >= spare:
                full.append(group)
            elif last is None and self.num_free[group] - last_blocks >= spare:
                last = group
            if len(full) + (last is not None) == num_groups:
                # As in Vidur: group 0 counts as none.
                return ([*full, last] if last else full), last_blocks
        return [], 0

    def grow(self, request: Request) -> int:
        """Reserve the block that the next decode step takes, if it takes one; return how many."""
        held = self._held[request]
        if request.num_processed_tokens <= sum(held.values()) * self.block_size:
            return 0
        last = self.last_group(request)
        held[last] += 1
        self.num_free[last] -= 1
        return 1

    def num_held(self, request: Request) -> int:
        """Blocks of a request in all groups."""
        return sum(self._held[request].values())

    def free(self, request: Request) -> None:
        """Give the blocks of a request back."""
        for group, blocks in self._held.pop(request).items():
            self.num_free[group] += blocks

    def last_group(self, request: Request) -> int:
        """Return the group that the decode steps of a request fill."""
        return next(reversed(self._held[request]))

    def is_in(self, group: int, request: Request) -> bool:
        """Whether a group holds blocks of a request."""
        return group in self._held[request]

    def residents(self, request: Request) -> list[tuple[int, int]]:
        """Return the groups that compute a request, each with the tokens of it that it holds."""
        groups = list(self._held[request])
        if request.is_prefill_complete:
            num_done = request.num_processed_tokens
        else:
            num_done = request.num_scheduled_tokens
            groups = groups[: num_done // self.num_tokens_each + 1]
        *earlier, last = groups
        residents = [(group, self.num_tokens_each) for group in earlier]
        return [*residents, (last, num_done - self.num_tokens_each * len(earlier))]


class GroupedBatch(Batch):
    """A batch of several KV-parallel groups.

    Attributes
    ----------
    parts : list of Batch
        What each group computes.
    """

    __slots__ = ("parts",)

    def __init__(
        self, decodes: DecodeSet | None, chunks: Sequence[PrefillChunk], parts: Sequence[Batch]
    ) -> None:
        super().__init__(decodes, chunks)
        self.parts = parts


class GroupPart(GrowingBatch):
    """The part of a batch that one KV-parallel group computes."""

    __slots__ = ("has_long",)

    def __init__(self) -> None:
        super().__init__()
        self.has_long = False

    def count_decode(self, num_resident: int) -> None:
        """Count a decode step beside so many tokens of the request in this group."""
        self.num_decodes += 1
        self.num_tokens += 1
        self.decode_context += num_resident + 1
        self.total_context += num_resident + 1
        self.num_attention_pairs += num_resident + 1


class GroupedDraft(Draft):
    """A batch of several KV-parallel groups that is being formed. O(requests in the batch).

    A request is computed, with the same tokens, in every group that holds some of it.
    """

    def __init__(
        self,
        decodes: DecodeSet | None,
        predict: Callable[[Batch], float],
        long_threshold: int,
        blocks: KVParallelBlocks,
    ) -> None:
        super().__init__(decodes, predict, long_threshold)
        self._chunks: list[PrefillChunk] = []
        self._blocks = blocks
        self._parts = [GroupPart() for _ in range(blocks.num_groups)]
        self._times = [0.0] * blocks.num_groups
        for request in decodes.members if decodes is not None else ():
            is_long = request.num_processed_tokens > long_threshold
            for group, num_resident in blocks.residents(request):
                self._parts[group].count_decode(num_resident)
                self._parts[group].has_long |= is_long

    def num_tokens_beside(self, request: Request) -> int:
        """Tokens that are computed beside those of a request, in its group with the most."""
        return max(self._parts[group].num_tokens for group, _ in self._blocks.residents(request))

    def predicted_beside(self, request: Request) -> float:
        """Predicted seconds of the slowest of a request's groups; see :class:`Draft`."""
        return max(self._times[group] for group, _ in self._blocks.residents(request))

    def has_long_beside(self, request: Request) -> bool:
        """Whether a long request is in one of a request's groups."""
        return any(self._parts[group].has_long for group, _ in self._blocks.residents(request))

    def time_with(self, request: Request, num_tokens: int) -> float:
        """Predict the seconds of the slowest of a request's groups with so many tokens of it."""
        group, num_resident = max(
            self._blocks.residents(request), key=lambda place: self._times[place[0]]
        )
        part = self._parts[group]
        part.push(PrefillChunk(request, num_tokens, num_resident + num_tokens))
        time = self._predict(part)
        part.pop()
        return time

    def add(self, request: Request, num_tokens: int, time: float) -> None:
        """Add a chunk of a request to each of its groups."""
        is_long = request.num_scheduled_tokens > self._threshold
        for group, num_resident in self._blocks.residents(request):
            part = self._parts[group]
            part.push(PrefillChunk(request, num_tokens, num_resident + num_tokens))
            part.has_long |= is_long
        self._chunks.append(chunk_of(request, num_tokens))
        self.num_requests += 1
        if num_tokens != 1:
            self._times = [self._predict(part) if part.num_tokens else 0.0 for part in self._parts]

    def finish(self) -> Batch:
        """Return the batch."""
        return GroupedBatch(self._decodes, self._chunks, self._parts)


def slowest_group(stage_time: StageTime) -> StageTime:
    """Return stage times where a batch of several groups lasts as long as the slowest of them."""

    def slowest(batch: BatchCounts, stage_id: int) -> float:
        if not isinstance(batch, GroupedBatch):
            return stage_time(batch, stage_id)
        return max(stage_time(part, stage_id) for part in batch.parts if part.num_tokens)

    return slowest
