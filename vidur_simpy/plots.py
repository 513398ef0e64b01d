"""One function per plot: ``(result, ax=None, **options) -> Axes``.

A function named in ``__all__`` is a plot of every result: ``result.plot.cdf("ttft")`` calls
``cdf(result, "ttft")``. Plots are readable in black and white: line styles, markers and hatches
differ as well as colours, which are those of Okabe and Ito (2008). No style setting is changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.errors import ConfigError, unknown_name
from vidur_simpy.summary import digits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = ["cdf", "gantt", "quantiles", "timeline"]

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY_BLUE, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, VERMILLION, GREEN, BLACK, PURPLE, ORANGE, SKY_BLUE)
LINE_STYLES = ("-", "--", "-.", ":")
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end-to-end latency",
    "num_prefill_tokens": "prompt length",
    "num_decode_tokens": "output length",
}
MARKS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Kinds of batches: colour and hatch of their bars.
BATCH_KINDS = {
    "prefill only": (SKY_BLUE, "////"),
    "prefill and decode": (GREEN, ".."),
    "decode only": (ORANGE, ""),
}
MAX_POINTS = 4_000
MAX_BARS = 50_000
DEFAULT_BATCHES = 60
MAX_WINDOWS = 40
MAX_ROW_LABELS = 40
# A legend between the title and the axes, where it hides no line.
_ABOVE: Any = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "frameon": False,
    "fontsize": "small",
}


def cdf(
    result: Result,
    metric: str = "ttft",
    ax: Axes | None = None,
    *,
    complementary: bool = False,
    log: bool = False,
    label: str | None = None,
) -> Axes:
    """Draw the distribution of a metric over the requests that have a value.

    Parameters
    ----------
    result : Result
    metric : str
        A numeric column of ``result.requests``, or ``"itl"`` (needs recorded tokens), whose
        distribution is over output tokens.
    ax : Axes, optional
        Where to draw; curves of several results fit on one.
    complementary : bool
        Draw the share that is at least x, on a logarithmic axis: it shows the tail.
    log : bool
        Make the x axis logarithmic; values that are not positive are then not seen.
    label : str, optional
        Name of the curve in the legend.

    Raises
    ------
    ConfigError
        If there is no such metric.
    """
    values, shares = _distribution(result, metric)
    ax = _axes(ax)
    if len(values):
        index = sum(line.get_gid() == "cdf" for line in ax.lines)
        colour = COLOURS[index % len(COLOURS)]
        style = LINE_STYLES[index % len(LINE_STYLES)]
        at = _quantiles(result, metric, values)
        listed = ", ".join(f"{name} {digits(value)}" for name, value in at.items())
        x, y, drawstyle = _curve(values, shares, complementary)
        (line,) = ax.plot(x, y, style, color=colour, drawstyle=drawstyle)
        line.set_gid("cdf")
        line.set_label(f"{label}: {listed}" if label else listed)
        heights = [1 - MARKS[name] if complementary else MARKS[name] for name in at]
        ax.plot(list(at.values()), heights, "o", color=colour, ms=4, markerfacecolor="white")
        ax.legend(loc="upper right" if complementary else "lower right", fontsize="small")
    else:
        _say_empty(ax, f"no request has a value of {metric}")
    what = "output tokens" if metric == "itl" else "requests"
    if complementary:
        ax.set_yscale("log")
        ax.set_ylabel(f"share of {what} at or above")
    else:
        ax.set_ylim(0, 1.03)
        ax.set_ylabel(f"share of {what} at or below")
    if log:
        ax.set_xscale("log")
    elif len(values) and values[0] >= 0:
        ax.set_xlim(left=0)
    ax.set_xlabel(_label(metric))
    ax.set_title(f"Distribution of the {_name(metric)}")
    ax.grid(alpha=0.3)
    return ax


def quantiles(
    result: Result,
    metric: str = "ttft",
    ax: Axes | None = None,
    *,
    window: float | None = None,
) -> Axes:
    """Draw p50, p90 and p99 of a metric over time, by windows of arrival.

    Parameters
    ----------
    result : Result
    metric : str
        A numeric column of ``result.requests``.
    ax : Axes, optional
    window : float, optional
        Length of a window in seconds; by default a round number that makes at most 40 windows of
        25 requests or more on average. Windows without a value are gaps.

    Raises
    ------
    ConfigError
        If there is no such metric, or the window is not positive.
    """
    if window is not None and not window > 0:
        raise ConfigError(f"quantiles(): window = {window!r}: expected a positive number of s.")
    values = _numeric(result.requests, metric)
    arrived_at = result.requests["arrived_at"].to_numpy()[~np.isnan(values)]
    values = values[~np.isnan(values)]
    ax = _axes(ax)
    if len(values):
        window = window or _round_window(arrived_at)
        middles, rows = _windowed_quantiles(arrived_at, values, window)
        looks = (("p50", BLUE, "o-"), ("p90", ORANGE, "s--"), ("p99", VERMILLION, "^:"))
        for (name, colour, look), row in zip(looks, rows, strict=True):
            ax.plot(middles, row, look, color=colour, markersize=3.5, label=name)
        ax.set_ylim(bottom=min(0.0, float(values.min())))
        ax.legend(fontsize="small")
        ax.set_title(f"{_name(metric).capitalize()}, by windows of {digits(window)} s")
    else:
        _say_empty(ax, f"no request has a value of {metric}")
        ax.set_title(_name(metric).capitalize())
    ax.set_xlabel("arrival (s)")
    ax.set_ylabel(_label(metric))
    ax.grid(alpha=0.3)
    return ax


def timeline(result: Result, ax: Axes | None = None) -> Axes:
    """Draw requests running and waiting, summed over replicas, and the share of KV cache in use.

    The lines hold each replica's last sample until its next one, or until no request is on it. If
    there are no samples they come from the requests, without the KV cache.

    Parameters
    ----------
    result : Result
    ax : Axes, optional
        Gets a second y axis for the KV cache, mean over the replicas, in percent.
    """
    ax = _axes(ax)
    has_samples = len(result.timeline) > 0
    load = _sampled_load(result) if has_samples else _load_of_requests(result.requests)
    lines = []
    for name, colour, style in (("running", BLUE, "-"), ("waiting", VERMILLION, "--")):
        x, y = _thinned(load["time"].to_numpy(), load[name].to_numpy())
        lines += ax.plot(x, y, style, color=colour, drawstyle="steps-post", label=name)
    if has_samples:
        usage_axes = ax.twinx()
        x, y = _thinned(load["time"].to_numpy(), 100 * load["usage"].to_numpy())
        lines += usage_axes.plot(
            x, y, ":", color=GREEN, drawstyle="steps-post", label="KV cache (right axis)"
        )
        usage_axes.set_ylim(0, 105)
        usage_axes.set_ylabel("KV cache in use (%)")
    if not len(load):
        _say_empty(ax, "no request arrived")
    ax.set_ylim(0, 1.05 * max(1.0, load["running"].max(), load["waiting"].max()))
    ax.set_xlabel("time (s)")
    ax.set_ylabel("requests")
    ax.set_title(f"Load of {_count(len(result.replicas), 'replica')}", pad=26)
    ax.legend(handles=lines, **_ABOVE, ncols=len(lines))
    ax.grid(alpha=0.3)
    return ax


def gantt(
    result: Result,
    ax: Axes | None = None,
    *,
    start: float | None = None,
    duration: float | None = None,
    replica_id: int | None = None,
) -> Axes:
    """Draw the batches on each pipeline stage as bars; gaps between them are idle time.

    Bars of batches with prompt tokens only, with prompt and decode tokens, and with decode tokens
    only differ in colour and hatch; a bar that has room bears the index of its batch.

    Parameters
    ----------
    result : Result
        Recorded with ``record=("stages",)``.
    ax : Axes, optional
    start : float, optional
        Start of the window in seconds; by default the first batch.
    duration : float, optional
        Length of the window in seconds; by default about 60 batches of a replica.
    replica_id : int, optional
        Show this replica only.

    Raises
    ------
    ConfigError
        If there is no such replica, or the window has too many bars to see.
    NotAvailableError
        If stages were not recorded.
    """
    stages = result.stages
    if replica_id is not None:
        known = sorted(set(stages["replica_id"]))
        if replica_id not in known:
            raise ConfigError(f"gantt(): replica_id = {replica_id!r}: expected one of {known}.")
        stages = stages[stages["replica_id"] == replica_id]
    # A batch that was on its stage when the run stopped has no end yet.
    end_of_run = result.info.get("simulated_time", stages["ended_at"].max())
    stages = stages.assign(ended_at=stages["ended_at"].fillna(end_of_run))
    first, last = _window(stages, start, duration)
    shown = stages[(stages["ended_at"] > first) & (stages["started_at"] < last)]
    if len(shown) > MAX_BARS:
        raise ConfigError(
            f"gantt(): the window of {digits(last - first)} s has {len(shown)} bars: expected at "
            f"most {MAX_BARS}; give a shorter duration or one replica_id."
        )
    rows = sorted(set(zip(stages["replica_id"], stages["stage_id"], strict=True)))
    ax = _axes(ax, height=min(12.0, 1.8 + 0.35 * len(rows)))
    ax.set_xlim(first, last)
    _draw_bars(ax, shown, rows)
    is_deep = bool((stages["stage_id"] > 0).any())
    names = [f"replica {r}, stage {s}" if is_deep else f"replica {r}" for r, s in rows]
    every = math.ceil(len(rows) / MAX_ROW_LABELS) or 1
    ax.set_yticks(range(0, len(rows), every), names[::every])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("time (s)")
    ax.set_title("Batches on their stages", pad=26)
    return ax


def _axes(ax: Axes | None, height: float = 4.0) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, height), layout="constrained")[1]


def _say_empty(ax: Axes, message: str) -> None:
    ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes)


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _label(metric: str) -> str:
    unit = "s" if metric == "itl" else COLUMNS["requests"].get(metric, ("", ""))[0]
    return f"{_name(metric)} ({unit})" if unit else _name(metric)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _numeric(requests: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where there is none."""
    numbers = requests.select_dtypes("number")
    if metric not in numbers:
        raise unknown_name("metric", metric, [str(name) for name in numbers])
    values = numbers[metric].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _distribution(result: Result, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the values in order, and the share that is at or below each of them."""
    if metric == "itl":
        tokens = result.tokens.sort_values("inter_token_latency")
        counts = tokens["num_tokens"].to_numpy(dtype=np.float64)
        values = tokens["inter_token_latency"].to_numpy(dtype=np.float64)
    else:
        values = _numeric(result.requests, metric)
        values = np.sort(values[~np.isnan(values)])
        counts = np.ones(len(values))
    return values, np.cumsum(counts) / counts.sum() if len(counts) else counts


def _quantiles(result: Result, metric: str, values: NDArray[np.float64]) -> dict[str, float]:
    if metric == "itl":
        summary = result.summary()
        return {name: summary[name].to_dict()["itl"] for name in MARKS}
    found = np.quantile(values, list(MARKS.values())).tolist()
    return dict(zip(MARKS, found, strict=True))


def _curve(
    values: NDArray[np.float64], shares: NDArray[np.float64], complementary: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Return the steps of the distribution function, or of its complement."""
    last = len(values) - 1
    if last >= MAX_POINTS:
        # Evenly spaced ranks for the body, and ever closer ones towards both ends for the tails.
        tail = np.geomspace(1, last + 1, MAX_POINTS // 4).astype(np.int64) - 1
        body = np.linspace(0, last, MAX_POINTS // 2).astype(np.int64)
        kept = np.unique(np.concatenate((tail, body, last - tail)))
    else:
        kept = np.arange(last + 1)
    if complementary:
        at_least = np.concatenate(([1.0], 1.0 - shares[:-1]))
        return values[kept], at_least[kept], "steps-pre"
    x = np.concatenate((values[:1], values[kept]))
    return x, np.concatenate(([0.0], shares[kept])), "steps-post"


def _round_window(arrived_at: NDArray[np.float64]) -> float:
    """Return a length of 1, 2 or 5 times a power of ten."""
    span = float(arrived_at.max() - arrived_at.min()) or 1.0
    shortest = span / min(MAX_WINDOWS, max(1, len(arrived_at) // 25))
    power = 10.0 ** math.floor(math.log10(shortest))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= shortest * 0.999)


def _windowed_quantiles(
    arrived_at: NDArray[np.float64], values: NDArray[np.float64], window: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the middle of each window and a row per quantile; NaN in empty windows."""
    import pandas as pd

    index = np.floor(arrived_at / window).astype(np.int64)
    shares = np.array(list(MARKS.values()))
    by_window = pd.Series(values).groupby(index).quantile(shares).unstack()
    by_window = by_window.reindex(range(index.min(), index.max() + 1))
    return (by_window.index.to_numpy() + 0.5) * window, by_window.to_numpy().T


def _sampled_load(result: Result) -> pd.DataFrame:
    """Return time, running, waiting and usage of all replicas at each sample of any of them."""
    import pandas as pd

    names = {"num_running": "running", "num_waiting": "waiting", "kv_cache_usage": "usage"}
    samples = result.timeline.rename(columns=names)
    if "measured_from" not in result.info:  # else the requests before it are not known
        idle = _idle_instants(result.requests).assign(running=0, waiting=0, usage=0.0)
        samples = pd.concat([idle, samples])
    samples = samples.sort_values("time", kind="stable", ignore_index=True)
    levels = samples[list(names.values())].astype(np.float64)
    changes = levels.groupby(samples["replica_id"]).diff().fillna(levels)
    load = changes.cumsum().clip(lower=0.0)  # a sum of changes may end at -1e-17
    load["usage"] /= max(1, len(result.replicas))
    load.insert(0, "time", samples["time"])
    return load.drop_duplicates("time", keep="last", ignore_index=True)


def _idle_instants(requests: pd.DataFrame) -> pd.DataFrame:
    """Return when a replica finished the last request it had; it forms no batch then."""
    import pandas as pd

    accepted = requests[requests["replica_id"].notna() & (requests["refusal"] == "")]
    arrivals = pd.DataFrame({"time": accepted["arrived_at"], "change": 1})
    ends = pd.DataFrame({"time": accepted["completed_at"].dropna(), "change": -1})
    moves = pd.concat([arrivals, ends])
    moves["replica_id"] = accepted["replica_id"].astype(np.int64).loc[moves.index]
    moves = moves.sort_values("time", kind="stable")
    is_idle = moves.groupby("replica_id")["change"].cumsum() == 0
    return moves.loc[is_idle, ["time", "replica_id"]]


def _load_of_requests(requests: pd.DataFrame) -> pd.DataFrame:
    """Return time, running and waiting: from arrival to first batch, from there to the end."""
    import pandas as pd

    accepted = requests[requests["refusal"] == ""]
    moves = pd.concat(
        pd.DataFrame({"time": accepted[column].dropna(), "running": running, "waiting": waiting})
        for column, running, waiting in (
            ("arrived_at", 0, 1),
            ("scheduled_at", 1, -1),
            ("completed_at", -1, 0),
        )
    ).sort_values("time", kind="stable", ignore_index=True)
    moves[["running", "waiting"]] = moves[["running", "waiting"]].cumsum()
    return moves.drop_duplicates("time", keep="last", ignore_index=True)


def _thinned(
    time: NDArray[np.float64], value: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return at most `MAX_POINTS` points: first, last, least and greatest of equal time spans."""
    if len(time) <= MAX_POINTS:
        return time, value
    span = np.linspace(time[0], time[-1], MAX_POINTS // 4)
    bucket = np.searchsorted(span[1:-1], time, side="right")
    order = np.lexsort((value, bucket))
    is_first = np.diff(bucket, prepend=-1) > 0
    is_last = np.diff(bucket, append=bucket[-1] + 1) > 0
    # `bucket` does not fall, so its bounds are those of the sorted order too.
    kept = np.unique(
        np.concatenate(
            (np.flatnonzero(is_first), np.flatnonzero(is_last), order[is_first], order[is_last])
        )
    )
    return time[kept], value[kept]


def _window(
    stages: pd.DataFrame, start: float | None, duration: float | None
) -> tuple[float, float]:
    """Return start and end of what `gantt` shows, in seconds."""
    if duration is not None and not duration > 0:
        raise ConfigError(f"gantt(): duration = {duration!r}: expected a positive number of s.")
    if start is None:
        start = float(stages["started_at"].min()) if len(stages) else 0.0
    if duration is not None:
        return start, start + duration
    later = stages[stages["ended_at"] > start]
    if later.empty:
        return start, start + 1.0
    one = later[later["replica_id"] == later["replica_id"].iloc[0]]
    batch = one["batch_index"]
    return start, float(one.loc[batch < batch.min() + DEFAULT_BATCHES, "ended_at"].max())


def _draw_bars(ax: Axes, stages: pd.DataFrame, rows: list[tuple[int, int]]) -> None:
    from matplotlib.collections import PolyCollection

    left, right = stages["started_at"].to_numpy(), stages["ended_at"].to_numpy()
    places = zip(stages["replica_id"], stages["stage_id"], strict=True)
    number = {row: index for index, row in enumerate(rows)}
    middle = np.array([number[place] for place in places], dtype=np.float64)
    top, bottom = middle - 0.35, middle + 0.35
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1)
    has_prefill = stages["num_prefill_tokens"].to_numpy() > 0
    has_decode = stages["num_decode_tokens"].to_numpy() > 0
    chosen = (has_prefill & ~has_decode, has_prefill & has_decode, ~has_prefill)
    for (kind, (colour, hatch)), mask in zip(BATCH_KINDS.items(), chosen, strict=True):
        if mask.any():
            shapes: Any = corners[mask].reshape(-1, 4, 2)
            look: Any = {"facecolor": colour, "hatch": hatch, "edgecolor": "0.2", "linewidth": 0.4}
            ax.add_collection(PolyCollection(shapes, label=kind, **look))
    if len(stages):
        ax.legend(**_ABOVE, ncols=len(BATCH_KINDS))
    else:
        _say_empty(ax, "no batch in this window")
    _number_bars(ax, left, right, middle, stages["batch_index"].to_numpy())


def _number_bars(
    ax: Axes,
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    middle: NDArray[np.float64],
    batch_index: NDArray[np.int64],
) -> None:
    """Write the index of its batch on each bar that is wide enough."""
    first, last = ax.get_xlim()
    left, right = np.maximum(left, first), np.minimum(right, last)
    width = ax.get_window_extent().width / ax.figure.dpi * 72  # of the axes, in points
    room = (right - left) / (last - first) * width
    for index in np.flatnonzero(room > 6 + 5 * np.char.str_len(batch_index.astype(str))):
        ax.text(
            (left[index] + right[index]) / 2,
            middle[index],
            str(batch_index[index]),
            ha="center",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
