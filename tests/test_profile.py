"""Measured operator tables in Vidur's formats: what is read, fitted, composed and refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from counts import Chunk, Counts, decodes, prefill
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import GridSearchCV

import vidur_simpy as vs
from vidur_simpy.execution_time import HasDecodeTimes, HasOperators
from vidur_simpy.execution_time.regression import GRIDS, Search, fitted

TOKENS = [1, 4, *range(8, 129, 8), *range(160, 4097, 32)]
BATCHES = [1, 2, *range(4, 65, 4)]
CONTEXTS = range(64, 2049, 64)
CHUNKS = range(64, 1025, 64)

# Milliseconds of the tables: of a token's operators start and per token.
LINES = {
    "attn_pre_proj": (0.010, 3e-5),
    "attn_post_proj": (0.009, 2.5e-5),
    "mlp_up_proj": (0.020, 1.2e-4),
    "mlp_down_proj": (0.015, 6e-5),
    "mlp_act": (0.004, 2e-5),
    "attn_rope": (0.003, 4e-6),
    "input_layernorm": (0.005, 6e-6),
    "post_attention_layernorm": (0.006, 7e-6),
    "add": (0.002, 5e-6),
}
CPU = {
    "schedule_median": 0.2,
    "sampler_e2e_median": 0.5,
    "prepare_inputs_e2e_median": 0.6,
    "process_model_outputs_median": 0.3,
    "ray_comm_time_mean": 0.4,
}


def line_ms(name, num_tokens):
    start, per_token = LINES[name]
    return start + per_token * num_tokens


def token_ms(num_tokens):
    """One layer's operators by tokens, saving the KV cache apart."""
    return sum(line_ms(name, num_tokens) for name in LINES)


def save_ms(num_tokens):
    return 0.004 + 2e-6 * num_tokens


def decode_ms(num_decodes, context):
    return 0.012 + 3e-6 * num_decodes + 3e-6 * num_decodes * context


def prefill_ms(kv_cache_size, chunk):
    return 0.011 + 6e-8 * chunk * (kv_cache_size + chunk / 2)


def all_reduce_ms(num_tokens):
    return 0.015 + 1e-5 * num_tokens


def send_ms(num_tokens):
    return 0.012 + 8e-6 * num_tokens


def model(**changes):
    sizes = {"num_layers": 4, "hidden_size": 1024, "num_heads": 8, "num_kv_heads": 2}
    sizes |= {"head_dim": 128, "intermediate_size": 4096, "vocab_size": 32000}
    return vs.Model(name="small/Model-1B", max_position=2048, **(sizes | changes))


SMALL = model()


def deployment(tp=1, pp=1, model=SMALL, **settings):
    return vs.Deployment(model, vs.Device.from_name("a100"), tp, pp, **settings)


def stats(times, operator):
    return {f"time_stats.{operator}.{kind}": times for kind in ("median", "mean")}


def mlp_table(tp=1, num_kv_heads=2):
    rows = {"num_tokens": TOKENS, "num_tensor_parallel_workers": tp, "n_head": 8}
    rows |= {"n_kv_head": num_kv_heads, "n_embd": 1024, "n_expanded_embd": 4096}
    rows |= {"vocab_size": 32768, "use_gated_mlp": True}
    for name in LINES:
        rows |= stats([line_ms(name, num_tokens) for num_tokens in TOKENS], name)
    return pd.DataFrame(rows)


def attention_table(tp=1, num_kv_heads=2):
    rows = [(b, 0, kv, None, decode_ms(b, kv)) for b in BATCHES for kv in CONTEXTS]
    rows += [
        (1, chunk, kv, prefill_ms(kv, chunk), None) for chunk in CHUNKS for kv in range(0, 1025, 64)
    ]
    columns = ["batch_size", "prefill_chunk_size", "kv_cache_size"]
    columns += ["time_stats.attn_prefill.median", "time_stats.attn_decode.median"]
    frame = pd.DataFrame(rows, columns=columns)
    num_tokens = frame[["batch_size", "prefill_chunk_size"]].max(axis=1)
    frame["time_stats.attn_kv_cache_save.median"] = save_ms(num_tokens)
    return frame.assign(
        n_embd=1024, n_q_head=8, n_kv_head=num_kv_heads, block_size=16, max_model_len=2048
    ).assign(num_tensor_parallel_workers=tp)


def network_table(name, times_ms, **columns):
    sizes = {"size": [num_tokens * 1024 * 2 for num_tokens in TOKENS]}
    return pd.DataFrame(sizes | stats([times_ms(t) for t in TOKENS], name) | columns)


