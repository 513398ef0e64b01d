"""Bars that say how far a run, or a number of runs, has come."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from vidur_simpy.summary import digits

__all__ = ["RunBar", "progress_bar"]

# A bar nobody asked for appears when a run takes longer than this, in seconds.
PATIENCE = 2.0
# Seconds between two drawings: a notebook takes about a millisecond for each.
PERIOD = 0.25

SIMPLE = "{desc}"
WITH_SHARE = "{percentage:3.0f}%|{bar}| {desc}"


def progress_bar(total: int, unit: str, shown: bool | None) -> Any:
    """Return a bar that counts; None shows it on a terminal or in a notebook after a while."""
    is_shown = _is_seen() if shown is None else shown
    return _tqdm(total=total, unit=unit, delay=0 if shown else PATIENCE, disable=not is_shown)


class RunBar:
    """How far one call of ``run`` has come, drawn on a terminal or in a notebook.

    Parameters
    ----------
    instant : callable
        Returns the simulated time, in seconds.
    num_done : callable
        Returns how many requests are complete or refused.
    num_expected : callable
        Returns how many there will be; 0 where nobody knows.
    until : float or None
        Instant at which the run ends, in seconds, if it does not end with its requests.
    shown : bool or None
        None draws it where somebody sees it, once a run takes longer than `PATIENCE`.
    clock : callable
        Real time, in seconds.
    """

    def __init__(
        self,
        instant: Callable[[], float],
        num_done: Callable[[], int],
        num_expected: Callable[[], int],
        *,
        until: float | None = None,
        shown: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.is_shown = _is_seen() if shown is None else shown
        self._instant, self._num_done, self._num_expected = instant, num_done, num_expected
        self._until = until
        self._clock = clock
        self._bar: Any = None
        self._from = (clock(), instant(), num_done())
        self._looked_at = self._from[0] - PERIOD
        self._num_to_skip, self._stride = 0, 1
        self._draws_at = self._from[0] + (PATIENCE if shown is None else 0.0)

    def __enter__(self) -> RunBar:
        if self.is_shown:
            self.tick()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._draw(self._clock(), is_over=error is None)
            self._bar.close()

    def tick(self) -> None:
        """Draw the bar, if the last time was long enough ago; to be called as requests are done."""
        self._num_to_skip -= 1
        if self._num_to_skip < 0:
            self._look()

    def _look(self) -> None:
        """Look at the clock, some ten times in each period however fast ticks come."""
        now = self._clock()
        since = now - self._looked_at
        self._stride = 2 * self._stride if since < PERIOD / 20 else 1
        self._num_to_skip = self._stride - 1
        self._looked_at = now
        if now >= self._draws_at:
            self._draw(now)
            self._draws_at = now + PERIOD

    def _draw(self, now: float, *, is_over: bool = False) -> None:
        share = self._share()
        if is_over and share is not None:
            share = 1.0  # an event may end a run before its requests are done
        text = self._text(now - self._from[0], share)
        if self._bar is None:
            total, form = (None, SIMPLE) if share is None else (1.0, WITH_SHARE)
            self._bar = _tqdm(desc=text, total=total, bar_format=form, dynamic_ncols=True)
        self._bar.n = share or 0.0
        self._bar.set_description_str(text)

    def _share(self) -> float | None:
        """Return how much of the run is done, 0 to 1: of its time or of its requests."""
        _, started_at, num_before = self._from
        shares = []
        if self._until is not None and self._until > started_at:
            shares.append((self._instant() - started_at) / (self._until - started_at))
        num_left = self._num_expected() - num_before
        if num_left > 0:
            shares.append((self._num_done() - num_before) / num_left)
        return min(1.0, max(shares)) if shares else None

    def _text(self, elapsed: float, share: float | None) -> str:
        _, started_at, num_before = self._from
        num_done, num_expected = self._num_done(), self._num_expected()
        instant = self._instant()
        total = f"/{num_expected:,}" if num_expected else ""
        left = "" if share is None else f"<{_duration(elapsed / share - elapsed) if share else '?'}"
        speed = ""
        if elapsed > 0:
            rate = (num_done - num_before) / elapsed
            pace = (instant - started_at) / elapsed
            speed = f", {digits(rate)} requests/s, {digits(pace)} simulated s/s"
        return (
            f"{num_done:,}{total} requests, {digits(instant)} s simulated "
            f"[{_duration(elapsed)}{left}{speed}]"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_seen() -> bool:
    """Whether somebody is likely to look: at a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _tqdm(**options: Any) -> Any:
    with warnings.catch_warnings():
        # Without ipywidgets a notebook gets the bar as text, which needs no warning.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm(**options)
