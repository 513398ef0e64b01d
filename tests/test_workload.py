"""Arrivals and lengths follow their laws, and a workload puts them together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidur_simpy.errors import ConfigError
from vidur_simpy.workload import (
    ARRIVALS,
    LENGTHS,
    WORKLOADS,
    AllAtOnce,
    Constant,
    FixedLengths,
    Gamma,
    LognormalLengths,
    Poisson,
    PublishedLengths,
    RequestArrays,
    UniformLengths,
    Workload,
    ZipfLengths,
    clip_lengths,
)

MANY = 200_000
SAMPLERS = [
    FixedLengths(7, 3),
    UniformLengths(2, 4000, 9.0),
    ZipfLengths(0.99, 2, 4000, 9.0),
    LognormalLengths(800.0, 1.2, 150.0, 0.9),
    PublishedLengths("azure-conv-2023"),
]
PROCESSES = [Poisson(rate=3.0), Gamma(rate=3.0, cv=5.0), Gamma(rate=3.0, cv=0.3), Constant(3.0)]
PUBLISHED = [
    "azure-code-2023",
    "azure-conv-2023",
    "arxiv-summarization",
    "mooncake-conversation",
    "mooncake-synthetic",
]


def rng(seed=0):
    return np.random.default_rng(seed)


def gaps(arrivals, n=MANY):
    return np.diff(arrivals.arrival_times(rng(), num_requests=n), prepend=0.0)


def deviation(sample, mean):
    """Standard errors between the mean of a sample and what it should be."""
    return abs(sample.mean() - mean) / (sample.std() / math.sqrt(len(sample)))


def spearman(x, y):
    def ranks(values):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[where]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


# Arrivals


def test_poisson_gaps_are_exponential():
    """Mean, variance and tail of the gaps are those of the exponential distribution."""
    drawn = gaps(Poisson(rate=4.0))
    assert deviation(drawn, 0.25) < 4
    assert deviation(drawn**2, 2 * 0.25**2) < 4
    assert deviation(drawn > 0.75, math.exp(-3)) < 4  # Vidur would have none above 3 / rate


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_mean_and_cv_asked_for(cv):
    """The mean is 1 / rate and the second moment (1 + cv²) / rate²."""
    drawn = gaps(Gamma(rate=4.0, cv=cv))
    assert deviation(drawn, 0.25) < 4
    assert deviation(drawn**2, (1 + cv**2) / 16) < 4


def test_poisson_counts_in_a_window_have_equal_mean_and_variance():
    """The number of arrivals before a duration is Poisson distributed."""
    counts = np.array([len(Poisson(5.0).arrival_times(rng(s), duration=4.0)) for s in range(4000)])
    assert deviation(counts, 20.0) < 4
    assert deviation((counts - 20.0) ** 2, 20.0) < 4


def test_constant_arrivals_are_exact():
    """Request k arrives at k / rate, with no drift."""
    times = Constant(rate=10.0).arrival_times(rng(), num_requests=1000)
    assert times[0] == 0.1
    assert times[-1] == 100.0
    assert Constant(rate=10.0).arrival_times(rng(), duration=0.3).tolist() == [0.1, 0.2]


@given(
    process=st.sampled_from(PROCESSES),
    duration=st.floats(0.01, 200.0),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_duration_cuts_the_same_stream_as_a_number(process, duration, seed):
    """All times below the duration and no other, bit for bit those of a longer run."""
    times = process.arrival_times(rng(seed), duration=duration)
    longer = process.arrival_times(rng(seed), num_requests=len(times) + 1)
    assert np.array_equal(times, longer[:-1])
    assert longer[-1] >= duration
    assert np.all(times < duration)
    assert np.all(np.diff(times) >= 0)


@pytest.mark.parametrize("process", [*PROCESSES, AllAtOnce()])
def test_equal_generators_give_equal_arrivals(process):
    """Arrivals depend on the generator alone."""
    first, second = (process.arrival_times(rng(9), num_requests=500) for _ in range(2))
    assert first.dtype == np.float64
    assert np.array_equal(first, second)


@pytest.mark.parametrize("limits", [{}, {"num_requests": 3, "duration": 1.0}])
@pytest.mark.parametrize("process", [Poisson(1.0), Constant(1.0)])
def test_arrivals_need_one_limit(process, limits):
    """Neither none nor both of num_requests and duration."""
    with pytest.raises(ConfigError, match="expected exactly one"):
        process.arrival_times(rng(), **limits)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Poisson(rate=0.0), "Poisson.rate = 0.0: expected greater than 0"),
        (lambda: Poisson(rate=math.inf), "Poisson.rate = inf"),
        (lambda: Gamma(rate=1.0, cv=0.0), "Gamma.cv = 0.0"),
        (lambda: Constant(rate=1.0, rat=1.0), "did you mean 'rate'"),
        (lambda: FixedLengths(0, 1), "expected greater than or equal to 1"),
        (lambda: UniformLengths(1, 10, 1.0), "expected greater than or equal to 2"),
        (lambda: UniformLengths(11, 10, 1.0), "min_tokens = 11: expected at most max_tokens = 10"),
        (lambda: ZipfLengths(-0.1, 2, 10, 1.0), "expected greater than or equal to 0"),
        (lambda: ZipfLengths(0.5, 20, 10, 1.0), "min_tokens = 20"),
        (lambda: LognormalLengths(0.0, 1.0, 1.0, 1.0), "expected greater than or equal to 1"),
        (lambda: PublishedLengths("azure-conv-2032"), "did you mean 'azure-conv-2023'"),
        (lambda: AllAtOnce().arrival_times(rng(), duration=1.0), "needs num_requests"),
    ],
)
def test_settings_out_of_range_are_refused(make, what):
    """The message names the setting, its value and what was expected."""
    with pytest.raises(ConfigError, match=what):
        make()


# Lengths


@given(
    sampler=st.sampled_from(SAMPLERS),
    num_requests=st.integers(0, 200),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_lengths_are_positive_integers_and_a_longer_run_extends_a_shorter(
    sampler, num_requests, seed
):
    """int64, at least 1; request i does not depend on how many follow it."""
    prompt, output = sampler.sample(rng(seed), num_requests)
    assert prompt.dtype == output.dtype == np.int64
    assert len(prompt) == len(output) == num_requests
    assert np.all(prompt >= 1)
    assert np.all(output >= 1)
    more_prompt, more_output = sampler.sample(rng(seed), num_requests + 50)
    assert np.array_equal(prompt, more_prompt[:num_requests])
    assert np.array_equal(output, more_output[:num_requests])


@given(
    smallest=st.integers(2, 500),
    spread=st.integers(0, 5000),
    ratio=st.floats(1e-4, 1e4),
    theta=st.floats(0, 5),
)
@settings(deadline=None)
def test_splitting_a_total_loses_nothing(smallest, spread, ratio, theta):
    """Prompt + output stays in the range, with both at least 1, whatever the ratio."""
    largest = smallest + spread
    for lengths in (
        UniformLengths(smallest, largest, ratio),
        ZipfLengths(theta, smallest, largest, ratio),
    ):
        prompt, output = lengths.sample(rng(), 50)
        total = prompt + output
        assert np.all((smallest <= total) & (total <= largest))
        assert min(prompt.min(), output.min()) >= 1


def test_uniform_totals_are_even_and_split_by_the_ratio():
    """Every total is as likely as any other; the output is ceil(total / (1 + ratio))."""
    prompt, output = UniformLengths(10, 19, 4.0).sample(rng(), MANY)
    total = prompt + output
    for value in range(10, 20):
        assert deviation(total == value, 0.1) < 4.5
    assert np.array_equal(output, -(-total // 5))


@pytest.mark.parametrize("theta", [0.0, 0.6, 1.0, 2.5])
def test_zipf_totals_follow_the_exact_weights(theta):
    """The k-th total has the probability k ** -theta over their sum."""
    prompt, output = ZipfLengths(theta, 50, 149, 3.0).sample(rng(), MANY)
    weights = np.arange(1, 101.0) ** -theta
    weights /= weights.sum()
    total = prompt + output
    assert deviation(total, weights @ np.arange(50, 150)) < 4
    for rank in (0, 1, 9):
        assert deviation(total == 50 + rank, weights[rank]) < 4
    assert np.array_equal(output, total // 4)


def test_lognormal_lengths_have_the_median_and_sigma_asked_for():
    """Logarithms are normal around the median's; prompt and output are independent."""
    prompt, output = LognormalLengths(20_000.0, 0.7, 5_000.0, 0.4).sample(rng(), MANY)
    assert deviation(np.log(prompt), math.log(20_000)) < 4
    assert deviation((np.log(prompt) - math.log(20_000)) ** 2, 0.7**2) < 4
    assert deviation(np.log(output), math.log(5_000)) < 4
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.01


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lengths_have_the_published_figures(name):
    """Mean within 1 %, standard deviation within 10 %, quantiles, range and correlation."""
    lengths = PublishedLengths(name)
    drawn = dict(zip(("prompt", "output"), lengths.sample(rng(), MANY), strict=True))
    for side, values in drawn.items():
        figures = lengths.statistics[side]
        assert values.mean() == pytest.approx(figures["mean"], rel=0.01)
        assert values.std() == pytest.approx(figures["std"], rel=0.10)
        quantiles = figures["quantiles_1pct"]
        assert quantiles[0] <= values.min()
        assert values.max() <= quantiles[-1]
        for percent in (10, 50, 90):
            low, high = quantiles[percent - 1], quantiles[percent + 1]
            assert low <= np.quantile(values, percent / 100) <= high
    expected = lengths.statistics["spearman_prompt_output"]
    assert spearman(drawn["prompt"], drawn["output"]) == pytest.approx(expected, abs=0.01)


