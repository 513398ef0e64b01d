"""The KV-cache blocks of vLLM V1's requests: counted, and with prefix caching known by content."""

from __future__ import annotations

from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.prefix_cache import Block, BlockKeys, PrefixCache, Prefixes
from vidur_simpy.replica_scheduler.vllm_v1_steps import RequestState

__all__ = ["RequestBlocks"]


class RequestBlocks:
    """Takes, finds and frees the blocks of requests.

    A running request holds blocks for its computed tokens. Without a prefix cache blocks are all
    alike and only counted.

    Parameters
    ----------
    pool : BlockPool
        One of its blocks is set aside: vLLM's null block, which is never handed out.
    cache : PrefixCache or None
        None to count only.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache | None) -> None:
        pool.reserve(1)
        self.pool = pool
        self.cache = cache
        self._prefixes = Prefixes()
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0

    @property
    def figures(self) -> dict[str, float]:
        """What the prefix cache did, as columns of the table of replicas."""
        if self.cache is None:
            return {}
        queried, hit = self._num_queried_tokens, self._num_hit_tokens
        return {
            "num_cached_tokens": hit,
            "prefix_cache_hit_rate": hit / queried if queried else 0.0,
            "num_evicted_blocks": self.cache.num_evicted_blocks,
        }

    def longest_hit(self, state: RequestState) -> list[Block]:
        """Return the cached blocks to start from; the last token is never among them."""
        if self.cache is None:
            return []
        request, block_size = state.request, self.pool.block_size
        if state.keys is None:
            state.keys = BlockKeys(
                self._prefixes,
                request.hash_ids or (),
                request.hash_block_size,
                block_size,
                request.num_prefill_tokens,
            )
        return self.cache.longest_hit(state.keys.of(0, (request.prefill_target - 1) // block_size))

    def hold(self, state: RequestState, hits: list[Block]) -> None:
        """Let a request that is admitted hold the cached blocks that it starts from."""
        if self.cache is None:
            return
        num_tokens = len(hits) * self.pool.block_size
        self.cache.touch(hits)
        state.blocks = hits
        state.request.start_prefill(num_tokens)
        self._num_hit_tokens += num_tokens
        self._num_queried_tokens += state.request.prefill_target

    def take(self, num_blocks: int) -> None:
        """Take blocks that are free, for one request or for many."""
        if self.cache is None:
            self.pool.reserve(num_blocks)
        else:
            self.cache.take(num_blocks)

    def share(self, state: RequestState, num_tokens: int) -> None:
        """Let other requests find the blocks that the first `num_tokens` tokens of one fill."""
        if self.cache is not None:
            assert state.keys is not None, f"{state.request} was never looked up"
            num_filled = num_tokens // self.pool.block_size
            self._register(self.cache, state, min(num_filled, state.keys.num_shareable))

    def suspend(self, state: RequestState, num_tokens: int, num_findable: int) -> None:
        """Free the blocks of a request's first `num_tokens` tokens, which are all it holds.

        Those that `num_findable` tokens fill it can find when it comes back.
        """
        num_blocks = self.pool.blocks_of(num_tokens)
        if self.cache is None:
            self.pool.free(num_blocks)
            return
        self._register(self.cache, state, num_findable // self.pool.block_size)
        self.cache.release(state.blocks, 0, num_blocks - len(state.blocks))
        state.blocks = []

    def finish(self, state: RequestState, num_tokens: int) -> None:
        """Free the blocks of a request's first `num_tokens` tokens for good."""
        num_blocks = self.pool.blocks_of(num_tokens)
        if self.cache is None:
            self.pool.free(num_blocks)
            return
        # What only the request itself would find needs no entry any more.
        num_filled = num_tokens // self.pool.block_size
        num_orphaned = num_filled - len(state.blocks)
        self.cache.release(state.blocks, num_orphaned, num_blocks - num_filled)

    def _register(self, cache: PrefixCache, state: RequestState, stop: int) -> None:
        assert state.keys is not None, f"{state.request} was never looked up"
        state.blocks += map(cache.register, state.keys.of(len(state.blocks), stop))
