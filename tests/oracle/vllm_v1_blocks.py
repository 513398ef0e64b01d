"""The block pool of vLLM V1, restated plainly: free list, references and prefix cache."""

from __future__ import annotations

__all__ = ["PlainBlockPool"]


class PlainBlockPool:
    """Blocks 1 .. num_gpu_blocks - 1 (block 0 is vLLM's null block and is never handed out).

    A block with no reference stands in the free list; it may still be cached, that is, carry a
    key under which a later request finds it, until it is handed out again.

    Parameters
    ----------
    num_gpu_blocks : int
        Blocks of the pool, the null block included.
    unhashed_first : bool
        Whether freed blocks without a key are reused before all others (releases since 0.23.0).
    """

    def __init__(self, num_gpu_blocks: int, *, unhashed_first: bool = True) -> None:
        self.num_usable = num_gpu_blocks - 1
        self.unhashed_first = unhashed_first
        self.free = list(range(1, num_gpu_blocks))
        self.references = dict.fromkeys(self.free, 0)
        self.key_of: dict[int, int] = {}
        self.blocks_of: dict[int, list[int]] = {}  # in the order of registration
        self._chain: dict[tuple[int | None, tuple[object, ...]], int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, cached ones included."""
        return len(self.free)

    def chain_key(self, parent: int | None, tokens: tuple[object, ...]) -> int:
        """Return the number that stands for `tokens` after the prefix `parent`: equal iff equal."""
        return self._chain.setdefault((parent, tokens), len(self._chain))

    def take(self, count: int) -> list[int]:
        """Hand out the first `count` blocks of the free list; they leave the cache."""
        assert count <= len(self.free), f"{count} blocks wanted, {len(self.free)} free"
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self._evict(block)
            self.references[block] = 1
        return taken

    def touch(self, blocks: list[int]) -> None:
        """Give each block a further reference; one that had none leaves the free list."""
        for block in blocks:
            if self.references[block] == 0:
                self.free.remove(block)
            self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop a reference of each block of one request, given from first to last."""
        hashed, unhashed = [], []
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0, f"block {block} released once too often"
            if self.references[block] == 0:
                cached = block in self.key_of or not self.unhashed_first
                (hashed if cached else unhashed).append(block)
        self.free = unhashed + self.free + hashed

    def register(self, block: int, key: int) -> None:
        """Enter a full block in the cache; one of the same content stays beside it."""
        assert block not in self.key_of, f"block {block} registered twice"
        self.key_of[block] = key
        self.blocks_of.setdefault(key, []).append(block)

    def longest_hit(self, keys: list[int]) -> list[int]:
        """Return the cached blocks of the longest prefix of `keys`, changing nothing."""
        found: list[int] = []
        for key in keys:
            if key not in self.blocks_of:
                break
            found.append(self.blocks_of[key][0])  # the earliest registered one still present
        return found

    def num_unreferenced(self, blocks: list[int]) -> int:
        """Return how many of `blocks` stand in the free list."""
        return sum(self.references[block] == 0 for block in blocks)

    def _evict(self, block: int) -> None:
        key = self.key_of.pop(block, None)
        if key is None:
            return
        self.blocks_of[key].remove(block)
        if not self.blocks_of[key]:
            del self.blocks_of[key]
