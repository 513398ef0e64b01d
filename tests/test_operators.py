"""The breakdown of execution time by operator: recorded on request, tabled, saved and drawn."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
from counts import batches as any_batch
from counts import replica
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import vidur_simpy as vs
from vidur_simpy.plots.operator_bars import mean_times
from vidur_simpy.result import NotAvailableError, Result

WORKLOAD = vs.Workload(vs.Poisson(rate=20.0), vs.UniformLengths(2, 600, 4.0), num_requests=40)
CLUSTERS = {
    "roofline": vs.Cluster(model="llama-3.1-8b", replica_scheduler="sarathi"),
    "experts": vs.Cluster(model="qwen3-30b-a3b", tensor_parallel_size=2),
    "pipeline": vs.Cluster(model="llama-3.1-8b", pipeline_parallel_size=2, num_replicas=2),
    "linear": vs.Cluster(execution_time="linear", replica_scheduler="vllm_v1"),
    "calibrated": vs.Cluster(execution_time=vs.Calibrated(vs.Roofline(), overhead=0.001)),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module", params=CLUSTERS)
def result(request):
    record = ("stages", "operators")
    return vs.simulate(CLUSTERS[request.param], WORKLOAD, seed=3, record=record)


# The table


def test_operators_make_up_the_time_of_every_stage(result):
    """What was executed, by stage and kind of batch, is the sum over the operators."""
    stages = result.stages.assign(
        duration=lambda table: table["ended_at"] - table["started_at"],
        batch_kind=[
            ("mixed" if decodes else "prefill") if prefills else "decode"
            for prefills, decodes in zip(
                result.stages["num_prefill_tokens"], result.stages["num_decode_tokens"], strict=True
            )
        ],
    )
    place = ["replica_id", "stage_id", "batch_kind"]
    executed = stages.groupby(place)["duration"].sum()
    recorded = result.operators.groupby(place)["execution_time"].sum()
    assert recorded.to_dict() == pytest.approx(executed.to_dict(), rel=1e-9)
    batches = stages.groupby(place).size()
    assert (result.operators.groupby(place)["num_batches"].max() == batches).all()


def test_shares_add_up_in_each_stage(result):
    """A share is of all the time that its stage was busy."""
    shares = result.operators.groupby(["replica_id", "stage_id"])["share"].sum()
    assert shares.tolist() == pytest.approx([1.0] * len(shares))


def test_the_first_stage_has_the_cpu_and_the_last_one_the_lm_head():
    """Operators are recorded where they are executed."""
    result = vs.simulate(CLUSTERS["pipeline"], WORKLOAD, record=("operators",))
    stage_of = result.operators.groupby("operator")["stage_id"].unique().map(list)
    assert stage_of["cpu_overhead"] == stage_of["send"] == [0]
    assert stage_of["lm_head"] == [1]
    assert sorted(stage_of["mlp"]) == [0, 1]


def test_memory_does_not_grow_with_the_run():
    """A run of five times the requests has the same rows."""
    rows = []
    for num_requests in (40, 200):
        workload = vs.Workload(vs.Poisson(20.0), vs.FixedLengths(300, 20), num_requests)
        result = vs.simulate(CLUSTERS["roofline"], workload, record=("operators",))
        rows.append(result.operators[["batch_kind", "operator"]])
    assert {*rows[0].itertuples(index=False)} <= {*rows[1].itertuples(index=False)}
    assert len(rows[1]) <= 24


def test_recording_changes_nothing_else():
    """The requests are the same with and without it."""
    plain = vs.simulate(CLUSTERS["roofline"], WORKLOAD, seed=3)
    recorded = vs.simulate(CLUSTERS["roofline"], WORKLOAD, seed=3, record=("operators",))
    assert_frame_equal(plain.requests, recorded.requests)
    assert plain.tables == ("requests", "timeline", "replicas")


def test_shards_record_the_same():
    """A run in shards has the rows of the single run, in their order."""
    whole, cut = (
        vs.simulate(CLUSTERS["pipeline"], WORKLOAD, seed=3, record=("operators",), shards=shards)
        for shards in (1, 2)
    )
    assert_frame_equal(whole.operators, cut.operators)


def test_operators_are_saved_with_the_result(result, tmp_path):
    """Loaded again they are the same, and draw the same; the warm-up does not divide them."""
    result.save(tmp_path / "saved")
    loaded = vs.load_result(tmp_path / "saved")
    assert_frame_equal(loaded.operators, result.operators)
    assert_frame_equal(loaded.after(1.0).operators, result.operators)
    assert loaded.plot.operators().get_title() == result.plot.operators().get_title()


def test_not_recorded_says_how():
    """As for the other tables."""
    result = vs.simulate(CLUSTERS["linear"], WORKLOAD)
    with pytest.raises(NotAvailableError, match=r"pass record=\('operators',\) to simulate"):
        _ = result.operators
    with pytest.raises(NotAvailableError, match=r"record=\('operators',\)"):
        result.plot.operators()


def test_times_without_operators_are_refused_at_once():
    """A plain function has none; it says so before the run, and which models have some."""
    cluster = vs.Cluster(execution_time=lambda batch: 0.01)
    with pytest.raises(vs.ConfigError, match=r"not broken down by operator.*as Roofline\(\)"):
        vs.simulate(cluster, WORKLOAD, record=("operators",))


@settings(max_examples=30)
@given(batch=any_batch, stage=st.sampled_from([0, 1]))
def test_terms_of_the_line_make_up_its_time(batch, stage):
    """The straight line has three."""
    stage_time = vs.Linear().for_replica(replica(pp=2))
    operators = stage_time.operators(batch, stage)
    assert list(operators) == ["base", "tokens", "context"]
    assert sum(operators.values()) == pytest.approx(stage_time(batch, stage), rel=1e-12)


# The stacked bar


def table(*rows):
    names = ("replica_id", "stage_id", "batch_kind", "operator", "num_batches", "execution_time")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return columns | {"share": [0.0] * len(rows)}


def made(*rows):
    tables = {"requests": {}, "replicas": {}, "timeline": {}, "operators": table(*rows)}
    return Result(tables, config=None, info={"simulated_time": 1.0})


def test_a_mean_iteration_goes_through_all_stages():
    """By hand: two replicas, two stages; an iteration takes the mean of each stage."""
    means = mean_times(
        made(
            (0, 0, "decode", "mlp", 10, 1.0),
            (1, 0, "decode", "mlp", 30, 1.0),
            (0, 1, "decode", "mlp", 10, 3.0),
            (1, 1, "decode", "mlp", 30, 5.0),
            (0, 1, "decode", "lm_head", 10, 0.4),
            (0, 0, "prefill", "mlp", 2, 9.0),
        ).operators
    )
    assert list(means.index) == ["prefill", "decode"]
    assert list(means.columns) == ["mlp", "lm_head"]
    assert means.loc["decode"].to_list() == pytest.approx([0.05 + 0.2, 0.01])
    assert means.loc["prefill"].to_list() == pytest.approx([4.5, 0.0])


def test_segments_differ_and_fill_the_bar():
    """Colours and hatches both; the small ones are one white segment, so that nothing is lost."""
    rows = [(0, 0, "decode", f"operator_{i}", 10, 0.1 * (i + 1)) for i in range(11)]
    ax = made(*rows).plot.operators()
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in ax.patches}
    assert len(looks) == len(ax.patches) == 8
    assert len({patch.get_hatch() for patch in ax.patches}) == 7  # the first and the last have none
    assert sum(patch.get_width() for patch in ax.patches) == pytest.approx(1e3 * 6.6 / 10)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[0] == "operator 10"
    assert names[-1] == "others"
    texts = [text.get_text() for text in ax.texts]
    assert texts[0] == "17%"
    assert texts[-1] == " 660.0 ms"


def test_nothing_executed():
    """It says so."""
    tables = {"requests": {}, "replicas": {}, "timeline": {}, "operators": {}}
    result = Result(tables, config=None, info={"simulated_time": 1.0})
    ax = result.plot.operators()
    assert [text.get_text() for text in ax.texts] == ["no batch was executed"]
