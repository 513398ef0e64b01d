"""LLMServingSim's operator tables: read, interpolated, composed, and refused with a reason."""

from __future__ import annotations

import csv
import functools
import warnings
from itertools import pairwise

import numpy as np
import pytest
from counts import Chunk, Counts, decodes, prefill, replica
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_folder import SHARED

from vidur_simpy.errors import ProfileError
from vidur_simpy.execution_time.interpolation import Curve, Grid, Plane, leave_one_out_error
from vidur_simpy.execution_time.operator_tables import in_graph
from vidur_simpy.execution_time.profile import Profile

PROFILES = SHARED / "data/reference/llmservingsim_profiles"

NUM_LAYERS = 32  # of llama-3.1-8b
US = 1e-6

# A made-up device on which everything is linear, so that all interpolation is exact.
DENSE = {
    "embedding": (2, 0.001),
    "layernorm": (3, 0.002),
    "qkv_proj": (30, 0.1),
    "rotary_emb": (2, 0.003),
    "o_proj": (20, 0.05),
    "gate_up_proj": (150, 0.5),
    "act_fn": (2, 0.02),
    "down_proj": (80, 0.25),
    "final_layernorm": (3, 0.004),
}
HEAD = {"lm_head": (700, 0.5), "sampler": (20, 0.4)}
SIZES = (1, 2, 8, 64, 256, 4096)
CONTEXTS = (16, 128, 1024, 16384)


def attention(chunk, prefix, num_decodes, context):
    """Microseconds: linear in what is computed and read."""
    return (
        10
        + 0.04 * chunk
        + 1e-4 * chunk * prefix
        + 0.1 * num_decodes
        + 2e-3 * (num_decodes * context)
    )


def attention_rows():
    for n in SIZES[:-1]:
        yield from ((0, 0, n, kv, attention(0, 0, n, kv)) for kv in CONTEXTS)
    for chunk in (16, 512, 2048):
        for prefix in (0, 512, 16384):
            yield chunk, prefix, 0, 0, attention(chunk, prefix, 0, 0)
            for n in SIZES[:-1]:
                for kv in CONTEXTS:
                    yield chunk, prefix, n, kv, attention(chunk, prefix, n, kv)


def write(file, header, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([header, *rows])


def read(file):
    return list(csv.reader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("profile"))


def write_tables(folder, size=1, experts=False):
    place = folder / f"tp{size}"
    linear = [(n, t, a + b * t) for n, (a, b) in DENSE.items() for t in SIZES]
    write(place / "dense.csv", ("layer", "tokens", "time_us"), linear)
    heads = [(n, s, a + b * s) for n, (a, b) in HEAD.items() for s in SIZES[:-1]]
    write(place / "per_sequence.csv", ("layer", "sequences", "time_us"), heads)
    header = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    write(place / "attention.csv", header, attention_rows())
    if experts:
        grid = [(t, e, 10 + 6 * e + 0.1 * t) for e in (8, 64, 128) for t in (1, 8, 512, 4096)]
        write(place / "moe.csv", ("tokens", "activated_experts", "time_us"), grid)
    return folder


def stage_time(folder, deployment=None, **settings):
    profile = Profile(folder, **settings)
    return profile.for_replica(deployment or replica(device="rtx-pro-6000"))


def layer(num_tokens):
    """Microseconds of a layer without attention."""
    times = {name: a + b * num_tokens for name, (a, b) in DENSE.items()}
    return sum(times.values()) + times["layernorm"] - times["embedding"] - times["final_layernorm"]


def ends(num_tokens, num_sequences):
    """Microseconds of what is there once."""
    once = (a + b * num_tokens for a, b in (DENSE["embedding"], DENSE["final_layernorm"]))
    return sum(once) + sum(a + b * num_sequences for a, b in HEAD.values())


# Interpolation


@given(
    steps=st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=2, max_size=8),
    points=st.lists(st.floats(-10, 500), min_size=1, max_size=20),
)
def test_a_curve_rises_where_its_measurements_do(steps, points):
    """It meets every point, never falls between rising ones, and a run of looks is the looks."""
    known = np.cumsum([width for width, _ in steps]).tolist()
    values = np.cumsum([rise for _, rise in steps]).tolist()
    curve = Curve(known, values)
    assert [curve(point) for point in known] == values
    found = [curve(point) for point in sorted(points)]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(found))
    assert curve.many(np.asarray(points)).tolist() == [curve(point) for point in points]


