"""The clock and its order: seven typed events on one SimPy environment.

Simultaneous events are handled in the order of their key ``(time, event_type, event_id)``. An event
type is a SimPy priority and an event id SimPy's own serial number, so SimPy's queue does the
ordering and nothing else has to. What SimPy schedules for itself (process starts, timeouts, stores,
interrupts) gets a priority below every typed event: at one instant the plumbing settles first.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count
from math import inf
from numbers import Real
from typing import Any, Literal, Protocol

import simpy
from simpy.core import BoundClass, StopSimulation
from simpy.events import NORMAL, URGENT, Event, EventPriority

from vidur_simpy.errors import ConfigError, SimulationError, unknown_name

__all__ = ["Environment", "EventOrder", "EventType", "Shortcut", "Signal", "TypedEvent"]

EventOrder = Literal["type", "id"]

# (replica_id, stage_id) of an event, where it has them.
Where = tuple[int | None, int | None]


_FIRST_ARRIVAL_ID = -(2**62)
_FIRST_TYPED_PRIORITY = 1


class Shortcut(Protocol):
    """Something that lets one event stand for several, as long as nobody looks or listens."""

    def settle(self, now: float) -> None:
        """Do what the events before `now` (seconds) would have done."""

    def show(self, now: float) -> None:
        """Settle, and let what ends right `now` end by itself, before a look at this instant."""

    def cut(self, now: float) -> None:
        """Settle, and let what comes after the present step happen event by event."""


class EventType(IntEnum):
    """The seven events of the simulation; the value is the priority among simultaneous ones."""

    BATCH_STAGE_ARRIVAL = 1
    REQUEST_ARRIVAL = 2
    BATCH_STAGE_END = 3
    BATCH_END = 4
    GLOBAL_SCHEDULE = 5
    REPLICA_STAGE_SCHEDULE = 6
    REPLICA_SCHEDULE = 7


class TypedEvent(Event):
    """One of the seven events, at one instant; yield it as any SimPy event.

    Attributes
    ----------
    signal : Signal
        What raised it, and where.
    event_type : EventType
    replica_id, stage_id : int or None
        Where it happens, if it has a place.
    value : Batch, Request or None
        The batch or the request it is about.
    """

    def __init__(self, signal: Signal, value: Any, callbacks: list[Any]) -> None:
        # As SimPy's own events do, without super().__init__(): one of these is made per event.
        self.env = signal.env
        self.callbacks = callbacks
        self.signal = signal
        self._ok = True
        self._value = value

    @property
    def event_type(self) -> EventType:
        """Which of the seven it is."""
        return self.signal.event_type

    @property
    def replica_id(self) -> int | None:
        """Replica at which it happens."""
        return self.signal.where[0]

    @property
    def stage_id(self) -> int | None:
        """Pipeline stage at which it happens."""
        return self.signal.where[1]

    def _desc(self) -> str:
        return f"{self.event_type.name}(replica_id={self.replica_id}, stage_id={self.stage_id})"


class Environment(simpy.Environment):
    """A SimPy environment that also raises the seven typed events.

    Parameters
    ----------
    event_order : {"type", "id"}
        ``"type"``: simultaneous events by ``(event_type, event_id)``, as Vidur documents it.
        ``"id"``: by ``event_id`` alone, as Vidur really does; for parity with its recorded runs.

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
        # Whether events may be left out: nobody listens, and their order is by type.
        self.is_unobserved = event_order == "type"
        self._listeners: dict[EventType, list[Callable[[TypedEvent], None]]] = {}
        self._arrival_ids = count(_FIRST_ARRIVAL_ID)
        self._is_interrupted = False
        # What stands for several events at once, to be told before somebody looks or listens.
        self.shortcuts: dict[Shortcut, None] = {}
        # SimPy binds its event classes to instances of its own class only; a subclass has to.
        for name, bound_class in simpy.Environment.__dict__.items():
            if isinstance(bound_class, BoundClass):
                setattr(self, name, getattr(self, name))

    def schedule(self, event: Event, priority: EventPriority = NORMAL, delay: float = 0) -> None:
        """Schedule an event of SimPy's own or of a user's process, before any typed event."""
        entry = (self._now + delay, priority - 2, next(self._eid), event)
        heappush(self._queue, entry)  # type: ignore[misc]

    def key_of(self, event_type: EventType) -> tuple[int, count[int]]:
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

        ``timeout(time - now)`` would happen at ``now + (time - now)``, which is another number.
        """
        if not time >= self._now:
            raise ValueError(f"an event at {time} s lies before the present, {self._now} s")
        return Signal(self, event_type).at(time, value)

    def cancel(self, event: Event) -> None:
        """Let an event that is queued never happen; what is left of it is passed over."""
        event.callbacks = None  # type: ignore[assignment]
        if isinstance(event, TypedEvent):
            event.signal.let_go(event)

    def is_alone_at(self, instant: float) -> bool:
        """Whether nothing is queued for this instant any more."""
        return not self._queue or self._queue[0][0] > instant

    def peek(self) -> float:
        """Return the instant of the next event, in seconds; infinity if there is none."""
        self._pass_over_cancelled()
        return super().peek()

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
        """Events scheduled so far, typed or not."""
        return _next_of(self._eid) + _next_of(self._arrival_ids) - _FIRST_ARRIVAL_ID

    # -- listening ---------------------------------------------------------------------------

    def subscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Call `listener(event)` each time an event of this type has been handled."""
        if event_type not in list(EventType):
            raise unknown_name("event_type", event_type, EventType.__members__)
        for shortcut in tuple(self.shortcuts):
            shortcut.cut(self._now)
        self._listeners.setdefault(EventType(event_type), []).append(listener)
        self.is_unobserved = False

    def unsubscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Stop calling a listener."""
        listeners = self._listeners[event_type]
        listeners.remove(listener)
        if not listeners:
            del self._listeners[event_type]
            self.is_unobserved = not self._listeners and self.event_order == "type"

    def _tell(self, event: Event | None) -> None:
        if isinstance(event, TypedEvent):
            event.signal.let_go(event)
            for listener in tuple(self._listeners.get(event.event_type, ())):
                listener(event)

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
        self._tell(event)

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
        with _ctrl_c_between_events(self), _rare_garbage_collection():
            return self._run(until)

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
        queue, listeners, shortcuts = self._queue, self._listeners, self.shortcuts
        while queue:
            now, priority, _, event = heappop(queue)
            callbacks = event.callbacks
            if callbacks is None:  # cancelled
                continue
            self._now = now
            if priority < _FIRST_TYPED_PRIORITY and shortcuts:
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
            if not event._ok and not hasattr(event, "_defused"):
                raise event._value
            if listeners:
                self._tell(event)
            if self._is_interrupted:
                raise KeyboardInterrupt


@contextmanager
def _ctrl_c_between_events(env: Environment) -> Iterator[None]:
    """Hear a ctrl-C when the present event is done, so that nothing is left half done.

    A second one is heard at once. A handler of the user's own stays in charge.
    """
    usual = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or usual is not signal.default_int_handler:
        yield
        return

    def note(*_: Any) -> None:
        env._is_interrupted = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        env._is_interrupted = False


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Look for circular garbage less often: a simulation makes objects fast, and hardly any such.

    Looking as often as usual took a fifth of the time of a run near saturation.
    """
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 100_000) if usual[0] else 0, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _next_of(ids: count[int]) -> int:
    """Return the next serial number without taking it."""
    return int(repr(ids).removeprefix("count(").removesuffix(")"))


