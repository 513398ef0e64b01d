"""NVIDIA's measured kernels as execution times: names, tables on disk, and look-ups."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from counts import Chunk, Counts, batches, decodes, prefill, replica
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shared_folder import SHARED

import vidur_simpy as vs
from vidur_simpy.execution_time import kernel_database, stage_time_of
from vidur_simpy.execution_time.aiconfigurator import AIConfigurator, AIConfiguratorStageTime
from vidur_simpy.execution_time.cache import cache_directory, cached
from vidur_simpy.execution_time.kernel_tables import Grid, tabulated

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

PACKAGE = "aiconfigurator_core"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Each test has a cache of its own."""
    monkeypatch.setenv("VIDUR_SIMPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The cache


def test_tables_are_computed_once(cache_folder):
    """The second time they come from disk, equal in values and types."""
    calls = []

    def compute():
        calls.append(1)
        return {"numbers": np.arange(3), "names": np.array(["a", "bc"])}

    first, again = (cached("table", {"size": 3}, compute) for _ in range(2))
    assert len(calls) == 1
    assert cache_directory() == cache_folder
    assert first["numbers"].tolist() == again["numbers"].tolist()
    assert again["names"].tolist() == ["a", "bc"]
    assert again["numbers"].dtype == first["numbers"].dtype


def test_another_key_is_another_table():
    """Whatever decides the values is in the name of the file."""
    for size in (1, 2):
        found = cached("table", {"size": size}, lambda size=size: {"zeros": np.zeros(size)})
        assert len(found["zeros"]) == size
    assert len(list(cache_directory().iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "other"])
def test_a_damaged_file_is_noticed_and_computed_again(damage):
    """Cut short, with a byte changed, empty, or of something else: a warning, and all is well."""
    cached("table", {"size": 3}, lambda: {"numbers": np.arange(1000.0)})
    (path,) = cache_directory().iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if damage == "other":
        cached("other", {}, lambda: {"numbers": np.arange(2)})
        path.write_bytes(next(cache_directory().glob("other*")).read_bytes())
    else:
        kept = {"cut": content[:100], "changed": content, "emptied": b""}[damage]
        path.write_bytes(kept)
    with pytest.warns(UserWarning, match="is damaged"):
        found = cached("table", {"size": 3}, lambda: {"numbers": np.arange(1000.0)})
    assert found["numbers"][-1] == 999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached("table", {"size": 3}, lambda: pytest.fail("was written again"))


def test_an_interrupted_computation_leaves_nothing():
    """A file is complete or not there."""

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("table", {}, interrupted)
    assert not cache_directory().exists() or not list(cache_directory().iterdir())


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    """The tables are there all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIDUR_SIMPY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="set VIDUR_SIMPY_CACHE"):
        assert cached("table", {}, lambda: {"one": np.ones(1)})["one"] == 1


def test_objects_are_not_kept():
    """Only what can be read without running code."""
    with pytest.raises(vs.ConfigError, match="'things' of object"):
        cached("table", {}, lambda: {"things": np.array([object()])})


# Look-ups, on kernels that are made up


class MadeUp:
    """Kernels whose times are simple formulas, in milliseconds."""

    def __init__(self):
        self.num_calls = 0

    def run_static_per_op(self, *, batch_size, isl, osl, prefix=0, mode="static"):
        self.num_calls += 1
        if mode == "static_gen":
            attention = 0.05 + 1e-5 * batch_size * (isl + 1)
            times = {"qkv_gemm": 1 + 0.01 * batch_size, "attention": attention}
            times |= {"logits_gemm": 0.2 + 0.001 * batch_size, "p2p": 0.1 + 0.001 * batch_size}
            return [], [(f"generation_{name}", time, 0.0) for name, time in times.items()]
        tokens = batch_size * (isl - prefix)
        attention = 0.05 + 1e-3 * tokens + 1e-6 * tokens * prefix
        times = {"qkv_gemm": 1 + 0.01 * tokens, "attention": attention, "p2p": 0.1 + 0.001 * tokens}
        return [(f"context_{name}", time, 0.0) for name, time in times.items()], []


@pytest.fixture(scope="module")
def made_up():
    return tabulated(MadeUp(), Grid(16, 64, 2), max_num_seqs=256, max_context=8192)


def milliseconds(stage_time, batch, stage_id=0):
    return stage_time(batch, stage_id) * 1e3


def test_decodes_are_what_the_kernels_say(made_up):
    """At points of the grid, and between those where the kernels are straight."""
    stage_time = AIConfiguratorStageTime(made_up, 1, 0.0)
    for number, context in ((1, 2), (7, 100), (16, 1000), (200, 5000)):
        expected = 1.25 + 0.011 * number + 1e-5 * number * context
        assert milliseconds(stage_time, decodes(number, context)) == pytest.approx(expected)


def test_prefills_are_what_the_kernels_say(made_up):
    """One chunk or several, after a prefix or none; the LM head has a row for each."""
    stage_time = AIConfiguratorStageTime(made_up, 1, 0.0)
    for number, length, prefix in ((1, 1, 0), (1, 100, 50), (3, 500, 0), (8, 700, 1300)):
        batch = Counts(0, 0, (Chunk(length, prefix + length),) * number)
        tokens = number * length
        expected = 1 + 0.01 * tokens + 0.05 + 1e-3 * tokens + 1e-6 * tokens * prefix
        expected += 0.2 + 0.001 * number
        assert milliseconds(stage_time, batch) == pytest.approx(expected)


def test_a_mixed_batch_is_its_tokens_and_both_attentions(made_up):
    """Products are of all tokens at once; attention is of either kind."""
    stage_time = AIConfiguratorStageTime(made_up, 1, 0.0)
    batch = Counts(10, 10_000, (Chunk(300, 300), Chunk(100, 100)))
    # Chunks as if equal: 200 tokens each, with a prefix at which they attend to as much.
    prefix = (300 * 301 + 100 * 101) / 2 / 400 - 201 / 2
    attention = 0.05 + 0.1 + 0.05 + 0.4 + 1e-6 * 400 * prefix
    assert milliseconds(stage_time, batch) == pytest.approx(1 + 4.1 + attention + 0.212)


@settings(max_examples=30, deadline=None)
@given(number=st.integers(1, 256), mean=st.integers(1, 4096), num_iterations=st.integers(1, 100))
def test_decode_times_are_the_calls_to_the_last_bit(made_up, number, mean, num_iterations):
    """Few or many at once, of any number of decodes."""
    stage_time = AIConfiguratorStageTime(made_up, 1, 0.002)
    context = number * mean + number // 2
    times = stage_time.decode_times(number, context, num_iterations, 0)
    calls = [
        stage_time(Counts(number, context + index * number), 0) for index in range(num_iterations)
    ]
    assert list(times) == calls


@settings(max_examples=30, deadline=None)
@given(batch=batches, num_stages=st.sampled_from([1, 2, 4]))
def test_operators_add_up(made_up, batch, num_stages):
    """They are the stage's time, in each stage."""
    assume(batch.num_tokens <= 8192)  # what the tables hold
    stage_time = AIConfiguratorStageTime(made_up, num_stages, 0.002)
    for stage_id in range(num_stages):
        operators = stage_time.operators(batch, stage_id)
        assert sum(operators.values()) == pytest.approx(stage_time(batch, stage_id))
        assert ("cpu_overhead" in operators) == (stage_id == 0)
        assert ("lm_head" in operators) == (stage_id == num_stages - 1)
        assert ("send" in operators) == (stage_id < num_stages - 1)


def test_stages_share_the_layers(made_up):
    """Together they take what one does, and the transfers."""
    whole, stages = (AIConfiguratorStageTime(made_up, number, 0.001) for number in (1, 2))
    batch = decodes(8, 500)
    together = stages(batch, 0) + stages(batch, 1)
    assert together == pytest.approx(whole(batch, 0) + 1e-4 + 8e-6)


@pytest.mark.parametrize(
    ("batch", "setting"),
    [
        (decodes(257, 10), "max_num_seqs"),
        (decodes(2, 40_000), "max_context"),
        (prefill(10_000), "max_context"),
        (prefill(100, 40_000), "max_context"),
        (Counts(300, 3000, (Chunk(10, 10),)), "max_num_seqs"),
    ],
)
def test_nothing_is_extrapolated_silently(made_up, batch, setting):
    """A batch beyond the tables says which setting is too small."""
    stage_time = AIConfiguratorStageTime(made_up, 1, 0.0)
    with pytest.raises(vs.ProfileError, match=f"raise {setting}"):
        stage_time(batch, 0)
    if not batch.prefills:
        with pytest.raises(vs.ProfileError, match=f"raise {setting}"):
            stage_time.decode_times(batch.num_decodes, batch.decode_context, 50, 0)


# Names


def test_a_device_is_called_by_the_package_s_name():
    """Those that were measured; others are refused with those that were, nearest first."""
    assert kernel_database.system_of("h200-141gb-sxm") == "h200_sxm"
    with pytest.raises(vs.ConfigError, match=r"no device 'h100-80gb-pcie'.* h100-80gb-sxm, "):
        kernel_database.system_of("h100-80gb-pcie")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    """The extra by name."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(vs.ConfigError, match=r"pip install 'vidur-simpy\[aiconfigurator\]'"):
        AIConfigurator().for_replica(replica())


def test_another_version_of_the_package_is_refused(monkeypatch):
    """It is before 1.0, and its functions move."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.1")
    with pytest.raises(vs.ConfigError, match=r"0\.13\.1: expected 0\.12\.\*"):
        AIConfigurator().for_replica(replica())


