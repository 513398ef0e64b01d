"""Prefix caching: which blocks are found, and which are forgotten first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.prefix_cache import Block, BlockKeys, PrefixCache, Prefixes, num_unheld
from vidur_simpy.workload import RequestArrays


def cache_of(num_blocks: int, **options: bool) -> PrefixCache:
    return PrefixCache(BlockPool(num_blocks, block_size=16), **options)


def used(cache: PrefixCache, keys: Sequence[int], num_blank: int = 0) -> list[Block]:
    """Blocks with these keys that somebody held, together with blank ones, and let go of."""
    cache.take(len(keys) + num_blank)
    blocks = [cache.register(key) for key in keys]
    cache.release(blocks, num_orphaned=0, num_blank=num_blank)
    return blocks


def found(cache: PrefixCache, keys: Sequence[int]) -> int:
    return len(cache.longest_hit(keys))


# -- the order of eviction ------------------------------------------------------------------------


def test_blank_blocks_are_reused_first() -> None:
    """Three were left half-filled: only the fourth block taken was worth keeping."""
    cache = cache_of(4)
    used(cache, [1], num_blank=3)
    cache.take(3)
    assert found(cache, [1]) == 1
    cache.take(1)
    assert (found(cache, [1]), cache.num_evicted_blocks) == (0, 1)


def test_blank_blocks_queue_up_before_0_23() -> None:
    """Of four, the last one was freed first: it was half-filled, and stands behind the others."""
    cache = cache_of(4, reuses_blank_first=False)
    used(cache, [1])
    used(cache, [2], num_blank=2)
    cache.take(1)
    assert (found(cache, [1]), found(cache, [2])) == (0, 1)
    cache.take(2)
    assert (found(cache, [2]), cache.num_evicted_blocks) == (1, 1)


def test_the_longest_free_prefix_goes_first_from_its_end() -> None:
    """Within one request deeper blocks go before shallower ones."""
    cache = cache_of(5)
    used(cache, [1, 2, 3])
    used(cache, [7, 8])
    cache.take(1)
    assert (found(cache, [1, 2, 3]), found(cache, [7, 8])) == (2, 2)
    cache.take(3)
    assert (found(cache, [1, 2, 3]), found(cache, [7, 8])) == (0, 1)


def test_a_hit_does_not_count_as_use_but_its_end_does() -> None:
    """Who looks changes nothing; who holds a prefix keeps it, and makes it recent when he goes."""
    cache = cache_of(2)
    used(cache, [1])
    used(cache, [2])
    assert found(cache, [1]) == 1
    (block,) = cache.longest_hit([1])
    cache.touch([block])
    assert (block.num_holders, cache.pool.num_free) == (1, 1)
    cache.release([block], 0, 0)
    cache.take(1)
    assert (found(cache, [1]), found(cache, [2])) == (1, 0)


def test_orphaned_blocks_are_evicted_in_their_turn() -> None:
    """Nobody will look for them, yet the one freed after them is safe until they are reused."""
    cache = cache_of(6)
    used(cache, [1])
    cache.take(4)
    cache.release([cache.register(2)], num_orphaned=3, num_blank=0)
    cache.take(1)  # the one that was never used
    cache.take(4)
    assert (found(cache, [1]), found(cache, [2]), cache.num_evicted_blocks) == (0, 1, 4)
    cache.take(1)
    assert (found(cache, [2]), cache.num_evicted_blocks) == (0, 5)


# -- what is found --------------------------------------------------------------------------------


def test_a_gap_hides_what_is_behind_it() -> None:
    """A prefix cut in the middle is found again once the gap is computed again."""
    cache = cache_of(4)
    blocks = used(cache, [1, 2, 3])
    cache.touch([blocks[0], blocks[2]])
    cache.take(2)  # the unused block, and key 2
    assert found(cache, [1, 2, 3]) == 1
    cache.register(2)
    assert found(cache, [1, 2, 3]) == 3


def test_of_equal_blocks_the_earliest_is_found() -> None:
    """Two computed the same; when the first one's block is reused, the second one's is left."""
    cache = cache_of(2)
    cache.take(2)
    first, second = cache.register(1), cache.register(1)
    assert (cache.longest_hit([1]), len(cache)) == ([first], 1)
    cache.release([first], 0, 0)
    cache.take(1)
    assert cache.longest_hit([1]) == [second]
    cache.release([second], 0, 0)
    cache.take(1)
    assert (cache.longest_hit([1]), len(cache)) == ([], 0)


def test_blocks_of_unheld_hits_are_counted() -> None:
    """An admission has to pay for hits that stand in the free list."""
    cache = cache_of(3)
    blocks = used(cache, [1, 2, 3])
    cache.touch(blocks[:1])
    assert num_unheld(cache.longest_hit([1, 2, 3])) == 2


# -- keys -----------------------------------------------------------------------------------------


def named_tokens(ids: Sequence[int], size: int, num_tokens: int) -> list[tuple[int, int]]:
    return [(ids[token // size], token % size) for token in range(num_tokens)]


@given(
    st.lists(st.integers(-1, 1), min_size=12, max_size=12),
    st.lists(st.integers(-1, 1), min_size=12, max_size=12),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 12),
)
def test_keys_are_equal_where_all_tokens_so_far_are(
    ours: list[int], theirs: list[int], hash_size: int, block_size: int, num_tokens: int
) -> None:
    """Whether the block size divides that of the hash ids or not."""
    prefixes = Prefixes()
    keys = [
        list(BlockKeys(prefixes, ids, hash_size, block_size, num_tokens).of(0, 13))
        for ids in (ours, theirs)
    ]
    for index, (a, b) in enumerate(zip(*keys, strict=True)):
        stop = (index + 1) * block_size
        is_full = stop <= num_tokens  # otherwise it holds outputs, which are nobody else's
        a_tokens, b_tokens = (
            named_tokens(ids, hash_size, min(stop, num_tokens)) for ids in (ours, theirs)
        )
        assert (a == b) == (is_full and a_tokens == b_tokens)


def test_ids_of_other_lengths_name_other_tokens() -> None:
    """Id 5 for 16 tokens is not id 5 for 512."""
    prefixes = Prefixes()
    assert prefixes.chain([5], 16) != prefixes.chain([5], 512)


def test_prompts_without_ids_share_nothing() -> None:
    """Every such prompt is its own."""
    prefixes = Prefixes()
    ours, theirs = (BlockKeys(prefixes, (), 512, 16, 64) for _ in range(2))
    assert not set(ours.of(0, 4)) & set(theirs.of(0, 4))
    assert ours.num_shareable == 0


# -- the published traces -------------------------------------------------------------------------

RATIOS = {"conversation": (0.3664, 0.3736), "synthetic": (0.6396, 0.6512)}


def mooncake(shared: Path, name: str) -> Path:
    path = shared / "data" / "traces" / f"mooncake_fast25_{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the trace is not there: {path}")
    return path


@pytest.mark.parametrize("name", RATIOS)
def test_an_unlimited_cache_hits_what_the_trace_repeats(shared: Path, name: str) -> None:
    """Ratios of blocks and tokens as published for the Mooncake traces, cut blocks included."""
    cache, prefixes = cache_of(10**9), Prefixes()
    hits = blocks = hit_tokens = tokens = 0
    for line in mooncake(shared, name).read_text().splitlines():
        row = json.loads(line)
        ids, length = row["hash_ids"], row["input_length"]
        keys = list(BlockKeys(prefixes, ids, 512, 512, 512 * len(ids)).of(0, len(ids)))
        num_hits = found(cache, keys)
        used(cache, keys)
        hits, blocks = hits + num_hits, blocks + len(keys)
        hit_tokens, tokens = hit_tokens + min(512 * num_hits, length), tokens + length
    assert (round(hits / blocks, 4), round(hit_tokens / tokens, 4)) == RATIOS[name]


@pytest.mark.parametrize("name", RATIOS)
def test_a_simulation_hits_what_the_trace_repeats(shared: Path, name: str) -> None:
    """Each prompt computed in turn: full blocks before the last token, in order of arrival."""
    path = mooncake(shared, name)
    seen: set[int] = set()
    expected = queried = 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        findable = row["hash_ids"][: (row["input_length"] - 1) // 512]
        num_hits = next((i for i, key in enumerate(findable) if key not in seen), len(findable))
        expected, queried = expected + 512 * num_hits, queried + row["input_length"]
        seen.update(row["hash_ids"][: row["input_length"] // 512])
    cluster = vs.Cluster(
        max_model_len=200_000,
        kv_cache=vs.KVCache(block_size=512, num_blocks=10**6),
        replica_scheduler=vs.VllmV1(max_num_batched_tokens=200_000),
        execution_time=lambda batch: 1e-3,
    )
    result = vs.simulate(cluster, vs.Trace(str(path), decode_scale=1e-9), progress=False)
    (replica,) = result.replicas.to_dict("records")
    assert (replica["num_cached_tokens"], replica["num_evicted_blocks"]) == (expected, 0)
    assert replica["prefix_cache_hit_rate"] == expected / queried
    assert replica["prefix_cache_hit_rate"] == pytest.approx(RATIOS[name][1], abs=0.001)
    assert result.requests.num_cached_tokens.sum() == expected


# -- bad input ------------------------------------------------------------------------------------


def test_hash_ids_that_do_not_fit_the_prompt() -> None:
    """One id per block of the prompt, in a workload and in a request."""
    with pytest.raises(vs.ConfigError, match=r"hash_ids\[1\] has 1 ids, expected 2 .* 600 tokens"):
        RequestArrays([0.0, 1.0], [512, 600], [1, 1], hash_ids=[np.array([1]), np.array([1])])
    with pytest.raises(vs.ConfigError, match=r"hash_ids has 3 ids: expected 2 .* = 16"):
        vs.Request(20, 1, hash_ids=[1, 2, 3], hash_block_size=16)
    with pytest.raises(vs.ConfigError, match="hash_block_size = 0"):
        vs.Request(20, 1, hash_ids=[1], hash_block_size=0)