def test_published_lengths_know_short_and_full_names():
    """Both names stand for the same figures, which say where they come from."""
    short, full = PublishedLengths("azure-conv-2023"), PublishedLengths("azure_llm_2023_conv")
    assert np.array_equal(short.sample(rng(), 100), full.sample(rng(), 100))
    assert {"source", "license", "citation"} <= set(short.statistics)


# Clipping


@given(
    prompt=st.integers(1, 10_000),
    output=st.integers(1, 10_000),
    limit=st.integers(2, 10_000),
    clip=st.sampled_from(["prompt", "proportional"]),
)
def test_clipping_fits_the_limit_and_leaves_shorter_requests_alone(prompt, output, limit, clip):
    """One token of each stays, and no more is taken than needed but for rounding."""
    before = np.array([prompt]), np.array([output])
    (new_prompt,), (new_output,) = clip_lengths(*before, limit, clip)
    assert 1 <= new_prompt <= prompt
    assert 1 <= new_output <= output
    if prompt + output <= limit:
        assert (new_prompt, new_output) == (prompt, output)
    else:
        assert limit - 1 <= new_prompt + new_output <= limit
    if clip == "prompt" and output < limit:
        assert new_output == output


def test_proportional_clipping_rounds_each_share_up():
    """As Vidur: 7 + 4 to 8 takes ceil(3·7/11) = 2 and ceil(3·4/11) = 2."""
    prompt, output = clip_lengths(np.array([7]), np.array([4]), 8, "proportional")
    assert (prompt[0], output[0]) == (5, 2)


