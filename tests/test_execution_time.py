"""Stage times: the contract, and the straight line."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
from counts import Chunk, Counts, decodes, replica
from oracle.golden import golden_root

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time import EXECUTION_TIMES, ExecutionTime, Linear, stage_time_of

GOLDEN = golden_root()
GOLDEN_CASES = [
    "v26_orca_pp1_r1_round_robin_poisson__patched",
    "ms_lightllm_pp1_r1_round_robin_simul",
    "v26_vllm_pp1_r3_lor_simul",
]


# The contract


def test_the_table_holds_models():
    """Every model has the shape of one, and works without settings where no data are needed."""
    needing_data = {"aiconfigurator", "profile"}
    assert set(EXECUTION_TIMES) == {"calibrated", "linear", "roofline"} | needing_data
    for name in EXECUTION_TIMES.keys() - needing_data:
        model = EXECUTION_TIMES[name]
        assert isinstance(model(), ExecutionTime)
        assert stage_time_of(model(), replica())(decodes(4, 100), 0) > 0


def test_a_function_of_the_batch_is_the_time_of_each_stage():
    """A plain function need not know of stages."""
    stage_time = stage_time_of(lambda batch: 0.5 * batch.num_tokens, replica(pp=2))
    assert [stage_time(decodes(3, 10), stage) for stage in (0, 1)] == [1.5, 1.5]


def test_a_function_of_batch_and_stage_is_taken_as_it_is():
    """A function that knows of stages is called directly."""

    def stage_time(batch, stage_id):
        return batch.num_tokens + stage_id

    assert stage_time_of(stage_time, replica()) is stage_time


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda batch, scale=2.0: scale, 2.0),
        (lambda batch, stage_id=7: float(stage_id), 1.0),
        (lambda batch, stage_id, scale=2.0: scale * stage_id, 2.0),
        (lambda *args: float(len(args)), 1.0),
        (partial(lambda scale, batch: scale, 3.0), 3.0),
    ],
)
def test_only_a_stage_id_is_passed_besides_the_batch(function, expected):
    """Another parameter with a default keeps it."""
    assert stage_time_of(function, replica())(decodes(1, 1), 1) == expected


@pytest.mark.parametrize("given_", [3, "roofline", None, Linear, lambda: 0.0, lambda a, b, c: 0.0])
def test_what_is_no_model_is_refused(given_):
    """The error says what is expected."""
    with pytest.raises(ConfigError, match=r"execution_time .* \(batch\) or \(batch, stage_id\)"):
        stage_time_of(given_, replica())


# The straight line


def test_linear_is_evaluated_left_to_right():
    """The sum is that of the formula to the last bit, divided over the stages."""
    batch = Counts(3, 1001, (Chunk(333, 777),))
    stage_time = Linear(base=0.1, per_token=0.7e-5, per_context_token=0.3e-7).for_replica(
        replica(pp=4)
    )
    assert stage_time(batch, 2) == (0.1 + 0.7e-5 * 336 + 0.3e-7 * 1778) / 4


@pytest.mark.parametrize("setting", [{"base": -1e-3}, {"per_token": "fast"}, {"slope": 1.0}])
def test_linear_settings_are_checked(setting):
    """Times are numbers, not negative, and known by name."""
    with pytest.raises(ConfigError, match="Linear"):
        Linear(**setting)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_linear_reproduces_the_reference(case):
    """Every batch of the golden cases ends at the same instant, bit for bit."""
    folder = GOLDEN / case
    settings = json.loads((folder / "case.json").read_text())["execution_time"]
    model = Linear(settings["base"], settings["per_token"], settings["per_kv_token"])
    stage_time = model.for_replica(replica())
    processed: dict[str, int] = {}
    prompts = {
        row["request_id"]: int(row["num_prefill_tokens"]) for row in table(folder, "workload")
    }
    for row in table(folder, "batches"):
        batch = []
        for request, tokens in zip(
            row["request_ids"].split(), row["num_q_tokens"].split(), strict=True
        ):
            context = processed.get(request, 0) + int(tokens)
            batch.append(Chunk(int(tokens), context))
            processed[request] = context + (context == prompts[request])
        end = float(row["stage0_start"]) + stage_time(Counts(0, 0, tuple(batch)), 0)
        assert end == float(row["stage0_end"])


def table(folder, name):
    with (folder / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))