def cpu_table(tp=1):
    return pd.DataFrame(
        {"batch_size": [8, 16, 24, 32], "model_name": "small/model-1b"}
        | {"tensor_parallel_degree": tp}
        | {column: [time_ms + 0.01 * n for n in range(4)] for column, time_ms in CPU.items()}
    )


def write(folder, tp=1, num_kv_heads=2):
    """Write all tables, measured for one tensor parallel size."""
    folder.mkdir(exist_ok=True)
    workers = {"num_workers": tp, "devices_per_node": tp}
    near = network_table("send_recv", send_ms, devices_per_node=2)
    far = network_table("send_recv", lambda t: 3 * send_ms(t), devices_per_node=1)
    tables = {
        "mlp": mlp_table(tp, num_kv_heads),
        "attention": attention_table(tp, num_kv_heads),
        "all_reduce": network_table("all_reduce", all_reduce_ms, **workers),
        "send_recv": pd.concat([near, far]),
        "cpu_overheads": cpu_table(tp),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep fits of a test to itself."""
    monkeypatch.setenv("VIDUR_SIMPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Tables of one device, with a small search."""
    monkeypatch.setitem(GRIDS, "fast", Search(3, (10,), (16,), (2,), (1, 2)))
    return write(tmp_path / "tables")


def profile(path, **settings):
    return vs.Profile(path, **({"regressor": "interpolation"} | settings))


ALONE = deployment()


def stage_time(path, deployment=ALONE, **settings):
    return profile(path, **settings).for_replica(deployment)


def change(path, **columns):
    """Change the table of a file: a function of its frame for each column."""
    frame = pd.read_csv(path)
    frame.assign(**columns).to_csv(path, index=False)


def seconds(milliseconds):
    return pytest.approx(milliseconds * 1e-3, rel=1e-9)


# Vidur's rules


def test_decodes_by_hand(tables):
    """Tokens round up to 8, the mean context before the step down and then up to 64; 1.1 times."""
    batch = Counts(num_decodes=20, decode_context=20 * 1000 + 19)
    attention = 1.1 * decode_ms(20, 1024)
    expected = 4 * (token_ms(24) + save_ms(20) + attention)
    assert stage_time(tables)(batch, 0) == seconds(expected)


def test_one_decode_by_hand(tables):
    """Nothing is added for one request; a context at a multiple of 64 stays."""
    expected = 4 * (token_ms(8) + save_ms(1) + decode_ms(1, 128))
    assert stage_time(tables)(decodes(1, 129), 0) == seconds(expected)


def test_one_prefill_by_hand(tables):
    """The prefix is rounded up to 64."""
    expected = 4 * (token_ms(512) + save_ms(512) + prefill_ms(192, 512))
    assert stage_time(tables)(prefill(512, prefix=130), 0) == seconds(expected)


def test_several_prefills_by_hand(tables):
    """Prefixes are rounded and summed, chunks become the root of the sum of their squares."""
    batch = Counts(0, 0, (Chunk(192, 292), Chunk(256, 300)))
    attention = 1.1 * prefill_ms(128 + 64, 320)
    expected = 4 * (token_ms(448) + save_ms(448) + attention)
    assert stage_time(tables)(batch, 0) == seconds(expected)


def test_several_prefills_of_the_last_release(tables):
    """There each prefill counts by itself, its chunk rounded up to 32."""
    batch = Counts(0, 0, (Chunk(190, 290), Chunk(256, 300)))
    attention = 1.1 * (prefill_ms(128, 192) + prefill_ms(64, 256))
    expected = 4 * (token_ms(448) + save_ms(446) + attention)
    assert stage_time(tables, rules="0.0.26")(batch, 0) == seconds(expected)


def test_a_mixed_batch_is_the_sum_of_its_parts(tables):
    """Decodes and prefills share what depends on tokens, and nothing else."""
    batch = Counts(8, 8 * 500, (Chunk(64, 64),))
    attention = 1.1 * decode_ms(8, 512) + prefill_ms(0, 64)
    expected = 4 * (token_ms(72) + save_ms(72) + attention)
    assert stage_time(tables)(batch, 0) == seconds(expected)


def test_nothing_is_added_where_every_head_has_its_own_keys(tmp_path):
    """The factor on several requests is for shared keys and values."""
    path = write(tmp_path / "mha", num_kv_heads=8)
    times = stage_time(path, deployment(model=model(num_kv_heads=8)))
    assert times.operators(decodes(20, 1000), 0)["attn_decode"] == seconds(4 * decode_ms(20, 1024))


def test_tensor_parallelism_adds_all_reduces(tmp_path):
    """Two a layer, each with its launch."""
    times = stage_time(write(tmp_path / "tp", tp=2), deployment(tp=2))
    expected = 2 * 4 * (all_reduce_ms(104) + 0.02)
    assert times.operators(prefill(100), 0)["all_reduce"] == seconds(expected)


@pytest.mark.parametrize(("devices_per_node", "factor"), [(8, 1), (1, 3)])
def test_stages_share_the_layers_and_send(tables, devices_per_node, factor):
    """All stages but the last send on; between nodes other rows apply."""
    times = stage_time(tables, deployment(pp=2), devices_per_node=devices_per_node)
    batch = decodes(4, 500)
    layers = 2 * (token_ms(8) + save_ms(4) + 1.1 * decode_ms(4, 512))
    assert times(batch, 0) == seconds(layers + factor * send_ms(8))
    assert times(batch, 1) == seconds(layers)


def test_cpu_time_by_table_is_in_every_stage(tables):
    """As Vidur counts it where it does; the constant is in the first stage."""
    without = stage_time(tables, deployment(pp=2))
    measured = stage_time(tables, deployment(pp=2), cpu_overheads=tables)
    constant = stage_time(tables, deployment(pp=2), cpu_overhead=0.003)
    batch = decodes(16, 500)
    for stage_id in (0, 1):
        added = measured(batch, stage_id) - without(batch, stage_id)
        assert added == seconds(sum(CPU.values()) + 5 * 0.01)
    assert constant(batch, 0) - without(batch, 0) == pytest.approx(0.003)
    assert constant(batch, 1) == without(batch, 1)


def test_operators_that_were_not_measured_take_no_time(tables):
    """Norms, additions and saving the KV cache may be missing, as in Vidur's older tables."""
    frame = pd.read_csv(tables / "attention.csv")
    columns = [column for column in frame if "kv_cache_save" not in column]
    frame[columns].to_csv(tables / "attention.csv", index=False)
    change(tables / "mlp.csv", **{"time_stats.add.median": math.nan})
    times = stage_time(tables)
    assert times.absent == ["add", "attn_kv_cache_save"]
    attention = 1.1 * decode_ms(20, 1024)
    expected = 4 * (token_ms(24) - line_ms("add", 24) + attention)
    assert times(decodes(20, 1001), 0) == seconds(expected)


@settings(max_examples=30)
@given(
    num_decodes=st.integers(0, 29),
    mean=st.integers(1, 2000),
    chunks=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=3),
    stage_id=st.integers(0, 1),
)
def test_operators_add_up(tmp_path_factory, num_decodes, mean, chunks, stage_id):
    """The breakdown of any batch is its time."""
    times = _pipeline(tmp_path_factory)
    prefills = tuple(Chunk(length, prefix + length) for length, prefix in chunks)
    if not (num_decodes or prefills):
        return
    batch = Counts(num_decodes, num_decodes * mean, prefills)
    total = sum(times.operators(batch, stage_id).values())
    assert times(batch, stage_id) == pytest.approx(total, rel=1e-12)


