"""The clock and its order: seven typed events on one SimPy environment.

Simultaneous events are handled in the order of their key ``(time, event_type, event_id)``. An event
type is a SimPy priority and an event id SimPy's own serial number, so SimPy's queue does the
ordering and nothing else has to. What SimPy schedules for itself (process starts, timeouts, stores,
interrupts) gets a priority below every typed event: at one instant the plumbing settles first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from heapq import heapify, heappush
from itertools import count
from typing import Any, Literal

import simpy
from simpy.core import BoundClass
from simpy.events import NORMAL, URGENT, Event, EventPriority

from vidur_simpy.errors import unknown_name

__all__ = ["Environment", "EventOrder", "EventType", "Signal", "TypedEvent"]

EventOrder = Literal["type", "id"]

# (replica_id, stage_id) of an event, where it has them.
Where = tuple[int | None, int | None]


_FIRST_ARRIVAL_ID = -(2**62)


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
    event_type : EventType
    replica_id, stage_id : int or None
        Where it happens, if it has a place.
    value : Batch, Request or None
        The batch or the request it is about.
    """

    def __init__(self, env: Environment, event_type: EventType, where: Where, value: Any) -> None:
        # As SimPy's own events do, without super().__init__(): one of these is made per event.
        self.env = env
        self.callbacks = []
        self.event_type = event_type
        self.where = where
        self._ok = True
        self._value = value

    @property
    def replica_id(self) -> int | None:
        """Replica at which it happens."""
        return self.where[0]

    @property
    def stage_id(self) -> int | None:
        """Pipeline stage at which it happens."""
        return self.where[1]

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
        self._listeners: dict[EventType, list[Callable[[TypedEvent], None]]] = {}
        # Arrivals are numbered as if all had been created before the first event: at one instant
        # they come before any other event of their type (or, in "id" order, of any type).
        self._arrival_ids = count(_FIRST_ARRIVAL_ID)
        # SimPy binds its event classes to instances of its own class only; a subclass has to.
        for name, bound_class in simpy.Environment.__dict__.items():
            if isinstance(bound_class, BoundClass):
                setattr(self, name, getattr(self, name))

    def schedule(self, event: Event, priority: EventPriority = NORMAL, delay: float = 0) -> None:
        """Schedule an event of SimPy's own or of a user's process, before any typed event."""
        heappush(
            self._queue,
            (self._now + delay, EventPriority(priority - 2), next(self._eid), event),
        )

    def push(self, time: float, event: TypedEvent) -> None:
        """Put a typed event into the queue at exactly `time`. The order lives here."""
        event_type = event.event_type
        if event_type is EventType.REQUEST_ARRIVAL:
            event_id = next(self._arrival_ids)
        else:
            event_id = next(self._eid)
        priority = event_type if self.event_order == "type" else 1
        heappush(self._queue, (time, EventPriority(priority), event_id, event))

    def at(
        self,
        time: float,
        event_type: EventType,
        value: Any = None,
        *,
        where: Where = (None, None),
    ) -> TypedEvent:
        """Return a typed event that happens at exactly `time` (seconds, not before now).

        ``timeout(time - now)`` would happen at ``now + (time - now)``, which is another number.
        """
        if time < self._now:
            raise ValueError(f"an event at {time} s lies before the present, {self._now} s")
        event = TypedEvent(self, event_type, where, value)
        self.push(time, event)
        return event

    def cancel(self, event: Event) -> None:
        """Take an event out of the queue that has not happened yet. O(queue), for rare use."""
        self._queue = [entry for entry in self._queue if entry[3] is not event]
        heapify(self._queue)

    def subscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Call `listener(event)` each time an event of this type has been handled."""
        self._listeners.setdefault(EventType(event_type), []).append(listener)
        # Only an environment that somebody listens to pays for looking.
        self.step = self._step_and_tell  # type: ignore[method-assign]

    def unsubscribe(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Stop calling a listener."""
        self._listeners[event_type].remove(listener)

    @property
    def num_events(self) -> int:
        """Events scheduled so far, typed or not."""
        return self._count_of(self._eid) + self._count_of(self._arrival_ids) - _FIRST_ARRIVAL_ID

    @staticmethod
    def _count_of(ids: count[int]) -> int:
        """Return the next id without taking it."""
        return int(repr(ids).removeprefix("count(").removesuffix(")"))

    def _step_and_tell(self) -> None:
        event = self._queue[0][3] if self._queue else None
        simpy.Environment.step(self)
        if isinstance(event, TypedEvent):
            for listener in tuple(self._listeners.get(event.event_type, ())):
                listener(event)

    def run(self, until: float | Event | None = None) -> Any:
        """Run until nothing is left, until an event happens, or until exactly the instant `until`.

        Events at the instant `until` are not handled; a later call goes on with them.

        Raises
        ------
        ValueError
            If `until` is not after the present.
        """
        if until is None or isinstance(until, Event):
            return super().run(until)
        instant = float(until)
        if not instant > self._now:
            raise ValueError(f"until ({until}) must be after the present, {self._now} s")
        stop = Event(self)
        stop._ok, stop._value = True, None
        heappush(self._queue, (instant, EventPriority(URGENT - 3), next(self._eid), stop))
        return super().run(stop)


class Signal:
    """Raises one type of event at one place, for one process that waits for each in turn.

    It is SimPy's ``event``/``succeed`` idiom without the hand-over: the process waits for the
    typed event itself. An event raised while the process is busy elsewhere still happens, and
    finds nobody, as a schedule event that has nothing to do should.
    """

    __slots__ = ("_awaited", "_pending", "env", "event_type", "where")

    def __init__(
        self, env: Environment, event_type: EventType, where: Where = (None, None)
    ) -> None:
        self.env = env
        self.event_type = event_type
        self.where = where
        self._awaited: TypedEvent | None = None
        self._pending: deque[TypedEvent] = deque()

    def raise_now(self, value: Any = None) -> None:
        """Raise the event at the present instant."""
        event = self._awaited
        if event is None:
            event = TypedEvent(self.env, self.event_type, self.where, value)
            self._pending.append(event)
        else:
            self._awaited = None
            event._value = value
        self.env.push(self.env._now, event)

    def wait(self) -> TypedEvent:
        """Return the event to yield: the first one raised and not yet handled, or a new one."""
        pending = self._pending
        while pending:
            event = pending.popleft()
            if event.callbacks is not None:
                return event
        self._awaited = TypedEvent(self.env, self.event_type, self.where, None)
        return self._awaited
