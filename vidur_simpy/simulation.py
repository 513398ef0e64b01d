"""One run: a cluster, a workload and a seed wired together, alive at any instant."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import simpy

from vidur_simpy.cluster import Cluster
from vidur_simpy.config import dump_config
from vidur_simpy.entities import Request
from vidur_simpy.errors import ConfigError, SimulationError, VidurError
from vidur_simpy.kernel import Environment, EventOrder, EventType, TypedEvent
from vidur_simpy.metrics import replica_columns, timeline_columns
from vidur_simpy.processes import arrivals
from vidur_simpy.progress import RunBar
from vidur_simpy.record_columns import new_directory
from vidur_simpy.request_log import RequestLog
from vidur_simpy.result import Result
from vidur_simpy.roster import Roster
from vidur_simpy.shards import simulate_in_shards
from vidur_simpy.state import as_html, as_line, as_text
from vidur_simpy.streams import streams_of
from vidur_simpy.wiring import checked_record, make_log, make_replicas, make_router
from vidur_simpy.workload import RequestSource, requests_of

__all__ = ["Simulation", "simulate"]


class Simulation:
    """A simulation that can be watched, steered and continued.

    `env` is a SimPy environment: start processes on it, wait for their events, and run. Printed or
    as the last line of a notebook cell, it shows its state: after a ctrl-C, or an error in a
    listener or a process of yours, it is whole, and the next `run` goes on. After an error in a
    policy or an execution time `result` still has all that was complete.

    Parameters
    ----------
    cluster : Cluster
    workload : Workload, Trace, RequestSource or None
        Requests that arrive by themselves; None if all are submitted.
    seed : int
        Seeds one independent generator for each source of randomness.
    event_order : {"type", "id"}
        Order of simultaneous events; see :class:`Environment`.
    record : collection of str
        Tables to keep besides the requests: ``"batches"``, ``"stages"``, ``"events"``,
        ``"tokens"``, ``"operators"``, ``"phases"``.
    record_to : path, optional
        New or empty directory to which finished requests and recorded rows go as they come, so
        that memory stays flat and a killed run keeps what it had written: see
        :func:`load_records`. Needs pyarrow. Results read their tables from it when asked.
        What is under way, and sums such as ``operators``, are in results only.
    progress : bool or None
        Show simulated time, requests done, speed and the time left; None shows it on a terminal
        or in a notebook when a run takes longer than two seconds.

    Attributes
    ----------
    env : Environment
    replicas : list of Replica
    router : Router
    num_expected : int
        Requests of the workload.
    num_refused : int
        Requests that can never run; `last_refusal` says why the last of them.
    last_refusal : str
    request_log : RequestLog
        The rows of requests that are complete or refused.
    logs : dict of str to object
        What keeps each of the tables to `record`.
    record_to : Path or None
        Where they go.

    Examples
    --------
    A client that submits a request, waits for its completion and submits the next:

    >>> from vidur_simpy import Cluster, Request, Simulation
    >>> sim = Simulation(Cluster(execution_time=lambda batch: 0.1))
    >>> def client(num_requests):
    ...     for _ in range(num_requests):
    ...         request = yield sim.submit(Request(100, 3))
    ...         print(f"{sim.env.now:.1f} s: request {request.request_id} is complete")
    >>> _ = sim.env.process(client(2))
    >>> sim.run()
    0.3 s: request 0 is complete
    0.6 s: request 1 is complete
    """

    def __init__(
        self,
        cluster: Cluster,
        workload: RequestSource | None = None,
        *,
        seed: int = 0,
        event_order: EventOrder = "type",
        record: Collection[str] = (),
        record_to: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(cluster, Cluster):
            raise ConfigError(f"cluster = {cluster!r}: expected a Cluster.")
        if workload is not None and not hasattr(workload, "requests"):
            raise ConfigError(f"workload = {workload!r}: expected a Workload, a Trace or None.")
        self.cluster = cluster
        self.workload = workload
        self.seed = _checked_seed(seed)
        self.env = Environment(event_order)
        self._streams = streams_of(self.seed)
        names = checked_record(record)
        self.record_to = None if record_to is None else new_directory(record_to)
        self.logs = {
            name: make_log(name, self.env, cluster, self._users_of, self.record_to)
            for name in names
        }
        self.request_log = RequestLog(self.record_to)
        self.num_refused = 0
        self.last_refusal = ""
        self._roster = Roster()
        self._live = self._roster.live
        self._until: float | None = None
        self.replicas = make_replicas(self.env, cluster, self._complete)
        self.router = make_router(
            self.env, cluster, self.replicas, self._streams["routing"], self._refuse
        )
        self._progress = progress
        self._bar: RunBar | None = None
        if workload is not None:
            self._start_workload(workload)

    def __repr__(self) -> str:
        return as_line(self)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """Return the same as html tables; names are escaped."""
        return as_html(self)

    @property
    def num_expected(self) -> int:
        """Requests of the workload."""
        return self._roster.num_expected

    # -- wiring ------------------------------------------------------------------------------

    def _users_of(self, replica_id: int, stage_id: int) -> Sequence[Any]:
        return self.replicas[replica_id].stages[stage_id].users

    def _start_workload(self, workload: RequestSource) -> None:
        table = requests_of(workload, self._streams, self.cluster.max_tokens)
        expected = self._roster.expect(table, self._keep, self._is_watched)
        self.env.process(arrivals(self.env, expected, self.router))

    def _refuse(self, request: Request) -> None:
        self.num_refused += 1
        self.last_refusal = request.refusal
        self._complete(request)

    def _complete(self, request: Request) -> None:
        """Keep the row of a request that is complete or refused, and tell who waits for it."""
        assert request.request_id is not None
        self._live.pop(request.request_id, None)
        self.request_log.append(request)
        if request.done is not None:
            request.done.succeed(request)
        if self._bar is not None:
            self._bar.tick()

    def _keep(self, columns: Mapping[str, Any]) -> None:
        """Keep the rows of requests of the workload that are complete."""
        self.request_log.append_columns(columns)
        if self._bar is not None:
            self._bar.tick()

    def _is_watched(self) -> bool:
        """Whether a bar shows how far the run is; rows that go to files stay together."""
        return self._bar is not None and self.record_to is None

    # -- what a user does with it ------------------------------------------------------------

    def submit(self, request: Request) -> simpy.Event:
        """Let a request arrive at its `arrived_at`, or now.

        Returns
        -------
        simpy.Event
            Happens when the request is complete, or refused (see its `refusal`), with the request
            as its value.

        Raises
        ------
        ConfigError
            If it was submitted before, or should have arrived in the past.
        """
        arrived_at = self._roster.submit(request, self.env.now)
        request.done = self.env.event()
        arrival = self.env.at(arrived_at, EventType.REQUEST_ARRIVAL, request)
        arrival.callbacks.append(lambda event: self.router.receive(request))
        return request.done

    def next(self, event_type: EventType) -> simpy.Event:
        """Return a SimPy event that happens right after the next event of `event_type`.

        Its value is the :class:`vidur_simpy.kernel.TypedEvent`.
        """
        upcoming = self.env.event()

        def tell(event: TypedEvent) -> None:
            if not upcoming.triggered:
                upcoming.succeed(event)
                self.env.unsubscribe(event_type, tell)

        self.env.subscribe(event_type, tell)
        return upcoming

    def on(self, event_type: EventType, listener: Callable[[TypedEvent], None]) -> None:
        """Call `listener(event)` right after each event of `event_type`."""
        self.env.subscribe(event_type, listener)

    def run(self, until: float | simpy.Event | None = None) -> Any:
        """Run to the end, to the instant `until` in seconds, or until an event happens.

        Call it again to go on.

        Returns
        -------
        object
            The value of the event `until`, if it is one.

        Raises
        ------
        SimulationError
            If nothing can happen any more while requests wait, or a policy or an execution-time
            model gives what cannot be. Its `result` keeps what was computed; so does that of any
            other error that a function of the user's raises.
        """
        try:
            with self._run_bar(until):
                value = self.env.run(until)
            if until is None and self._num_missing > len(self._live):
                raise SimulationError(
                    f"{self._num_missing} requests are missing: an error ended an earlier run "
                    f"before they arrived or were complete; start a new Simulation."
                )
            if until is None and self._live:
                raise SimulationError(self._stuck())
        except Exception as error:
            if not isinstance(error, VidurError):  # of a function or a process of the user's
                now = f"{self.env.now:.6g}"
                error.add_note(f"At {now} s; `result` of this error has what is computed.")
            error.result = self.result()  # type: ignore[attr-defined]
            raise
        except KeyboardInterrupt:
            self._until = self.env.now
            raise
        finally:
            self._bar = None
            self._flush()
        self._until = None if until is None else self.env.now
        return value

    def _flush(self) -> None:
        """Write the rows that wait in memory for more, if rows go to files."""
        for log in (self.request_log, *self.logs.values()):
            log.flush()

    @property
    def _num_missing(self) -> int:
        """Requests expected or submitted that have no row, when all should have one."""
        return self._roster.num_expected + self._roster.num_submitted - len(self.request_log)

    def _stuck(self) -> str:
        stuck = sorted(self._live)
        shown = ", ".join(map(str, stuck[:10])) + (", ..." if len(stuck) > 10 else "")
        return (
            f"at {self.env.now:.6g} s nothing can happen any more, but {len(stuck)} requests are "
            f"not complete: {shown}. Does the replica scheduler "
            f"{type(self.replicas[0].scheduler).__name__} admit every request it accepts?"
        )

    def result(self) -> Result:
        """Return everything computed so far; the simulation can go on afterwards."""
        tables: dict[str, Any] = {
            "requests": self.request_log.columns(self.under_way()),
            "replicas": replica_columns(self.replicas, self.cluster.deployment, self.env.now),
            "timeline": timeline_columns(self.replicas),
        }
        tables.update((name, log.columns()) for name, log in self.logs.items())
        config = dump_config(
            cluster=self.cluster,
            workload=self.workload,
            seed=self.seed,
            event_order=self.env.event_order,
            until=self._until,
            record=list(self.logs) or None,
        )
        return Result(
            tables,
            config=config,
            info={
                "simulated_time": self.env.now,
                "num_events": self.env.num_events,
                "seed": self.seed,
                "version": _version(),
                **_factors_used(self.cluster),
            },
        )

    def under_way(self) -> list[Request]:
        """Return the requests that have arrived and are neither complete nor refused."""
        return self._roster.arrived(self.env.now, self.router.queue)

    def _run_bar(self, until: float | simpy.Event | None) -> RunBar:
        num_expected = self._roster.num_expected
        bar = RunBar(
            instant=lambda: self.env.now,
            num_done=lambda: len(self.request_log),
            # Clients go on for as long as they like: only a workload says how many there will be.
            num_expected=lambda: num_expected and num_expected + self._roster.num_submitted,
            until=float(until) if isinstance(until, Real) else None,
            shown=self._progress,
        )
        self._bar = bar if bar.is_shown else None
        return bar


def simulate(
    cluster: Cluster,
    workload: RequestSource,
    *,
    seed: int = 0,
    event_order: EventOrder = "type",
    until: float | None = None,
    record: Collection[str] = (),
    record_to: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    shards: int = 1,
) -> Result:
    """Run a workload on a cluster and return the result.

    Parameters
    ----------
    until : float, optional
        Stop at this instant, in seconds, whatever is under way.
    shards : int
        Cut the run into so many, some of the replicas each, which run at the same time on the
        workers that ``joblib.parallel_config`` says, else on all cores. The tables are those of
        the single run, to the last bit and row. The router must not look at replicas, which
        ``round_robin`` and ``random`` do not.
    cluster, workload, seed, event_order, record, record_to, progress
        See :class:`Simulation`.

    Raises
    ------
    SimulationError
        If the run cannot go on; its `result` keeps what was computed.

    Examples
    --------
    >>> import vidur_simpy as vs
    >>> workload = vs.Workload(vs.Constant(rate=2.0), vs.FixedLengths(512, 16), num_requests=100)
    >>> result = vs.simulate(vs.Cluster(model="llama-3.1-8b", device="h100-80gb-sxm"), workload)
    >>> int(result.figures["completed"])
    100
    """
    if shards != 1:
        if record_to is not None:
            raise ConfigError(
                f"record_to = {record_to!r} with shards = {shards}: records of shards are put in "
                "order at the end only; leave out one of the two."
            )
        return simulate_in_shards(
            Simulation,
            cluster,
            workload,
            shards,
            seed=seed,
            event_order=event_order,
            until=until,
            record=record,
            progress=progress,
        )
    simulation = Simulation(
        cluster,
        workload,
        seed=seed,
        event_order=event_order,
        record=record,
        record_to=record_to,
        progress=progress,
    )
    simulation.run(until)
    return simulation.result()


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not (isinstance(seed, SupportsIndex) and int(seed) >= 0):
        raise ConfigError(f"seed = {seed!r}: expected an integer >= 0.")
    return int(seed)


def _factors_used(cluster: Cluster) -> dict[str, str]:
    """Say which fitted factors gave the execution times, where such were used."""
    factors_name = getattr(cluster.execution_time, "factors_name", None)
    return {"roofline_factors": factors_name(cluster.deployment.device)} if factors_name else {}


def _version() -> str:
    from vidur_simpy import __version__

    return __version__
