"""The KV-cache blocks of vLLM V1's requests: counted, and with prefix caching known by content."""

from __future__ import annotations

from collections.abc import Callable

from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.prefix_cache import NO_HIT, Hit, Holder, PrefixCache, Prefixes
from vidur_simpy.replica_scheduler.vllm_v1_lockstep import RequestState

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

    Attributes
    ----------
    take : callable
        ``take(num_blocks)`` takes blocks that are free, for one request or for many.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache | None) -> None:
        pool.reserve(1)
        self.pool = pool
        self.cache = cache
        self.take: Callable[[int], None] = pool.reserve if cache is None else cache.take
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

    def longest_hit(self, state: RequestState) -> Hit:
        """Return the cached blocks to start from; the last token is never among them."""
        request = state.request
        if self.cache is None or (state.holder is None and not request.hash_ids):
            return NO_HIT
        num_blocks = (request.prefill_target - 1) // self.pool.block_size
        return self.cache.longest_hit(self._holder_of(state), num_blocks)

    def hold(self, state: RequestState, hit: Hit) -> None:
        """Let a request that is admitted hold the cached blocks that it starts from."""
        if self.cache is None:
            return
        request = state.request
        num_tokens = hit.num_blocks * self.pool.block_size
        if num_tokens:
            self.cache.hold(self._holder_of(state), hit)
        request.start_prefill(num_tokens)
        self._num_hit_tokens += num_tokens
        self._num_queried_tokens += request.prefill_target

    def grow(self, state: RequestState, num_tokens: int) -> None:
        """Take the blocks of further tokens of a prompt; other requests find those that are full.

        The tokens are not counted in ``num_scheduled_tokens`` yet.
        """
        block_size, num_computed = self.pool.block_size, state.request.num_scheduled_tokens
        num_tokens += num_computed
        num_blocks = -(-num_tokens // block_size) - -(-num_computed // block_size)
        if num_blocks:
            self.take(num_blocks)
        holder = state.holder
        if holder is not None and self.cache is not None:
            self.cache.register(holder, min(num_tokens // block_size, holder.num_shareable))

    def suspend(self, state: RequestState, num_tokens: int, num_findable: int) -> None:
        """Free the blocks of a request's first `num_tokens` tokens, which are all it holds.

        Those that `num_findable` tokens fill it can find when it comes back.
        """
        num_blocks = self.pool.blocks_of(num_tokens)
        if self.cache is None:
            self.pool.free(num_blocks)
            return
        holder = self._holder_of(state)
        self.cache.register(holder, num_findable // self.pool.block_size)
        self.cache.free(0, num_blocks - holder.num_blocks)
        self.cache.release(holder)

    def finish(self, state: RequestState, num_tokens: int) -> None:
        """Free the blocks of a request's first `num_tokens` tokens for good."""
        num_blocks = self.pool.blocks_of(num_tokens)
        if self.cache is None:
            self.pool.free(num_blocks)
            return
        # What only the request itself would find needs no entry any more.
        num_filled, holder = num_tokens // self.pool.block_size, state.holder
        if holder is None:
            self.cache.free(num_filled, num_blocks - num_filled)
        else:
            self.cache.free(num_filled - holder.num_blocks, num_blocks - num_filled)
            self.cache.release(holder)

    def _holder_of(self, state: RequestState) -> Holder:
        """Return what the cache knows a request as; there is nothing before it is needed."""
        if state.holder is None:
            request = state.request
            state.holder = Holder(
                self._prefixes,
                request.hash_ids or (),
                request.hash_block_size,
                self.pool.block_size,
                request.num_prefill_tokens,
            )
        return state.holder
