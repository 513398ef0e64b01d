"""What the plots share: colours, marks, and how axes, steps and labels are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.columns import COLUMNS
from vidur_simpy.series import spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

    from vidur_simpy.result import Result

__all__ = [
    "ABOVE",
    "BATCH_KINDS",
    "BLACK",
    "BLUE",
    "COLOURS",
    "COLOUR_MAP",
    "DEFAULT_BATCHES",
    "GREEN",
    "LINE_STYLES",
    "MARKS",
    "MAX_BARS",
    "MAX_NUMBERED_ROWS",
    "MAX_ROWS",
    "MAX_ROW_LABELS",
    "MAX_STEPS",
    "MAX_VECTOR_BARS",
    "MIN_BATCHES",
    "NUM_SPANS",
    "ORANGE",
    "PURPLE",
    "SKY_BLUE",
    "VERMILLION",
    "as_label",
    "count",
    "draw_steps",
    "label_of",
    "legend_above",
    "make_axes",
    "make_axis_logarithmic",
    "make_logarithmic",
    "mark_look",
    "marks_of",
    "name_of",
    "outline",
    "plain_logarithmic",
    "say_empty",
    "unit_of",
]

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
# From dark to bright also in grey, and made for colour-blind readers.
COLOUR_MAP = "cividis"
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
MAX_STEPS = 1_000
NUM_SPANS = 300
MAX_BARS = 50_000
# With more bars than this a figure holds them as pixels.
MAX_VECTOR_BARS = 2_000
DEFAULT_BATCHES = 60
MIN_BATCHES = 10
MAX_ROWS = 128
MAX_ROW_LABELS = 40
MAX_NUMBERED_ROWS = 24
# Characters of small print that have room beside each other.
LINE_LENGTH = 90
# A legend between the title and the axes, where it hides no line.
ABOVE: Any = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "frameon": False,
    "fontsize": "small",
}


def as_label(name: str) -> str:
    r"""Return a name that a figure shows as it is: no formula in \$, no hidden label."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def make_axes(ax: Axes | None, height: float = 4.0) -> Axes:
    """Return the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, height), layout="constrained")[1]


def legend_above(ax: Axes, handles: Sequence[Any] | None = None, columns: int = 4) -> None:
    """Put the legend between the axes and the title, which makes room for it.

    Names are in several columns where they are short, and cut where they are longer than a line.
    """
    if handles is None:
        handles = ax.get_legend_handles_labels()[0]
    names = [str(handle.get_label()) for handle in handles]
    longest = max(map(len, names), default=0)
    columns = max(1, min(columns, len(names), LINE_LENGTH // (longest + 4)))
    shown = [
        name if len(name) <= LINE_LENGTH else f"{name[: LINE_LENGTH - 3]}..." for name in names
    ]
    ax.legend(handles, shown, ncols=columns, **ABOVE)
    num_rows = -(-len(names) // columns)
    ax.set_title(ax.get_title(), pad=12 + 14 * num_rows)


def say_empty(ax: Axes, message: str) -> None:
    """Write on the axes why nothing is drawn."""
    ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes)


def name_of(metric: str) -> str:
    """Return a metric in words."""
    return NAMES.get(metric, metric.replace("_", " "))


def unit_of(metric: str) -> str:
    """Return the unit with a space before it, or nothing."""
    unit = "s" if metric == "itl" else COLUMNS["requests"].get(metric, ("", ""))[0]
    return f" {unit}" if unit else ""


def label_of(metric: str) -> str:
    """Return a metric in words with its unit, for an axis."""
    unit = unit_of(metric).strip()
    return f"{name_of(metric)} ({unit})" if unit else name_of(metric)


def marks_of(result: Result, metric: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Return the quantiles that the legend of `cdf` lists."""
    if metric == "itl":
        summary = result.summary()
        return {name: summary[name].to_dict()["itl"] for name in MARKS}
    return dict(zip(MARKS, np.quantile(values, list(MARKS.values())).tolist(), strict=True))


def mark_look(colour: str) -> dict[str, Any]:
    """Return how marks on a curve look."""
    return {"color": colour, "markersize": 4, "markerfacecolor": "white"}


def make_logarithmic(ax: Axes) -> None:
    """Make the x axis logarithmic with plain numbers, which do not run into each other."""
    ax.set_xscale("log")
    drawn = np.concatenate([np.asarray(line.get_xdata(), float) for line in ax.lines])
    positive = drawn[drawn > 0]
    # A curve drawn before may have set the left end to 0, which has no place on this axis.
    ax.set_xlim(positive.min() / 1.1, positive.max() * 1.1)
    plain_logarithmic(ax.xaxis, *ax.get_xlim())


def make_axis_logarithmic(axis: Axis, values: NDArray[np.float64]) -> None:
    """Make an axis logarithmic, with plain numbers, if any of the values can be on one."""
    from matplotlib.axis import XAxis

    positive = values[(values > 0) & np.isfinite(values)]
    if len(positive):
        set_scale = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
        set_scale("log")
        plain_logarithmic(axis, positive.min(), positive.max())


def plain_logarithmic(axis: Axis, low: float, high: float) -> None:
    """Give a logarithmic axis from `low` to `high` plain numbers that have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs: Sequence[float] = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    if high < 20 * low:
        subs = (1.0, 2.0, 3.0, 5.0, 7.0)
    if high < 4 * low:
        subs = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_steps(
    ax: Axes,
    time: NDArray[np.float64],
    value: NDArray[np.float64],
    style: str,
    colour: str,
    label: str,
) -> Line2D:
    """Draw a step line, or where it has too many steps to see, its mean and its range."""
    if len(time) <= MAX_STEPS:
        return ax.plot(time, value, style, color=colour, drawstyle="steps-post", label=label)[0]
    middle, mean, least, greatest = spans(time, value, NUM_SPANS)
    ax.fill_between(middle, least, greatest, color=colour, alpha=0.2, linewidth=0)
    return ax.plot(middle, mean, style, color=colour, label=label)[0]


def outline() -> list[Any]:
    """Return path effects that part a line from a dark or a hatched ground."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3.5, foreground="white")]


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if there are several."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
