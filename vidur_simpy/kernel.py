"""The clock and its order: seven typed events on one SimPy environment.

Simultaneous events are handled in the order of their key ``(time, event_type, event_id)``. An event
type is a SimPy priority and an event id SimPy's own serial number, so SimPy's queue does the
ordering and nothing else has to. What SimPy schedules for itself (process starts, timeouts, stores,
interrupts) gets a priority below every typed event: at one instant the plumbing settles first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import inf
from numbers import Real
from typing import Any, Literal, Protocol

import simpy
from simpy.core import BoundClass, StopSimulation
from simpy.events import NORMAL, URGENT, Event, EventPriority

from vidur_simpy.around_runs import ctrl_c_between_events, rare_garbage_collection
from vidur_simpy.errors import ConfigError, SimulationError, unknown_name
from vidur_simpy.events import EventType, Signal, TypedEvent

__all__ = [
    "FIRST_ARRIVAL_ID",
    "Environment",
    "EventOrder",
    "EventType",
    "Shortcut",
    "Signal",
    "TypedEvent",
]

EventOrder = Literal["type", "id"]

FIRST_ARRIVAL_ID = -(2**62)
"""The serial number of the first arrival: below those of all other events."""

_FIRST_TYPED_PRIORITY = 1


class Shortcut(Protocol):
    """Something that lets one event stand for several, as long as nobody looks or listens."""

    def settle(self, now: float) -> None:
        """Do what the events before `now` (seconds) would have done."""

    def show(self, now: float) -> None:
        """Settle, and let what ends right `now` end by itself, before a look at this instant."""

    def cut(self, now: float) -> None:
        """Settle, and let what comes after the present step happen event by event."""


class Environment(simpy.Environment):
    """A SimPy environment that also raises the seven typed events.

    Parameters
    ----------
    event_order : {"type", "id"}
        ``"type"``: simultaneous events by ``(event_type, event_id)``, as Vidur documents it.
        ``"id"``: by ``event_id`` alone, as Vidur really does; for parity with its recorded runs.

    Attributes
    ----------
    is_unobserved : bool
        Whether events may be left out: nobody listens, and their order is by type.
    is_interrupted : bool
        Whether a ctrl-C ends the run after the present event.
    shortcuts : dict of Shortcut to None
        What stands for several events at once, to be told before somebody looks or listens.

    Examples
    --------
    >>> env = Environment()
    >>> seen = []
    >>> env.subscribe(EventType.BATCH_END, lambda event: seen.append(env.now))
    >>> _ = env.at(0.25, EventType.BATCH_END)
    >>> env.run()
    >>> seen
    [0.25]
    """

    def __init__(self, event_order: EventOrder = "type") -> None:
        super().__init__(0.0)
        if event_order not in ("type", "id"):
            raise unknown_name("event_order", event_order, ["type", "id"])
        self.event_order = event_order
        self.is_unobserved = event_order == "type"
        # Those of a type are known to all its signals: always one and the same list.
        self._listeners: dict[EventType, list[Callable[[TypedEvent], None]]] = {
            event_type: [] for event_type in EventType
        }
        self._arrival_ids = count(FIRST_ARRIVAL_ID)
        self.is_interrupted = False
        self.shortcuts: dict[Shortcut, None] = {}
        # SimPy binds its event classes to instances of its own class only; a subclass has to.
        for name, bound_class in simpy.Environment.__dict__.items():
            if isinstance(bound_class, BoundClass):
                setattr(self, name, getattr(self, name))

    def schedule(self, event: Event, priority: EventPriority = NORMAL, delay: float = 0) -> None:
        """Schedule an event of SimPy's own or of a user's process, before any typed event.

        Parameters
        ----------
        event : simpy.Event
        priority : int
            SimPy's, among such events of one instant.
        delay : float
            Seconds from now.
        """
        entry = (self._now + delay, priority - 2, next(self._eid), event)
        heappush(self._queue, entry)  # type: ignore[misc]

    def key_of(self, event_type: EventType) -> tuple[int, Iterator[int]]:
        """Return what orders simultaneous events of this type: a priority, and serial numbers.

        The order lives here.
        """
        priority = int(event_type) if self.event_order == "type" else 1
        # Arrivals are numbered as if all had been created before the first event: at one instant
        # they come before any other event of their type (or, in "id" order, of any type).
        is_arrival = event_type is EventType.REQUEST_ARRIVAL
        return priority, self._arrival_ids if is_arrival else self._eid

    def at(self, time: float, event_type: EventType, value: Any = None) -> TypedEvent:
        """Return a typed event that happens at exactly `time` (seconds, not before now).

        Its `value` is what the event is about.

        ``timeout(time - now)`` would happen at ``now + (time - now)``, which is another number.

        Raises
        ------
        ConfigError
            If `time` lies before the present, or is no number.
        """
        if not time >= self._now:
            raise ConfigError(
                f"time = {time!r}: expected an instant in seconds that is not before the present, "
                f"{self._now} s."
            )
        return Signal(self, event_type).at(time, value)

    def cancel(self, event: Event) -> None:
        """Let an event that is queued never happen; what is left of it is passed over."""
        event.callbacks = None  # type: ignore[assignment]
        if isinstance(event, TypedEvent):
            event.signal.let_go(event)

    def is_alone_at(self, instant: float) -> bool:
        """Whether nothing is queued up to this instant."""
        return not self._queue or self._queue[0][0] > instant

    def peek(self) -> float:
        """Return the instant of the next event, in seconds; infinity if there is none."""
        self._pass_over_cancelled()
        return super().peek()

    @property
    def next_entry(self) -> tuple[float, int, int, Event] | None:
        """The event to be handled next after its key: instant, priority and serial number."""
        self._pass_over_cancelled()
        return self._queue[0] if self._queue else None

    @property
    def next_id(self) -> int:
        """The serial number of whatever is queued next, other than an arrival."""
        return _next_of(self._eid)

    def _pass_over_cancelled(self) -> None:
        while self._queue and self._queue[0][3].callbacks is None:
            heappop(self._queue)

    def settle(self) -> None:
        """Bring everything that several events stand for up to the present."""
        for shortcut in self.shortcuts:
            shortcut.settle(self._now)

    def show(self) -> None:
        """Settle for a look from among the typed events: what ends now has to end before."""
        for shortcut in self.shortcuts:
            shortcut.show(self._now)

    @property
    def num_events(self) -> int:
        """Events queued so far, typed or not: the fewer, the less could be watched."""
        return self.next_id + _next_of(self._arrival_ids) - FIRST_ARRIVAL_ID

    # -- listening ---------------------------------------------------------------------------

    def subscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Call `listener(event)` each time an event of this type has been handled."""
        if event_type not in list(EventType):
            names = [f"EventType.{name}" for name in EventType.__members__]
            raise unknown_name("event_type", event_type, names)
        for shortcut in tuple(self.shortcuts):
            shortcut.cut(self._now)
        self._listeners[event_type].append(listener)
        self.is_unobserved = False

    def unsubscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Stop calling a listener."""
        self._listeners[event_type].remove(listener)
        self.is_unobserved = self.event_order == "type" and not any(self._listeners.values())

    # -- running -----------------------------------------------------------------------------

    def step(self) -> None:
        """Handle the next event, as SimPy does, and tell who listens to it."""
        self._pass_over_cancelled()
        event = None
        if self._queue:
            self._now, priority, _, event = self._queue[0]
            if priority < _FIRST_TYPED_PRIORITY:
                self.settle()
        super().step()
        if isinstance(event, TypedEvent):
            event.signal.tell(event)

    def run(self, until: float | Event | None = None) -> Any:
        """Run until nothing is left, until an event happens, or until exactly the instant `until`.

        Events at the instant `until` are not handled; a later call goes on with them. So it does
        after a ctrl-C, which ends the run between two events.

        Returns
        -------
        object
            The value of the event `until`, if it is one.

        Raises
        ------
        ConfigError
            If `until` is neither an event nor an instant after the present.
        SimulationError
            If `until` is an event and nothing is left that could make it happen.
        """
        with ctrl_c_between_events(self._interrupt), rare_garbage_collection():
            return self._run(until)

    def _interrupt(self, is_interrupted: bool) -> None:
        self.is_interrupted = is_interrupted

    def _run(self, until: float | Event | None) -> Any:
        if until is None:
            try:
                self._handle_events()
            finally:
                self.settle()
            return None
        stop = until if isinstance(until, Event) else self._stop_at(until)
        if stop.callbacks is None:
            return stop.value
        stop.callbacks.append(StopSimulation.callback)
        try:
            self._handle_events()
        except StopSimulation as stopped:
            return stopped.args[0]
        finally:
            self.settle()
            # A run that was cut short must not stop a later one.
            if stop.callbacks and StopSimulation.callback in stop.callbacks:
                stop.callbacks.remove(StopSimulation.callback)
            if stop is not until:
                self.cancel(stop)
        raise SimulationError(f"nothing is left to happen, and {until} did not.")

    def _stop_at(self, instant: float) -> Event:
        """Return an event at exactly this instant, before all others."""
        if not (isinstance(instant, Real) and self._now < instant < inf):
            raise ConfigError(
                f"until = {instant!r}: expected an event, or an instant in seconds after the "
                f"present, {self._now} s."
            )
        stop = Event(self)
        stop._ok, stop._value = True, None
        self._put_first(float(instant), stop)
        return stop

    def _put_first(self, instant: float, event: Event) -> None:
        """Queue an event before all others of its instant; it takes no serial number."""
        heappush(self._queue, (instant, EventPriority(URGENT - 3), -1, event))

    def _handle_events(self) -> None:
        """Handle events until none is left: SimPy's `step` in a loop, without a call for each."""
        queue, shortcuts = self._queue, self.shortcuts
        while queue:
            now, priority, _, event = heappop(queue)
            callbacks = event.callbacks
            if callbacks is None:  # cancelled
                continue
            self._now = now
            if shortcuts and priority < _FIRST_TYPED_PRIORITY:
                self.settle()  # whoever is told may look
            event.callbacks = None  # type: ignore[assignment]
            try:
                for callback in callbacks:
                    callback(event)
            except StopSimulation:
                # Whoever waits for the event as well is told when the simulation goes on.
                event.callbacks = callbacks[callbacks.index(callback) + 1 :]
                self._put_first(self._now, event)
                raise
            if priority >= _FIRST_TYPED_PRIORITY:
                if event.signal.listeners:  # type: ignore[attr-defined]
                    event.signal.tell(event)  # type: ignore[attr-defined]
            elif not event._ok and not hasattr(event, "_defused"):
                raise event._value
            elif isinstance(event, TypedEvent):  # that a stop was put before
                event.signal.tell(event)
            if self.is_interrupted:
                raise KeyboardInterrupt


def _next_of(ids: count[int]) -> int:
    """Return the next serial number without taking it."""
    return int(repr(ids).removeprefix("count(").removesuffix(")"))
