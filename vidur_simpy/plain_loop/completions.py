"""What the plain loop keeps of requests that are complete: tuples, turned into columns in bulk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from vidur_simpy.workload import RequestArrays

__all__ = ["Completions", "Member", "Restart", "Row"]

Row: TypeAlias = tuple[int, int, int, float]
"""A request: its row in the workload's table, its prompt and output tokens, when it arrived."""

Member: TypeAlias = tuple[int, int, int, float, float, float, float, float, float, float, int]
"""A request that decodes: a `Row`; when it was scheduled and got its first token; its execution and
its preempted time, and the end of its last stage, when it joined its decode set; the execution time
of the set then; the set's iteration in which it gets its last token. In no set, these two are 0 and
the tokens to come. Times in seconds."""


class Restart(NamedTuple):
    """What a request keeps when it is restarted; it waits as a `Row` with what is left to do.

    Attributes
    ----------
    scheduled_at : float
        In seconds, as all times here.
    first_token_at : float or None
    execution_time, preempted_time, last_stage_end : float
    num_restarts : int
    """

    scheduled_at: float
    first_token_at: float | None
    execution_time: float
    preempted_time: float
    last_stage_end: float
    num_restarts: int


class Completions:
    """The requests that are complete and not yet taken away as columns.

    Attributes
    ----------
    members : list of Member
        In order of completion.
    ends : list of tuple
        For each batch in which some were completed: the instant, the execution time of the decode
        set, the replica, and how many.
    num_outstanding : list of int
        By replica: requests routed there that are not complete.
    num_restarts : dict of int to int
        By row, of requests that were restarted.
    many : int
        When there are so many they are to be taken away.
    """

    def __init__(self, num_replicas: int, many: int) -> None:
        self.many = many
        self.num_restarts: dict[int, int] = {}
        self.members: list[Member] = []
        self.ends: list[tuple[float, float, int, int]] = []
        self.num_outstanding = [0] * num_replicas

    def forget(self) -> None:
        """Forget them: they were taken away."""
        for member in self.members if self.num_restarts else ():
            self.num_restarts.pop(member[0], None)
        self.members.clear()
        self.ends.clear()

    def columns(self, table: RequestArrays) -> dict[str, Any]:
        """Return the columns of a request log of all members."""
        columns = list(zip(*self.members, strict=True))
        numbers, floats = columns[0], columns[4:10]
        order = np.argsort(numbers)
        rows = np.array(numbers)[order]
        scheduled_at, first_token_at, spent, gap, since, joined = (
            np.array(each)[order] for each in floats
        )
        counts = [end[3] for end in self.ends]
        completed_at, executed, replica_id = (
            np.repeat([end[column] for end in self.ends], counts)[order] for column in range(3)
        )
        # As DecodeSet.times_of: what was not execution was waiting.
        own = executed - joined
        waited = completed_at - since - own
        requests = table.take(rows)
        some = {}
        if self.num_restarts:
            restarts = [self.num_restarts.get(row, 0) for row in rows.tolist()]
            some["num_restarts"] = np.array(restarts)
        return {
            "request_id": rows if requests.request_id is None else requests.request_id,
            "replica_id": replica_id,
            "arrived_at": requests.arrived_at,
            "scheduled_at": scheduled_at,
            "first_token_at": first_token_at,
            "completed_at": completed_at,
            "num_prefill_tokens": requests.num_prefill_tokens,
            "num_decode_tokens": requests.num_decode_tokens,
            "execution_time": spent + own,
            "preempted_time": gap + np.where(waited > 0.0, waited, 0.0),
            "num_output_tokens": requests.num_decode_tokens,
            **some,
            **{
                name: requests.cells(name)
                for name in ("priority", "deadline", "session_id")
                if getattr(requests, name) is not None
            },
        }
