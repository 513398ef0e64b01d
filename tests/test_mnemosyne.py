"""Mnemosyne: chunks sized by time, deadlines, space sharing, KV-parallel groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy import Batch, DecodeSet, PrefillChunk, Request
from vidur_simpy.kv_cache import BlockPool
from vidur_simpy.replica_scheduler import ReplicaResources
from vidur_simpy.replica_scheduler.chunk_sizing import (
    Draft,
    GrowingBatch,
    PrefillTimes,
    tokens_for_time,
)
from vidur_simpy.replica_scheduler.kv_parallel import KVParallelBlocks
from vidur_simpy.workload import RequestArrays

LINEAR = vs.Linear(base=0.004, per_token=2e-5, per_context_token=5e-8)


class Rows:
    """A workload of given rows."""

    def __init__(self, *rows, **optional):
        self.table = RequestArrays(*map(np.array, zip(*rows, strict=True)), **optional)

    def requests(self, *_):
        return self.table


def cluster_of(policy, *, num_blocks=4000, watermark=0.01, **changes):
    settings = {
        "max_model_len": 16_384,
        "kv_cache": vs.KVCache(num_blocks=num_blocks, watermark=watermark),
        "replica_scheduler": policy,
        "execution_time": LINEAR,
    }
    return vs.Cluster(**(settings | changes))


def scheduler_of(policy, *, num_blocks=1000, **changes):
    resources = {
        "pool": BlockPool(num_blocks, 16),
        "max_model_len": 16_384,
        "stage_time": lambda batch, stage_id: 0.004 + 2e-5 * batch.num_tokens,
    }
    return policy.for_replica(ReplicaResources(**(resources | changes)))


def chunks_of(result, request_id):
    """How many tokens a request got in each of its batches."""
    return [
        row.num_tokens[list(row.request_ids).index(request_id)]
        for row in result.batches.itertuples()
        if request_id in row.request_ids
    ]


# Chunks


def test_fixed_chunks():
    """A chunk_size means chunks of that many tokens, decodes included."""
    result = vs.simulate(
        cluster_of(vs.Mnemosyne(chunk_size=512)), Rows((0.0, 1300, 3)), record=["batches"]
    )
    assert chunks_of(result, 0) == [512, 512, 276, 1, 1]


def test_chunks_keep_the_batch_time():
    """Batches with prompts take the target time, 10 % more or less; short ends are left over."""
    result = vs.simulate(
        cluster_of(vs.Mnemosyne(target_batch_time=0.012)), Rows((0.0, 1300, 1)), record=["batches"]
    )
    assert chunks_of(result, 0) == [384, 448, 384, 32, 32, 20]
    times = (result.batches.completed_at - result.batches.scheduled_at).to_numpy()
    assert np.all(np.abs(times[:3] / 0.012 - 1) <= 0.1)


@pytest.mark.parametrize(
    ("num_left", "target", "expected"),
    [
        (5000, 1e9, 992),  # never more, whatever the target
        (5000, 1e-9, 32),  # never less than a multiple of 32 ...
        (20, 1e-9, 20),  # ... but what is left
        (1, 1.0, 1),
        (32, 1.0, 32),
        (5000, 512.0, 512),  # the first number tried
    ],
)
def test_numbers_that_the_search_finds(num_left, target, expected):
    """It halves an interval in multiples of 32 and never tries its ends."""
    assert tokens_for_time(num_left, target, float) == (expected, float(expected))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), max_size=5), st.data())
def test_a_growing_batch_counts_as_a_batch(lengths, data):
    """Chunks that joined one by one count as if the batch had been made of them."""
    decodes = DecodeSet(16)
    for processed in data.draw(st.lists(st.integers(1, 50), max_size=3)):
        request = Request(processed, 5, 0.0)
        request.end_chunk(processed)
        decodes.join(request)
    chunks = [PrefillChunk(Request(1, 1), q, q + before) for q, before in lengths]
    growing, whole = GrowingBatch(decodes), Batch(decodes, chunks)
    for chunk in chunks:
        growing.push(PrefillChunk(Request(1, 1), 77, 99))
        growing.pop()
        growing.push(chunk)
    for name in (
        "num_decodes",
        "num_tokens",
        "num_prefill_tokens",
        "decode_context",
        "total_context",
        "num_attention_pairs",
        "prefills",
    ):
        assert getattr(growing, name) == getattr(whole, name), name


@settings(max_examples=50)
@given(
    st.floats(0.005, 0.2),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), min_size=1, max_size=4),
)
def test_prefill_times_are_those_of_a_lone_prompt(target, spans):
    """Rows that share their first chunks equal rows computed each for itself, to the bit."""

    def next_chunk(num_left, num_done):
        return tokens_for_time(num_left, target, lambda q: 0.004 + 2e-5 * q + 5e-8 * (num_done + q))

    def alone(length):
        done, seconds = 0, 0.0
        while done < length:
            num_tokens, time = next_chunk(length - done, done)
            done, seconds = done + num_tokens, seconds + time
        return seconds

    times = PrefillTimes(next_chunk)
    for done, left in spans:
        num_tokens = done + left
        expected = alone(-(-num_tokens // 256) * 256) - alone(done // 256 * 256)
        assert times.between(done, num_tokens) == expected


def test_decodes_are_predicted_once_a_prompt_has_joined():
    """Until then the batch counts as empty, as in Vidur."""
    decodes = DecodeSet(16)
    for _ in range(600):
        request = Request(1, 5, 0.0)
        request.end_chunk(1)
        decodes.join(request)
    draft = Draft(decodes, lambda batch: float(batch.num_tokens), 100)
    newcomer = Request(10, 1)
    assert draft.predicted_beside(newcomer) == 0.0
    draft.add(newcomer, 10, draft.time_with(newcomer, 10))
    assert draft.predicted_beside(newcomer) == 610.0
    last = Request(1, 1)
    draft.add(last, 1, draft.time_with(last, 1))
    assert draft.predicted_beside(newcomer) == 610.0  # a tail of one token is not predicted
    assert draft.finish().num_tokens == 611


def test_decodes_stay_one_set():
    """A step in which nobody joins or leaves hands the same set over, whatever its size."""
    scheduler = scheduler_of(vs.Mnemosyne(ordering="lrs", max_num_seqs=300), num_blocks=5000)
    for number in range(300):
        scheduler.add(Request(16, 50, 0.0, request_id=number))
    sets = []
    for step in range(40):
        batch = scheduler.schedule(float(step))
        scheduler.end(batch, step + 0.5)
        sets.append((batch.decodes, batch.num_decodes))
    assert sets[-1][1] == 300
    assert len({id(decodes) for decodes, _ in sets[1:]}) == 1


# Deadlines


def test_deadlines_are_derived():
    """So many times the predicted prefill time, and at least min_deadline, after the arrival."""
    rows = Rows((0.5, 100, 2), (1.0, 9000, 2))
    lone = scheduler_of(vs.Mnemosyne(), stage_time=cluster_of("sarathi").stage_time())
    prefill_time = lone.remaining_time(Request(9000, 2))
    policy = vs.Mnemosyne(ordering="edf", deadline_multiplier=3.0, min_deadline=0.25)
    deadlines = vs.simulate(cluster_of(policy), rows).requests.deadline
    assert deadlines[0] == 0.75
    assert deadlines[1] == pytest.approx(1.0 + 3.0 * prefill_time)


def test_deadlines_of_the_workload_are_kept():
    """Those without one get theirs derived; first come, first served needs none."""
    rows = Rows((0.0, 100, 2), (0.0, 100, 2), deadline=np.array([7.5, float("nan")]))
    result = vs.simulate(cluster_of(vs.Mnemosyne(ordering="lrs", min_deadline=2.0)), rows)
    assert result.requests.deadline.to_list() == [7.5, 2.0]
    result = vs.simulate(cluster_of(vs.Mnemosyne()), Rows((0.0, 100, 2)))
    assert "deadline" not in result.requests


def test_least_slack_sees_what_is_left_to_do():
    """EDF takes the earlier deadline, LRS the long prompt that would miss its later one."""
    rows = [(0.0, 900, 2), (0.001, 500, 2), (0.002, 9000, 2)]
    deadlines = np.array([9.0, 0.8, 1.0])
    first = {}
    for ordering in ("edf", "lrs"):
        policy = vs.Mnemosyne(ordering=ordering, target_batch_time=0.012)
        requests = vs.simulate(cluster_of(policy), Rows(*rows, deadline=deadlines)).requests
        first[ordering] = requests.scheduled_at[1:].idxmin()
    assert first == {"edf": 1, "lrs": 2}


def test_other_orderings_work_here_too():
    """Shortest prompt first, by name and by a key of one's own."""
    rows = Rows((0.0, 600, 2), (0.0, 900, 2), (0.0, 300, 2))
    for ordering in ("sjf", "spt", lambda request, now: request.num_prefill_tokens):
        policy = vs.Mnemosyne(ordering=ordering, max_num_seqs=1)
        requests = vs.simulate(cluster_of(policy), rows).requests
        assert requests.scheduled_at.sort_values().index.to_list() == [2, 0, 1]