def test_a_curve_goes_on_but_never_down():
    """Beyond the last point as between the last two; at the last value if these fall."""
    assert Curve([1, 3], [10.0, 14.0])(5) == 18.0
    assert Curve([1, 3], [10.0, 8.0])(5) == 8.0
    assert Curve([3], [7.0])(99) == 7.0


def test_points_have_to_ascend():
    """A curve through two values at one point is none."""
    with pytest.raises(ProfileError, match="not ascending"):
        Curve([1, 1], [2.0, 3.0])


def test_a_grid_is_exact_where_time_is_linear_whatever_its_rows():
    """Each row was measured at points of its own."""
    rows = {
        1: {1: Curve([0, 9], [1.0, 10.0]), 5: Curve([0, 3, 9], [5.0, 8.0, 14.0])},
        4: {2: Curve([0, 9], [5.0, 14.0]), 3: Curve([0, 9], [6.0, 15.0])},
    }
    grid = Grid({number: Plane(row) for number, row in rows.items()})
    for x, y, z in [(1, 1, 0), (2, 3, 4), (4, 2.5, 9), (3, 2, 8.5)]:
        assert grid(x, y, z) == pytest.approx(x + y + z - 1)


def test_a_straight_line_predicts_its_own_points():
    """And a bent one does not."""
    assert leave_one_out_error({(n,): 3.0 * n for n in (1, 2, 5, 9)}) == pytest.approx(0, abs=1e-12)
    assert leave_one_out_error({(n,): float(n * n) for n in (1, 2, 3)}) == pytest.approx(1 / 4)


# Composition


def test_an_iteration_is_its_layers_and_its_ends(tables):
    """Two prompts and some decodes: every operator as often as it is there."""
    batch = Counts(10, 10 * 500, (Chunk(300, 300), Chunk(200, 700)))
    pairs = sum(n * end - n * (n - 1) / 2 for n, end in batch.prefills)
    prefix = pairs / 500 - 501 / 2
    expected = NUM_LAYERS * (layer(510) + attention(500, prefix, 10, 500)) + ends(510, 12)
    assert stage_time(tables)(batch, 0) == pytest.approx(expected * US)


def test_decodes_fill_a_graph(tables):
    """Nine decodes run as sixteen, but attend and sample as nine."""
    expected = NUM_LAYERS * (layer(16) + attention(0, 0, 9, 700)) + ends(16, 9)
    assert stage_time(tables)(decodes(9, 700), 0) == pytest.approx(expected * US)
    assert [in_graph(n) for n in (1, 3, 8, 250, 300, 512, 513)] == [1, 4, 8, 256, 304, 512, 513]


def test_overheads_come_once(tables):
    """The CPU's with every iteration, that of prefills with a prefill."""
    plain = stage_time(tables)
    slow = stage_time(tables, cpu_overhead=1e-3, prefill_overhead=1e-2)
    assert slow(decodes(4, 100), 0) - plain(decodes(4, 100), 0) == pytest.approx(1e-3)
    assert slow(prefill(100), 0) - plain(prefill(100), 0) == pytest.approx(1.1e-2)


def test_many_short_prompts_are_one_chunk_of_as_many_pairs(tables):
    """Twenty prompts of 100 attend to far fewer pairs than one of 2,000."""
    short = Counts(0, 0, (Chunk(100, 100),) * 20)
    times = stage_time(tables)
    pairs = 20 * 100 * 101 / 2
    chunk = (np.sqrt(8 * pairs + 1) - 1) / 2
    same = NUM_LAYERS * (layer(2000) + attention(chunk, 0, 0, 0)) + ends(2000, 20)
    assert times(short, 0) == pytest.approx(same * US)


def test_stages_share_the_layers_and_keep_their_ends(tables):
    """Two stages take what one does, and a transfer."""
    one, batch = stage_time(tables), Counts(5, 5000, (Chunk(64, 64),))
    both = stage_time(tables, replica(device="rtx-pro-6000", pp=2), link_gbps=10, link_latency=0)
    sent = 69 * 4096 * 2 / 10e9
    assert both(batch, 0) + both(batch, 1) == pytest.approx(one(batch, 0) + sent)


