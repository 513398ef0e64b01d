"""The clock: simultaneous events have one order, times are exact, and a run may come in pieces."""

from __future__ import annotations

import math
import signal
import threading
from itertools import permutations

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from vidur_simpy import ConfigError, Environment, EventType, SimulationError
from vidur_simpy.kernel import Signal

ORDERS = pytest.mark.parametrize("event_order", ["type", "id"])
BATCH_END, REQUEST_ARRIVAL = EventType.BATCH_END, EventType.REQUEST_ARRIVAL


def handled(env, events):
    """Run, and tell the (time, number) of the events in the order in which they were handled."""
    order = []
    for number, event in enumerate(events):
        event.callbacks.append(lambda _, number=number: order.append((env.now, number)))
    env.run()
    return order


# Order


def test_ties_follow_the_type_however_they_were_made():
    """All 5,040 orders of creation of the seven types give the documented order."""
    for types in permutations(EventType):
        env = Environment()
        order = handled(env, [env.at(1.0, event_type) for event_type in types])
        assert [types[number] for _, number in order] == list(EventType)


def test_ties_follow_the_id_in_id_order():
    """Order of creation decides, but arrivals count as made before everything else."""
    for types in permutations(EventType):
        env = Environment("id")
        order = handled(env, [env.at(1.0, event_type) for event_type in types])
        others = [event_type for event_type in types if event_type is not REQUEST_ARRIVAL]
        assert [types[number] for _, number in order] == [REQUEST_ARRIVAL, *others]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(EventType)), max_size=30)
)
def test_order_is_the_documented_key(planned):
    """Events happen by (time, event_type, event_id), whatever was planned when."""
    env = Environment()
    order = handled(env, [env.at(time, event_type) for time, event_type in planned])
    keys = [(time, event_type, number) for number, (time, event_type) in enumerate(planned)]
    assert order == [(time, number) for time, _, number in sorted(keys)]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(EventType)), max_size=30)
)
def test_id_order_is_the_order_of_creation(planned):
    """With "id" the key is (time, event_id), arrivals first."""
    env = Environment("id")
    order = handled(env, [env.at(time, event_type) for time, event_type in planned])
    keys = [
        (time, event_type is not REQUEST_ARRIVAL, number)
        for number, (time, event_type) in enumerate(planned)
    ]
    assert order == [(time, number) for time, _, number in sorted(keys)]


def test_unknown_order_is_refused():
    """The message names the nearest order."""
    with pytest.raises(ConfigError, match="unknown event_order 'typ': did you mean 'type'"):
        Environment("typ")


# SimPy's own events


@ORDERS
def test_plumbing_settles_before_typed_events(event_order):
    """Timeouts, stores, starts and ends of processes at an instant come before any typed event."""
    env = Environment(event_order)
    log = []
    for event_type in EventType:
        env.at(1.0, event_type).callbacks.append(lambda event: log.append(event.event_type.name))
    store = simpy.Store(env)

    def consumer():
        item = yield store.get()
        log.append(item)

    def producer():
        yield env.timeout(1.0)
        yield env.process(consumer()) & store.put("item")
        yield env.timeout(0.0)
        log.append("producer")

    env.process(producer())
    env.run()
    assert log[:2] == ["item", "producer"]
    assert sorted(log[2:]) == sorted(event_type.name for event_type in EventType)


@ORDERS
def test_interrupt_settles_before_typed_events(event_order):
    """A process interrupted at an instant has reacted when the typed events of it happen."""
    env = Environment(event_order)
    log = []
    env.at(1.0, EventType.BATCH_STAGE_ARRIVAL).callbacks.append(lambda _: log.append("typed"))

    def sleeper():
        with pytest.raises(simpy.Interrupt):
            yield env.timeout(10.0)
        log.append("woken")

    def alarm(process):
        yield env.timeout(1.0)
        process.interrupt()

    env.process(alarm(env.process(sleeper())))
    env.run()
    assert log == ["woken", "typed"]


@ORDERS
def test_what_a_typed_event_starts_settles_before_the_next_one(event_order):
    """Processes that one typed event wakes are done when the next of the same instant happens."""
    env = Environment(event_order)
    log = []

    def reaction():
        yield env.timeout(0.0)
        yield env.timeout(0.0)
        log.append("settled")

    first = env.at(1.0, EventType.BATCH_STAGE_ARRIVAL)
    first.callbacks.append(lambda _: env.process(reaction()))
    env.at(1.0, EventType.BATCH_STAGE_END).callbacks.append(lambda _: log.append("next"))
    env.run()
    assert log == ["settled", "next"]


