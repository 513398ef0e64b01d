"""How long prompts and outputs are: distributions, published statistics and recorded lengths."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vidur_simpy.errors import ConfigError, TraceError, unknown_name
from vidur_simpy.validation import configuration
from vidur_simpy.workload.requests import MAX_TOKENS
from vidur_simpy.workload.traces import TraceFormat, read_lengths

__all__ = [
    "Clip",
    "FixedLengths",
    "Lengths",
    "LengthsPair",
    "LognormalLengths",
    "PublishedLengths",
    "TraceLengths",
    "UniformLengths",
    "ZipfLengths",
    "clip_lengths",
    "scale_lengths",
]

LengthsPair: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]
Clip: TypeAlias = Literal["refuse", "prompt", "proportional"]


@runtime_checkable
class Lengths(Protocol):
    """Anything that can draw prompt and output lengths.

    Where a `Lengths` is asked for, a plain callable ``(rng, num_requests) -> (prompt, output)``
    does too.
    """

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return prompt and output tokens of `num_requests` requests, int64 of shape (n,), >= 1.

        `rng` is the only source of randomness.
        """
        ...


@configuration
class FixedLengths:
    """The same lengths for every request.

    Parameters
    ----------
    num_prefill_tokens, num_decode_tokens : int
        Tokens of the prompt and of the output.

    Examples
    --------
    >>> FixedLengths(512, 128).sample(np.random.default_rng(0), 2)
    (array([512, 512]), array([128, 128]))
    """

    num_prefill_tokens: int = Field(ge=1, le=MAX_TOKENS)
    num_decode_tokens: int = Field(ge=1, le=MAX_TOKENS)

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`; `rng` is not used."""
        prompt = np.full(num_requests, self.num_prefill_tokens, np.int64)
        return prompt, np.full(num_requests, self.num_decode_tokens, np.int64)


@configuration
class UniformLengths:
    """Totals drawn evenly from `min_tokens` to `max_tokens`, both included, and split.

    The output gets ``ceil(total / (1 + ratio))`` tokens, the prompt the rest, each at least one.
    Vidur draws a real total and may lose its fraction; here prompt + output is the total.

    Parameters
    ----------
    min_tokens, max_tokens : int
        Range of prompt + output, at least 2.
    prefill_to_decode_ratio : float
        Prompt tokens per output token.

    Examples
    --------
    >>> prompt, output = UniformLengths(10, 90, 4.0).sample(np.random.default_rng(0), 3)
    >>> prompt, output
    (array([62, 48, 40]), array([16, 13, 11]))
    """

    min_tokens: int = Field(ge=2)
    max_tokens: int = Field(ge=2, le=MAX_TOKENS)
    prefill_to_decode_ratio: float = Field(gt=0)

    def __post_init__(self) -> None:
        _check_range(self.min_tokens, self.max_tokens)

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`."""
        total = rng.integers(self.min_tokens, self.max_tokens, num_requests, endpoint=True)
        return _split(total, np.ceil(total / (1 + self.prefill_to_decode_ratio)))


@configuration
class ZipfLengths:
    """Totals from `min_tokens` to `max_tokens`, the k-th of them with weight k ** -theta, split.

    Drawn by inverting the exact cumulative weights, so any `theta` >= 0 will do (0 is uniform);
    Vidur inverts an approximation that excludes 1. The output gets ``int(total / (1 + ratio))``
    tokens, the prompt the rest, each at least one; Vidur may lose a token or give no output.
    Vidur's scrambling of the totals is left out.

    Parameters
    ----------
    theta : float
        Exponent; the larger, the more requests are near `min_tokens`.
    min_tokens, max_tokens : int
        Range of prompt + output, at least 2.
    prefill_to_decode_ratio : float
        Prompt tokens per output token.

    Examples
    --------
    >>> prompt, output = ZipfLengths(0.6, 100, 4000, 9.0).sample(np.random.default_rng(0), 3)
    >>> prompt + output
    array([1414,  277,  104])
    """

    theta: float = Field(ge=0)
    min_tokens: int = Field(ge=2)
    max_tokens: int = Field(ge=2, le=MAX_TOKENS)
    prefill_to_decode_ratio: float = Field(gt=0)

    def __post_init__(self) -> None:
        _check_range(self.min_tokens, self.max_tokens)

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`."""
        ranks = np.arange(1, self.max_tokens - self.min_tokens + 2, dtype=np.float64)
        cumulative = np.cumsum(ranks**-self.theta)
        cumulative /= cumulative[-1]
        drawn = np.searchsorted(cumulative, rng.random(num_requests), side="right")
        total = self.min_tokens + drawn
        return _split(total, total // (1 + self.prefill_to_decode_ratio))


@configuration
class LognormalLengths:
    """Independent lognormal prompts and outputs, rounded, from 1 to 2**30 tokens.

    Parameters
    ----------
    prompt_median, output_median : float
        Tokens that half of the requests stay below.
    prompt_sigma, output_sigma : float
        Standard deviation of the logarithm, up to 10.

    Examples
    --------
    >>> lengths = LognormalLengths(1000, 0.8, 200, 0.5)
    >>> lengths.sample(np.random.default_rng(0), 2)
    (array([1106, 1669]), array([187, 211]))
    """

    prompt_median: float = Field(ge=1, le=MAX_TOKENS)
    prompt_sigma: float = Field(ge=0, le=10)
    output_median: float = Field(ge=1, le=MAX_TOKENS)
    output_sigma: float = Field(ge=0, le=10)

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`."""
        normal = rng.standard_normal((num_requests, 2))  # a row per request: a longer run extends
        prompt = self.prompt_median * np.exp(self.prompt_sigma * normal[:, 0])
        output = self.output_median * np.exp(self.output_sigma * normal[:, 1])
        return _tokens(prompt), _tokens(output)


@configuration
class PublishedLengths:
    """Lengths distributed as in a published trace.

    Drawn from the trace's percentiles (0 to 100 %) by inverting the distribution. Between
    percentiles it is linear. Over the last per cent it is ``q99 + (max - q99) * v ** k`` for v
    from 0 to 1, with k such that the mean is the published one: linear there, a long tail would
    count too much (22 % on the outputs of azure-code-2023). Prompt and output are joined by a
    Gaussian copula of the published Spearman correlation (Pearson's r is 2 sin(pi rho / 6)).

    Parameters
    ----------
    name : str
        ``azure-code-2023``, ``azure-conv-2023``, ``arxiv-summarization``,
        ``mooncake-conversation``, ``mooncake-synthetic``, or the trace's full name.

    Raises
    ------
    ConfigError
        An unknown name.

    Examples
    --------
    >>> lengths = PublishedLengths("azure-conv-2023")
    >>> lengths.statistics["license"], lengths.statistics["prompt"]["mean"]
    ('CC-BY-4.0', 1154.697)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _published():
            raise unknown_name("published lengths", self.name, _published())

    @property
    def statistics(self) -> Mapping[str, Any]:
        """The published figures, with their source, licence and citation."""
        return _published()[self.name]

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`."""
        figures = self.statistics
        r = 2 * math.sin(math.pi * figures["spearman_prompt_output"] / 6)
        first, second = rng.standard_normal((num_requests, 2)).T
        second = r * first + math.sqrt(1 - r**2) * second
        prompt = _quantile(figures["prompt"], _normal_cdf(first))
        return _tokens(prompt), _tokens(_quantile(figures["output"], _normal_cdf(second)))


@configuration
class TraceLengths:
    """Lengths taken from a trace, row by row, prompt and output together.

    Parameters
    ----------
    path : str or Path
        A file with columns of lengths, see :func:`vidur_simpy.workload.read_trace`; arrival
        times may be missing.
    format : {"auto", "vidur", "azure", "mooncake"}
        How the file is read; "auto" tells it from the columns.
    prefill_scale, decode_scale : float
        Factors on the lengths; the product is truncated, and at least 1.
    order : {"resample", "shuffle", "file"}
        Draw rows at random with replacement, each at most once in random order (as Vidur does),
        or in the order of the file. The last two cannot give more rows than the file has.

    Raises
    ------
    TraceError
        When read: an unusable file, or fewer rows than are asked for.
    """

    path: str | Path
    format: TraceFormat = "auto"
    prefill_scale: float = Field(default=1.0, gt=0)
    decode_scale: float = Field(default=1.0, gt=0)
    order: Literal["resample", "shuffle", "file"] = "resample"

    def sample(self, rng: np.random.Generator, num_requests: int) -> LengthsPair:
        """Return the lengths, see :class:`vidur_simpy.workload.Lengths`."""
        prompt, output = read_lengths(self.path, self.format)
        rows = self._rows(rng, num_requests, len(prompt))
        prompt = scale_lengths(prompt[rows], self.prefill_scale, "prefill_scale")
        return prompt, scale_lengths(output[rows], self.decode_scale, "decode_scale")

    def _rows(
        self, rng: np.random.Generator, num_requests: int, num_rows: int
    ) -> NDArray[np.int64]:
        if self.order == "resample":
            return rng.integers(num_rows, size=num_requests)
        if num_requests > num_rows:
            raise TraceError(
                f"{self.path} has {num_rows} rows, {num_requests} lengths are asked for; use "
                "order='resample' to draw rows more than once."
            )
        rows = rng.permutation(num_rows) if self.order == "shuffle" else np.arange(num_rows)
        return rows[:num_requests]


def scale_lengths(lengths: NDArray[np.int64], factor: float, what: str) -> NDArray[np.int64]:
    """Return `lengths` times `factor`, truncated, at least 1.

    Raises
    ------
    ConfigError
        If a product exceeds 2**30 tokens; it names the setting `what`.

    Examples
    --------
    >>> scale_lengths(np.array([1, 10, 15]), 0.5, "prefill_scale")
    array([1, 5, 7])
    """
    scaled = lengths * factor
    if scaled.max(initial=0) > MAX_TOKENS:
        raise ConfigError(
            f"{what} = {factor}: makes a request of {scaled.max():.4g} tokens, expected at most "
            f"{MAX_TOKENS}."
        )
    return np.maximum(scaled.astype(np.int64), 1)


def clip_lengths(
    prompt: NDArray[np.int64], output: NDArray[np.int64], max_model_len: int | None, clip: Clip
) -> LengthsPair:
    """Shorten requests whose prompt + output exceed `max_model_len`.

    "refuse" changes nothing: the simulator refuses such a request. "prompt" takes the excess
    from the prompt and, once that is down to one token, from the output (Vidur's trace replay).
    "proportional" takes it from both in proportion, each share rounded up (Vidur's trace
    lengths). One token of each always stays.

    Examples
    --------
    >>> clip_lengths(np.array([90]), np.array([30]), 100, "prompt")
    (array([70]), array([30]))
    >>> clip_lengths(np.array([90]), np.array([30]), 100, "proportional")
    (array([75]), array([25]))
    """
    if clip == "refuse" or max_model_len is None:
        return prompt, output
    total = prompt + output
    excess = np.maximum(total - max_model_len, 0)
    from_prompt, from_output = excess, excess - (prompt - 1)
    if clip == "proportional":
        from_prompt, from_output = -(-excess * prompt // total), -(-excess * output // total)
    prompt = np.maximum(prompt - from_prompt, 1)
    return prompt, np.maximum(output - np.maximum(from_output, 0), 1)


def _check_range(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise ConfigError(f"min_tokens = {min_tokens}: expected at most max_tokens = {max_tokens}.")


def _split(total: NDArray[np.int64], output: NDArray[np.floating[Any]]) -> LengthsPair:
    """Give `output` of each total to the output and the rest to the prompt, both at least 1."""
    output_tokens = np.clip(output.astype(np.int64), 1, total - 1)
    return total - output_tokens, output_tokens


def _tokens(lengths: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip(np.rint(lengths), 1, MAX_TOKENS).astype(np.int64)


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
    """Read the statistics by full and by short name."""
    file = resources.files("vidur_simpy") / "data" / "workload_statistics.json"
    by_key: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return by_key | {figures["name"]: figures for figures in by_key.values()}


def _normal_cdf(values: NDArray[np.float64]) -> NDArray[np.float64]:
    root = math.sqrt(0.5)
    return np.array([0.5 * math.erfc(-root * value) for value in values.tolist()], np.float64)


def _quantile(figures: Mapping[str, Any], level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Invert a distribution given by its percentiles and mean, see `PublishedLengths`."""
    percentiles = np.array(figures["quantiles_1pct"], np.float64)
    below, last, largest = percentiles[:-1], percentiles[-2], percentiles[-1]
    mean_of_tail = 100 * figures["mean"] - (below[1:] + below[:-1]).sum() / 2
    # v ** k has the mean 1 / (k + 1). Percentiles are rounded, so the share may leave 0 to 1.
    share = np.clip((mean_of_tail - last) / (largest - last), 0.01, 0.99)
    into_tail = np.clip(100 * level - 99, 0, 1)
    tail: NDArray[np.float64] = (largest - last) * into_tail ** (1 / share - 1)
    return tail + np.interp(100 * level, np.arange(100), below)
