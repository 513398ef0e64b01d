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

    def register(self, state: RequestState, num_tokens: int) -> None:
        """Let the blocks that a request's first `num_tokens` tokens fill be found in the cache."""
        if self.cache is None:
            return
        assert state.keys is not None, f"{state.request} was never looked up"
        keys = state.keys.of(len(state.blocks), num_tokens // self.pool.block_size)
        state.blocks += map(self.cache.register, keys)

    def release(self, state: RequestState, num_tokens: int, num_filled: int) -> None:
        """Free the blocks of a request's first `num_tokens` tokens, which are all it holds.

        Those that `num_filled` tokens fill can be found from now on. Output tokens are like no
        other request's, so that it is soon enough when the request itself could look for them.
        """
        num_blocks = self.pool.blocks_of(num_tokens)
        if self.cache is None:
            self.pool.free(num_blocks)
        else:
            self.register(state, num_filled)
            self.cache.release(state.blocks, num_blocks - len(state.blocks))
            state.blocks = []