@settings(max_examples=30)
@given(
    num_decodes=st.integers(1, 32),
    mean=st.integers(1, 1700),
    remainder=st.integers(0, 31),
    num_iterations=st.integers(1, 300),
    stage_id=st.integers(0, 1),
)
def test_a_run_is_its_steps_to_the_last_bit(
    tmp_path_factory, num_decodes, mean, remainder, num_iterations, stage_id
):
    """Times looked up for a run of decode steps are those of its steps."""
    times = _pipeline(tmp_path_factory)
    context = num_decodes * mean + remainder
    at_once = times.decode_times(num_decodes, context, num_iterations, stage_id)
    steps = range(context, context + num_decodes * num_iterations, num_decodes)
    assert at_once == [times(Counts(num_decodes, step), stage_id) for step in steps]


def _pipeline(tmp_path_factory, known={}):  # noqa: B006
    """Two stages with CPU tables, made once."""
    if not known:
        tables = write(tmp_path_factory.mktemp("profile") / "tables")
        known["times"] = stage_time(tables, deployment(pp=2), cpu_overheads=tables)
    return known["times"]


def test_it_has_what_the_engine_and_the_result_ask_for(tables):
    """Runs at once and a breakdown by operator."""
    times = stage_time(tables)
    assert isinstance(times, HasDecodeTimes)
    assert isinstance(times, HasOperators)


# Regressions