# Space sharing


def test_a_long_prompt_yields_to_short_ones():
    """With slack it fills half the batch's time; under LRS it would take all of it."""
    rows = Rows((0.0, 9000, 2), (0.03, 400, 2), (0.03, 400, 2))
    sizes = {}
    for ordering in ("lrs", "st"):
        policy = vs.Mnemosyne(
            ordering=ordering,
            target_batch_time=0.02,
            min_deadline=60.0,
            long_request_threshold=1000,
        )
        result = vs.simulate(cluster_of(policy), rows, record=["batches"])
        sizes[ordering] = chunks_of(result, 0)
    assert sizes["lrs"][0] == sizes["st"][0]
    assert max(sizes["st"][2:]) < 0.6 * max(sizes["lrs"][2:-2])


def test_a_long_prompt_yields_half_of_the_time_at_most():
    """However much slack it has: of 20 ms that are 9 to 11, 4 of them fixed: 250 to 350 tokens."""
    policy = vs.Mnemosyne(
        ordering="st", target_batch_time=0.02, min_deadline=600.0, long_request_threshold=1000
    )
    line = vs.Linear(base=0.004, per_token=2e-5, per_context_token=0.0)
    cluster = cluster_of(policy, execution_time=line)
    chunks = chunks_of(vs.simulate(cluster, Rows((0.0, 9000, 2)), record=["batches"]), 0)
    steady = chunks[2:-4]  # behind the threshold, before what is left over
    assert len(steady) > 20
    assert all(250 <= num_tokens <= 350 for num_tokens in steady)


