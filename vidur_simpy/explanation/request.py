"""One request explained: a sentence, a table and a waterfall of where its time went."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING

from vidur_simpy.errors import ConfigError
from vidur_simpy.explanation.parts import PHASES, coarse_parts
from vidur_simpy.plots.breakdown_bars import PARTS, waterfall
from vidur_simpy.summary import aligned, digits, html_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vidur_simpy.result import Result

__all__ = ["Explanation", "explain_request"]

MOST_NAMED = 4
HINT = 'record=("phases",) tells more: stalls, waits between steps and preemptions.'


@dataclass(frozen=True, repr=False)
class Explanation:
    """Where the time of one request went; `Result.explain` makes it.

    A notebook shows it as text and table; ``print`` gives the same as plain text.

    Attributes
    ----------
    request_id : int
    text : str
        One sentence.
    hint : str
        What to record to know more; empty if all is known.
    parts : Series
        Seconds by part, in the order in which a request goes through them; they add up to its
        end-to-end latency, or to its time up to the end of the run. Empty if it was refused.
    """

    request_id: int
    text: str
    hint: str
    parts: pd.Series

    @property
    def table(self) -> pd.DataFrame:
        """A row per part: ``meaning``, ``time`` in seconds, and its ``share`` of the whole."""
        import pandas as pd

        meaning = [PARTS[name].phrase for name in map(str, self.parts.index)]
        total = self.parts.sum()
        share = self.parts / total if total else self.parts * math.nan
        return pd.DataFrame({"meaning": meaning, "time": self.parts, "share": share})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the parts as a waterfall, those that took no time left out."""
        return waterfall(self.parts, f"Where the time of request {self.request_id} went", ax)

    def __repr__(self) -> str:
        return f"<Explanation: {self.text}>"

    def __str__(self) -> str:
        rows = [["part", "time (s)", "share"], *self._rows()] if len(self.parts) else []
        return "\n".join([self.text, *([""] if rows else []), *aligned(rows), *self._hint_lines()])

    def _repr_html_(self) -> str:
        """Return text and table as html; what users can name is escaped."""
        table = html_table(self._rows(), ["part", "time (s)", "share"]) if len(self.parts) else ""
        hint = f"<p><small>{html.escape(self.hint)}</small></p>" if self.hint else ""
        return f"<p>{html.escape(self.text)}</p>{table}{hint}"

    def _rows(self) -> list[list[str]]:
        return [
            [str(row["meaning"]), digits(row["time"]), _percent(row["share"])]
            for _, row in self.table.iterrows()
        ]

    def _hint_lines(self) -> list[str]:
        return ["", self.hint] if self.hint else []


def explain_request(result: Result, request_id: int) -> Explanation:
    """Explain a request, as `Result.explain` describes it."""
    import pandas as pd

    request_id, request = _found(result.requests, request_id)
    name = f"Request {request_id}"
    if request["refusal"]:
        nothing = pd.Series([], dtype=float)
        return Explanation(
            request_id, f"{name} was refused at its arrival: {request['refusal']}.", "", nothing
        )
    is_complete = not pd.isna(request["completed_at"])
    has_phases = "phases" in result.tables
    parts = _phases_of(result, request_id) if has_phases else _known_parts(result, request)
    total = float(parts.sum())
    if is_complete:
        start = f"{name} took {digits(total)} s{_rank(result.requests, request)}"
    else:
        end = digits(result.info["simulated_time"])
        start = f"{name} was not complete when the run ended at {end} s; of its {digits(total)} s"
        start += " so far, it spent"
    text = f"{start}{':' if is_complete else ''} {_listed(parts)}{_restarts(request)}."
    is_measured = result.config is None
    return Explanation(request_id, text, "" if has_phases or is_measured else HINT, parts)


def _found(requests: pd.DataFrame, request_id: int) -> tuple[int, pd.Series]:
    ids = requests["request_id"].to_numpy()
    try:
        number = index(request_id)
    except TypeError:
        raise ConfigError(f"explain({request_id!r}): expected the number of a request.") from None
    rows = (ids == number).nonzero()[0]
    if len(rows):
        return number, requests.iloc[rows[0]]
    if not len(ids):
        raise ConfigError(f"explain({number}): there are no requests.")
    nearest = ids[abs(ids - number).argmin()]
    raise ConfigError(
        f"unknown request {number}: did you mean {nearest}? There are {len(ids):,}, from "
        f"{ids.min()} to {ids.max()}."
    )


def _phases_of(result: Result, request_id: int) -> pd.Series:
    phases = result.phases
    row = phases.loc[phases["request_id"] == request_id, list(PHASES)].iloc[0]
    return row.rename("time").astype(float)


def _known_parts(result: Result, request: pd.Series) -> pd.Series:
    """Return the coarse parts, of an unfinished request up to the end of the run."""
    known = request.copy()
    if math.isnan(known["e2e"]):
        end = float(result.info["simulated_time"])
        so_far = end - known["arrived_at"]
        known["e2e"] = so_far
        known["scheduling_delay"] = min(so_far, _or(known["scheduling_delay"], so_far))
        known["ttft"] = min(so_far, _or(known["ttft"], so_far))
    row = coarse_parts(known.to_frame().T.infer_objects(), "e2e").iloc[0]
    return row.rename("time").astype(float)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else float(value)


def _rank(requests: pd.DataFrame, request: pd.Series) -> str:
    """Return how it compares with the others, if there are some."""
    e2e = requests["e2e"].dropna()
    if len(e2e) < 2:
        return ""
    return f", longer than {_percent((e2e < request['e2e']).mean())} of the completed requests"


def _listed(parts: pd.Series) -> str:
    """Return the largest parts in words."""
    total = float(parts.sum())
    if not total > 0:
        return "no time at all"
    largest = parts[parts > 0].sort_values(ascending=False, kind="stable")
    named = largest[largest >= 0.005 * total][:MOST_NAMED]
    words = [f"{_percent(time / total)} {PARTS[str(name)].phrase}" for name, time in named.items()]
    rest = 1 - float(named.sum()) / total
    if rest >= 0.005:
        words.append(f"{_percent(rest)} in other ways")
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _restarts(request: pd.Series) -> str:
    times = int(request["num_restarts"])
    return f"; it was preempted {f'{times} times' if times > 1 else 'once'}" if times else ""


def _percent(share: float) -> str:
    """Return a share in percent, with a decimal where it is close to none or all."""
    if math.isnan(share):
        return "-"
    num_decimals = 1 if 0 < share < 0.02 or 0.98 < share < 1 else 0
    return f"{100 * share:.{num_decimals}f} %"
