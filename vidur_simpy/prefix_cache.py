"""Prefix caching: KV-cache blocks that stay findable by their content after they are freed.

A block is held by requests, or free and blank, or free and cached: still found under its content
until it is handed out again. The rules are those of vLLM V1, block by block, but the work is done
by the run: blocks that are registered, held, freed and reused together cost as much as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

from vidur_simpy.kv_cache import BlockPool

__all__ = ["NO_HIT", "Hit", "Holder", "PrefixCache", "Prefixes", "Run"]


# Prefixes of free blocks that nobody looks for: without content, and with that of a request that
# is gone and like no other.
BLANK = -1
ORPHANED = -2


class Run:
    """Blocks of one prefix, one behind the other, that the same requests hold.

    Of a run that nobody holds the deepest block is reused first.

    Attributes
    ----------
    prefix : int
        Stands, with the index of a block, for its content and for all tokens before it.
    first, stop : int
        Index of the first block among those of a request, and of the one behind the last.
    holders : set of Holder
        Who uses the blocks.
    previous, next : Run
        Its neighbours in the queue of free blocks, if nobody does.
    """

    __slots__ = ("first", "holders", "next", "prefix", "previous", "stop")

    def __init__(self, prefix: int, first: int, stop: int) -> None:
        self.prefix = prefix
        self.first = first
        self.stop = stop
        self.holders: set[Holder] = set()
        self.previous = self.next = self

    def follow(self, previous: Run) -> None:
        """Enter the queue right behind another run."""
        behind = previous.next
        self.previous, self.next = previous, behind
        previous.next = behind.previous = self

    def leave_queue(self) -> None:
        """Leave the queue; the neighbours close up."""
        self.previous.next, self.next.previous = self.next, self.previous


class Hit(NamedTuple):
    """Cached blocks that a request can start from.

    Attributes
    ----------
    parts : sequence of (Run, int, int)
        Runs one behind the other, and of each the first block that is meant and the stop.
    num_blocks : int
    num_unheld : int
        Those of the blocks that no request uses.
    """

    parts: Sequence[tuple[Run, int, int]]
    num_blocks: int
    num_unheld: int


NO_HIT = Hit((), 0, 0)


class PrefixCache:
    """The blocks of a replica by their content.

    Blocks are handed out as numbers; they get an identity when they are registered. Free blocks
    are reused in this order: blank ones, then cached ones, the longest free first.

    Parameters
    ----------
    pool : BlockPool
        What is taken and released here is reserved and freed there.
    reuses_blank_first : bool
        Whether a freed block without content is reused before all cached ones; otherwise it
        queues up behind them.

    Attributes
    ----------
    num_evicted_blocks : int
        Cached blocks that were handed out again, and so forgotten.

    Examples
    --------
    >>> prefixes, cache = Prefixes(), PrefixCache(BlockPool(num_blocks=2, block_size=16))
    >>> ours, theirs = (Holder(prefixes, [7, 8], 16, 16, num_prefill_tokens=32) for _ in "ab")
    >>> cache.take(2)
    >>> cache.register(ours, 1)
    >>> cache.free(num_orphaned=0, num_blank=1)  # our second block was not full yet
    >>> cache.release(ours)
    >>> cache.longest_hit(theirs, 2).num_blocks
    1
    >>> cache.take(2)  # the blank one first, then the cached one
    >>> cache.longest_hit(theirs, 2).num_blocks, cache.num_evicted_blocks
    (0, 1)
    """

    def __init__(self, pool: BlockPool, *, reuses_blank_first: bool = True) -> None:
        self.pool = pool
        self.reuses_blank_first = reuses_blank_first
        self.num_evicted_blocks = 0
        # In order of registration: of equal blocks the earliest is found.
        self._runs: dict[int, list[Run]] = {}
        # Free blocks but for the blank ones at the head, which the pool counts: a ring of runs,
        # from behind this one without blocks around to before it.
        self._queue = Run(BLANK, 0, 0)
        self._num_queued = 0

    def take(self, num_blocks: int) -> None:
        """Hand out free blocks; cached ones are forgotten, longest free first.

        The caller has made sure that they are there.
        """
        num_blank = self.pool.num_free - self._num_queued
        self.pool.reserve(num_blocks)
        if num_blocks > num_blank:
            self._reuse(num_blocks - num_blank)

    def register(self, holder: Holder, stop: int) -> None:
        """Let the first `stop` blocks of a request be found, which were taken and are full now.

        Others of the same content stay beside them.
        """
        first, runs_of, held = holder.num_blocks, self._runs, holder.runs
        if stop <= first:
            return
        for prefix, start, end in holder.spans(first, stop):
            run = Run(prefix, start, end)
            run.holders.add(holder)
            held.append(run)
            runs = runs_of.get(prefix)
            if runs is None:
                runs_of[prefix] = [run]
            else:
                runs.append(run)
        holder.num_blocks = stop

    def longest_hit(self, holder: Holder, num_blocks: int) -> Hit:
        """Return the cached ones of a request's first blocks, up to a gap; changes nothing."""
        parts: list[tuple[Run, int, int]] = []
        position = num_unheld = 0
        for prefix, first, stop in holder.spans(0, num_blocks):
            for part in _earliest(self._runs.get(prefix, ()), first, stop):
                parts.append(part)
                run, start, position = part
                if not run.holders:
                    num_unheld += position - start
            if position < stop:
                break
        return Hit(parts, position, num_unheld)

    def hold(self, holder: Holder, hit: Hit) -> None:
        """Let a request that holds no blocks hold cached ones; free ones are so no longer."""
        for part, first, stop in hit.parts:
            run = part
            if run.first < first:
                self._split(run, first)
            if stop < run.stop:
                run = self._split(run, stop)
            if not run.holders:
                run.leave_queue()
            run.holders.add(holder)
            holder.runs.append(run)
        holder.num_blocks = hit.num_blocks
        self._num_queued -= hit.num_unheld
        self.pool.reserve(hit.num_unheld)

    def release(self, holder: Holder) -> None:
        """Let go of all blocks that a request has in the cache.

        The last one goes first, so that of one prefix the deepest blocks are evicted first.
        """
        num_unheld = 0
        for run in reversed(holder.runs):
            run.holders.remove(holder)
            if not run.holders:
                num_unheld += run.stop - run.first
                run.follow(self._queue.previous)
        self._num_queued += num_unheld
        self.pool.free(num_unheld)
        holder.runs = []
        holder.num_blocks = 0

    def free(self, num_orphaned: int, num_blank: int) -> None:
        """Let go of blocks that a request has beside, and behind, those in the cache.

        Parameters
        ----------
        num_orphaned : int
            Full ones that were not registered, because nobody will look for them. They are
            evicted in their turn all the same.
        num_blank : int
            The rest.
        """
        self.pool.free(num_orphaned + num_blank)
        if num_blank and not self.reuses_blank_first:
            self._enqueue(BLANK, num_blank)
        if num_orphaned:
            self._enqueue(ORPHANED, num_orphaned)

    def _enqueue(self, prefix: int, num_blocks: int) -> None:
        """Queue blocks that nobody looks for; those side by side are alike."""
        self._num_queued += num_blocks
        last = self._queue.previous
        if last.prefix == prefix and last is not self._queue:
            last.stop += num_blocks
        else:
            Run(prefix, 0, num_blocks).follow(last)

    def _reuse(self, num_blocks: int) -> None:
        """Hand out the first blocks of the queue."""
        self._num_queued -= num_blocks
        while num_blocks:
            run = self._queue.next
            num_reused = run.stop - run.first
            if num_reused > num_blocks:
                num_reused = num_blocks
                run.stop -= num_blocks
            else:
                run.leave_queue()
                if run.prefix >= 0:
                    self._forget(run)
            if run.prefix != BLANK:
                self.num_evicted_blocks += num_reused
            num_blocks -= num_reused

    def _forget(self, run: Run) -> None:
        runs = self._runs[run.prefix]
        if len(runs) == 1:
            del self._runs[run.prefix]
        else:
            runs.remove(run)

    def _split(self, run: Run, stop: int) -> Run:
        """Cut a run in two and return the blocks before `stop`, which are reused after the rest."""
        head = Run(run.prefix, run.first, stop)
        run.first = stop
        runs = self._runs[run.prefix]
        runs.insert(runs.index(run), head)
        head.holders |= run.holders
        for holder in run.holders:
            holder.runs.insert(holder.runs.index(run), head)
        if not run.holders:
            head.follow(run)
        return head


