"""Execution time of any other model, corrected by a few numbers fitted to a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, SkipValidation

from vidur_simpy.errors import ConfigError
from vidur_simpy.execution_time.interface import stage_time_of
from vidur_simpy.execution_time.lookup import Lookup
from vidur_simpy.execution_time.roofline import Roofline
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time.interface import BatchCounts

__all__ = ["PARAMETERS", "Calibrated", "CalibratedStageTime", "DecodeCounts", "Parts"]

PARAMETERS = ("overhead", "per_sequence", "compute_scale", "context_scale")
"""What a calibration fits, in the order of `Calibrated.covariance`."""


@configuration
class Calibrated:
    """Stage times of another model, corrected to fit a measurement.

    The time of the `base` is taken apart by asking it for batches that have less in them:

    * its least time, of one decode without context: taken as it is, plus `overhead`, because no
      measurement tells the two apart;
    * what further tokens add, of decodes and of prefill chunks: times `compute_scale`;
    * what the context of the decodes adds: times `context_scale`, which is that of the bandwidth;

    and each request of the batch takes `per_sequence` on top, which roofline models do not have.
    With the defaults it is the base. :func:`vidur_simpy.calibrate` finds the numbers.

    Parameters
    ----------
    base : ExecutionTime or callable
        The model that is corrected. A function is called with counts only, see `BatchCounts`.
    overhead : float
        Seconds that an iteration takes more than the base says (less, if negative), spent in the
        first stage as CPU overhead is.
    per_sequence : float
        Seconds per request of the batch, in the first stage.
    compute_scale, context_scale : float
        Factors, see above.
    time_scale : float
        Factor on the whole; 1.1 is a machine that is 10 % slower throughout.
    covariance : sequence of sequence of float
        Of the fitted numbers, in the order of `PARAMETERS`; empty if not known.
    drift : float
        How much the machine changed from one part of the measurement to another, as standard
        deviation of the logarithm of its speed. With `covariance` it gives the band of
        :func:`vidur_simpy.simulate_with_uncertainty`; it does not enter the times.

    Raises
    ------
    ConfigError
        If the base is not a model, or `covariance` is not 4 rows of 4 finite numbers with none
        below 0 on the diagonal.

    Examples
    --------
    >>> from vidur_simpy.execution_time import Linear
    >>> Calibrated(Linear(), overhead=0.001, context_scale=1.2).overhead
    0.001
    """

    base: Annotated[Any, SkipValidation] = Roofline()
    overhead: float = 0.0
    per_sequence: float = 0.0
    compute_scale: float = Field(default=1.0, ge=0)
    context_scale: float = Field(default=1.0, ge=0)
    time_scale: float = Field(default=1.0, gt=0)
    covariance: Sequence[Sequence[float]] = ()
    drift: float = Field(default=0.0, ge=0)

    def __post_init__(self) -> None:
        base = self.base
        if isinstance(base, type) or not (hasattr(base, "for_replica") or callable(base)):
            raise ConfigError(
                f"Calibrated.base = {base!r}: expected an execution-time model, such as "
                "Roofline() or Linear(), or a function of (batch) or (batch, stage_id)."
            )
        covariance = tuple(tuple(float(value) for value in row) for row in self.covariance)
        is_square = [len(row) for row in covariance] in ([], [len(PARAMETERS)] * len(PARAMETERS))
        if not is_square or any(row[i] < 0 for i, row in enumerate(covariance)):
            raise ConfigError(
                f"Calibrated.covariance = {self.covariance!r}: expected a row and a column for "
                f"each of {', '.join(PARAMETERS)}, with variances >= 0 on the diagonal."
            )
        object.__setattr__(self, "covariance", covariance)

    @property
    def factors_name(self) -> Callable[..., str]:
        """The base's function that names its factors on a device, if it has one."""
        name: Callable[..., str] = self.base.factors_name
        return name

    def for_replica(self, deployment: Deployment) -> CalibratedStageTime:
        """Return the stage times of a replica.

        Raises
        ------
        ConfigError
            If a batch would take no time or less.
        """
        return CalibratedStageTime(self, deployment)


class DecodeCounts:
    """A batch of decodes alone, as counts: what an execution-time model may read of it."""

    __slots__ = (
        "decode_context",
        "num_attention_pairs",
        "num_decodes",
        "num_tokens",
        "total_context",
    )

    prefills: Sequence[PrefillChunk] = ()

    def __init__(self, num_decodes: int, decode_context: int) -> None:
        self.num_decodes = self.num_tokens = num_decodes
        self.decode_context = self.total_context = self.num_attention_pairs = decode_context


class Parts(NamedTuple):
    """The base's time of a batch, taken apart; the sum of all three, in seconds."""

    least: float
    compute: float
    context: float