@ORDERS
def test_a_typed_event_can_be_yielded(event_order):
    """A user's process may wait for a typed event and gets its value, at its instant."""
    env = Environment(event_order)

    def process():
        value = yield env.at(0.3, BATCH_END, "batch")
        return env.now, value

    assert env.run(until=env.process(process())) == (0.3, "batch")


# Exact times


@pytest.mark.parametrize(("now", "target"), [(0.3, 0.9), (0.1, 0.1 + 0.2), (0.7, 10.1)])
def test_at_is_exact_where_a_timeout_is_not(env, now, target):
    """An event at `target` happens then, not at now + (target - now)."""
    assert 0.3 + (0.9 - 0.3) != 0.9
    env.run(until=now)
    assert handled(env, [env.at(target, BATCH_END)]) == [(target, 0)]


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_at_is_exact(a, b):
    """Whatever the present, the event happens at the very number asked for."""
    env = Environment()
    env.at(min(a, b), BATCH_END).callbacks.append(lambda _: env.at(max(a, b), BATCH_END))
    env.run()
    assert env.now == max(a, b)


@pytest.mark.parametrize("time", [0.5, -1.0, math.nan])
def test_no_event_in_the_past(env, time):
    """An event before the present, or at no time at all, is refused."""
    env.run(until=1.0)
    with pytest.raises(ValueError, match="before the present"):
        env.at(time, BATCH_END)


# Running in pieces


def planned_environment():
    """Typed events and processes at common instants, and the log that they write."""
    env = Environment()
    log = []

    def process(name, gap):
        for _ in range(6):
            yield env.timeout(gap)
            log.append((env.now, name))

    for name, gap in (("a", 0.5), ("b", 0.25), ("c", 0.1)):
        env.process(process(name, gap))
    for number, event_type in enumerate(reversed(EventType)):
        event = env.at(0.25 * (number // 2), event_type)
        event.callbacks.append(lambda event: log.append((env.now, event.event_type)))
    return env, log


@given(st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]), max_size=8))
def test_pieces_equal_one_run(instants):
    """Stopping on the way, also at the instants of events, changes neither order nor count."""
    whole, expected = planned_environment()
    whole.run()
    env, log = planned_environment()
    for instant in sorted(set(instants)):
        env.run(until=instant)
        assert env.now == instant
        assert all(time < instant for time, _ in log)
    env.run()
    assert log == expected
    assert env.num_events == whole.num_events


def test_steps_equal_one_run():
    """Handling one event after another gives the same log, and tells listeners, too."""
    whole, expected = planned_environment()
    whole.run()
    env, log = planned_environment()
    told = []
    env.subscribe(BATCH_END, lambda event: told.append(env.now))
    while env.peek() < math.inf:
        env.step()
    assert log == expected
    assert len(told) == 1


def test_events_at_the_instant_wait_for_the_next_run(env):
    """`until` stops before the events of that instant; a later run goes on with them."""
    seen = []
    env.at(1.0, BATCH_END).callbacks.append(lambda _: seen.append(env.now))
    env.run(until=1.0)
    assert (env.now, seen) == (1.0, [])
    env.run(until=2.0)
    assert (env.now, seen) == (2.0, [1.0])


def test_run_until_an_event_returns_its_value(env):
    """A run may end with a timeout, a typed event or a process, and be asked again."""
    assert env.run(until=env.timeout(1.0, "timeout")) == "timeout"
    typed = env.at(2.0, BATCH_END, "typed")
    assert env.run(until=typed) == "typed"
    assert env.run(until=typed) == "typed"
    assert env.now == 2.0


def test_others_who_wait_for_the_same_event_are_told(env):
    """Whoever waits behind the run for its last event goes on with the next run."""
    event = env.timeout(1.0)
    log = []

    def waiter(name):
        yield event
        log.append(name)

    env.process(waiter("before"))
    env.run(until=0.5)
    event_run = env.run(until=event)
    event_late = env.timeout(1.0)
    env.process(waiter("after"))
    env.run(until=event_late)
    assert event_run is None
    assert log == ["before", "after"]


