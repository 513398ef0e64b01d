"""Requests that decode together in a pipeline, as tuples: a decode set of the plain loop."""

from __future__ import annotations

from operator import itemgetter
from typing import TypeAlias

from vidur_simpy.plain_loop.completions import Member, Restart, Row

__all__ = ["Cohort", "Entry", "Prompt", "gather", "kept"]


class Prompt:
    """A prompt that is computed piece by piece, each of them as execution-time models see it.

    Times are as before the batch under way, in seconds.

    Attributes
    ----------
    row : Row
    scheduled_at, execution_time, preempted_time, last_stage_end : float
    num_tokens : int
        Of the last piece.
    context : int
        Tokens computed, once that piece is.
    """

    __slots__ = (
        "context",
        "execution_time",
        "last_stage_end",
        "num_tokens",
        "preempted_time",
        "row",
        "scheduled_at",
    )

    def __init__(self, row: Row, now: float, num_tokens: int) -> None:
        self.row = row
        self.scheduled_at = self.last_stage_end = now
        self.execution_time = self.preempted_time = 0.0
        self.num_tokens = self.context = num_tokens

    def with_times(
        self, execution_time: float, preempted_time: float, last_stage_end: float
    ) -> Prompt:
        """Set its times, and return it."""
        self.execution_time, self.preempted_time = execution_time, preempted_time
        self.last_stage_end = last_stage_end
        return self

    def take_up(self, restart: Restart) -> None:
        """Go on with the times of a request that was restarted."""
        self.scheduled_at = restart.scheduled_at
        self.execution_time = restart.execution_time
        self.preempted_time = restart.preempted_time
        self.last_stage_end = restart.last_stage_end

    def num_pairs(self) -> int:
        """Return how many tokens those of the piece see, summed over them."""
        return self.num_tokens * self.context - self.num_tokens * (self.num_tokens - 1) // 2


def _arrived_at(entry: Prompt | Member) -> float:
    return entry.row[3] if isinstance(entry, Prompt) else entry[3]