def test_tensor_parallel_devices_reduce_over_the_link(tmp_path):
    """Twice a layer and once after the embedding; the logits are gathered."""
    folder = write_tables(write_tables(tmp_path), size=2)
    times = stage_time(
        folder, replica(device="rtx-pro-6000", tp=2), link_gbps=10, link_latency=1e-5
    )
    operators = times.operators(prefill(100), 0)
    message = 100 * 4096 * 2
    assert operators["all_reduce"] == pytest.approx(65 * (2e-5 + message / 10e9))
    assert operators["logits_gather"] == pytest.approx(1e-5 + 128256 / 10e9)


@settings(max_examples=30)
@given(n=st.integers(1, 256), mean=st.integers(1, 5000), rest=st.integers(0, 255))
@pytest.mark.parametrize("longest", [1.0, 3.0])
def test_a_run_of_decodes_is_its_steps_to_the_last_bit(uneven_tables, longest, n, mean, rest):
    """With and without uneven lengths."""
    times = uneven_tables[longest]
    context = n * mean + rest
    steps = [times(Counts(n, context + step * n), 0) for step in range(40)]
    assert times.decode_times(n, context, 40, 0).tolist() == steps


def test_operators_add_up(tables):
    """On every stage, for decodes and for prompts."""
    times = stage_time(tables, replica(device="rtx-pro-6000", pp=2), cpu_overhead=1e-3)
    for batch in (decodes(9, 100), Counts(3, 300, (Chunk(40, 90),))):
        for stage in (0, 1):
            assert sum(times.operators(batch, stage).values()) == pytest.approx(times(batch, stage))


# Uneven decodes

SKEW = """
skew_fit:
  enabled: true
  bucket_axes:
    n_bins: [0, 8, 1000000]
    n_labels: [n<=8, n>8]
    skew_rate_bins: [-0.01, 0.2, 1.01]
    skew_rate_labels: [few, many]
    kv_big_bins: [0, 1024, 1000000000]
    kv_big_labels: [short, long]
    kp_bins: [-1, 0, 1000000000]
    kp_labels: [kp=0, kp>0]
  per_tp: {1: {alpha_default: 0.05}}
"""


@pytest.fixture(scope="module")
def uneven_tables(tmp_path_factory):
    """Stage times by the longest decode, as a multiple of the mean."""
    folder = write_tables(tmp_path_factory.mktemp("uneven"))
    (folder / "meta.yaml").write_text(SKEW)
    header = ("pc", "n_label", "skew_rate_label", "kv_big_label", "kp_label", "alpha", "n_samples")
    rows = [
        (0, "n<=8", "many", "long", "kp=0", 0.3, 4),
        (0, "n>8", "many", "short", "kp=0", 0.1, 4),
    ]
    write(folder / "tp1/skew_fit.csv", header, rows)
    return {longest: stage_time(folder, longest_decode=longest) for longest in (1.0, 3.0)}


@pytest.mark.parametrize(
    ("num_decodes", "mean", "alpha"),
    [(8, 900, 0.3), (8, 300, 0.05), (9, 300, 0.1), (9, 900, 0.05), (1, 900, 0.0)],
)
def test_uneven_decodes_go_part_of_the_way_to_the_longest(uneven_tables, num_decodes, mean, alpha):
    """By the factor of their bin, or the common one where there is none; one alone is even."""
    batch = decodes(num_decodes, mean)
    more = uneven_tables[3.0](batch, 0) - uneven_tables[1.0](batch, 0)
    longest = attention(0, 0, num_decodes, 3 * mean) - attention(0, 0, num_decodes, mean)
    assert more == pytest.approx(NUM_LAYERS * alpha * longest * US)


def test_batches_with_a_prompt_are_looked_up_by_their_mean(uneven_tables):
    """There the factors have either sign."""
    batch = Counts(8, 7200, (Chunk(100, 100),))
    assert uneven_tables[3.0](batch, 0) == uneven_tables[1.0](batch, 0)


# Experts

EXPERTS = {"model": "qwen3-30b-a3b", "device": "rtx-pro-6000"}
LINK = {"link_gbps": 10, "link_latency": 1e-5}


def sharing():
    return replica(**EXPERTS, data_parallel_size=2, enable_expert_parallel=True)


