"""What surrounds a run: ctrl-C is heard between two events, the garbage collector rests."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ctrl_c_between_events", "rare_garbage_collection"]


@contextmanager
def ctrl_c_between_events(interrupt: Callable[[bool], None]) -> Iterator[None]:
    """Hear a ctrl-C when the present event is done, so that nothing is left half done.

    `interrupt` is told True at the first one, which is then to end the run, and False at the end.
    One that comes in the last event is heard after it. A second one is heard at once. A handler of
    the user's own stays in charge.
    """
    usual = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or usual is not signal.default_int_handler:
        yield
        return

    is_heard = False

    def note(*_: Any) -> None:
        nonlocal is_heard
        is_heard = True
        interrupt(True)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        interrupt(False)
    if is_heard:
        raise KeyboardInterrupt


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Look for circular garbage less often: a simulation makes objects fast, and hardly any such.

    Looking as often as usual took a fifth of the time of a run near saturation.
    """
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 100_000) if usual[0] else 0, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