@pytest.mark.parametrize("regressor", ["random_forest", "polynomial", "interpolation"])
def test_each_regressor_finds_the_physics(tables, regressor):
    """Each is as close to the truth as it says of itself, and that is close."""
    times = stage_time(tables, regressor=regressor)
    errors = times.errors
    assert set(errors) == {*LINES, "attn_kv_cache_save", "attn_decode", "attn_prefill"}
    assert max(errors.values()) < 0.05
    for num_decodes, context in [(3, 700), (18, 1500), (50, 2000)]:
        rounded = math.ceil(num_decodes / 8) * 8
        attention = 1.1 * decode_ms(num_decodes, math.ceil((context - 1) / 64) * 64)
        expected = 4e-3 * (token_ms(rounded) + save_ms(num_decodes) + attention)
        assert times(decodes(num_decodes, context), 0) == pytest.approx(expected, rel=0.06)


def test_a_kept_forest_is_the_forest(rng):
    """The table between thresholds gives what the trees give, anywhere."""
    points = rng.integers(1, 20, size=(300, 2)).astype(float)
    times = 1 + points[:, 0] * points[:, 1] + rng.random(300)
    fit = fitted("forest", points, times, "random_forest")
    unique = np.unique(points, axis=0)
    assert len(unique) < len(points)
    means = [times[(points == point).all(axis=1)].mean() for point in unique]
    forest = RandomForestRegressor(random_state=0, **fit.settings).fit(unique, means)
    asked = rng.uniform(-1, 22, size=(200, 2)).round(1)
    expected = forest.predict(asked)
    assert [fit.predict(point) for point in asked.tolist()] == pytest.approx(expected.tolist())


def test_a_polynomial_is_found_exactly():
    """Times that are a polynomial have no error."""
    sizes = np.arange(1.0, 60.0)[:, None]
    fit = fitted("square", sizes, 2 + 0.1 * sizes[:, 0] ** 2, "polynomial")
    assert fit.error < 1e-6
    assert fit.predict([30.5]) == pytest.approx(2 + 0.1 * 30.5**2)


def test_the_error_is_that_of_points_left_out(rng):
    """Noise of 10 % shows as such, though the forest could learn it by heart."""
    sizes = np.arange(1.0, 200.0)[:, None]
    times = 5 * rng.uniform(0.9, 1.1, size=199)
    for regressor in ("random_forest", "polynomial", "interpolation"):
        assert 0.04 < fitted("noise", sizes, times, regressor).error < 0.09


@pytest.mark.parametrize("regressor", ["random_forest", "polynomial"])
def test_fits_are_kept_and_found_again(regressor, cache, monkeypatch):
    """A second run trains nothing, and gives the same to the last bit."""
    sizes = np.arange(1.0, 60.0)[:, None]
    times = 1 + np.sqrt(sizes[:, 0])
    first = fitted("root", sizes, times, regressor)
    assert len(list(cache.glob(f"root-{regressor}-*.npz"))) == 1
    monkeypatch.setattr(GridSearchCV, "fit", None)
    again = fitted("root", sizes, times, regressor)
    assert (again.error, again.settings) == (first.error, first.settings)
    assert again.predict([7.3]) == first.predict([7.3])


def test_a_damaged_fit_is_noticed(tables, cache):
    """It is said and done again."""
    path, batch = profile(tables, regressor="polynomial"), prefill(100)
    first = path.for_replica(ALONE)(batch, 0)
    file = next(cache.glob("mlp_up_proj-*.npz"))
    file.write_bytes(file.read_bytes()[:300])
    _forget_what_was_read()
    with pytest.warns(UserWarning, match=r"mlp_up_proj.*damaged"):
        again = path.for_replica(ALONE)(batch, 0)
    assert again == first


def test_other_rows_are_another_fit(tables, cache):
    """A table that changed is read and fitted again."""
    path, batch = profile(tables, regressor="polynomial"), prefill(64)
    first = path.for_replica(ALONE)(batch, 0)
    column = "time_stats.mlp_up_proj.median"
    change(tables / "mlp.csv", **{column: lambda frame: 2 * frame[column]})
    added = path.for_replica(ALONE)(batch, 0) - first
    assert added == pytest.approx(4e-3 * line_ms("mlp_up_proj", 64), rel=1e-6)
    assert len(list(cache.glob("mlp_up_proj-*.npz"))) == 2


def _forget_what_was_read():
    from vidur_simpy.execution_time import vidur_operators

    vidur_operators._read_measured.cache_clear()


