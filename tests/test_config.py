"""Configurations: what a file says is what an object is, and back, to the last bit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy import ConfigError, dump_config, load_config
from vidur_simpy.config import TABLES, TOP_LEVEL
from vidur_simpy.execution_time import RooflineFactors

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SYNTHETIC = {
    "type": "synthetic",
    "arrivals": {"type": "poisson", "rate": 2.0},
    "lengths": {"type": "fixed", "num_prefill_tokens": 100, "num_decode_tokens": 10},
    "num_requests": 20,
}

# One with every setting changed, where settings are needed or change much.
EXAMPLES = {
    "replica_scheduler": [
        vs.Sarathi(max_num_seqs=7, chunk_size=33),
        vs.Vllm(max_num_seqs=7, max_num_batched_tokens=999),
        vs.Orca(max_num_seqs=7),
        vs.FasterTransformer(max_num_seqs=7),
    ],
    "global_scheduler": [],
    "execution_time": [
        vs.Linear(base=1e-5, per_token=2.5e-7, per_context_token=1 / 3),
        vs.Roofline(cpu_overhead=0.0),
        vs.Roofline(factors="hopper"),
        vs.Calibrated(base=vs.Roofline(cpu_overhead=0.0), overhead=1e-3, context_scale=1.25),
        vs.Roofline(factors=replace(RooflineFactors.from_name("a100"), name="my fit")),
    ],
    "arrivals": [
        vs.Poisson(rate=0.1),
        vs.Gamma(rate=1e-3, cv=2.5),
        vs.Constant(rate=3),
        vs.TraceArrivals("trace.csv", time_scale=0.5, format="azure"),
    ],
    "lengths": [
        vs.FixedLengths(3, 4),
        vs.UniformLengths(10, 20, 4.5),
        vs.ZipfLengths(0.6, 10, 20, 4.5),
        vs.LognormalLengths(100.0, 0.5, 20.0, 1e-7),
        vs.PublishedLengths("azure-code-2023"),
        vs.TraceLengths("trace.csv", prefill_scale=0.1, decode_scale=2.0, order="file"),
    ],
    "workload": [
        vs.Trace("trace.csv"),
        vs.Trace("trace.csv", "mooncake", 0.5, 2.0, 0.25, duration=5.5, clip="prompt"),
    ],
}


def through_yaml(arguments):
    """The keyword arguments, written to YAML text and read again."""
    return load_config(yaml.safe_load(yaml.safe_dump(dump_config(**arguments), sort_keys=False)))


def with_defaults(key):
    """An object of every class in a table that needs no settings; the others have examples."""
    made = []
    for cls in TABLES[key].values():
        with suppress(ConfigError):
            made.append(cls())
    return made


CLUSTER_PARTS = [
    (key, part)
    for key in ("replica_scheduler", "global_scheduler", "execution_time")
    for part in [*with_defaults(key), *EXAMPLES[key]]
]
WORKLOADS = [
    *EXAMPLES["workload"],
    *[
        vs.Workload(arrivals, vs.FixedLengths(3, 4), num_requests=5)
        for arrivals in [*with_defaults("arrivals"), *EXAMPLES["arrivals"]]
    ],
    *[
        vs.Workload(vs.Poisson(1.0), lengths, duration=2.5, clip="proportional")
        for lengths in EXAMPLES["lengths"]
    ],
]
CLUSTERS = [
    vs.Cluster(),
    vs.Cluster(
        model="meta-llama/Llama-3.1-70B",
        device="a100-80gb-sxm",
        num_replicas=3,
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        max_model_len=4096,
        kv_cache=vs.KVCache(block_size=8, watermark=0.05, gpu_memory_utilization=0.85),
        sequence_pipeline_parallel=True,
    ),
    vs.Cluster(
        max_model_len=100,
        kv_cache=vs.KVCache(block_size=1, num_blocks=1000),
        replica_scheduler=vs.LightLLM(7, 999, 3),
        global_scheduler="random",
    ),
    vs.Cluster(
        model={
            "name": "mine",
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "vocab_size": 1000,
        },
        device={
            "name": "mine",
            "bf16_dense_tflops": 1.5,
            "memory_bandwidth_gbps": 100,
            "memory_gb": 8,
            "scaleup_bidir_gbps": 10,
        },
        max_model_len=100,
    ),
]


# Round trips


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: str(cluster.num_devices))
def test_a_cluster_goes_through_yaml(cluster):
    """Dumped, written, read and built it is equal, and plans the same memory."""
    again = through_yaml({"cluster": cluster})["cluster"]
    assert again == cluster
    assert again.num_blocks == cluster.num_blocks


@pytest.mark.parametrize(("key", "part"), CLUSTER_PARTS, ids=str)
def test_a_policy_goes_through_yaml(key, part, make_cluster):
    """Every replica scheduler, router and execution time, with usual and unusual settings."""
    block_size = 1 if isinstance(part, vs.LightLLM) else 16
    kv_cache = vs.KVCache(block_size=block_size, num_blocks=10_000)
    cluster = make_cluster(**{"kv_cache": kv_cache, "execution_time": vs.Linear(), key: part})
    again = through_yaml({"cluster": cluster})["cluster"]
    assert getattr(again, key) == part
    assert again == cluster


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_a_workload_goes_through_yaml(workload):
    """Every kind of arrivals, lengths and trace."""
    assert through_yaml({"workload": workload})["workload"] == workload


def test_no_class_of_the_tables_is_forgotten():
    """What needs settings has an example above, so that every name has gone through YAML."""
    for key, table in TABLES.items():
        shown = {type(part) for part in [*with_defaults(key), *EXAMPLES[key]]}
        shown |= {vs.Workload, vs.Profile}  # a profile reads its tables: see test_profile
        assert shown >= set(table.values()), key


@given(
    rate=st.floats(1e-12, 1e12),
    base=st.floats(0, 1e3),
    seed=st.integers(0, 2**70),
    n=st.integers(1),
)
def test_numbers_keep_every_bit(rate, base, seed, n):
    """Tiny, huge and odd numbers come back as they went."""
    arguments = {
        "cluster": vs.Cluster(execution_time=vs.Linear(base=base)),
        "workload": vs.Workload(vs.Poisson(rate), vs.FixedLengths(1, 1), num_requests=n),
        "seed": seed,
    }
    assert through_yaml(arguments) == arguments


def test_model_objects_are_dumped_as_their_fields():
    """A Model or Device object is told by its fields, from which the same deployment follows."""
    cluster = vs.Cluster(
        model=replace(vs.Model.from_name("llama-3.1-8b"), num_layers=16),
        device=vs.Device.from_name("h100"),
    )
    assert through_yaml({"cluster": cluster})["cluster"].deployment == cluster.deployment


def test_options_of_the_run_go_through_yaml():
    """Seed, order, end and tables are part of a configuration."""
    arguments = {"seed": 7, "event_order": "id", "until": 2.5, "record": ["batches", "tokens"]}
    again = through_yaml({"cluster": vs.Cluster(), **arguments})
    assert {key: again[key] for key in arguments} == arguments
    assert set(TOP_LEVEL) == {"cluster", "workload", *arguments}


# What a result says


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3, "event_order": "id", "record": ("stages", "batches")},
        {"until": 4.5, "record": "events"},
    ],
)
def test_a_result_says_what_reproduces_it(options, tmp_path):
    """`result.config`, also from a saved result, gives every table again, exactly."""
    cluster = vs.Cluster(num_replicas=2, global_scheduler="random", execution_time="linear")
    workload = vs.Workload(vs.Gamma(5.0, 2.0), vs.PublishedLengths("azure-conv-2023"), 40)
    result = vs.simulate(cluster, workload, **options)
    result.save(tmp_path / "saved")
    for config in (result.config, tmp_path / "saved" / "config.yaml"):
        again = vs.simulate(**load_config(config))
        assert again.tables == result.tables
        for table in result.tables:
            ours, theirs = getattr(again, table), getattr(result, table)
            assert_frame_equal(ours, theirs, check_exact=True)
        assert again.info == result.info
        assert again.config == result.config


def test_objects_of_the_users_own_are_told_not_stored(make_cluster):
    """A config that cannot be read back says so, and names the object."""

    def my_router(request, replicas):
        return replicas[-1]

    config = dump_config(cluster=make_cluster(global_scheduler=my_router, execution_time="linear"))
    assert config["cluster"]["global_scheduler"]["object"].endswith("my_router")
    with pytest.raises(ConfigError, match=r"cluster.global_scheduler was the Python object .*my_r"):
        load_config(config)


# Files


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_go_through_yaml(file):
    """Every file of configs/ gives objects that come back equal."""
    arguments = load_config(file)
    assert through_yaml(arguments) == arguments


def test_names_stand_for_usual_settings():
    """A plain name is the policy with its defaults."""
    cluster = load_config({"cluster": {"replica_scheduler": "vllm", "global_scheduler": "random"}})
    assert cluster["cluster"].replica_scheduler == vs.Vllm()
    assert cluster["cluster"].global_scheduler == vs.RandomRouting()


def test_a_mapping_is_not_changed():
    """Reading leaves the caller's mapping as it was, also with overrides."""
    mapping = {"cluster": {"kv_cache": {"block_size": 8}}, "workload": SYNTHETIC}
    before = yaml.safe_dump(mapping)
    load_config(mapping, ["cluster.kv_cache.block_size=4", "workload.num_requests=3"])
    assert yaml.safe_dump(mapping) == before