class CalibratedStageTime:
    """The corrected times of one replica: call it with a batch and a stage for the seconds.

    A batch of decodes costs one call of the base, one look-up, a product and a sum; a batch with
    prefill chunks a second, cheap call.

    ``decode_times`` and ``operators`` are there where the base has them.
    """

    def __init__(self, calibrated: Calibrated, deployment: Deployment) -> None:
        self._calibrated = calibrated
        self._base: Any = stage_time_of(calibrated.base, deployment)
        time_scale = calibrated.time_scale
        self._compute_scale = time_scale * calibrated.compute_scale
        self._context_scale = time_scale * calibrated.context_scale
        self._scale_of_decodes = self._context_scale - self._compute_scale
        self._counts = DecodeCounts(1, 1)
        stages = range(deployment.pipeline_parallel_size)
        # Overheads are spent in the first stage.
        self._per_sequence = [0.0 if i else time_scale * calibrated.per_sequence for i in stages]
        # The base's times of so many decodes without context, and what goes on top of its time
        # with context.
        self._starts = [Lookup(self._start_of(stage_id)) for stage_id in stages]
        self._offsets = [Lookup(self._offset_of(stage_id)) for stage_id in stages]
        if hasattr(self._base, "decode_times"):
            self.decode_times = self._decode_times
        if hasattr(self._base, "operators"):
            self.operators = self._operators
        for stage_id in stages:
            if self(DecodeCounts(1, 1), stage_id) <= 0:
                least = self.least_time(stage_id)
                raise ConfigError(
                    f"Calibrated.overhead = {calibrated.overhead} with per_sequence = "
                    f"{calibrated.per_sequence}: stage {stage_id} of the base takes {least:.3g} s "
                    "at least, expected more than 0 together."
                )

    def _start_of(self, stage_id: int) -> Callable[[int], float]:
        def start(num_decodes: int) -> float:
            num_decodes = max(num_decodes, 1)
            time: float = self._base(DecodeCounts(num_decodes, num_decodes), stage_id)
            return time

        return start

    def _offset_of(self, stage_id: int) -> Callable[[int], float]:
        calibrated = self._calibrated
        overhead = calibrated.overhead if stage_id == 0 else 0.0
        starts, per_sequence = self._starts[stage_id], self._per_sequence[stage_id]

        def offset(num_decodes: int) -> float:
            least, start = starts[0], starts[num_decodes]
            time = calibrated.time_scale * (overhead + least) + per_sequence * num_decodes
            return time + self._compute_scale * (start - least) - self._context_scale * start

        return offset

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""
        time: float = self._base(batch, stage_id)
        num_decodes, prefills = batch.num_decodes, batch.prefills
        if not prefills:
            return self._offsets[stage_id][num_decodes] + self._context_scale * time
        if num_decodes:
            # One object for all such calls: to make one takes as long as to use it.
            counts, context = self._counts, batch.decode_context
            counts.num_decodes = counts.num_tokens = num_decodes
            counts.decode_context = counts.total_context = counts.num_attention_pairs = context
            decodes: float = self._base(counts, stage_id)
        else:
            decodes = self._starts[stage_id][0]
        return (
            self._offsets[stage_id][num_decodes]
            + self._per_sequence[stage_id] * len(prefills)
            + self._compute_scale * time
            + self._scale_of_decodes * decodes
        )

    def least_time(self, stage_id: int) -> float:
        """Return what the base takes for one decode without context."""
        return self._starts[stage_id][0]

    def parts(self, batch: BatchCounts, stage_id: int) -> Parts:
        """Return the base's time of a batch in the parts that the parameters scale."""
        num_decodes, starts = batch.num_decodes, self._starts[stage_id]
        least, start, time = starts[0], starts[num_decodes], self._base(batch, stage_id)
        decodes = least
        if num_decodes:
            decodes = self._base(DecodeCounts(num_decodes, batch.decode_context), stage_id)
        return Parts(least, start - least + time - decodes, decodes - start)

    def _decode_times(
        self, num_decodes: int, decode_context: int, num_iterations: int, stage_id: int
    ) -> list[float] | NDArray[np.float64]:
        """Return the seconds of so many iterations of decodes, each a token longer than the last.

        The i-th is that of a batch without prefill chunks whose context is ``decode_context +
        i * num_decodes``, to the last bit.
        """
        times: list[float] | NDArray[np.float64] = self._base.decode_times(
            num_decodes, decode_context, num_iterations, stage_id
        )
        offset, scale = self._offsets[stage_id][num_decodes], self._context_scale
        if isinstance(times, list):
            return [offset + scale * time for time in times]
        return offset + scale * times

    def _operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time.

        The fitted overheads are an operator of their own, unless they are negative; all others are
        those of the base, stretched by one factor.
        """
        base: dict[str, float] = self._base.operators(batch, stage_id)
        num_sequences = batch.num_decodes + len(batch.prefills)
        overhead = self._per_sequence[stage_id] * num_sequences
        if stage_id == 0:
            overhead += self._calibrated.time_scale * self._calibrated.overhead
        overhead = max(overhead, 0.0)
        total = sum(base.values())
        stretch = (self(batch, stage_id) - overhead) / total if total else 1.0
        operators = {name: stretch * time for name, time in base.items()}
        return operators | {"calibrated_overhead": overhead}
