"""What blocks contain: names for prefixes, the blocks of a request, and runs of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import count
from operator import itemgetter
from typing import TypeAlias

__all__ = ["Holder", "Prefixes", "Run", "Span"]

Span: TypeAlias = tuple[int, int, int]
"""A prefix, and the first and the stop of the blocks whose content it tells."""

_first_of, _stop_of = itemgetter(1), itemgetter(2)


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
        self._ids: dict[tuple[int | None, int], int] = {}
        self._next_id = count()

    def chain(self, hash_ids: Sequence[int], hash_block_size: int) -> list[int]:
        """Return a number for the prefix that ends with each of the hash ids."""
        ids, chain = self._ids, []
        prefix: int | None = -hash_block_size  # ids of other lengths name other tokens
        for hash_id in hash_ids:
            key = (prefix, hash_id)
            prefix = ids.get(key)
            if prefix is None:
                prefix = ids[key] = next(self._next_id)
            chain.append(prefix)
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
    >>> ours.spans(0, 3), theirs.spans(0, 3)
    ([(0, 0, 2), (2, 2, 3)], [(0, 0, 2), (4, 2, 3)])
    """

    __slots__ = ("_own", "_spans", "num_blocks", "num_shareable", "runs")

    def __init__(
        self,
        prefixes: Prefixes,
        hash_ids: Sequence[int],
        hash_block_size: int,
        block_size: int,
        num_prefill_tokens: int,
    ) -> None:
        chain = prefixes.chain(hash_ids, hash_block_size)
        self._own = prefixes.unique()
        self.num_shareable = num_prefill_tokens // block_size if chain else 0
        self.runs: list[Run] = []
        self.num_blocks = 0
        self._spans: list[Span] = []
        first = num_tokens = 0
        for prefix in chain:
            num_tokens += hash_block_size
            stop = num_tokens // block_size
            if stop > first:
                self._spans.append((prefix, first, stop))
                first = stop

    def spans(self, first: int, stop: int) -> list[Span]:
        """Return prefixes, each with the first and the stop of its blocks, from `first` to `stop`.

        A block and its prefix are equal to those of others exactly where the content is.
        """
        last = min(stop, self.num_shareable)
        spans = []
        if first < last:
            place = bisect_right(self._spans, first, key=_stop_of)
            spans = self._spans[place : bisect_left(self._spans, last, place, key=_first_of)]
            prefix, begin, end = spans[0]
            if begin < first:
                spans[0] = prefix, first, end
            prefix, begin, end = spans[-1]
            if end > last:
                spans[-1] = prefix, begin, last
            first = last
        if first < stop:
            spans.append((self._own, first, stop))
        return spans


class Run:
    """Blocks of a request, one behind the other, that the same requests hold.

    Of a run that nobody holds the deepest block is reused first.

    Parameters
    ----------
    first, stop : int
        Index of the first block among those of a request, and of the one behind the last.
    spans : list of Span
        What the blocks contain. Without any, nobody looks for them: the request is gone, and like
        no other. The last may reach beyond the run.
    holders : set of Holder
        Who uses the blocks.
    is_blank : bool
        Whether the blocks have no content.

    Attributes
    ----------
    previous, next : Run
        Its neighbours in the queue of free blocks, if nobody holds it.
    """

    __slots__ = ("first", "holders", "is_blank", "next", "previous", "spans", "stop")

    previous: Run
    next: Run

    def __init__(
        self,
        first: int,
        stop: int,
        spans: list[Span],
        holders: set[Holder],
        is_blank: bool = False,
    ) -> None:
        self.first = first
        self.stop = stop
        self.spans = spans
        self.holders = holders
        self.is_blank = is_blank

    def follow(self, previous: Run) -> None:
        """Enter the queue right behind another run."""
        behind = previous.next
        self.previous, self.next = previous, behind
        previous.next = behind.previous = self

    def leave_queue(self) -> None:
        """Leave the queue; the neighbours close up."""
        self.previous.next, self.next.previous = self.next, self.previous
        self.forget_neighbours()

    def forget_neighbours(self) -> None:
        """Refer to no other run: a circle of them would stay in memory."""
        del self.previous, self.next