class Signal:
    """Raises one type of event at one place.

    A process that waits for each event in turn yields :meth:`wait`. That is SimPy's
    ``event``/``succeed`` idiom without the hand-over: the process waits for the typed event itself.
    An event raised while the process is busy elsewhere still happens, and finds nobody, as an
    event that has nothing to do should. When nobody listens, a schedule event that is raised again
    before it was handled happens once; `num_merged` says how often more it was raised.

    Parameters
    ----------
    env : Environment
    event_type : EventType
    where : (int or None, int or None)
        Replica and stage at which it happens.
    handler : callable, optional
        Called with each event, for events that no process waits for.
    """

    __slots__ = (
        "_awaited",
        "_handlers",
        "_ids",
        "_last",
        "_listeners",
        "_may_merge",
        "_pending",
        "_priority",
        "_queue",
        "env",
        "event_type",
        "num_merged",
        "where",
    )

    def __init__(
        self,
        env: Environment,
        event_type: EventType,
        where: Where = (None, None),
        handler: Callable[[TypedEvent], None] | None = None,
    ) -> None:
        self.env = env
        self.event_type = event_type
        self.where = where
        self._handlers = () if handler is None else (handler,)
        self._priority, self._ids = env.key_of(event_type)
        self._queue: list[Any] = env._queue
        self._listeners = env._listeners
        self._awaited: TypedEvent | None = None
        self._pending: deque[TypedEvent] = deque()
        self._last: TypedEvent | None = None
        # In "id" order other events may come between two of one instant.
        is_schedule = event_type >= EventType.GLOBAL_SCHEDULE
        self._may_merge = is_schedule and env.event_order == "type"
        self.num_merged = 0

    def at(self, time: float, value: Any = None) -> TypedEvent:
        """Return the event at exactly `time` in seconds."""
        event = self._last = self._next_event(value)
        heappush(self._queue, (time, self._priority, next(self._ids), event))
        return event

    def raise_now(self, value: Any = None) -> None:
        """Raise the event at the present instant, for the process that waits."""
        event = self._awaited
        if event is None or not event.callbacks:  # nobody waits, or not any more
            last = self._last
            if (
                self._may_merge
                and last is not None
                and last.callbacks  # its process was not interrupted meanwhile
                and not self._listeners
            ):
                self.num_merged += 1
                return
            event = self._next_event(value)
            self._pending.append(event)
        else:
            self._awaited = None
            event._value = value
        heappush(self._queue, (self.env._now, self._priority, next(self._ids), event))

    @property
    def is_heard(self) -> bool:
        """Whether somebody listens or records, so that every event has to happen."""
        return bool(self._listeners)

    def wait(self) -> TypedEvent:
        """Return the event to yield: the first one raised and not yet handled, or a new one."""
        pending = self._pending
        while pending:
            event = pending.popleft()
            if event.callbacks is not None:
                self._last = event
                return event
        self._awaited = self._last = event = self._next_event(None)
        return event

    def let_go(self, event: TypedEvent) -> None:
        """Never use an event again: somebody may have kept it."""
        if self._last is event:
            self._last = None

    def _next_event(self, value: Any) -> TypedEvent:
        """Return a new event, or if nobody listens the last one again, once it was handled."""
        event = self._last
        if event is None or event.callbacks is not None or self._listeners:
            return TypedEvent(self, value, [*self._handlers])
        event.callbacks = [*self._handlers]
        event._value = value
        return event