def test_experts_are_looked_up_by_how_many_are_hit(tmp_path):
    """By 40 tokens, of 128 experts with 8 chosen each."""
    times = stage_time(write_tables(tmp_path, experts=True), replica(**EXPERTS))
    hit = 128 * (1 - (15 / 16) ** 40)
    moe = times.operators(prefill(40), 0)["moe"]
    assert moe == pytest.approx(48 * (10 + 6 * hit + 0.1 * 40) * US)


def test_replicas_that_share_experts_step_together(tmp_path):
    """The slowest attends, all compute the experts of all, and exchange hidden states."""
    times = stage_time(write_tables(tmp_path, experts=True), sharing(), **LINK)
    long, short = prefill(1000), decodes(24, 300)
    together = times.together([long, short])
    hit, rows = 64 * (1 - (15 / 16) ** 1024), 1024 / 2
    moe = 48 * (10 + 6 * hit + 0.1 * rows) * US
    moved = 1024 / 2 * (2 * 2048 + 128) * 2 / 10e9
    own = times.operators(long, 0)
    own = sum(own.values()) - own["moe"] - own["exchange"]
    assert together == pytest.approx(own + moe + 48 * (2e-5 + moved))
    assert together == times.together([short, long])


def test_a_replica_alone_takes_the_other_to_do_as_much(tmp_path):
    """Then it is as if both did the same."""
    times = stage_time(write_tables(tmp_path, experts=True), sharing(), **LINK)
    for batch in (decodes(24, 300), prefill(500)):
        assert times(batch, 0) == pytest.approx(times.together([batch, batch]))


def test_a_replica_without_requests_takes_part(tmp_path):
    """With one token, in the graph of the other; it slows nobody down by itself."""
    times = stage_time(write_tables(tmp_path, experts=True), sharing(), **LINK)
    batch = decodes(24, 300)
    assert times.together([batch, None]) == pytest.approx(times.together([batch, batch]))
    assert times.together([prefill(500), None]) < times.together([prefill(500)] * 2)


def test_experts_need_their_table(tables):
    """A dense profile does not do for a mixture."""
    with pytest.raises(ProfileError, match=r"moe.csv is missing: expected columns tokens"):
        stage_time(tables, replica(**EXPERTS))


# What was not measured


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (prefill(3000), r"attention was measured for prefill_chunk up to 2048, a batch asks for 3"),
        (prefill(64, 20000), r"attention .* kv_prefill up to 16384, a batch asks for 20000"),
        (decodes(4, 17000), r"attention .* kv_decode up to 16384, a batch asks for 17000"),
        (decodes(300, 100), r"lm_head was measured for sequences up to 256, a batch asks for 300"),
        (Counts(4200, 67200, (Chunk(16, 16),)), r"embedding|layernorm .* tokens up to 4096"),
    ],
)
def test_beyond_is_refused_with_the_place(tables, batch, message):
    """It names the operator, the size, the value and the range."""
    with pytest.raises(ProfileError, match=message):
        stage_time(tables)(batch, 0)


