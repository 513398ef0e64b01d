"""The seven typed events, and what raises them.

An event type is a SimPy priority: simultaneous events are handled in the order of their types.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from heapq import heappush
from typing import TYPE_CHECKING, Any

from simpy.events import Event

if TYPE_CHECKING:
    from vidur_simpy.kernel import Environment

__all__ = ["EventType", "Signal", "TypedEvent", "Where"]

Where = tuple[int | None, int | None]
"""Replica and stage of an event, where it has them."""


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
    def value(self) -> Any:
        """The batch or the request it is about."""
        return self._value

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
        "_may_merge",
        "_pending",
        "_priority",
        "_queue",
        "env",
        "event_type",
        "listeners",
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
        self.listeners = env._listeners[event_type]
        self._awaited: TypedEvent | None = None
        self._pending: deque[TypedEvent] = deque()
        self._last: TypedEvent | None = None
        # In "id" order other events may come between two of one instant.
        is_schedule = event_type >= EventType.GLOBAL_SCHEDULE
        self._may_merge = is_schedule and env.event_order == "type"
        self.num_merged = 0

    def at(self, time: float, value: Any = None) -> TypedEvent:
        """Return the event at exactly `time` in seconds.

        It is the last one again, once that was handled, if nobody listens to this type.
        """
        event = self._last
        if event is None or event.callbacks is not None or self.listeners:
            self._last = event = TypedEvent(self, value, [*self._handlers])
        else:
            event.callbacks = [*self._handlers]
            event._value = value
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
                and self.env.is_unobserved
            ):
                self.num_merged += 1
            else:
                self._pending.append(self.at(self.env._now, value))
            return
        self._awaited = None
        event._value = value
        heappush(self._queue, (self.env._now, self._priority, next(self._ids), event))

    def wait(self) -> TypedEvent:
        """Return the event to yield: the first one raised and not yet handled, or a new one."""
        pending = self._pending
        while pending:
            event = pending.popleft()
            if event.callbacks is not None:
                self._last = event
                return event
        last = self._last
        if last is None or last.callbacks is not None or self.listeners:
            self._last = last = TypedEvent(self, None, [])
        else:
            last.callbacks = []
        self._awaited = last
        return last

    def tell(self, event: TypedEvent) -> None:
        """Call the listeners: the event has been handled."""
        self.let_go(event)
        for listener in tuple(self.listeners):
            listener(event)

    def let_go(self, event: TypedEvent) -> None:
        """Never use an event again: somebody may have kept it."""
        if self._last is event:
            self._last = None