def _earliest(runs: Sequence[Run], first: int, stop: int) -> Iterator[tuple[Run, int, int]]:
    """Yield the parts of runs in which the blocks from `first` on are found, up to a gap."""
    while first < stop:
        end = stop
        for run in runs:
            if run.first <= first < run.stop:
                end = min(end, run.stop)
                break
            if first < run.first < end:
                end = run.first  # from there on it is the earlier one
        else:
            return
        yield run, first, end
        first = end


class Prefixes:
    """Numbers that stand for whole prefixes: equal exactly where the prefixes are.

    They take the place of the chained hashes of a real cache, without collisions.

    Examples
    --------
    >>> prefixes = Prefixes()
    >>> prefixes.chain([5, 6], 512), prefixes.chain([5, 7], 512)
    ([0, 1], [0, 2])
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[int, int], int] = {}
        self._next_id = count()

    def chain(self, hash_ids: Sequence[int], hash_block_size: int) -> list[int]:
        """Return a number for the prefix that ends with each of the hash ids."""
        chain = []
        prefix = -hash_block_size  # ids of other lengths name other tokens
        for hash_id in hash_ids:
            known = self._ids.get((prefix, hash_id))
            if known is None:
                known = self._ids[prefix, hash_id] = next(self._next_id)
            chain.append(known)
            prefix = known
        return chain

    def unique(self) -> int:
        """Return a number for a prefix that nothing else will ever share."""
        return next(self._next_id)


class Holder:
    """A request as the cache sees it: the contents of its blocks, and those that are in the cache.

    Prompt token ``p`` is named by ``hash_ids[p // hash_block_size]`` and its place in there, so a
    block is known by its index and the prefix up to the last hash id that it touches. A block that
    holds output tokens, or a prompt without hash ids, is like no other request's.

    Parameters
    ----------
    prefixes : Prefixes
        Shared by all requests of the cache.
    hash_ids : sequence of int
        May be empty.
    hash_block_size : int
        Tokens behind one hash id.
    block_size : int
        Tokens per KV-cache block.
    num_prefill_tokens : int
        Length of the prompt.

    Attributes
    ----------
    num_shareable : int
        Blocks, from the first, that other requests may have, too.
    runs : list of Run
        Those of its blocks that are in the cache, from the first.
    num_blocks : int
        Their number.

    Examples
    --------
    Two prompts of 40 tokens whose second 32 differ share their first two blocks:

    >>> prefixes = Prefixes()
    >>> ours, theirs = (Holder(prefixes, ids, 32, 16, 40) for ids in ([1, 2], [1, 3]))
    >>> list(ours.spans(0, 3)), list(theirs.spans(0, 3))
    ([(0, 0, 2), (2, 2, 3)], [(0, 0, 2), (4, 2, 3)])
    """

    __slots__ = (
        "_block_size",
        "_chain",
        "_hash_block_size",
        "_own",
        "num_blocks",
        "num_shareable",
        "runs",
    )

    def __init__(
        self,
        prefixes: Prefixes,
        hash_ids: Sequence[int],
        hash_block_size: int,
        block_size: int,
        num_prefill_tokens: int,
    ) -> None:
        self._chain = prefixes.chain(hash_ids, hash_block_size)
        self._own = prefixes.unique()
        self._hash_block_size = hash_block_size
        self._block_size = block_size
        self.num_shareable = num_prefill_tokens // block_size if self._chain else 0
        self.runs: list[Run] = []
        self.num_blocks = 0

    def spans(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield prefixes, each with the first and the stop of its blocks, from `first` to `stop`.

        A block and its prefix are equal to those of others exactly where the content is.
        """
        block_size, hash_block_size = self._block_size, self._hash_block_size
        last = min(stop, self.num_shareable)
        while first < last:
            place = ((first + 1) * block_size - 1) // hash_block_size
            end = min(last, (place + 1) * hash_block_size // block_size)
            yield self._chain[place], first, end
            first = end
        if first < stop:
            yield self._own, first, stop