def test_beyond_is_taken_on_request_with_one_warning(tables):
    """Linear times go on; what was asked for is recorded."""
    times = stage_time(tables, extrapolate=True)
    with pytest.warns(UserWarning, match=r"attention .* up to 16384, .* 20000: extrapolating"):
        first = times(decodes(4, 20000), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times(decodes(4, 30000), 0)
    expected = NUM_LAYERS * (layer(4) + attention(0, 0, 4, 20000)) + ends(4, 4)
    assert first == pytest.approx(expected * US)
    assert times.extrapolations == {"attention": "kv_decode up to 30000, measured up to 16384"}


def test_less_than_the_least_takes_as_long(tables):
    """A context of three tokens is read as one of sixteen."""
    times = stage_time(tables)
    assert times(decodes(4, 3), 0) == times(decodes(4, 16), 0)


# Tables that cannot be


def spoil(tmp_path, file, line, column, value):
    folder = write_tables(tmp_path)
    place = folder / "tp1" / file
    rows = read(place)
    rows[line - 1][column] = value
    write(place, rows[0], rows[1:])
    return folder


@pytest.mark.parametrize(
    ("file", "line", "column", "value", "message"),
    [
        ("dense.csv", 1, 2, "time_ms", r"dense.csv has no column 'time_us': it has layer, tokens"),
        ("dense.csv", 9, 2, "0", r"dense.csv, line 9: time_us = '0': expected microseconds"),
        ("dense.csv", 9, 2, "-3.5", r"dense.csv, line 9: time_us = '-3.5'"),
        ("dense.csv", 9, 2, "0.00003", r"line 9: time_us = '0.00003': expected microseconds"),
        ("attention.csv", 4, 4, "nan", r"attention.csv, line 4: time_us = 'nan'"),
        ("attention.csv", 4, 4, "fast", r"attention.csv, line 4: time_us = 'fast'"),
        ("attention.csv", 4, 2, "1.5", r"line 4: n_decode = '1.5': expected a whole number"),
        ("dense.csv", 3, 1, "1", r"dense.csv, line 3 measures again"),
        ("dense.csv", 3, 1, "0", r"tokens = '0': expected a whole number of at least 1"),
        ("dense.csv", 3, 0, "mamba", r"dense.csv has unknown mamba: .* needs layernorm, qkv_proj"),
    ],
)
def test_bad_values_are_named(tmp_path, file, line, column, value, message):
    """The file, the row and the value."""
    with pytest.raises(ProfileError, match=message):
        stage_time(spoil(tmp_path, file, line, column, value))


def scale(folder, factor):
    for file in (folder / "tp1").glob("*.csv"):
        rows = read(file)
        write(file, rows[0], [[*row[:-1], float(row[-1]) * factor] for row in rows[1:]])


@pytest.mark.parametrize("factor", [0.1, 100])
def test_a_wrong_unit_is_noticed(tmp_path, factor):
    """The LM head cannot read its weights at 9 times the device's bandwidth, or a hundredth."""
    folder = write_tables(tmp_path)
    scale(folder, factor)
    with pytest.raises(ProfileError, match=r"lm_head takes .* of 1597 GB/s: expected times in mic"):
        stage_time(folder)


def test_missing_tables_are_named(tmp_path):
    """A file, a size, an operator."""
    with pytest.raises(ProfileError, match=r"tensor_parallel_size 4 was not measured; .* one of 1"):
        stage_time(write_tables(tmp_path), replica(device="rtx-pro-6000", tp=4))
    (tmp_path / "tp1/attention.csv").unlink()
    with pytest.raises(ProfileError, match=r"attention.csv is missing: expected columns prefill"):
        stage_time(tmp_path)
    write(tmp_path / "tp1/dense.csv", ("layer", "tokens", "time_us"), [("layernorm", 1, 3)])
    write_tables(tmp_path / "other")
    (tmp_path / "other/tp1/dense.csv").write_text((tmp_path / "tp1/dense.csv").read_text())
    with pytest.raises(ProfileError, match=r"dense.csv has no qkv_proj, o_proj, gate_up_proj"):
        stage_time(tmp_path / "other")


# Measured profiles

needs_profiles = pytest.mark.skipif(not PROFILES.is_dir(), reason="needs ../shared")
MEASURED = {
    "RTXPRO6000/Llama-3.1-8B": replica(device="rtx-pro-6000"),
    "RTX4090/Llama-3.1-8B": replica(device="rtx-4090"),
    "RTXPRO6000/Qwen3-32B": replica("qwen3-32b", "rtx-pro-6000", 2),
    "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507": sharing(),
}


@functools.cache
def measured(name):
    return stage_time(PROFILES / name, MEASURED[name])


@needs_profiles
@pytest.mark.parametrize("name", MEASURED)
def test_measured_tables_predict_themselves(name):
    """Each operator within 7 % from twice as far as a look-up looks."""
    times = measured(name)
    assert max(times.errors.values()) < 0.07
    assert {"qkv_proj", "lm_head", "attention of both"} <= times.errors.keys()


@needs_profiles
@pytest.mark.parametrize("name", MEASURED)
def test_more_work_takes_longer(name):
    """A longer context, a longer prompt, more decodes beside it."""
    times = measured(name)
    contexts = [times(decodes(64, context), 0) for context in range(100, 8000, 300)]
    assert contexts == sorted(contexts)
    prompts = [times(prefill(tokens), 0) for tokens in range(128, 2049, 256)]
    assert prompts == sorted(prompts)
    beside = [times(Counts(n, 800 * n, (Chunk(500, 500),)), 0) for n in (1, 16, 60, 100, 128)]
    assert beside == sorted(beside)
