"""Prefix caching: KV-cache blocks that stay findable by their content after they are freed.

A block is held by requests, or free and blank, or free and cached: still found under its key until
it is handed out again. The rules are those of vLLM V1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from vidur_simpy.kv_cache import BlockPool

__all__ = ["Block", "BlockKeys", "PrefixCache", "Prefixes", "num_unheld"]


# Keys of free blocks that nobody looks for: without content, and with that of a request that is
# gone and like no other.
BLANK = -1
ORPHANED = -2


class Block:
    """A KV-cache block that requests may share.

    Attributes
    ----------
    key : int
        Stands for its content and for all tokens before it.
    num_holders : int
        Requests that use it.
    num_alike : int
        Blocks that this one stands for: more than one only where nobody looks for them.
    """

    __slots__ = ("key", "num_alike", "num_holders")

    def __init__(self, key: int, num_holders: int = 0, num_alike: int = 1) -> None:
        self.key = key
        self.num_holders = num_holders
        self.num_alike = num_alike


class PrefixCache:
    """The blocks of a replica by their content.

    Blocks are handed out as numbers; one gets an identity when it is registered under its key.
    Free blocks are reused in this order: blank ones, then cached ones, the longest free first.

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
    >>> cache = PrefixCache(BlockPool(num_blocks=2, block_size=16))
    >>> cache.take(2)
    >>> cache.release([cache.register(key=7)], num_orphaned=0, num_blank=1)
    >>> len(cache.longest_hit([7, 8]))
    1
    >>> cache.take(2)  # the blank one first, then the cached one
    >>> cache.longest_hit([7, 8]), cache.num_evicted_blocks
    ([], 1)
    """

    def __init__(self, pool: BlockPool, *, reuses_blank_first: bool = True) -> None:
        self.pool = pool
        self.reuses_blank_first = reuses_blank_first
        self.num_evicted_blocks = 0
        # Free blocks but for the blank ones at the head, which are counted by the pool.
        self._queue: OrderedDict[Block, None] = OrderedDict()
        self._num_queued = 0
        # By key: of the blocks still there the one registered first, and the others in order.
        self._cached: dict[int, Block] = {}
        self._copies: dict[int, list[Block]] = {}

    def __len__(self) -> int:
        """Return how many contents are cached; blocks of equal content count once."""
        return len(self._cached)

    def take(self, num_blocks: int) -> None:
        """Hand out free blocks; cached ones are forgotten, longest free first.

        The caller has made sure that they are there.
        """
        num_blank = self.pool.num_free - self._num_queued
        self.pool.reserve(num_blocks)
        if num_blocks > num_blank:
            self._reuse(num_blocks - num_blank)

    def register(self, key: int) -> Block:
        """Let a block that was taken, and is full now, be found under `key`.

        Others of the same content stay beside it.
        """
        block = Block(key, num_holders=1)
        if self._cached.setdefault(key, block) is not block:
            self._copies.setdefault(key, []).append(block)
        return block

    def touch(self, blocks: Iterable[Block]) -> None:
        """Let one more request hold cached blocks; those that were free are so no longer."""
        for block in blocks:
            if not block.num_holders:
                del self._queue[block]
                self._num_queued -= 1
                self.pool.reserve(1)
            block.num_holders += 1

    def release(self, blocks: Sequence[Block], num_orphaned: int, num_blank: int) -> None:
        """Let go of all blocks of one request.

        The last one goes first, so that of one prefix the deepest blocks are evicted first.

        Parameters
        ----------
        blocks : sequence of Block
            Those that were registered, in the order of the request's tokens.
        num_orphaned : int
            Full ones behind them that were not, because nobody will look for them. They are
            evicted in their turn all the same.
        num_blank : int
            The rest.
        """
        self.pool.free(num_orphaned + num_blank)
        if num_blank and not self.reuses_blank_first:
            self._enqueue(Block(BLANK, num_alike=num_blank))
        if num_orphaned:
            self._enqueue(Block(ORPHANED, num_alike=num_orphaned))
        for block in reversed(blocks):
            block.num_holders -= 1
            if not block.num_holders:
                self.pool.free(1)
                self._enqueue(block)

    def longest_hit(self, keys: Iterable[int]) -> list[Block]:
        """Return the cached blocks of the longest prefix of `keys`; changes nothing."""
        blocks = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _enqueue(self, block: Block) -> None:
        self._queue[block] = None
        self._num_queued += block.num_alike

    def _reuse(self, num_blocks: int) -> None:
        """Hand out the first blocks of the queue."""
        self._num_queued -= num_blocks
        while num_blocks:
            block = next(iter(self._queue))
            num_reused = min(num_blocks, block.num_alike)
            num_blocks -= num_reused
            block.num_alike -= num_reused
            if not block.num_alike:
                del self._queue[block]
            if block.key != BLANK:
                self.num_evicted_blocks += num_reused
            if block.key >= 0:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        """Take a block that is handed out again out of the cache."""
        key = block.key
        copies = self._copies.get(key)
        if copies is None:
            del self._cached[key]
            return
        if self._cached[key] is block:
            self._cached[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._copies[key]


def num_unheld(blocks: Iterable[Block]) -> int:
    """Return how many of the blocks no request uses."""
    return sum(not block.num_holders for block in blocks)


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


class BlockKeys:
    """The keys of one request's blocks.

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

    Examples
    --------
    Two prompts of 40 tokens whose second 32 differ share their first two blocks:

    >>> prefixes = Prefixes()
    >>> ours, theirs = (BlockKeys(prefixes, ids, 32, 16, 40) for ids in ([1, 2], [1, 3]))
    >>> [a == b for a, b in zip(ours.of(0, 3), theirs.of(0, 3))]
    [True, True, False]
    """

    __slots__ = ("_block_size", "_chain", "_hash_block_size", "_own", "num_shareable")

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

    def of(self, first: int, stop: int) -> Iterator[int]:
        """Yield the keys of the blocks with the indices `first` to ``stop - 1``."""
        for index in range(first, stop):
            if index < self.num_shareable:
                last_token = (index + 1) * self._block_size - 1
                prefix = self._chain[last_token // self._hash_block_size]
            else:
                prefix = self._own
            # Exact: a cache of 2**32 blocks of one request does not exist.
            yield prefix << 32 | index