def test_the_package_is_not_loaded_before_it_is_needed():
    """Configurations are made, compared and written without it."""
    code = (
        "import sys, vidur_simpy as vs; vs.dump_config(execution_time=vs.AIConfigurator());"
        f"sys.exit('{PACKAGE}' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_configuration_says_its_name():
    """In files it is `aiconfigurator`."""
    dumped = vs.dump_config(execution_time=vs.AIConfigurator(backend="sglang", max_num_seqs=64))
    assert dumped["execution_time"]["type"] == "aiconfigurator"
    assert dumped["execution_time"]["backend"] == "sglang"


# With the package itself

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs aiconfigurator-core"
)


def coarse(**kwargs):
    return AIConfigurator(grid="coarse", max_num_seqs=16, max_context=2048, **kwargs)


@needs_package
def test_models_go_by_the_package_s_name_if_they_are_alike():
    """Whatever they are called here; others are described by their sizes."""

    def name_of(model, device="h100", **settings):
        return AIConfigurator().request(replica(model, device, **settings)).model

    assert name_of("llama-3.1-8b") == "meta-llama/Meta-Llama-3.1-8B"
    assert name_of("deepseek-v3", "h200", tp=8) == "deepseek-ai/DeepSeek-V3"
    assert name_of("mixtral-8x7b", tp=2) == "mistralai/Mixtral-8x7B-v0.1"
    described = AIConfigurator().request(replica("qwen2.5-7b"))
    assert described.model == "Qwen/Qwen2.5-7B"
    assert described.config["num_key_value_heads"] == 4