@pytest.mark.parametrize("until", [1.0, 0.0, math.nan, math.inf, "soon", [2.0]])
def test_until_must_lie_ahead(env, until):
    """An instant that is past, present, infinite or no number is refused with what is expected."""
    env.run(until=1.0)
    with pytest.raises(ConfigError, match=r"until = .*: expected an event, or an instant"):
        env.run(until=until)


def test_an_event_that_never_happens_is_told(env):
    """A run towards it ends when nothing is left, says so, and does not stop a later run."""
    event = env.event()
    with pytest.raises(SimulationError, match="nothing is left to happen"):
        env.run(until=event)
    env.timeout(1.0).callbacks.append(lambda _: event.succeed())
    env.timeout(2.0)
    env.run()
    assert env.now == 2.0


def test_a_run_that_was_cut_short_leaves_no_stop_behind(env):
    """After an exception or a ctrl-C the next run goes as far as it is told."""

    def failing():
        yield env.timeout(1.0)
        raise KeyboardInterrupt

    env.process(failing())
    env.timeout(10.0)
    with pytest.raises(KeyboardInterrupt):
        env.run(until=5.0)
    assert env.now == 1.0
    env.run()
    assert env.now == 10.0


def test_what_a_process_raises_comes_out_of_run(env):
    """An exception in a user's process is the exception of the run."""

    def failing():
        yield env.timeout(1.0)
        raise KeyError("mine")

    env.process(failing())
    with pytest.raises(KeyError, match="mine"):
        env.run()


# Signals


@pytest.mark.parametrize("listens", [False, True])
def test_an_event_raised_while_the_process_is_busy_still_happens(env, listens):
    """It finds nobody, as an event with nothing to do should; the next wait is for a later one."""
    raised = Signal(env, BATCH_END)
    seen, caught = [], []
    if listens:
        env.subscribe(BATCH_END, lambda event: seen.append((env.now, event.value)))

    def process():
        while True:
            value = yield raised.wait()
            caught.append((env.now, value))
            yield env.timeout(2.5)

    def source():
        for number in range(6):
            yield env.timeout(1.0)
            raised.raise_now(number)

    env.process(process())
    env.process(source())
    env.run()
    assert caught == [(1.0, 0), (4.0, 3)]
    assert seen == ([(1.0 + number, number) for number in range(6)] if listens else [])
    assert env.num_events > 6


@pytest.mark.parametrize("listens", [False, True])
def test_events_raised_together_are_handled_one_by_one(env, listens):
    """A process that waits for each in turn misses none of an instant."""
    raised = Signal(env, BATCH_END)
    caught = []
    if listens:
        env.subscribe(BATCH_END, lambda event: None)

    def process():
        while True:
            caught.append((yield raised.wait()))

    def source():
        for instant in range(3):
            yield env.timeout(1.0)
            for number in range(3):
                raised.raise_now((instant, number))

    env.process(process())
    env.process(source())
    env.run()
    assert caught == [(instant, number) for instant in range(3) for number in range(3)]


@ORDERS
def test_an_event_raised_again_after_an_interrupt_is_not_lost(event_order):
    """The process no longer waits for the first one; the second must happen by itself."""
    env = Environment(event_order)
    raised = Signal(env, EventType.REPLICA_SCHEDULE)
    caught = []

    def process():
        while True:
            try:
                yield raised.wait()
                caught.append(env.now)
            except simpy.Interrupt:
                raised.raise_now()

    def source(waiting):
        yield env.timeout(1.0)
        raised.raise_now()
        waiting.interrupt()

    env.process(source(env.process(process())))
    env.run()
    assert caught == [1.0]


def test_a_signal_says_where(env):
    """An event knows its type and its place, and shows them."""
    event = Signal(env, EventType.BATCH_STAGE_END, (3, 1)).at(1.0)
    assert (event.event_type, event.replica_id, event.stage_id) == (
        EventType.BATCH_STAGE_END,
        3,
        1,
    )
    assert "BATCH_STAGE_END(replica_id=3, stage_id=1)" in repr(event)


# Listening


def test_listeners_are_told_after_the_event(env):
    """A listener is called when whoever waited for the event has handled it."""
    log = []
    env.subscribe(BATCH_END, lambda event: log.append("listener"))
    env.at(1.0, BATCH_END).callbacks.append(lambda _: log.append("handler"))
    env.run()
    assert log == ["handler", "listener"]