def test_keys_without_a_value_are_not_there(tmp_path):
    """`seed:` with nothing behind it is the usual seed."""
    path = tmp_path / "config.yaml"
    path.write_text("cluster:\nseed:\nrecord:\nuntil:\n")
    assert load_config(path) == {"cluster": vs.Cluster()}


@pytest.mark.parametrize("text", ["2e-5", "2.e-5", "2.0e-5", "+.2E-4", "0.00002"])
def test_numbers_are_read_as_people_write_them(text, tmp_path):
    """2e-5 is a number, though YAML 1.1 takes it for a text."""
    path = tmp_path / "config.yaml"
    path.write_text(f"cluster: {{execution_time: {{type: linear, per_token: {text}}}}}\n")
    assert load_config(path)["cluster"].execution_time.per_token == 2e-5
    assert (
        load_config({}, [f"cluster.execution_time={{type: linear, per_token: {text}}}"])["cluster"]
        == (load_config(path)["cluster"])
    )


def test_traces_are_looked_up_from_here_then_from_the_file(tmp_path, monkeypatch):
    """A relative path is meant from the current folder; if it is not there, from the config's."""
    row = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,{},1\n"
    folder, here = tmp_path / "configs", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    (folder / "config.yaml").write_text("workload: {type: trace, path: trace.csv}")
    (folder / "trace.csv").write_text(row.format(11))
    monkeypatch.chdir(here)

    def prompt():
        return load_config(folder / "config.yaml")["workload"].requests().num_prefill_tokens[0]

    assert prompt() == 11
    (here / "trace.csv").write_text(row.format(22))
    assert prompt() == 22