# Workload


def test_a_workload_is_reproducible_and_its_streams_are_separate():
    """Equal generators give equal requests; other lengths leave the arrivals as they were."""
    workload = Workload(Gamma(2.0, 3.0), PublishedLengths("azure-code-2023"), num_requests=300)
    first, second = (workload.requests(rng(1), rng(2)) for _ in range(2))
    other = workload.requests(rng(1), rng(3))
    assert np.array_equal(first.arrived_at, second.arrived_at)
    assert np.array_equal(first.num_prefill_tokens, second.num_prefill_tokens)
    assert np.array_equal(first.arrived_at, other.arrived_at)
    assert not np.array_equal(first.num_prefill_tokens, other.num_prefill_tokens)


def test_a_duration_may_pass_without_a_request():
    """No arrival before the end is a workload of no requests, not an error."""
    workload = Workload(Constant(rate=1.0), SAMPLERS[-1], duration=0.5)
    assert len(workload.requests(rng(), rng())) == 0


def test_lengths_may_be_a_plain_function_and_arrivals_any_object():
    """No subclass, no registration: the right shape is enough."""

    class Twice:
        def arrival_times(self, rng, num_requests=None, duration=None):
            return [0.0, 2.0]

    workload = Workload(Twice(), lambda rng, n: (rng.integers(5, 9, n), [3] * n), num_requests=2)
    requests = workload.requests(rng(), rng())
    assert requests.arrived_at.tolist() == [0.0, 2.0]
    assert requests.num_decode_tokens.tolist() == [3, 3]
    assert requests.num_prefill_tokens.dtype == np.int64


