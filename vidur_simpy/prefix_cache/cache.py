"""The cache: which blocks are found, handed out, held and freed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.prefix_cache.content import Holder, Run

__all__ = ["NO_HIT", "Hit", "PrefixCache"]


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
    >>> from vidur_simpy.prefix_cache import Prefixes
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
        # By prefix, in order of registration: of equal blocks the earliest is found.
        self._runs: dict[int, list[Run]] = {}
        # Free blocks but for the blank ones at the head, which the pool counts: a ring of runs,
        # from behind this one without blocks around to before it.
        self._queue = queue = Run(0, 0, [], set())
        queue.previous = queue.next = queue
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
        first, runs_of = holder.num_blocks, self._runs
        if stop <= first:
            return
        run = Run(first, stop, holder.spans(first, stop), {holder})
        for prefix, _, _ in run.spans:
            runs = runs_of.get(prefix)
            if runs is None:
                runs_of[prefix] = [run]
            else:
                runs.append(run)
        holder.runs.append(run)
        holder.num_blocks = stop

    def longest_hit(self, holder: Holder, num_blocks: int) -> Hit:
        """Return the cached ones of a request's first blocks, up to a gap; changes nothing."""
        parts: list[tuple[Run, int, int]] = []
        position = num_unheld = 0
        for prefix, first, stop in holder.spans(0, num_blocks):
            for run, start, end in _earliest(self._runs.get(prefix, ()), first, stop):
                if not run.holders:
                    num_unheld += end - start
                position = end
                if parts and parts[-1][0] is run:
                    start = parts.pop()[1]
                parts.append((run, start, end))
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
            self._enqueue(num_blank, is_blank=True)
        if num_orphaned:
            self._enqueue(num_orphaned, is_blank=False)

    def _enqueue(self, num_blocks: int, *, is_blank: bool) -> None:
        """Queue blocks that nobody looks for; those side by side are alike."""
        self._num_queued += num_blocks
        last = self._queue.previous
        if last.spans or last.is_blank != is_blank or last is self._queue:
            Run(0, num_blocks, [], set(), is_blank).follow(last)
        else:
            last.stop += num_blocks

    def _reuse(self, num_blocks: int) -> None:
        """Hand out the first blocks of the queue."""
        self._num_queued -= num_blocks
        queue = self._queue
        run = queue.next
        num_evicted = 0
        while num_blocks:
            num_reused = run.stop - run.first
            if not run.is_blank:
                num_evicted += min(num_reused, num_blocks)
            if num_reused > num_blocks:
                run.stop -= num_blocks
                self._forget(run, run.stop)
                break
            num_blocks -= num_reused
            self._forget(run, run.first)
            reused, run = run, run.next
            reused.forget_neighbours()
        queue.next, run.previous = run, queue
        self.num_evicted_blocks += num_evicted

    def _forget(self, run: Run, first: int) -> None:
        """Let the blocks of a run from `first` on no longer be found."""
        spans = run.spans
        while spans and spans[-1][1] >= first:
            prefix = spans.pop()[0]
            runs = self._runs[prefix]
            if len(runs) == 1:
                del self._runs[prefix]
            else:
                runs.remove(run)

    def _split(self, run: Run, stop: int) -> Run:
        """Cut a run in two and return the blocks before `stop`, which are reused after the rest."""
        ahead = [span for span in run.spans if span[1] < stop]
        head = Run(run.first, stop, ahead, run.holders.copy())
        for prefix, _, _ in ahead:
            runs = self._runs[prefix]
            runs[runs.index(run)] = head
        rest = run.spans[len(ahead) :]
        if not rest or rest[0][1] > stop:  # the last prefix of the one is the first of the other
            rest.insert(0, (prefix, stop, ahead[-1][2]))
            runs.insert(runs.index(head), run)
        run.first, run.spans = stop, rest
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
