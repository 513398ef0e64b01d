"""A run of decode steps looked up at once is the steps one by one, to the last bit."""

from __future__ import annotations

import pytest
from counts import Counts, replica
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vidur_simpy as vs
from vidur_simpy.execution_time import HasDecodeTimes, stage_time_of

DEPLOYMENTS = {
    "dense": replica(),
    "tensor parallel": replica("llama-3.1-70b", tp=4, quantization="fp8"),
    "pipeline": replica("llama-2-70b", "a100", tp=2, pp=4),
    "every layer with a window": replica("mistral-7b-v0.1", pp=2),
    "every other layer with a window": replica("gpt-oss-20b", pp=2),
    "experts": replica("qwen3-30b-a3b", "b200", tp=2, enable_expert_parallel=True),
    "latent": replica("deepseek-v2-lite", pp=3, kv_cache_dtype="fp8"),
}
MODELS = [
    vs.Linear(),
    vs.Linear(base=0.0, per_token=0.7e-5, per_context_token=0.3e-7),
    vs.Roofline(),
    vs.Roofline(cpu_overhead=0.0, factors="a100"),
]
STAGE_TIMES = {
    (name, index): stage_time_of(model, deployment)
    for name, deployment in DEPLOYMENTS.items()
    for index, model in enumerate(MODELS)
}


def one_by_one(stage_time, num_decodes, context, num_iterations, stage):
    steps = range(num_iterations)
    batches = (Counts(num_decodes, context + step * num_decodes) for step in steps)
    return [stage_time(batch, stage) for batch in batches]


@settings(max_examples=80)
@given(
    place=st.sampled_from(sorted(STAGE_TIMES)),
    num_decodes=st.integers(1, 512),
    mean_context=st.integers(1, 131_072),
    remainder=st.integers(0, 511),
    num_iterations=st.integers(1, 100),
    stage=st.integers(0, 3),
)
# Across the end of a window, in few and in many steps.
@example(("every layer with a window", 2), 8, 4090, 3, 20, 0)
@example(("every other layer with a window", 2), 8, 120, 3, 90, 1)
def test_a_run_is_its_steps_to_the_last_bit(
    place, num_decodes, mean_context, remainder, num_iterations, stage
):
    """Linear and roofline times, windows, all parallelisms, short and long runs."""
    stage_time = STAGE_TIMES[place]
    stage %= DEPLOYMENTS[place[0]].pipeline_parallel_size
    context = num_decodes * mean_context + remainder
    at_once = stage_time.decode_times(num_decodes, context, num_iterations, stage)
    expected = one_by_one(stage_time, num_decodes, context, num_iterations, stage)
    assert [float(time).hex() for time in at_once] == [time.hex() for time in expected]


@pytest.mark.parametrize("model", [vs.Linear(), vs.Roofline()])
@pytest.mark.parametrize("num_iterations", [1, 31, 32, 33, 5000])
def test_short_and_long_runs_join(model, num_iterations):
    """Where plain Python hands over to numpy nothing changes, and the lengths are right."""
    stage_time = stage_time_of(model, replica())
    times = stage_time.decode_times(64, 64_000, num_iterations, 0)
    assert len(times) == num_iterations
    assert list(times) == one_by_one(stage_time, 64, 64_000, num_iterations, 0)


@pytest.mark.parametrize("model", [vs.Linear(), vs.Roofline()])
def test_models_say_that_they_can(model):
    """The contract is a protocol; a plain function need not have the method."""
    assert isinstance(stage_time_of(model, replica()), HasDecodeTimes)
    assert not isinstance(stage_time_of(lambda batch: 0.1, replica()), HasDecodeTimes)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_order_of_questions_does_not_matter(name):
    """What is kept between calls is what a fresh model computes."""
    deployment = DEPLOYMENTS[name]
    used, fresh = (stage_time_of(vs.Roofline(), deployment) for _ in range(2))
    for num_decodes in (300, 1, 7, 64):
        used(Counts(num_decodes, 100 * num_decodes), 0)
    assert used(Counts(64, 64_000), 0) == fresh.decode_times(64, 64_000, 1, 0)[0]