def test_a_workload_clips_what_the_model_cannot_take():
    """With clip="prompt" the excess goes; by default the simulator is to refuse."""
    settings = {"arrivals": AllAtOnce(), "lengths": FixedLengths(90, 30), "num_requests": 1}
    clipped = Workload(**settings, clip="prompt").requests(rng(), rng(), max_model_len=100)
    refused = Workload(**settings).requests(rng(), rng(), max_model_len=100)
    assert clipped.num_prefill_tokens[0] == 70
    assert refused.num_prefill_tokens[0] == 90


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"num_requests": None}, "expected exactly one"),
        ({"duration": 1.0}, "expected exactly one"),
        ({"arrivals": "poisson"}, "Workload.arrivals = 'poisson': expected arrivals such as"),
        ({"arrivals": Poisson}, r"expected an object: Poisson\(...\)"),
        ({"lengths": 512}, "Workload.lengths = 512: expected lengths such as"),
        ({"lengths": FixedLengths}, r"expected an object: FixedLengths\(...\)"),
        ({"arrivals": AllAtOnce(), "num_requests": None, "duration": 1.0}, "needs num_requests"),
        ({"clip": "cut"}, "Workload.clip = 'cut': expected 'refuse', 'prompt' or 'proportional'"),
    ],
)
def test_a_workload_refuses_what_does_not_fit_together(changed, what):
    """Said when the workload is made, not when it runs."""
    settings = {"arrivals": Poisson(1.0), "lengths": FixedLengths(1, 1), "num_requests": 5}
    with pytest.raises(ConfigError, match=what):
        Workload(**(settings | changed))


@pytest.mark.parametrize(
    ("lengths", "what"),
    [
        (lambda rng, n: ([1] * n, [0] * n), r"num_decode_tokens\[0\] = 0"),
        (lambda rng, n: ([1.5] * n, [1] * n), r"num_prefill_tokens\[0\] = 1.5"),
        (lambda rng, n: ([math.nan] * n, [1] * n), "num_prefill_tokens"),
        (lambda rng, n: ([1] * n, [1]), "num_decode_tokens has 1 rows, arrived_at has 2"),
        (lambda rng, n: ([[1] * n], [1] * n), r"num_prefill_tokens has shape \(1, 2\)"),
        (lambda rng, n: (["a"] * n, [1] * n), "expected whole numbers"),
        (lambda rng, n: ([1] * n, [1] * n, [1] * n), r"expected \(prompt, output\)"),
        (lambda rng, n: None, r"returned NoneType, expected \(prompt, output\)"),
    ],
)
def test_lengths_written_by_a_user_are_checked(lengths, what):
    """A function that returns nonsense is told so, with the row."""
    with pytest.raises(ConfigError, match=what):
        Workload(Poisson(1.0), lengths, num_requests=2).requests(rng(), rng())


@pytest.mark.parametrize(
    ("times", "what"),
    [
        ([1.0, 0.5], r"arrived_at\[1\] = 0.5"),
        ([-1.0, 0.5], r"arrived_at\[0\] = -1.0"),
        ([0.0, math.nan], r"arrived_at\[1\] = nan"),
        ([[0.0, 1.0]], "arrived_at has shape"),
        ([0.0], "gave 1 arrivals, expected 2"),
    ],
)
def test_arrivals_written_by_a_user_are_checked(times, what):
    """Times must be finite, >= 0, ascending and as many as asked for."""

    class Mine:
        def arrival_times(self, rng, num_requests=None, duration=None):
            return times

    with pytest.raises(ConfigError, match=what):
        Workload(Mine(), FixedLengths(1, 1), num_requests=2).requests(rng(), rng())


def test_request_arrays_keep_their_columns_together():
    """Taking rows takes them from every column."""
    requests = RequestArrays(
        [0.0, 1.0, 2.0],
        [5, 6, 7],
        [1, 1, 1],
        priority=np.array([3, 2, 1]),
        hash_ids=[[1], [2], [3]],
    )
    last = requests.take(np.array([2]))
    assert (last.priority.tolist(), last.hash_ids, last.session_id) == ([1], [[3]], None)


def test_every_kind_has_a_name_for_configurations():
    """The tables hold what DESIGN names."""
    assert set(ARRIVALS) == {"poisson", "gamma", "constant", "all_at_once", "trace"}
    assert set(LENGTHS) == {"fixed", "uniform", "zipf", "lognormal", "published", "trace"}
    assert set(WORKLOADS) == {"trace", "synthetic"}
