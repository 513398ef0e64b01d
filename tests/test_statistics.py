"""Intervals hold what they say, warm-ups are cut, and differences are told from luck."""

from __future__ import annotations

import math
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import vidur_simpy as vs
from vidur_simpy.statistics.intervals import (
    difference_interval,
    mean_interval,
    num_values_needed,
    quantile_interval,
)
from vidur_simpy.statistics.mean_error import error_of_mean
from vidur_simpy.statistics.warm_up import mser5, warm_up_length

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import interval_coverage


@pytest.fixture
def queue():
    """One request at a time, a microsecond per prompt token: a queue with one server."""
    return vs.Cluster(
        max_model_len=50_000_000,
        kv_cache=vs.KVCache(num_blocks=4_000_000),
        replica_scheduler=vs.Vllm(max_num_seqs=1, max_num_batched_tokens=50_000_000),
        execution_time=lambda batch: 1e-6 * batch.num_tokens,
    )


def exponential_lengths(rng, num_requests):
    """Prompts whose service takes 1 s on average, exponentially distributed; one output token."""
    prompt = np.ceil(1e6 * rng.exponential(1.0, num_requests)).astype(np.int64)
    return prompt, np.ones(num_requests, np.int64)


def poisson(rate, num_requests, lengths=exponential_lengths):
    return vs.Workload(vs.Poisson(rate), lengths, num_requests=num_requests)


# Warm-up


def test_mser5_finds_where_a_step_ends(rng):
    """Values that are low for a while and then vary about their level are cut where they jump."""
    values = np.concatenate((np.zeros(100), 10 + rng.normal(size=900)))
    assert mser5(values) == 100


def test_mser5_cuts_at_most_half():
    """A run that rises to its end has no steady state to keep."""
    assert mser5(np.arange(1000.0)) == 500


@pytest.mark.parametrize("num_values", [0, 1, 9])
def test_a_handful_of_values_is_not_cut(num_values):
    """Two means of five are the least to choose between."""
    assert mser5(np.arange(float(num_values))) == 0


def test_a_busy_start_is_no_warm_up(rng):
    """A simulation starts empty: high latencies at its start are luck, and stay."""
    values = np.concatenate((np.full(100, 20.0), 10 + rng.normal(size=900)))
    assert mser5(values) == 100
    assert warm_up_length([values]) == 0


def test_the_warm_up_of_several_runs_is_that_of_their_average(rng):
    """What one noisy run hides shows in the mean of many."""
    ramp = 1 - np.exp(-np.arange(1000) / 50)
    runs = [5 * ramp + rng.normal(size=1000) for _ in range(20)]
    assert 100 < warm_up_length(runs) < 400


# Intervals of independent values


def test_a_mean_has_students_interval():
    """Three values: 5 +- 4.303 / sqrt(3)."""
    made = mean_interval(np.array([4.0, 5.0, 6.0]), is_correlated=False)
    assert (made.estimate, made.high - 5) == (5.0, pytest.approx(4.302653 / math.sqrt(3)))
    assert made.low + made.high == pytest.approx(10.0)


@given(st.integers(5, 400), st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from([0.9, 0.95]))
@settings(max_examples=40, deadline=None)
def test_ranks_of_a_quantile_are_the_exact_ones(count, quantile, confidence):
    """The ends are the innermost order statistics with at most half the error beyond each."""
    ranks = np.arange(1, count + 1)
    made = quantile_interval(
        np.arange(1.0, count + 1), quantile, confidence=confidence, is_correlated=False
    )
    tail = (1 - confidence) / 2
    assert made.low == max(ranks[binom.cdf(ranks - 1, count, quantile) <= tail], default=-math.inf)
    assert made.high == min(ranks[binom.sf(ranks - 1, count, quantile) <= tail], default=math.inf)


@pytest.mark.parametrize(("quantile", "needed"), [(0.5, 6), (0.95, 72), (0.99, 368), (0.999, 3688)])
def test_how_many_values_a_quantile_takes(quantile, needed):
    """One value fewer, and no order statistic bounds it from above."""
    assert num_values_needed(quantile) == needed
    few, enough = (
        quantile_interval(np.arange(float(count)), quantile, is_correlated=False)
        for count in (needed - 1, needed)
    )
    assert few.high == math.inf
    assert "too few values" in few.notes[0]
    assert enough.high < math.inf
    assert enough.notes == ()


def test_requests_that_are_never_served_count(rng):
    """Infinite values: quantiles below them are finite, the mean is not."""
    values = rng.permutation(np.concatenate((np.arange(900.0), np.full(100, np.inf))))
    assert quantile_interval(values, 0.5).high < 1000
    assert quantile_interval(values, 0.95).estimate == math.inf
    assert mean_interval(values).low == math.inf


@pytest.mark.parametrize("quantile", [0.0, 1.0, 99, "p99"])
def test_a_quantile_lies_between_0_and_1(quantile):
    """99 is not 0.99."""
    with pytest.raises(vs.ConfigError, match="expected a number between 0 and 1"):
        quantile_interval(np.arange(9.0), quantile)