def test_nothing_heavy_is_loaded_before_it_is_used():
    """Naming the model costs neither pandas nor scikit-learn."""
    code = (
        "import sys, vidur_simpy as vs\n"
        "from vidur_simpy.execution_time import EXECUTION_TIMES\n"
        "EXECUTION_TIMES['profile']('.')\n"
        "print({'pandas', 'sklearn', 'vidur_simpy.execution_time.vidur_profile'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_scikit_learn_there_is_interpolation(tables, monkeypatch):
    """The others say at once what to install."""

    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    assert stage_time(tables)(prefill(64), 0) > 0
    with pytest.raises(vs.ConfigError, match=r"pip install 'vidur-simpy\[profile\]'"):
        stage_time(tables, regressor="polynomial")


def test_the_grid_of_vidur_can_be_had():
    """27 forests, 10 folds, polynomials up to degree 5."""
    grid = GRIDS["vidur"]
    forests = itertools.product(grid.num_trees, grid.max_depth, grid.min_samples_split)
    assert len(list(forests)) == 27
    assert (grid.num_folds, max(grid.degree)) == (10, 5)
    assert vs.Profile(".", grid="vidur").grid in GRIDS


# Beyond what was measured


BEYOND = {
    "decodes": (decodes(65, 500), r"attn_decode .* batch_size from 1 to 64, .* asks for 65"),
    "context": (decodes(2, 2200), r"attn_decode .* kv_cache_size from 64 to 2048, .* for 2240"),
    "chunk": (prefill(1040), r"attn_prefill .* prefill_chunk_size from 64 to 1024, .* for 1040"),
    "prefix": (prefill(64, 1200), r"attn_prefill .* kv_cache_size from 0 to 1024, .* for 1216"),
    "tokens": (prefill(4100), r"num_tokens from 1 to 4096, .* for 4104"),
}


@pytest.fixture
def unsaved(tables):
    """Tables without the time to save the KV cache, whose range is that of the chunks."""
    table = attention_table().drop(columns="time_stats.attn_kv_cache_save.median")
    table.to_csv(tables / "attention.csv", index=False)
    return tables


@pytest.mark.parametrize("name", BEYOND)
def test_more_than_was_measured_is_refused(unsaved, name):
    """The message names the operator, the size, its value and the range."""
    batch, message = BEYOND[name]
    times = stage_time(unsaved)
    with pytest.raises(vs.ProfileError, match=message):
        times(batch, 0)


def test_what_rounding_adds_is_not_beyond(unsaved):
    """One size less than a step above the largest stands for the largest."""
    change(unsaved / "mlp.csv", num_tokens=lambda frame: frame.num_tokens.replace(4096, 4092))
    times = stage_time(unsaved)
    operators = times.operators(Counts(13, 1300, (Chunk(255, 255),) * 16), 0)
    assert operators["mlp_up_proj"] == seconds(4 * line_ms("mlp_up_proj", 4096))
    assert not times.extrapolations


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("regressor", ["polynomial", "interpolation"])
def test_it_can_extrapolate_and_says_so(unsaved, name, regressor):
    """Once per operator; in proportion to the work, it comes out longer than any within."""
    times = stage_time(unsaved, regressor=regressor, extrapolate=True)
    batch, _ = BEYOND[name]
    with pytest.warns(UserWarning, match="extrapolating"):
        first = times(batch, 0)
    assert times(batch, 0) == first
    assert any("measured from" in words for words in times.extrapolations.values())


def test_extrapolation_is_in_proportion(tables):
    """Twice the decodes take twice the attention of the most measured."""
    times = stage_time(tables, extrapolate=True)
    with pytest.warns(UserWarning, match="attn_decode"):
        twice = times.operators(decodes(128, 1025), 0)["attn_decode"]
    assert twice == pytest.approx(2 * times.operators(decodes(64, 1025), 0)["attn_decode"])
    assert times.extrapolations["attn_decode"].startswith("batch_size from 128 to 128")


def test_prefill_extrapolation_grows_with_the_pairs(unsaved):
    """A chunk twice as long as any measured takes four times as long."""
    times = stage_time(unsaved, extrapolate=True)
    with pytest.warns(UserWarning, match="attn_prefill"):
        twice = times.operators(prefill(2048), 0)["attn_prefill"]
    # It was said before.
    assert times(prefill(1536), 0) > times(prefill(1024), 0)
    assert twice == pytest.approx(4 * times.operators(prefill(1024), 0)["attn_prefill"])


def test_less_than_was_measured_takes_as_long_and_is_noted(tables):
    """A short chunk takes at most as long as the shortest measured; nothing is refused."""
    times = stage_time(tables)
    assert times.operators(prefill(5), 0)["attn_prefill"] == seconds(4 * prefill_ms(0, 64))
    assert (
        "prefill_chunk_size from 5 to 5, measured from 64" in times.extrapolations["attn_prefill"]
    )


def test_prefixes_and_chunks_together_have_a_limit(tables):
    """A long prefix with a long chunk may be beyond though each was measured."""
    frame = pd.read_csv(tables / "attention.csv")
    frame[frame.kv_cache_size + frame.prefill_chunk_size <= 1024].to_csv(
        tables / "attention.csv", index=False
    )
    with pytest.raises(vs.ProfileError, match=r"attn_prefill .*their sum .* to 1024, .* 1408"):
        stage_time(tables)(prefill(512, prefix=896), 0)


# Tables that cannot be


def test_a_bad_time_is_named_by_file_row_and_column(tables):
    """Zero, negative, and outside what the device can do."""
    column = "time_stats.mlp_up_proj.median"
    for bad in (0.0, -0.5, 1e-4, 1e5):
        frame = mlp_table()
        frame.loc[60, column] = bad
        frame.to_csv(tables / "mlp.csv", index=False)
        message = rf"mlp\.csv, line 62: {column} = {bad:g} for num_tokens = .*: expected .* ms"
        with pytest.raises(vs.ProfileError, match=message):
            stage_time(tables)


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "seconds"), (1e3, "microseconds")])
@pytest.mark.parametrize("file", ["mlp", "attention", "all_reduce", "send_recv", "cpu_overheads"])
def test_another_unit_is_noticed(tmp_path, file, factor, unit):
    """Every table in seconds or microseconds is refused, with a guess at its unit."""
    tables = write(tmp_path / "tables", tp=2)
    path = tables / f"{file}.csv"
    frame = pd.read_csv(path)
    times = [column for column in frame if column.startswith("time_stats") or column in CPU]
    change(path, **{column: frame[column] * factor for column in times})
    with pytest.raises(vs.ProfileError, match=rf"{file}\.csv, line \d+: .*if they were {unit}"):
        stage_time(tables, deployment(tp=2, pp=2), cpu_overheads=tables)