class Cohort:
    """What :class:`DecodeSet` is to the processes, with its rules and its order of additions.

    Attributes
    ----------
    members : dict of int to Member
        By row, in batch order.
    finishing : dict of int to list of Member
        By the iteration of their last token.
    phases : list of int
        Blocks that each step takes, by its number modulo the block size.
    iteration, processed : int
        Steps that have ended, and tokens processed, summed over the members. In a pipeline the
        step under way is counted, too.
    execution_time, last_end : float
        Time of the steps, and the end of the last of them, in seconds.
    """

    __slots__ = (
        "_is_sorted",
        "_latest_arrival",
        "execution_time",
        "finishing",
        "iteration",
        "last_end",
        "members",
        "phases",
        "processed",
    )

    def __init__(self, block_size: int) -> None:
        self.members: dict[int, Member] = {}
        self.finishing: dict[int, list[Member]] = {}
        self.phases = [0] * block_size
        self.iteration = self.processed = 0
        self.execution_time = self.last_end = 0.0
        self._is_sorted = True
        self._latest_arrival = float("-inf")

    def join(self, member: Member) -> None:
        """Add a request."""
        row, prompt, output, arrived_at, *_, num_left = member
        last = self.iteration + num_left
        member = (*member[:9], self.execution_time, last)
        self.members[row] = member
        self.processed += prompt + output - num_left
        self.phases[(1 + last - prompt - output) % len(self.phases)] += 1
        if last in self.finishing:
            self.finishing[last].append(member)
        else:
            self.finishing[last] = [member]
        if arrived_at < self._latest_arrival:
            self._is_sorted = False
        else:
            self._latest_arrival = arrived_at

    def leave(self, member: Member) -> Member:
        """Take a request out; return it with the times of its steps."""
        row, prompt, output, _, _, _, spent, gap, since, joined, last = member
        del self.members[row]
        bucket = self.finishing[last]
        bucket.remove(member)
        if not bucket:
            del self.finishing[last]
        num_left = last - self.iteration
        self.phases[(1 + last - prompt - output) % len(self.phases)] -= 1
        self.processed -= prompt + output - num_left
        own = self.execution_time - joined
        if own:
            gap += max(0.0, self.last_end - since - own)
            spent += own
            since = self.last_end
        return (*member[:6], spent, gap, since, 0.0, num_left)

    def absorb(self, other: Cohort, most: int) -> None:
        """Move the first members of another one here, at most so many: each leaves and joins."""
        executed, last_end, joined = other.execution_time, other.last_end, self.execution_time
        later, next_step = self.iteration - other.iteration, other.iteration + 1
        members, finishing, phases = self.members, self.finishing, self.phases
        others, buckets, other_phases = other.members, other.finishing, other.phases
        num_processed, block_size, latest_arrival = 0, len(phases), self._latest_arrival
        for member in [*others.values()][:most]:
            row, prompt, output, arrived_at, at, first_at, spent, gap, since, before, last = member
            del others[row]
            bucket = buckets.pop(last)
            if len(bucket) > 1:
                bucket.remove(member)
                buckets[last] = bucket
            phase = 1 + last - prompt - output
            other_phases[phase % block_size] -= 1
            phases[(phase + later) % block_size] += 1
            num_processed += next_step - phase
            own = executed - before
            if own:
                waited = last_end - since - own
                if waited > 0.0:
                    gap += waited
                spent += own
                since = last_end
            last += later
            member = (
                row,
                prompt,
                output,
                arrived_at,
                at,
                first_at,
                spent,
                gap,
                since,
                joined,
                last,
            )
            members[row] = member
            if last in finishing:
                finishing[last].append(member)
            else:
                finishing[last] = [member]
            if arrived_at < latest_arrival:
                self._is_sorted = False
            else:
                latest_arrival = arrived_at
        self._latest_arrival = latest_arrival
        self.processed += num_processed
        other.processed -= num_processed

    def finish(self) -> list[Member]:
        """Take out the members that have their last token now; there are some."""
        finished = self.finishing.pop(self.iteration)
        phases, block_size = self.phases, len(self.phases)
        for row, prompt, output, *_ in finished:
            del self.members[row]
            phases[(1 + self.iteration - prompt - output) % block_size] -= 1
            self.processed -= prompt + output
        return finished

    def sort_by_arrival(self) -> None:
        """Put the members in order of arrival; those of one instant keep their order."""
        if not self._is_sorted:
            members = sorted(self.members.values(), key=itemgetter(3))
            self.members = {member[0]: member for member in members}
            self._is_sorted = True


Entry: TypeAlias = Cohort | Prompt | Member
"""What is between two batches; a member that is in no cohort has its tokens to come as `last`."""


def gather(
    running: list[Entry], most: int, block_size: int
) -> tuple[Cohort | None, list[Prompt], list[Entry]]:
    """Take the first decodes, at most so many, and the unfinished prompts met on the way.

    As `ContinuousBatching.take_decodes`; return what is left, too.
    """
    if len(running) == 2:
        # Mostly a batch has left its decodes and a prompt that goes on.
        first, second = running
        if type(first) is Cohort and type(second) is Prompt and len(first.members) < most:
            return first, [second], []
    cohort: Cohort | None = None
    prompts: list[Prompt] = []
    left: list[Entry] = []
    room = most
    for entry in running:
        if not room:
            left.append(entry)
        elif isinstance(entry, Prompt):
            prompts.append(entry)
        elif isinstance(entry, Cohort):
            if cohort is None:
                cohort = entry
            else:
                cohort.absorb(entry, room)
                if entry.members:
                    left.append(entry)
            room = most - len(cohort.members)
        else:
            if cohort is None:
                cohort = Cohort(block_size)
            cohort.join(entry)
            room -= 1
    return cohort, prompts, left


def kept(skipped: list[Prompt], left: list[Entry]) -> list[Entry]:
    """Put what is for a later batch in order of arrival."""
    if not skipped and len(left) == 1:
        if isinstance(left[0], Cohort):
            left[0].sort_by_arrival()
        return left
    entries: list[Prompt | Member] = [*skipped]
    for entry in left:
        if isinstance(entry, Cohort):
            entries += [entry.leave(member) for member in list(entry.members.values())]
        else:
            entries.append(entry)
    return [*sorted(entries, key=_arrived_at)]