def test_no_values_have_no_interval():
    """An empty run says so."""
    with pytest.raises(vs.ConfigError, match="at least one value"):
        mean_interval(np.array([]))


def test_a_missing_scipy_names_its_extra(monkeypatch):
    """Intervals are the only ones to need it."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(vs.ConfigError, match=r"vidur-simpy\[statistics\]"):
        mean_interval(np.arange(9.0))


def test_a_single_value_bounds_nothing():
    """Its interval is everything."""
    made = mean_interval(np.array([3.0]))
    assert (made.estimate, made.low, made.high) == (3.0, -math.inf, math.inf)


# Intervals of correlated values


def test_correlated_values_are_worth_fewer(rng):
    """A random walk back to its mean: 10,000 values tell what about 10,000 / 19 would."""
    noise = rng.normal(size=10_000)
    values = np.empty(10_000)
    state = 0.0
    for index, step in enumerate(noise):
        state = values[index] = 0.9 * state + step
    made = mean_interval(values)
    naive = mean_interval(values, is_correlated=False)
    assert 200 < made.num_effective < 1500
    assert made.high - made.low > 3 * (naive.high - naive.low)


def test_intervals_cover_what_they_say_on_mm1():
    """A queue at load 0.5: 95 % intervals of 150 runs hold the truth in nearly all."""
    row = interval_coverage.coverage(0.5, 3_000, 150)
    assert all(row[name] > 0.88 for name in ("mean", "p50", "p90"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "num_requests", "num_runs"),
    [(0.5, 5_000, 1), (0.8, 20_000, 4), (0.8, 2_000, 1), (0.9, 10_000, 1), (0.9, 50_000, 20)],
)
def test_coverage_lies_between_92_and_98_percent(load, num_requests, num_runs):
    """Nominal 95 % intervals over 500 replications of M/M/1 that start empty."""
    row = interval_coverage.coverage(load, num_requests, 500, num_runs=num_runs)
    assert all(0.92 <= row[name] <= 0.98 for name in ("mean", "p90")), row


def test_where_intervals_cover_less_a_note_says_so():
    """Load 0.9 and 2,000 requests, worth 6 independent ones: the exception, with its note."""
    row = interval_coverage.coverage(0.9, 2_000, 200)
    assert 0.75 < row["mean"] < 0.92
    assert row["noted"] > 0.98


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.9])
def test_the_error_of_a_mean_is_that_of_theory(rng, correlation):
    """Values of which each resembles the one before: (1 + r) / (1 - r) of the independent error."""
    noise = rng.normal(size=400_000)
    values = np.array(list(accumulate(noise, lambda before, step: correlation * before + step)))
    expected = 1 / (1 - correlation) / math.sqrt(10_000)
    errors = [error_of_mean([part]).error for part in values.reshape(40, 10_000)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(expected, rel=0.12)


def test_values_that_hardly_vary_have_a_finite_error():
    """Equal ones are sure; so is the mean of two that take turns; none is divided by zero."""
    assert error_of_mean([np.full(500, 3.0)]).error == 0
    turns = error_of_mean([np.tile([9.0, 11.0], 500)])
    assert 0 <= turns.error < 1e-3
    one_apart = error_of_mean([np.concatenate((np.zeros(4_999), [1.0]))])
    assert 0 < one_apart.error < 1


def test_a_run_too_short_for_its_correlation_says_so():
    """Load 0.95 and 500 requests: a few busy spells are no basis."""
    rng = np.random.default_rng(3)
    made = mean_interval(interval_coverage.times_in_system(rng, 0.95, 500))
    assert "use more requests" in made.notes[0]


# Intervals of results


def test_a_simulated_queue_is_lindleys(queue):
    """The simulation's TTFT is the recursion's time in system, request by request."""
    result = vs.simulate(queue, poisson(0.7, 400), seed=5)
    requests = result.requests
    expected = interval_coverage.lindley(
        requests["arrived_at"].to_numpy(), 1e-6 * requests["num_prefill_tokens"].to_numpy()
    )
    np.testing.assert_allclose(requests["ttft"], expected, rtol=1e-9)


def test_intervals_of_simulated_queues_hold_the_truth(queue):
    """M/M/1 at load 0.6: mean 1 / 0.4 s, p90 ln(10) / 0.4 s; five of six seeds or more hold it."""
    results = [vs.simulate(queue, poisson(0.6, 4_000), seed=seed) for seed in range(6)]
    assert sum(2.5 in result.interval("ttft") for result in results) >= 5
    assert sum(math.log(10) / 0.4 in result.interval("ttft", 0.9) for result in results) >= 5
    pooled = vs.interval(results, "ttft")
    widths = [made.high - made.low for made in (result.interval("ttft") for result in results)]
    assert 2.5 in pooled
    assert pooled.high - pooled.low < np.mean(widths)


def test_the_estimate_is_that_of_the_summary(queue):
    """Without a warm-up to cut, the numbers are the ones people have seen."""
    result = vs.simulate(queue, poisson(0.5, 1_000))
    summary = result.summary().loc["ttft"]
    assert result.interval("ttft", warm_up=0.0).estimate == pytest.approx(summary["mean"])
    assert result.interval("ttft", 0.9, warm_up=0.0).estimate == pytest.approx(summary["p90"])


def test_warm_up_is_cut_as_asked(queue):
    """By seconds, or before, with `after`."""
    result = vs.simulate(queue, poisson(0.5, 1_000))
    num_early = int((result.requests["arrived_at"] < 500.0).sum())
    assert result.interval("ttft", warm_up=500.0).num_cut == num_early
    later = result.after(500.0)
    assert later.interval("ttft").num_cut == 0
    assert later.interval("ttft").estimate == result.interval("ttft", warm_up=500.0).estimate


def test_gaps_between_tokens_have_intervals(make_cluster):
    """Each batch takes a second, so does every gap."""
    workload = vs.Workload(vs.Constant(0.1), vs.FixedLengths(10, 30), num_requests=40)
    result = vs.simulate(make_cluster(), workload, record=("tokens",))
    made = result.interval("itl", 0.9)
    assert (made.low, made.estimate, made.high) == (1.0, 1.0, 1.0)
    assert made.num_values == 40 * 29


def test_too_few_requests_for_a_p99_warn(cluster):
    """The warning says how many there are and how many it takes."""
    workload = vs.Workload(vs.Poisson(0.1), vs.FixedLengths(10, 2), num_requests=100)
    result = vs.simulate(cluster, workload)
    with pytest.warns(UserWarning, match=r"ttft: too few values for a p99: 100 .* at least 368"):
        made = result.interval("ttft", 0.99)
    assert made.high == math.inf
    assert "p99" in repr(made)


def test_requests_without_a_value_are_told(make_cluster):
    """Refused requests have no TTFT."""
    lengths = lambda rng, count: (np.where(np.arange(count) < 3, 9000, 10), np.full(count, 2))  # noqa: E731
    workload = vs.Workload(vs.Constant(0.1), lengths, num_requests=200)
    result = vs.simulate(make_cluster(), workload)
    with pytest.warns(UserWarning, match="3 of 200 requests have no ttft"):
        assert result.interval("ttft").num_values == 197


def test_a_queue_that_grows_has_no_steady_state(queue):
    """Twice as much arrives as can be served."""
    result = vs.simulate(queue, poisson(2.0, 1_000))
    with pytest.warns(UserWarning, match="no steady state|use more requests"):
        made = result.interval("ttft")
    assert any("no steady state" in note for note in made.notes)


def test_an_unknown_metric_is_told(cluster):
    """With the nearest one."""
    workload = vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=3)
    result = vs.simulate(cluster, workload)
    with pytest.raises(vs.ConfigError, match="did you mean 'ttft'"):
        result.interval("tft")


def test_replications_are_independent_and_reproducible(queue):
    """The first has the given seed, the others have arrivals of their own."""
    results = vs.replicate(queue, poisson(0.5, 50), 3, seed=7)
    again = vs.replicate(queue, poisson(0.5, 50), 3, seed=7, jobs=1)
    arrivals = [result.requests["arrived_at"].to_numpy() for result in results]
    assert np.array_equal(
        arrivals[0], vs.simulate(queue, poisson(0.5, 50), seed=7).requests["arrived_at"]
    )
    assert abs(np.corrcoef(np.diff(arrivals[0]), np.diff(arrivals[1]))[0, 1]) < 0.5
    for first, second in zip(results, again, strict=True):
        assert first.requests.equals(second.requests)


# Differences


def test_shared_luck_drops_out_of_a_difference(rng):
    """Two noisy series a constant apart differ by exactly that."""
    before = np.cumsum(rng.normal(size=2_000))
    made = difference_interval(before, before + 0.5)
    assert made.low == pytest.approx(0.5)
    assert made.high == pytest.approx(0.5)
    assert difference_interval(before, before + 0.5, 0.9).low == pytest.approx(0.5)


def test_a_faster_cluster_is_told_from_a_slower_one(make_cluster):
    """The same requests, batches a tenth faster: the difference is sure, in mean and p90."""
    fast, slow = (
        make_cluster(execution_time=lambda batch, factor=factor: 0.01 * factor)
        for factor in (0.9, 1.0)
    )
    workload = vs.Workload(vs.Poisson(2.0), vs.FixedLengths(10, 20), num_requests=600)
    first, second = (vs.simulate(each, workload, seed=1) for each in (fast, slow))
    for quantile in (None, 0.9):
        made = vs.paired_difference(first, second, "e2e", quantile)
        assert 0 < made.low < made.estimate < made.high


def test_a_difference_needs_the_same_requests(cluster):
    """Other workloads cannot be paired."""
    first, second = (
        vs.simulate(
            cluster, vs.Workload(vs.Constant(1.0), vs.FixedLengths(10, 2), num_requests=count)
        )
        for count in (5, 6)
    )
    with pytest.raises(vs.ConfigError, match="the same requests"):
        vs.paired_difference(first, second, "ttft")
    with pytest.raises(vs.ConfigError, match="as many of the one"):
        vs.paired_difference([first, first], second, "ttft")