def test_a_long_decode_keeps_long_prompts_out():
    """Long prompts do not share a batch, not even with a long request that decodes."""
    policy = vs.Mnemosyne(ordering="st", target_batch_time=0.02, long_request_threshold=1000)
    rows = Rows((0.0, 1500, 200), (0.01, 3000, 2))
    result = vs.simulate(cluster_of(policy), rows, record=["batches"])
    requests = result.requests
    together = [
        tokens
        for ids, tokens in zip(result.batches.request_ids, result.batches.num_tokens, strict=True)
        if list(ids) == [0, 1]
    ]
    # Beside the decode it got no further than the threshold.
    assert sum(tokens[1] for tokens in together if tokens[0] == 1) < 1000 + 992
    assert requests.first_token_at[1] > requests.completed_at[0]


# Memory


def test_a_replica_on_which_nothing_runs_looks_at_everybody():
    """Ten that need memory stand before the one that has it, and would keep it for ever."""
    scheduler = scheduler_of(
        vs.Mnemosyne(ordering="edf", target_batch_time=0.005),
        pool=BlockPool(num_blocks=20, block_size=16, watermark=0.6),
    )
    first = Request(32, 1, 0.0, request_id=0, deadline=1.0)
    holder = Request(32, 1, 0.0, request_id=1, deadline=50.0)
    scheduler.add(first)
    scheduler.add(holder)
    batch = scheduler.schedule(0.0)
    assert [request for request, _ in batch.requests()] == [first]
    assert scheduler.num_running == 2  # the other has its blocks, but no time was left
    for number in range(2, 14):
        scheduler.add(Request(112, 1, 0.1, request_id=number, deadline=2.0))
    served = []
    while batch is not None:
        assert scheduler.end(batch, 1.0) is not None
        batch = scheduler.schedule(1.0)
        served += [request.request_id for request, _ in batch.requests()] if batch else []
    assert served[0] == 1
    assert set(served) == set(range(1, 14))


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("ordering", ["fcfs", "edf", "lrs", "st"])
def test_everybody_completes_and_every_block_comes_back(ordering, num_groups):
    """Under memory pressure as well, with preemptions."""
    policy = vs.Mnemosyne(
        ordering=ordering,
        target_batch_time=0.01,
        min_deadline=0.05,
        long_request_threshold=100,
        kv_parallel_size=num_groups,
        max_num_tokens_per_kvp_group=160,
    )
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 200, (2, 60))
    cluster = cluster_of(policy, num_blocks=30 if num_groups == 1 else 16, max_model_len=400)
    sim = vs.Simulation(cluster, Rows(*zip(np.sort(rng.random(60)), *lengths, strict=True)))
    sim.run()
    requests = sim.result().requests
    assert requests.completed_at.notna().all()
    assert requests.num_restarts.sum() > 0
    (replica,) = sim.replicas
    assert replica.pool.num_free == replica.pool.num_blocks
    assert replica.scheduler.num_running == replica.scheduler.num_waiting == 0
    if num_groups > 1:
        assert replica.pool.num_blocks == 3 * 16
        assert replica.scheduler.blocks.num_free == [16, 16, 16]