@needs_package
@pytest.mark.parametrize(
    ("execution_time", "deployment", "message"),
    [
        (coarse(model="llama-3.1-8b"), {}, r"no model 'llama-3.1-8b'; nearest first .*-3.1-8B"),
        (coarse(), {"model": "bloom"}, "bloom', which has MLPs without a gate"),
        (coarse(), {"device": "a10"}, "no device 'a10'"),
        (coarse(system="h100"), {}, "no system 'h100'; nearest first it has: h100_sxm"),
        (coarse(backend="vlm"), {}, "no backend 'vlm' on h100_sxm; nearest first it has: vllm"),
        (coarse(backend_version="0.9"), {}, "no version of vllm on h100_sxm '0.9'.*0.24.0"),
        (coarse(gemm_quant_mode="fp9"), {}, "no gemm_quant_mode 'fp9'; nearest first it has: fp8"),
    ],
)
def test_what_is_not_covered_is_refused_with_names_that_are(execution_time, deployment, message):
    """The package's own names, the nearest first."""
    with pytest.raises(vs.ConfigError, match=message):
        execution_time.for_replica(replica(**deployment))


@needs_package
def test_a_precision_without_measurements_is_a_profile_error():
    """What was measured instead is named, and no path of the machine."""
    with pytest.raises(vs.ProfileError, match=r"int4_wo.*bfloat16") as refused:
        coarse().for_replica(replica(quantization="awq"))
    assert "systems" not in str(refused.value)


@needs_package
def test_a_replica_is_tabulated_once_and_near_the_roofline(monkeypatch):
    """From the package first, then from disk; the roofline was fitted to the same kernels."""
    deployment = replica("llama-3.1-8b")
    stage_time = coarse(cpu_overhead=0.0).for_replica(deployment)
    roofline = vs.Roofline(cpu_overhead=0.0).for_replica(deployment)
    for batch in (decodes(8, 1000), prefill(1024), Counts(8, 8000, (Chunk(256, 512),))):
        assert stage_time(batch, 0) == pytest.approx(roofline(batch, 0), rel=0.15)
    monkeypatch.setattr(kernel_database, "compiled", lambda request: pytest.fail("asked again"))
    again = coarse(cpu_overhead=0.0).for_replica(deployment)
    assert again(decodes(8, 1000), 0) == stage_time(decodes(8, 1000), 0)


@needs_package
def test_a_cluster_runs_on_it():
    """As on any other execution-time model."""
    cluster = vs.Cluster(execution_time=coarse(), max_model_len=2048)
    assert stage_time_of(cluster.execution_time, cluster.deployment)(decodes(4, 100), 0) > 0.002
    workload = vs.Workload(vs.Constant(2.0), vs.FixedLengths(200, 20), num_requests=5)
    assert vs.simulate(cluster, workload).figures["completed"] == 5


@needs_package
def test_the_package_is_asked_for_random_iterations():
    """Of each kind that the tables are compared for."""
    import aiconfigurator_accuracy

    request = AIConfigurator().request(replica())
    cases = list(aiconfigurator_accuracy.cases(request, 1, np.random.default_rng(0)))
    assert len({case.kind for case in cases}) == len(cases) == 5
    assert all(case.seconds > 0 for case in cases)


# Against real servers


def test_nvidia_rows_play_as_closed_loops():
    """A row of each benchmark, with the right number of clients, near what was measured."""
    import nvidia_rows

    path = SHARED / "data" / "reference" / "nvidia_silicon_sample.csv"
    if not path.exists():
        pytest.skip(f"needs the measurements in {path}")
    rows = [row for row in nvidia_rows.read_rows(path) if row.concurrency == 8]
    chosen = [next(row for row in rows if row.is_inferencemax is kind) for kind in (True, False)]
    for row in chosen:
        execution_time = nvidia_rows.execution_time_of("roofline", row)
        played = nvidia_rows.play(row, execution_time, rounds=2)
        assert abs(played.tpot_error) < 15
        assert played.ttft > 0