# Overrides


def overridden(*overrides):
    return load_config(
        {"cluster": {"replica_scheduler": "sarathi"}, "workload": SYNTHETIC}, overrides
    )


def test_overrides_replace_values():
    """A dotted key and a YAML value, in the order given."""
    config = overridden(
        "cluster.num_replicas=3",
        "cluster.num_replicas=8",
        "cluster.kv_cache.num_blocks=500",
        "workload.arrivals.rate=0.5",
        "seed=4",
        "record=[batches, stages]",
    )
    assert config["cluster"].num_replicas == 8
    assert config["cluster"].kv_cache == vs.KVCache(num_blocks=500)
    assert config["workload"].arrivals == vs.Poisson(0.5)
    assert (config["seed"], config["record"]) == (4, ["batches", "stages"])


def test_overrides_give_settings_to_a_name():
    """A policy written as a name takes settings, and a mapping gives way to a name."""
    assert overridden("cluster.replica_scheduler.chunk_size=64")["cluster"].replica_scheduler == (
        vs.Sarathi(chunk_size=64)
    )
    assert overridden("cluster.replica_scheduler=orca")["cluster"].replica_scheduler == vs.Orca()
    inline = overridden("cluster.replica_scheduler={type: vllm, max_num_seqs: 4}")["cluster"]
    assert inline.replica_scheduler == vs.Vllm(max_num_seqs=4)
    assert overridden("workload.lengths={type: published, name: azure-code-2023}")[
        "workload"
    ].lengths == vs.PublishedLengths("azure-code-2023")


def test_overrides_take_a_value_away():
    """null stands for not given."""
    workload = overridden("workload.num_requests=null", "workload.duration=5")["workload"]
    assert (workload.num_requests, workload.duration) == (None, 5.0)