def test_bad_rows_can_be_left_out(tables):
    """They are counted, and the fit is that of the others."""
    column = "time_stats.mlp_up_proj.median"
    frame = mlp_table()
    frame.loc[[30, 35], column] = 1e-4
    frame.to_csv(tables / "mlp.csv", index=False)
    times = stage_time(tables, skip_bad_rows=True)
    assert times.num_skipped == {"mlp_up_proj": 2}
    expected = 4 * line_ms("mlp_up_proj", TOKENS[35])
    assert times.operators(prefill(TOKENS[35]), 0)["mlp_up_proj"] == seconds(expected)


MISFITS = {
    "missing column": (
        "mlp",
        lambda frame: frame.drop(columns="time_stats.mlp_act.median"),
        r"no column 'time_stats\.mlp_act\.median'; it has num_tokens, ",
    ),
    "missing size": (
        "attention",
        lambda frame: frame.drop(columns="kv_cache_size"),
        "no column 'kv_cache_size'",
    ),
    "another model": (
        "mlp",
        lambda frame: frame.assign(n_embd=2048),
        "'n_embd' has 2048, expected 1024",
    ),
    "other heads": (
        "attention",
        lambda frame: frame.assign(n_kv_head=8),
        "'n_kv_head' has 8, expected 2",
    ),
    "another split": (
        "attention",
        lambda frame: frame.assign(num_tensor_parallel_workers=4),
        "'num_tensor_parallel_workers' has 4, expected 1",
    ),
    "text": (
        "mlp",
        lambda frame: frame.assign(num_tokens=["many", *frame.num_tokens[1:].map(str)]),
        "line 2: num_tokens = 'many': expected a number",
    ),
    "negative size": (
        "mlp",
        lambda frame: frame.assign(num_tokens=-frame.num_tokens),
        "line 2: num_tokens -1.0: expected a number of at least 0",
    ),
    "size missing": (
        "mlp",
        lambda frame: frame.assign(num_tokens=[math.nan, *frame.num_tokens[1:]]),
        "line 2: num_tokens is missing",
    ),
    "too few rows": ("mlp", lambda frame: frame[:2], "has 2 usable rows"),
    "no rows": ("mlp", lambda frame: frame[:0], "has no rows"),
    "several block sizes": (
        "attention",
        lambda frame: frame.assign(block_size=[16, 32] * (len(frame) // 2)),
        "has the block sizes 16, 32: choose one",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tables_that_do_not_fit_are_refused(tables, name):
    """The message names the file and what was found and expected."""
    file, changed, message = MISFITS[name]
    path = tables / f"{file}.csv"
    changed(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(vs.ProfileError, match=rf"{file}\.csv.*{message}"):
        stage_time(tables)


def test_a_block_size_can_be_chosen(tables):
    """Only its rows are read."""
    frame = attention_table()
    slower = frame.assign(block_size=32)
    slower["time_stats.attn_decode.median"] *= 2
    pd.concat([frame, slower]).to_csv(tables / "attention.csv", index=False)
    times = stage_time(tables, block_size=32)
    expected = 4 * 2 * decode_ms(1, 128)
    assert times.operators(decodes(1, 129), 0)["attn_decode"] == seconds(expected)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n4\n", b"\xff\xfe\x00"])
def test_what_is_no_table_is_refused(tables, content):
    """Empty, ragged or binary."""
    (tables / "attention.csv").write_bytes(content)
    with pytest.raises(vs.ProfileError, match=r"attention\.csv"):
        stage_time(tables)


def test_missing_files_are_named(tables, tmp_path):
    """The folder, the tables of the layers, and the network where it is needed."""
    with pytest.raises(vs.ProfileError, match="there is no such folder"):
        stage_time(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(vs.ProfileError, match=r"expected Vidur's mlp\.csv.*; found nothing"):
        stage_time(tmp_path / "empty")
    (tables / "send_recv.csv").unlink()
    assert stage_time(tables)(prefill(64), 0) > 0
    with pytest.raises(vs.ProfileError, match=r"send_recv\.csv is missing.*Profile\.network"):
        stage_time(tables, deployment(pp=2))
    (tables / "attention.csv").unlink()
    with pytest.raises(vs.ProfileError, match=r"attention\.csv is missing"):
        stage_time(tables)


def test_the_cpu_table_knows_other_models(tables):
    """The nearest name is offered."""
    change(tables / "cpu_overheads.csv", model_name="small/Model-1C")
    with pytest.raises(vs.ProfileError, match="did you mean 'small/Model-1C'"):
        stage_time(tables, cpu_overheads=tables / "cpu_overheads.csv")


def test_deployments_that_such_tables_do_not_describe(tables):
    """Quantized weights and caches, experts."""
    with pytest.raises(vs.ProfileError, match="has quantized weights"):
        stage_time(tables, deployment(quantization="fp8"))
    with pytest.raises(vs.ProfileError, match="has a quantized KV cache"):
        stage_time(tables, deployment(kv_cache_dtype="fp8"))
    experts = model(num_experts=8, experts_per_token=2, moe_intermediate_size=1024)
    with pytest.raises(vs.ProfileError, match="has a mixture of experts"):
        stage_time(tables, deployment(model=experts))


def test_settings_are_checked():
    """As of any public object."""
    with pytest.raises(vs.ConfigError, match=r"Profile\.regressor = 'forest'"):
        vs.Profile(".", regressor="forest")


# In a simulation


def test_a_configuration_names_it(tables, tmp_path):
    """Paths are found beside the file, and what is dumped is what was loaded."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "cluster: {execution_time: {type: profile, path: tables, cpu_overheads: tables}}\n"
    )
    with pytest.raises(vs.ProfileError, match="'n_embd' has 1024, expected 4096"):
        vs.load_config(file)
    arguments = {"model": model(), "device": "a100", "max_model_len": 1024}
    cluster = vs.Cluster(execution_time=profile(tables), **arguments)
    dumped = vs.dump_config(cluster=cluster)["cluster"]["execution_time"]
    assert dumped["type"] == "profile"
    assert vs.Profile(**{key: value for key, value in dumped.items() if key != "type"}) == profile(
        str(tables)
    )


def test_a_simulation_runs_on_it(tables):
    """One request alone takes its prefill and its decodes."""
    cluster = vs.Cluster(
        model=model(), device="a100", max_model_len=1024, execution_time=profile(tables)
    )
    workload = vs.Workload(vs.AllAtOnce(), vs.FixedLengths(200, 20), num_requests=1)
    request = vs.simulate(cluster, workload).requests.iloc[0]
    times = stage_time(tables)
    steps = [times(decodes(1, context), 0) for context in range(201, 220)]
    assert request.ttft == pytest.approx(times(prefill(200), 0))
    assert request.e2e == pytest.approx(request.ttft + sum(steps))


# Real tables


REAL = {
    "a100": ("a100/meta-llama/Llama-2-70b-hf", "llama-2-70b", "a100", 2, "a100_dgx"),
    "a800": ("a800/meta-llama/Llama-2-7b-hf", "llama-2-7b", "a800", 1, None),
}


def real(shared, name, **settings):
    path, model_name, device, tp, network = REAL[name]
    folder = shared / "data" / "vidur_profiles"
    replica = vs.Deployment(vs.Model.from_name(model_name), vs.Device.from_name(device), tp)
    network = network and folder / "network" / network
    return profile(folder / path, network=network, **settings), replica


@pytest.mark.parametrize("name", REAL)
def test_real_tables_are_read_and_predicted(shared, name):
    """Left-out points of a real profile are met to some per cent, most kernels to 3."""
    path, replica = real(shared, name)
    errors = path.for_replica(replica).errors
    noise = errors.pop("attn_kv_cache_save", 0.0)  # a few steps of the timer's resolution
    assert noise < 0.2
    assert max(errors.values()) < 0.08
    assert np.median(list(errors.values())) < 0.03


@pytest.mark.parametrize("name", REAL)
def test_real_tables_agree_with_the_roofline(shared, name):
    """Decodes and prefills of real profiles lie where the device's peaks put them."""
    path, replica = real(shared, name)
    times, roofline = path.for_replica(replica), vs.Roofline(cpu_overhead=0).for_replica(replica)
    for batch in (
        decodes(8, 1000),
        decodes(100, 2000),
        prefill(512),
        prefill(2048),
        prefill(512, 3000),
    ):
        assert 0.6 < roofline(batch, 0) / times(batch, 0) < 1.2


def test_a_real_forest_is_as_good_as_vidur_says(shared):
    """The product that takes longest, by Vidur's regressor."""
    file = shared / "data/vidur_profiles/a100/meta-llama/Llama-2-70b-hf/mlp.csv"
    rows = pd.read_csv(file).query("num_tensor_parallel_workers == 2")
    points = rows[["num_tokens"]].to_numpy(float)
    times = rows["time_stats.mlp_up_proj.median"].to_numpy()
    assert fitted("mlp_up_proj", points, times, "random_forest").error < 0.03


def test_a_simulation_runs_on_real_tables(shared):
    """Llama-2-70B on two A100."""
    path, _ = real(shared, "a100", cpu_overhead=0.002)
    cluster = vs.Cluster(
        model="llama-2-70b", device="a100", tensor_parallel_size=2, execution_time=path
    )
    lengths = vs.UniformLengths(100, 2000, 4.0)
    workload = vs.Workload(vs.Poisson(rate=0.3), lengths, num_requests=20)
    tpot = vs.simulate(cluster, workload, seed=1).requests.tpot
    assert tpot.between(0.05, 0.4).all()


def test_real_cpu_tables_add_milliseconds(shared):
    """By the number of requests; only for the models and sizes that were measured."""
    table = shared / "data/vidur_profiles/cpu_overhead/a100_cpu_overheads.csv"
    path, replica = real(shared, "a800")
    without = path.for_replica(replica)
    times = dataclasses.replace(path, cpu_overheads=table).for_replica(replica)
    assert 0.001 < times(decodes(16, 500), 0) - without(decodes(16, 500), 0) < 0.01
    path, replica = real(shared, "a100", cpu_overheads=table)
    with pytest.raises(vs.ProfileError, match="'tensor_parallel_degree' has 4, expected 2"):
        path.for_replica(replica)


def test_a_faulty_real_table_is_refused(shared):
    """In the A30 table some projections are faster than its tensor cores: only their bias."""
    path = shared / "data/vidur_profiles/a30/Qwen/Qwen-2-7B"
    replica = vs.Deployment(vs.Model.from_name("qwen2.5-7b"), vs.Device.from_name("a30"))
    with pytest.raises(vs.ProfileError, match=r"mlp\.csv, line \d+: time_stats\.attn_pre_proj"):
        profile(path).for_replica(replica)
    times = profile(path, skip_bad_rows=True).for_replica(replica)
    assert times.num_skipped["attn_pre_proj"] > 50
    assert times(prefill(1000), 0) > 0


def test_real_tables_without_attention_are_refused(shared):
    """Of the H100 only the MLP was measured."""
    path = shared / "data/vidur_profiles/h100/meta-llama/Llama-2-70b-hf"
    replica = vs.Deployment(vs.Model.from_name("llama-2-70b"), vs.Device.from_name("h100"), 4)
    with pytest.raises(vs.ProfileError, match=r"attention\.csv is missing"):
        profile(path).for_replica(replica)


def test_the_benchmark_measures_every_profile(shared, monkeypatch):
    """It runs, and gives an error for every operator."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    benchmark = importlib.import_module("profile_accuracy")
    table = benchmark.run(shared / "data" / "vidur_profiles", ("interpolation",))
    assert len(table.columns) == 3
    assert table.loc["attn_decode"].between(0.1, 5).all()
