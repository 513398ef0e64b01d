"""Prefix caching: which blocks are found, and which are forgotten first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.vllm_v1_blocks import PlainBlockPool

import vidur_simpy as vs
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.prefix_cache import Hit, Holder, PrefixCache, Prefixes, Run
from vidur_simpy.workload import RequestArrays


class Cache(PrefixCache):
    """A cache of prompts of one block for each id."""

    def __init__(self, num_blocks: int, **options: bool) -> None:
        super().__init__(BlockPool(num_blocks, block_size=1), **options)
        self.prefixes = Prefixes()

    def prompt(self, *ids: int) -> Holder:
        return Holder(self.prefixes, ids, 1, 1, len(ids))

    def hit(self, holder: Holder) -> Hit:
        return self.longest_hit(holder, holder.num_shareable)

    def found(self, *ids: int) -> int:
        return self.hit(self.prompt(*ids)).num_blocks

    def compute(self, holder: Holder, num_further: int = 0) -> None:
        self.take(holder.num_shareable + num_further)
        self.register(holder, holder.num_shareable)

    def use(self, *ids: int, num_blank: int = 0) -> None:
        """Compute a whole prompt, together with blank blocks, and let go of it."""
        holder = self.prompt(*ids)
        self.compute(holder, num_blank)
        self.free(0, num_blank)
        self.release(holder)


def runs_in(cache: PrefixCache) -> set[Run]:
    return {run for runs in cache._runs.values() for run in runs}


# -- the order of eviction ------------------------------------------------------------------------


def test_blank_blocks_are_reused_first() -> None:
    """Three were left half-filled: only the fourth block taken was worth keeping."""
    cache = Cache(4)
    cache.use(1, num_blank=3)
    cache.take(3)
    assert cache.found(1) == 1
    cache.take(1)
    assert (cache.found(1), cache.num_evicted_blocks) == (0, 1)


def test_blank_blocks_queue_up_before_0_23() -> None:
    """Of four, the last one was freed first: it was half-filled, and stands behind the others."""
    cache = Cache(4, reuses_blank_first=False)
    cache.use(1)
    cache.use(2, num_blank=2)
    cache.take(1)
    assert (cache.found(1), cache.found(2)) == (0, 1)
    cache.take(2)
    assert (cache.found(2), cache.num_evicted_blocks) == (1, 1)


def test_the_longest_free_prefix_goes_first_from_its_end() -> None:
    """Within one request deeper blocks go before shallower ones."""
    cache = Cache(5)
    cache.use(1, 2, 3)
    cache.use(7, 8)
    cache.take(1)
    assert (cache.found(1, 2, 3), cache.found(7, 8)) == (2, 2)
    cache.take(3)
    assert (cache.found(1, 2, 3), cache.found(7, 8)) == (0, 1)


def test_a_hit_does_not_count_as_use_but_its_end_does() -> None:
    """Who looks changes nothing; who holds a prefix keeps it, and makes it recent when he goes."""
    cache = Cache(2)
    cache.use(1)
    cache.use(2)
    assert cache.found(1) == 1
    again = cache.prompt(1)
    cache.hold(again, cache.hit(again))
    assert cache.pool.num_free == 1
    cache.release(again)
    cache.take(1)
    assert (cache.found(1), cache.found(2)) == (1, 0)


def test_orphaned_blocks_are_evicted_in_their_turn() -> None:
    """Nobody will look for them, yet the one freed after them is safe until they are reused."""
    cache = Cache(6)
    cache.use(1)
    second = cache.prompt(2)
    cache.compute(second, 3)
    cache.free(num_orphaned=3, num_blank=0)
    cache.release(second)
    cache.take(1)  # the one that was never used
    cache.take(4)
    assert (cache.found(1), cache.found(2), cache.num_evicted_blocks) == (0, 1, 4)
    cache.take(1)
    assert (cache.found(2), cache.num_evicted_blocks) == (0, 5)


# -- what is found --------------------------------------------------------------------------------


def test_of_equal_blocks_the_earliest_is_found() -> None:
    """Two computed the same; when the first one's block is reused, the second one's is left."""
    cache = Cache(2)
    first, second = cache.prompt(1), cache.prompt(1)
    cache.compute(first)
    cache.compute(second)
    (its_run,) = first.runs
    assert cache.hit(first).parts == [(its_run, 0, 1)]
    cache.release(first)
    cache.take(1)
    (its_run,) = second.runs
    assert cache.hit(first).parts == [(its_run, 0, 1)]
    cache.release(second)
    cache.take(1)
    assert cache.found(1) == 0


def test_blocks_of_unheld_hits_are_counted() -> None:
    """An admission has to pay for hits that stand in the free list."""
    cache = Cache(3)
    cache.use(1, 2, 3)
    again = cache.prompt(1)
    cache.hold(again, cache.hit(again))
    assert cache.hit(cache.prompt(1, 2, 3))[1:] == (3, 2)


def test_a_part_of_a_run_is_held_and_evicted_alone() -> None:
    """Blocks behind one hash id part where a request that holds them ends."""
    cache = Cache(8)
    whole, begun = (Holder(cache.prefixes, [5], 8, 1, length) for length in (8, 3))
    cache.compute(whole)
    cache.release(whole)
    cache.hold(begun, cache.longest_hit(begun, 3))
    assert (cache.pool.num_free, begun.num_blocks) == (5, 3)
    cache.take(4)
    assert cache.longest_hit(whole, 8)[1:] == (4, 1)
    cache.release(begun)
    cache.take(3)
    assert cache.longest_hit(whole, 8).num_blocks == 1


def test_a_part_from_the_middle_of_a_run_is_held() -> None:
    """Block 2 is found in an earlier run, and blocks 0 and 1: 3 and 4 are cut out of a third."""
    cache = Cache(10)
    long, short, later = (Holder(cache.prefixes, [5], 10, 1, length) for length in (10, 3, 6))
    cache.take(2)
    cache.register(long, 2)
    cache.hold(short, cache.longest_hit(short, 2))
    cache.take(8)
    cache.register(short, 3)
    cache.register(long, 9)
    cache.release(short)
    cache.release(long)
    cache.hold(later, cache.longest_hit(later, 5))
    assert [(run.first, run.stop) for run in later.runs] == [(0, 2), (2, 3), (3, 5)]
    cache.take(4)  # 8 to 5 of the long one; its 2 goes after them
    assert cache.longest_hit(long, 10).num_blocks == 5
    assert sorted(run.stop for run in runs_in(cache)) == [2, 3, 3, 5]
    cache.take(1)
    assert cache.num_evicted_blocks == 5
    assert sorted(run.stop for run in runs_in(cache)) == [2, 3, 5]


def test_a_gap_hides_what_is_behind_it() -> None:
    """What lies behind blocks that are gone is found again once they are computed again."""
    cache = Cache(8)
    deep, whole = (Holder(cache.prefixes, [5], 8, 1, 8) for _ in range(2))
    cache.take(4)
    deep.num_blocks = 2
    cache.register(deep, 4)
    assert cache.longest_hit(whole, 8).num_blocks == 0
    cache.take(4)
    cache.register(whole, 4)
    found, first = cache.longest_hit(whole, 8), whole.runs[0]
    assert found.parts == [(first, 0, 2), (deep.runs[0], 2, 4)]


# -- against the plain block pool -----------------------------------------------------------------


class Both:
    """Requests on the cache and, block by block, on vLLM's pool restated."""

    def __init__(self, num_blocks: int, block_size: int, *, unhashed_first: bool) -> None:
        self.size = block_size
        self.plain = PlainBlockPool(num_blocks + 1, unhashed_first=unhashed_first)
        pool = BlockPool(num_blocks, block_size)
        self.cache = PrefixCache(pool, reuses_blank_first=unhashed_first)
        self.prefixes = Prefixes()
        self.running: list[tuple[Holder, list[int], list[int]]] = []

    def admit(self, ids: Sequence[int], hash_size: int, num_tokens: int) -> None:
        """Start a prompt behind what is found of it, if that is to be had."""
        holder = Holder(self.prefixes, ids, hash_size, self.size, num_tokens)
        keys: list[int] = []
        for index in range(num_tokens // self.size):
            tokens = range(index * self.size, (index + 1) * self.size)
            names = tuple((ids[token // hash_size], token % hash_size) for token in tokens)
            keys.append(self.plain.chain_key(keys[-1] if keys else None, names))
        findable = (num_tokens - 1) // self.size
        blocks = self.plain.longest_hit(keys[:findable])
        hit = self.cache.longest_hit(holder, findable)
        assert hit.num_blocks == len(blocks)
        assert hit.num_unheld == self.plain.num_unreferenced(blocks)
        self.plain.touch(blocks)
        self.cache.hold(holder, hit)
        self.running.append((holder, blocks, keys))

    def go_on(self, place: int, num_blocks: int) -> None:
        """Compute further blocks of a prompt, as far as there are free ones."""
        holder, blocks, keys = self.running[place % len(self.running)]
        first = len(blocks)
        stop = min(first + num_blocks, len(keys), first + self.plain.num_free)
        blocks += self.plain.take(stop - first)
        self.cache.take(stop - first)
        for block, key in zip(blocks[first:], keys[first:], strict=False):
            self.plain.register(block, key)
        self.cache.register(holder, stop)

    def let_go(self, place: int, num_blank: int) -> None:
        """Take some blank blocks at the end of a request, and free it."""
        holder, blocks, _ = self.running.pop(place % len(self.running))
        num_blank = min(num_blank, self.plain.num_free)
        blocks += self.plain.take(num_blank)
        self.cache.take(num_blank)
        self.plain.release(blocks)
        self.cache.free(0, num_blank)
        self.cache.release(holder)

    def check(self) -> None:
        """Say that the same blocks are free and cached."""
        assert self.cache.pool.num_free == self.plain.num_free
        num_cached = sum(run.stop - run.first for run in runs_in(self.cache))
        assert num_cached == len(self.plain.key_of)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_runs_of_blocks_are_found_and_evicted_as_single_blocks(data: st.DataObject) -> None:
    """Prompts that part anywhere, and repeat side by side, computed in pieces; memory is short."""
    draw = data.draw
    block_size, hash_size = draw(st.sampled_from([(1, 4), (1, 12), (2, 6), (3, 4), (4, 2)]))
    both = Both(draw(st.integers(4, 30)), block_size, unhashed_first=draw(st.booleans()))
    places = st.integers(0, 9)
    first_ids = st.sampled_from([[], [], [1], [0, 1]])
    for _ in range(draw(st.integers(1, 40))):
        step = draw(st.sampled_from(["admit", "go on", "go on", "let go"]))
        if step == "admit" or not both.running:
            num_tokens = block_size * draw(st.integers(1, 8)) - draw(st.integers(0, block_size - 1))
            both.admit([*draw(first_ids), *[0] * 20], hash_size, num_tokens)
        elif step == "go on":
            both.go_on(draw(places), draw(st.integers(1, 8)))
        else:
            both.let_go(draw(places), draw(st.integers(0, 4)))
        both.check()


# -- keys -----------------------------------------------------------------------------------------


def named_tokens(ids: Sequence[int], size: int, num_tokens: int) -> list[tuple[int, int]]:
    return [(ids[token // size], token % size) for token in range(num_tokens)]


def blocks_of(holder: Holder, num_blocks: int) -> list[tuple[int, int]]:
    """What its first blocks are known by: prefix and index."""
    spans = holder.spans(0, num_blocks)
    return [(prefix, index) for prefix, first, stop in spans for index in range(first, stop)]


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
        blocks_of(Holder(prefixes, ids, hash_size, block_size, num_tokens), 13)
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
    ours, theirs = (Holder(prefixes, (), 512, 16, 64) for _ in range(2))
    assert not set(blocks_of(ours, 4)) & set(blocks_of(theirs, 4))
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
    cache = Cache(10**9)
    hits = blocks = hit_tokens = tokens = 0
    for line in mooncake(shared, name).read_text().splitlines():
        row = json.loads(line)
        ids, length = row["hash_ids"], row["input_length"]
        num_hits = cache.found(*ids)
        cache.use(*ids)
        hits, blocks = hits + num_hits, blocks + len(ids)
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
