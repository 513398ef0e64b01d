"""Bad input: one sentence that names the place, the value, what was expected, the nearest name."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from against_oracle import Given

import vidur_simpy as vs
from vidur_simpy import (
    CapacityError,
    ConfigError,
    Request,
    Simulation,
    SimulationError,
    TraceError,
    VidurError,
    load_config,
)

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
GOOD = {
    "cluster": {"max_model_len": 4096},
    "workload": {
        "type": "synthetic",
        "arrivals": {"type": "poisson", "rate": 1.0},
        "lengths": {"type": "fixed", "num_prefill_tokens": 10, "num_decode_tokens": 3},
        "num_requests": 3,
    },
}


def complaint(config, *overrides):
    """What is said about a configuration when it is read and its simulation made."""

    def make():
        arguments = load_config(config, overrides)
        arguments.pop("until", None)
        Simulation(**arguments)

    with pytest.raises(VidurError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into an empty folder, which is the present one."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


# Unknown names, at every level


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "unknown key 'sed': did you mean 'seed'? Known: cluster, "),
        ("Cluster={}", "unknown key 'Cluster': did you mean 'cluster'?"),
        ("cluster.modl=x", "unknown cluster key 'modl': did you mean 'model'?"),
        ("cluster.model=llama-3.1-8", "unknown model 'llama-3.1-8': did you mean 'llama-3.1-8b'?"),
        ("cluster.model=5", "cluster: unknown model 5: Known: "),
        ("cluster.model={num_layer: 2}", "of Model 'num_layer': did you mean 'num_layers'?"),
        ("cluster.model={1: 2}", "unknown setting of Model '1'"),
        ("cluster.model={model_type: lama}", "model_type in the Hugging Face config 'lama': did "),
        ("cluster.device=l40", "unknown device 'l40': did you mean 'l40s'?"),
        ("cluster.device={memory: 2}", "of Device 'memory': did you mean 'memory_gb'?"),
        (
            "cluster.kv_cache.blocksize=8",
            "unknown cluster.kv_cache key 'blocksize': did you mean 'block_size'? Known: block_",
        ),
        (
            "cluster.replica_scheduler=sarthi",
            "unknown cluster.replica_scheduler.type 'sarthi': did you mean 'sarathi'?",
        ),
        (
            "cluster.replica_scheduler={type: sarathi, chunksize: 5}",
            "unknown cluster.replica_scheduler key 'chunksize': did you mean 'chunk_size'?",
        ),
        ("cluster.replica_scheduler={type: [1]}", "unknown cluster.replica_scheduler.type [1]"),
        (
            "cluster.replica_scheduler.chunk_size=5",
            "cluster.replica_scheduler needs a type, one of faster_transformer, lightllm, ",
        ),
        (
            "cluster.global_scheduler=robin",
            "unknown cluster.global_scheduler.type 'robin': did you mean 'round_robin'?",
        ),
        (
            "cluster.global_scheduler={type: random, sed: 5}",
            "unknown cluster.global_scheduler key 'sed': Known: none.",
        ),
        (
            "cluster.execution_time=liner",
            "unknown cluster.execution_time.type 'liner': did you mean 'linear'?",
        ),
        (
            "cluster.execution_time={type: linear, per_tokn: 1}",
            "unknown cluster.execution_time key 'per_tokn': did you mean 'per_token'?",
        ),
        (
            "cluster.execution_time={type: roofline, factors: hoper}",
            "unknown roofline factors 'hoper': did you mean 'hopper'?",
        ),
        (
            "cluster.execution_time={type: roofline, factors: {gemm: 1}}",
            "unknown cluster.execution_time.factors key 'gemm'",
        ),
        ("workload=trac", "unknown workload.type 'trac': did you mean 'trace'? Known: "),
        (
            "workload={type: sintetic}",
            "unknown workload.type 'sintetic': did you mean 'synthetic'?",
        ),
        (
            "workload.num_request=3",
            "unknown workload key 'num_request': did you mean 'num_requests'",
        ),
        ("workload.clip=promt", "workload.clip = 'promt': expected 'refuse', 'prompt' or "),
        (
            "workload.arrivals=poison",
            "unknown workload.arrivals.type 'poison': did you mean 'poisson'?",
        ),
        ("workload.arrivals.rat=1", "unknown workload.arrivals key 'rat': did you mean 'rate'?"),
        ("workload.arrivals=poisson", "workload.arrivals: Poisson needs 'rate'"),
        (
            "workload.lengths={type: fixd}",
            "unknown workload.lengths.type 'fixd': did you mean 'fix",
        ),
        (
            "workload.lengths.num_decode_token=1",
            "unknown workload.lengths key 'num_decode_token': did you mean 'num_decode_tokens'?",
        ),
        (
            "workload.lengths={type: published, name: azure-conv}",
            "unknown published lengths 'azure-conv': did you mean 'azure-conv-2023'?",
        ),
        ("workload={type: trace}", "workload: Trace needs 'path', which was not given."),
        ("event_order=ids", "unknown event_order 'ids': did you mean 'id'?"),
        (
            "record=[batches, stage]",
            "unknown record 'stage': did you mean 'stages'? Known: batches",
        ),
    ],
)
def test_unknown_names(override, expected):
    """The place is told, and the nearest that is known."""
    assert expected in complaint(GOOD, override)


# Wrong types, wrong ranges


@pytest.mark.parametrize(
    "value", ["two", "2.5", "0", "-1", ".nan", "true", "[2]", "null", "{a: 1}"]
)
@pytest.mark.parametrize(
    "place",
    [
        "cluster.num_replicas",
        "cluster.tensor_parallel_size",
        "cluster.kv_cache.block_size",
        "cluster.replica_scheduler.chunk_size",
        "workload.lengths.num_prefill_tokens",
        "workload.lengths.num_decode_tokens",
    ],
)
def test_counts_are_whole_and_positive(place, value):
    """No text, fraction, zero, negative, NaN, truth value, list or nothing stands for a count."""
    config = {**GOOD, "cluster": {"replica_scheduler": "sarathi"}}
    assert complaint(config, f"{place}={value}").startswith(f"{place} = ")


@pytest.mark.parametrize("value", ["fast", "0", "-1.5", ".nan", ".inf", "true", "[1.0]", "null"])
@pytest.mark.parametrize("place", ["workload.arrivals.rate", "cluster.kv_cache.watermark"])
def test_numbers_are_finite_and_in_range(place, value):
    """No text, NaN, infinity, truth value, list or nothing stands for a number."""
    if (place, value) == ("cluster.kv_cache.watermark", "0"):
        value = "1"
    assert complaint(GOOD, f"{place}={value}").startswith(f"{place} = ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cluster=5", "cluster = 5: expected a mapping."),
        ("cluster=[]", "cluster = []: expected a mapping."),
        ("cluster.max_model_len=1", "cluster.max_model_len = 1: expected greater than or equal to"),
        ("cluster.kv_cache=5", "cluster.kv_cache = 5: expected an instance of KVCache."),
        ("cluster.kv_cache.gpu_memory_utilization=1.1", "gpu_memory_utilization = 1.1: expected l"),
        ("cluster.replica_scheduler=5", "cluster.replica_scheduler = 5: expected a name, a callab"),
        ("cluster.global_scheduler=[a]", "cluster.global_scheduler = ['a']: expected a name, "),
        ("cluster.execution_time=0.1", "cluster.execution_time = 0.1: expected a name, a callable"),
        ("cluster.sequence_pipeline_parallel=2", "sequence_pipeline_parallel = 2: expected boolea"),
        ("cluster.num_replicas.a=1", "cluster.num_replicas = {'a': 1}: expected integer"),
        ("workload=5", "workload = 5: expected a Workload, a Trace or None."),
        ("workload.arrivals=5", "workload.arrivals = 5: expected arrivals such as Poisson(rate=1"),
        ("workload.lengths=5", "workload.lengths = 5: expected lengths such as FixedLengths("),
        ("workload={type: trace, path: 5}", "workload.path = 5: expected string"),
        ("workload.duration=5", "workload.num_requests = 3 and workload.duration = 5.0: expected"),
        ("workload.num_requests=null", "workload.num_requests = None and workload.duration = None"),
        ("workload.lengths={type: zipf, theta: 1, min_tokens: 9, max_tokens: 8, "
         "prefill_to_decode_ratio: 1}", "lengths: min_tokens = 9: expected at most max_tokens = 8"),
        ("seed=-1", "seed = -1: expected an integer >= 0."),
        ("seed=1.0", "seed = 1.0: expected an integer >= 0."),
        ("seed=one", "seed = 'one': expected an integer >= 0."),
        ("seed=true", "seed = True: expected an integer >= 0."),
        ("seed=[1]", "seed = [1]: expected an integer >= 0."),
        (
            "record=5",
            "record = 5: expected some of batches, stages, events, tokens, operators, phases.",
        ),
        ("until=0", "until = 0: expected an instant in seconds, after 0."),
        ("until=-2.5", "until = -2.5: expected an instant in seconds, after 0."),
        ("until=.nan", "until = nan: expected an instant in seconds, after 0."),
        ("until=.inf", "until = inf: expected an instant in seconds, after 0."),
        ("until=noon", "until = 'noon': expected an instant in seconds, after 0."),
        ("until=true", "until = True: expected an instant in seconds, after 0."),
        (
            "cluster.execution_time={type: profile, path: nowhere}",
            "cluster: nowhere: there is no such folder.",
        ),
        ("event_order=5", "unknown event_order 5: Known: id, type."),
    ],
)  # fmt: skip
def test_wrong_values(override, expected):
    """The message has the value as it was given, and what would do."""
    assert expected in complaint(GOOD, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cluster.num_replicas", "expected key=value, as in cluster.num_replicas=8."),
        ("=5", "--set '=5': expected key=value"),
        ("cluster.num_replicas=[", "'[' is not a YAML value."),
        ("cluster.kv_cache={block_size: 1, block_size: 2}", "is not a YAML value."),
        ("seed.first=1", "--set 'seed.first=1': seed is 5, which has no keys."),
    ],
)
def test_bad_overrides(override, expected):
    """--set is told what it should look like."""
    assert expected in complaint({**GOOD, "seed": 5}, override)


# Files


def test_a_missing_file(write):
    """The configurations that are there are told."""
    write("quickstart.yaml", "cluster: {}")
    assert complaint("quickstrat.yaml") == (
        "quickstrat.yaml: no such configuration file. In .: quickstart.yaml."
    )
    assert complaint("no/where.yaml") == "no/where.yaml: no such configuration file."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "cluster: {num_replicas: 2\nseed: 1\n",
            "x.yaml, line 2, column 5: not YAML: expected ','",
        ),
        ("cluster:\n\tseed: 1\n", "x.yaml, line 2, column 1: not YAML: found character '\\t'"),
        (
            "seed: 1\nseed: 2\n",
            "x.yaml, line 1, column 1: not YAML: the key 'seed' is given twice.",
        ),
        ("seed: !!python/name:os.system x", "x.yaml, line 1, column 7: not YAML: could not"),
        (b"\xff\xfe\x00", "x.yaml: not YAML: 'utf-8' codec can't decode"),
        ("", "x.yaml is empty: expected a mapping with the keys cluster, workload, seed"),
        ("# nothing yet\n", "x.yaml is empty: expected a mapping"),
        ("- cluster\n", "x.yaml holds a list: expected a mapping"),
        ("cluster", "x.yaml holds a str: expected a mapping"),
        ("cluster: {num_replicas: 0}", "x.yaml: cluster.num_replicas = 0: expected greater than"),
    ],
)
def test_bad_files(write, content, expected):
    """File, line and column of what is no YAML; the file of every other complaint."""
    assert complaint(write("x.yaml", content)).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "t.csv is empty, expected a header and rows"),
        (HEADER, "t.csv has a header but no rows, expected at least one request."),
        ("a,b\n1,2\n", "t.csv has the columns a, b; expected those of vidur (arrived_at, "),
        (HEADER + "0,5,5\n1,-7,5\n", "t.csv, line 3: num_prefill_tokens = '-7', expected a whole"),
        (HEADER + "0,5,5\n1,many,5\n", "t.csv, line 3: num_prefill_tokens = 'many', expected a wh"),
        (HEADER + "0,5,5\n1,,5\n", "t.csv, line 3: num_prefill_tokens is missing, expected a whol"),
        (HEADER + "0,5,5\n1,5\n", "t.csv, line 3: num_decode_tokens is missing, expected 3 values"),
        (HEADER + "0,5,5\n1,5,0\n", "t.csv, line 3: num_decode_tokens = '0', expected a whole num"),
        (HEADER + "0,5,5\n1,5,2.5\n", "t.csv, line 3: num_decode_tokens = '2.5', expected a whole"),
        (HEADER + "-1,5,5\n", "t.csv, line 2: arrived_at = '-1', expected finite seconds >= 0."),
        (HEADER + "nan,5,5\n", "t.csv, line 2: arrived_at = 'nan', expected finite seconds >= 0."),
        (HEADER + "soon,5,5\n", "t.csv, line 2: arrived_at = 'soon', expected finite seconds >= 0"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 5}\n', "t.csv, line 1: input_leng"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,5,5\n", "t.csv, line 2: TIMESTAMP = 'now'"),
    ],
)  # fmt: skip
def test_bad_traces(write, content, expected):
    """File, line and column of what cannot be a request."""
    write("t.csv", content)
    assert complaint(GOOD, "workload={type: trace, path: t.csv}").startswith(expected)
    with pytest.raises(TraceError):
        vs.Trace("t.csv").requests()


def test_a_missing_trace(write):
    """The nearest file of the folder is told."""
    write("traces.csv", HEADER)
    message = complaint(GOOD, "workload={type: trace, path: trace.csv}")
    assert message == "trace.csv does not exist. Did you mean 'traces.csv'?"


def test_a_trace_out_of_order_is_sorted(write, cluster):
    """It is a warning, not an error; requests of one instant keep their order."""
    write("t.csv", HEADER + "2.0,10,1\n0.5,20,1\n2.0,30,1\n0.5,40,1\n")
    with pytest.warns(UserWarning, match=r"t.csv: 2 of 4 rows arrive before .* line 3; sorted by"):
        requests = vs.simulate(cluster, vs.Trace("t.csv")).requests
    assert requests.arrived_at.to_list() == [0.5, 0.5, 2.0, 2.0]
    assert requests.num_prefill_tokens.to_list() == [20, 40, 10, 30]


def test_a_misspelt_column_of_a_trace_is_told(write, cluster):
    """Nobody would read it, and the requests would all be equally urgent."""
    write("t.csv", HEADER.strip() + ",priorty,region\n0.0,10,1,3,east\n")
    with pytest.warns(UserWarning, match=r"t.csv: .* column 'priorty'; did you mean 'priority'"):
        vs.simulate(cluster, vs.Trace("t.csv"))


# Requests that can never run


def outcome(cluster, *rows):
    """Run rows of (arrived_at, prompt, output); tell the requests table."""
    return vs.simulate(cluster, Given(rows)).requests


REFUSING = [
    (vs.Sarathi(), 900, 200, "its 900 + 200 tokens are more than max_model_len = 1000"),
    (
        vs.Sarathi(),
        700,
        10,
        "its prompt of 700 tokens needs 44 KV-cache blocks, 36 of 40 may be used",
    ),
    (vs.Sarathi(), 500, 200, "its 700 tokens need 44 KV-cache blocks, the whole cache has 40"),
    (vs.Vllm(max_num_batched_tokens=300), 301, 1, "longer than max_num_batched_tokens = 300"),
]


@pytest.mark.parametrize(("policy", "prompt", "output", "reason"), REFUSING)
def test_a_request_that_can_never_run_is_refused(make_cluster, policy, prompt, output, reason):
    """At arrival, with a reason and a row; the requests beside and behind it go on."""
    cluster = make_cluster(
        max_model_len=1000,
        kv_cache=vs.KVCache(block_size=16, num_blocks=40, watermark=0.1),
        replica_scheduler=policy,
    )
    requests = outcome(cluster, (0.0, 20, 2), (0.5, prompt, output), (0.5, 20, 2), (9.0, 20, 2))
    assert reason in requests.refusal[1]
    assert requests.completed_at.notna().to_list() == [True, False, True, True]
    assert (requests.refusal != "").to_list() == [False, True, False, False]
    assert requests.num_prefill_tokens[1] == prompt


@pytest.mark.parametrize(
    ("prompt", "output", "reason"),
    [
        (301, 1, "its prompt of 301 tokens is longer than max_num_batched_tokens = 300"),
        (250, 200, "it needs 449 tokens of KV cache and one free, there are 400"),
        (900, 200, "its 900 + 200 tokens are more than max_model_len = 1000"),
    ],
)
def test_lightllm_refuses_by_the_token(make_cluster, prompt, output, reason):
    """Its token limit and its memory count; the others go on."""
    cluster = make_cluster(
        max_model_len=1000,
        kv_cache=vs.KVCache(block_size=1, num_blocks=400),
        replica_scheduler=vs.LightLLM(max_num_batched_tokens=300),
    )
    requests = outcome(cluster, (0.0, 20, 2), (0.0, prompt, output), (0.0, 20, 2))
    assert requests.refusal[1] == reason
    assert requests.completed_at.notna().to_list() == [True, False, True]


@pytest.mark.parametrize("policy", [vs.Orca(), vs.FasterTransformer(), vs.Sarathi(), vs.Vllm()])
def test_a_request_that_just_fits_runs(make_cluster, policy):
    """The longest request that is not refused is completed, alone and in a crowd."""
    cluster = make_cluster(
        max_model_len=640,
        kv_cache=vs.KVCache(block_size=16, num_blocks=40, watermark=0.0),
        replica_scheduler=policy,
    )
    rows = [(0.0, 639, 1), (0.0, 320, 320), (0.0, 1, 639), (0.0, 320, 321)]
    requests = outcome(cluster, *rows)
    assert requests.completed_at.notna().to_list() == [True, True, True, False]
    assert requests.refusal[3] == "its 320 + 321 tokens are more than max_model_len = 640"


def test_all_requests_may_be_refused(make_cluster):
    """Then the run ends at once, with a summary that says why."""
    result = vs.simulate(make_cluster(max_model_len=100), Given([(0.0, 100, 1), (1.0, 200, 1)]))
    assert result.info["simulated_time"] == 1.0
    assert "2: 0 completed, 0 unfinished, 2 refused" in str(result)
    assert "more than max_model_len = 100" in str(result)


# Clusters that cannot be

NARROW = vs.KVCache(num_blocks=99)


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"model": "llama-2-70b"}, CapacityError, r"128.5 GiB of weights .* tensor_parallel_size"),
        ({"kv_cache": vs.KVCache(gpu_memory_utilization=0.1)}, CapacityError, "8.0 GiB .*; use "),
        ({"tensor_parallel_size": 3}, ConfigError,
         r"Cluster.tensor_parallel_size = 3 does not split the 32 heads .*: expected one of 2, 4"),
        ({"pipeline_parallel_size": 5}, ConfigError,
         r"Cluster.pipeline_parallel_size = 5 does not split the 32 layers .*: expected one of 4"),
        ({"replica_scheduler": "orca", "max_model_len": 4096, "kv_cache": NARROW},
         CapacityError, r"max_model_len = 4096 tokens needs 256 .* has 99; use max_model_len <= 1"),
        ({"replica_scheduler": "faster_transformer", "max_model_len": 4096, "kv_cache": NARROW},
         CapacityError, "has 99; use max_model_len <= 15"),
        ({"replica_scheduler": vs.Vllm(max_num_seqs=1), "pipeline_parallel_size": 2}, ConfigError,
         "max_num_seqs = 1 leaves no request for each of the 2 pipeline stages: expected at least"),
        ({"replica_scheduler": "lightllm"}, ConfigError, "kv_cache.block_size = 16, expected 1"),
        ({"replica_scheduler": "lightllm", "kv_cache": vs.KVCache(block_size=1),
          "pipeline_parallel_size": 2}, ConfigError, "pipeline_parallel_size = 2, expected 1"),
        ({"enable_expert_parallel": True}, ConfigError,
         "Cluster.enable_expert_parallel = True, .* has no experts"),
        ({"model": "qwen3-30b-a3b", "data_parallel_size": 2}, ConfigError,
         "Cluster.data_parallel_size = 2 does not divide the num_replicas = 1"),
        ({"quantization": "fp9"}, ConfigError, "Cluster.quantization 'fp9': did you mean 'fp8'"),
    ],
)  # fmt: skip
def test_clusters_that_cannot_be(settings, error, expected):
    """Refused when made, each with what would do."""
    with pytest.raises(error, match=expected) as caught:
        vs.Cluster(**settings)
    assert type(caught.value) is error


def test_a_capacity_error_of_a_file_stays_one():
    """The kind of error is kept through the configuration, with the place in front."""
    with pytest.raises(CapacityError, match=r"^cluster: meta-llama/Llama-2-70b-hf needs 128.5 GiB"):
        load_config(GOOD, ["cluster.model=llama-2-70b"])


# What a user's own functions give


@pytest.mark.parametrize(
    "seconds",
    [-1.0, math.nan, math.inf, "fast", None, [1.0], np.array([1.0]), np.array([1.0, 2.0])],
)
def test_execution_times_are_finite_and_not_negative(make_cluster, seconds):
    """The batch, the stage and the value are named; the result so far is kept."""
    times = iter([1.0, 1.0, seconds])
    sim = Simulation(make_cluster(execution_time=lambda batch: next(times)))
    sim.submit(Request(10, 5))
    with pytest.raises(SimulationError) as caught:
        sim.run()
    assert str(caught.value).startswith("the execution time of <Batch 2 of replica 0: 1 decodes, 0")
    assert "on stage 0 is" in str(caught.value)
    assert str(caught.value).endswith("expected a finite number >= 0.")
    assert caught.value.result.replicas.num_batches[0] == 2


@pytest.mark.parametrize("seconds", [1, np.float32(1.0), np.int64(1), Fraction(1)])
def test_execution_times_are_numbers_of_any_kind(make_cluster, seconds):
    """Tables hold floats whatever a model gives."""
    sim = Simulation(make_cluster(execution_time=lambda batch: seconds))
    sim.submit(Request(10, 3))
    sim.run()
    assert sim.result().requests.completed_at.to_list() == [3.0]


@pytest.mark.parametrize("times", [1.0, None, [1.0], np.ones((8, 1)), np.float64(1.0)])
def test_times_of_decodes_are_as_many_as_asked(make_cluster, times):
    """A value too few would shift all that follow."""

    class Model:
        def for_replica(self, deployment):
            return self

        def __call__(self, batch, stage_id):
            return 1.0

        def decode_times(self, num_decodes, decode_context, num_iterations, stage_id):
            return times

    sim = Simulation(make_cluster(execution_time=Model()))
    sim.submit(Request(10, 50))
    with pytest.raises(SimulationError, match=r"Model.decode_times\(\) gave .* for 8 iterations"):
        sim.run()


@pytest.mark.parametrize("function", [lambda: 1.0, lambda batch, stage_id, other: 1.0, int])
def test_execution_times_take_a_batch_and_maybe_a_stage(function):
    """Other parameters are refused when the cluster is made."""
    with pytest.raises(ConfigError, match=r"expected .*function of \(batch\) or \(batch, stage_id"):
        vs.Cluster(execution_time=function)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (
            lambda rng, n: (np.zeros(n, int), np.ones(n, int)),
            r"num_prefill_tokens\[0\] = 0: expected",
        ),
        (lambda rng, n: (np.ones(n), np.full(n, 1.5)), r"num_decode_tokens\[0\] = 1.5: expected"),
        (
            lambda rng, n: (np.ones(n), np.full(n, np.nan)),
            r"num_decode_tokens\[0\] = nan: expected",
        ),
        (lambda rng, n: (np.ones(2, int), np.ones(2, int)), "has 2 rows, arrived_at has 3"),
        (lambda rng, n: np.ones(n), r"returned ndarray, expected \(prompt, output\)"),
        (lambda rng, n: None, r"returned NoneType, expected \(prompt, output\)"),
    ],
)
def test_lengths_of_the_users_own_are_checked(cluster, lengths, expected):
    """Row and value are named before anything runs."""
    with pytest.raises(ConfigError, match=expected):
        Simulation(cluster, vs.Workload(vs.Constant(1.0), lengths, num_requests=3))


class Careless(vs.ContinuousBatching):
    """Gives a new request whatever `batch_of` makes of it."""

    batch_of = staticmethod(lambda request: None)

    def __init__(self, resources):
        super().__init__(resources, max_num_seqs=8)

    def schedule(self, now):
        return type(self).batch_of(self.waiting.popleft()) if self.waiting else None


@pytest.mark.parametrize(
    ("batch_of", "expected"),
    [
        (lambda request: 3, r"Careless.schedule\(\) gave 3: expected a Batch with tokens"),
        (
            lambda request: vs.Batch(),
            r"schedule\(\) gave <Batch .* 0 decodes, 0 prompt tok",
        ),
        (lambda request: vs.Batch(None, [request]), r"Batch.prefills = .*: expected chunks, as"),
        (lambda request: request.schedule_chunk(11), "a chunk of 11 tokens .* expected 1 to 10"),
        (lambda request: request.schedule_chunk(0), "a chunk of 0 tokens for <Request 0: 0 of 10"),
        (lambda request: request.schedule_chunk(-5), "a chunk of -5 tokens .* expected 1 to 10"),
        (
            lambda request: [request.schedule_chunk(10), request.schedule_chunk(1)],
            "a chunk of 1 tokens .* expected none, its prompt is scheduled",
        ),
    ],
)
def test_batches_of_the_users_own_are_checked(make_cluster, batch_of, expected):
    """What cannot be a batch is told at once, not by what it leads to."""
    policy = type("Careless", (Careless,), {"batch_of": staticmethod(batch_of)})
    sim = Simulation(make_cluster(replica_scheduler=policy))
    sim.submit(Request(10, 5))
    with pytest.raises(vs.VidurError, match=expected):
        sim.run()


def test_routers_take_a_request_and_the_replicas():
    """Other parameters are refused when the cluster is made."""
    with pytest.raises(ConfigError, match=r"global_scheduler = .*function of \(request, replicas"):
        vs.Cluster(global_scheduler=lambda request: None)


def test_a_workload_of_the_users_own_gives_arrays(cluster):
    """A table is none, though its columns may have the right names."""

    class Tabular:
        def requests(self, rng_arrivals, rng_lengths, max_model_len):
            return pd.DataFrame({"arrived_at": [0.0]})

    with pytest.raises(ConfigError, match=r"Tabular.requests\(\) gave a DataFrame: expected Req"):
        Simulation(cluster, Tabular())


def test_events_are_told_by_their_type(cluster):
    """The name of one is not enough."""
    with pytest.raises(ConfigError, match=r"did you mean 'EventType.BATCH_END'"):
        Simulation(cluster).on("BATCH_END", print)


def test_an_error_of_a_users_function_keeps_what_was_computed(make_cluster):
    """It is the user's own error, and says when; a later run tells that requests are missing."""

    def route(request, replicas):
        if request.request_id == 3:
            raise ZeroDivisionError("in the router")
        return replicas[0]

    workload = vs.Workload(vs.Constant(0.01), vs.FixedLengths(10, 2), num_requests=8)
    sim = Simulation(make_cluster(global_scheduler=route), workload)
    with pytest.raises(ZeroDivisionError, match="in the router") as caught:
        sim.run()
    assert caught.value.__notes__[0].startswith(f"At {sim.env.now:.6g} s; ")
    assert caught.value.result.figures["completed"] == 3
    with pytest.raises(SimulationError, match="5 requests are missing: an error ended an earlier"):
        sim.run()


@pytest.mark.parametrize("given", [0, -1, 1.5, math.nan, "ten", None])
def test_requests_have_whole_lengths(given):
    """A request of no tokens, of a part of one, or of no number cannot be made."""
    message = rf"Request.num_decode_tokens = {given!r}: expected a whole number, at least 1"
    with pytest.raises(ConfigError, match=message):
        Request(10, given)
    with pytest.raises(ConfigError, match=r"Request.num_prefill_tokens = "):
        Request(given, 10)