# KV-parallel groups


def test_groups_share_the_context_of_a_long_prompt():
    """Each attends to its part of the context, so the decode steps are as short as the longest."""
    policy = vs.Mnemosyne(chunk_size=1000, kv_parallel_size=4, max_num_tokens_per_kvp_group=4000)
    by_context = vs.Linear(base=0.0, per_token=0.0, per_context_token=1.0)
    cluster = cluster_of(policy, num_blocks=300, execution_time=by_context)
    result = vs.simulate(cluster, Rows((0.0, 10_000, 3)), record=["batches"])
    times = (result.batches.completed_at - result.batches.scheduled_at).to_list()
    # Two groups fill up to 4000 tokens (and the tokens of the chunk), the third holds the rest.
    assert times[:4] == [1000, 2000, 3000, 4000]
    assert times[4:10] == [5000, 5000, 5000, 5000, 5000, 5000]
    assert times[10:] == [4001, 4001]


def test_pending_work_decides_between_groups():
    """The group with the least of it is asked first."""
    blocks = KVParallelBlocks(BlockPool(100, 16), 3, 160)
    blocks.pending_work = [5, 0, 2]
    request = Request(100, 1)
    assert blocks.reserve_prompt(request)
    assert blocks.residents(request) == [(1, 0)]
    assert blocks.num_free == [100, 93, 100]
    assert not blocks.reserve_prompt(Request(3 * 160 + 1, 1))