def test_a_listener_hears_its_type_only(env):
    """One subscription, one type; every event of it, in order."""
    heard = []
    env.subscribe(BATCH_END, lambda event: heard.append((env.now, event.value)))
    for time in (2.0, 1.0):
        for event_type in EventType:
            env.at(time, event_type, event_type.name)
    env.run()
    assert heard == [(1.0, "BATCH_END"), (2.0, "BATCH_END")]


def test_a_listener_may_leave_while_it_is_told(env):
    """Unsubscribing inside a listener is safe, for itself and for the others."""
    heard = []

    def once(event):
        heard.append("once")
        env.unsubscribe(BATCH_END, once)

    env.subscribe(BATCH_END, once)
    env.subscribe(BATCH_END, lambda event: heard.append("always"))
    env.at(1.0, BATCH_END)
    env.at(2.0, BATCH_END)
    env.run()
    assert heard == ["once", "always", "always"]


def test_an_event_kept_by_a_listener_stays_as_it_was(env):
    """What a listener keeps is not used again for a later event."""
    kept = []
    raised = Signal(env, BATCH_END)

    def process():
        for number in range(4):
            yield raised.at(float(number + 1), number)

    env.subscribe(BATCH_END, kept.append)
    env.process(process())
    env.run(until=2.5)
    env.unsubscribe(BATCH_END, kept.append)
    env.run()
    assert [event.value for event in kept] == [0, 1]


def test_who_begins_to_listen_keeps_events_of_a_signal_that_used_one_again_and_again(env):
    """Others were listened to before, so that events of this type were not told apart."""
    kept = []
    raised = Signal(env, EventType.REPLICA_SCHEDULE)
    env.subscribe(BATCH_END, lambda event: None)

    def process():
        while True:
            yield raised.wait()

    def source():
        for number in range(6):
            yield env.timeout(1.0)
            raised.raise_now(number)
            raised.raise_now(-number)

    env.process(process())
    env.process(source())
    env.run(until=2.5)
    env.subscribe(EventType.REPLICA_SCHEDULE, kept.append)
    env.run(until=4.5)
    env.unsubscribe(EventType.REPLICA_SCHEDULE, kept.append)
    env.run()
    assert [event.value for event in kept] == [2, -2, 3, -3]
    assert raised.num_merged == 0


def test_an_unknown_type_cannot_be_heard(env):
    """The message names the nearest of the seven."""
    with pytest.raises(
        ConfigError, match=r"unknown event_type 'BATCH_ENDS': did you mean 'EventType.BATCH_"
    ):
        env.subscribe("BATCH_ENDS", print)


def test_a_cancelled_event_does_not_happen(env):
    """Others of the instant keep their order."""
    events = [env.at(1.0, event_type) for event_type in reversed(EventType)]
    seen = []
    for event in events:
        event.callbacks.append(lambda event: seen.append(event.event_type))
    env.cancel(events[3])
    env.run()
    assert seen == [event_type for event_type in EventType if event_type != BATCH_END]


# ctrl-C


def test_a_run_goes_on_after_a_ctrl_c():
    """It ends the run between two events; the next run continues as if nothing had been."""
    whole, expected = planned_environment()
    whole.run()
    env, log = planned_environment()

    def impatient():
        yield env.timeout(1.0)
        signal.raise_signal(signal.SIGINT)
        log.append("the process is not torn")
        yield env.timeout(0.0)

    env.process(impatient())
    with pytest.raises(KeyboardInterrupt):
        env.run()
    assert env.now == 1.0
    assert log.pop() == "the process is not torn"
    env.run()
    assert log == expected


def test_a_second_ctrl_c_is_heard_at_once(env):
    """Whoever waits for an event that takes for ever can still get out."""

    def endless():
        yield env.timeout(1.0)
        while True:
            signal.raise_signal(signal.SIGINT)

    env.process(endless())
    with pytest.raises(KeyboardInterrupt):
        env.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_runs_in_other_threads_leave_signals_alone(env):
    """Signals belong to the main thread; a run elsewhere works as well."""
    env.timeout(1.0)
    thread = threading.Thread(target=env.run)
    thread.start()
    thread.join()
    assert env.now == 1.0