def test_the_last_part_goes_where_no_more_fits():
    """A group without room for a full part takes the last one; group 0 is forgotten as such."""
    pool = BlockPool(20, 16)
    blocks = KVParallelBlocks(pool, 2, 160)
    assert pool.num_blocks == pool.num_free == 40
    blocks.num_free = [20, 5]
    request = Request(200, 1)
    assert blocks.reserve_prompt(request)
    assert blocks.num_free == [10, 2]
    assert blocks.last_group(request) == 1
    blocks.free(request)
    blocks.num_free = [5, 20]
    assert blocks.reserve_prompt(request)
    assert blocks.num_free == [5, 17]  # Vidur's quirk: one group less, with the last part only
    assert blocks.num_held(request) == 3


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk_size": 512, "target_batch_time": 0.05}, "expected exactly one of them"),
        ({"ordering": "st", "chunk_size": 512}, "expected target_batch_time instead"),
        ({"ordering": "edff"}, r"unknown ordering 'edff': did you mean 'edf'\?"),
        ({"kv_parallel_size": 2}, "kv_parallel_size = 2 needs max_num_tokens_per_kvp_group"),
        ({"target_batch_time": 0.0}, r"Mnemosyne\.target_batch_time = 0\.0: expected greater"),
        ({"min_deadline": 0.0}, r"Mnemosyne\.min_deadline = 0\.0: expected greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    """One sentence each, at construction."""
    with pytest.raises(vs.ConfigError, match=message):
        vs.Mnemosyne(**given)


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (100, r"max_num_tokens_per_kvp_group = 100: expected a multiple of .* = 16"),
        (1600, r"max_num_tokens_per_kvp_group = 1600: expected less than the 1600 tokens"),
    ],
)
def test_groups_that_do_not_fit_the_blocks(num_tokens, message):
    """Told when the cluster is made."""
    policy = vs.Mnemosyne(kv_parallel_size=2, max_num_tokens_per_kvp_group=num_tokens)
    with pytest.raises(vs.ConfigError, match=message):
        cluster_of(policy, num_blocks=100)


def test_what_groups_can_never_hold_is_refused():
    """With a reason, at arrival; the others go on."""
    policy = vs.Mnemosyne(kv_parallel_size=2, max_num_tokens_per_kvp_group=1600)
    rows = Rows((0.0, 100, 2), (0.0, 3000, 202), (0.0, 3000, 201))
    requests = vs.simulate(cluster_of(policy, num_blocks=101), rows).requests
    assert requests.refusal.to_list() == [
        "",
        "its 3202 tokens do not fit the 2 KV-parallel groups of 1600 tokens",
        "",
    ]
    requests = vs.simulate(cluster_of(policy, num_blocks=101, watermark=0.1), rows).requests
    assert "needs 100 KV-cache blocks in a group, 91 of 101 may be used" in requests.refusal[2]


def test_a_scheduler_that_cannot_predict():
    """Chunks sized by time need execution times; fixed chunks do not."""
    scheduler = scheduler_of(vs.Mnemosyne(), stage_time=None)
    scheduler.add(Request(100, 2, 0.0, request_id=0))
    with pytest.raises(vs.ConfigError, match=r"ReplicaResources\.stage_time is None"):
        scheduler.schedule(0.0)
    scheduler = scheduler_of(vs.Mnemosyne(chunk_size=64), stage_time=None)
    scheduler.add(Request(100, 2, 0.0, request_id=0))
    assert scheduler.schedule(0.0).num_tokens == 64


def test_mnemosyne_in_configurations():
    """Every setting can be written down and read; one that is not given has its usual value."""
    config = {
        "cluster": {
            "max_model_len": 4096,
            "replica_scheduler": {
                "type": "mnemosyne",
                "ordering": "st",
                "max_num_seqs": 64,
                "target_batch_time": 0.012,
                "deadline_multiplier": 1.0,
                "min_deadline": 0.1,
                "long_request_threshold": 512,
                "kv_parallel_size": 2,
                "max_num_tokens_per_kvp_group": 2048,
            },
        }
    }
    cluster = vs.load_config(config)["cluster"]
    assert cluster.replica_scheduler.ordering == "st"
    assert vs.load_config(vs.dump_config(cluster=cluster))["cluster"] == cluster
    cluster = vs.load_config({"cluster": {"replica_scheduler": "mnemosyne"}})["cluster"]
    assert cluster.replica_scheduler == vs.Mnemosyne(target_batch_time=0.05)
    assert vs.load_config(vs.dump_config(cluster=cluster))["cluster"] == cluster
