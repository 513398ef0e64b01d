"""Fits an execution-time model to what a user measured, and says how well it fits."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.calibration.fitting import (
    ROBUST_AT,
    Fit,
    averaged_least_squares,
    blocks_of,
    covariance_of,
    drift_of,
    robust_least_squares,
)
from vidur_simpy.calibration.replay import (
    REQUEST_SPREAD,
    START,
    Replay,
    design_of,
    log_ratio,
    lowest_of,
    model_of,
    prior_of,
)
from vidur_simpy.cluster import Cluster
from vidur_simpy.errors import ConfigError, ProfileError, unknown_name
from vidur_simpy.execution_time import Calibrated
from vidur_simpy.execution_time.calibrated import PARAMETERS
from vidur_simpy.hardware import Model
from vidur_simpy.measurements import MeasuredIterations, MeasuredRequests, read_measurement
from vidur_simpy.plots.drawing import COLOURS, legend_above, make_axes, make_axis_logarithmic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["Calibration", "calibrate"]

UNITS = ("s", "s", "", "")
# Of the quantities in a figure.
MARKS = ("o", "x", "^")

FEWEST_ROWS = 20

# Measured over predicted times beyond this, or its inverse, are no matter of calibration.
LARGEST_RATIO = 100.0


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """An execution-time model fitted to a measurement.

    Attributes
    ----------
    cluster : Cluster
        The cluster, now with the fitted execution time.
    execution_time : Calibrated
        The fitted model: plain numbers, which its configuration keeps.
    parameters : DataFrame
        A row per parameter: ``value``, ``standard_error`` and ``unit``; the error is NaN for a
        parameter that was not fitted.
    residuals : DataFrame
        A row per quantity: ``count``; ``bias``, predicted over measured total less one;
        ``median_bias``, the same of the medians; and ``spread``, the standard deviation of the
        logarithm of their ratio row by row.
    rows : DataFrame
        ``quantity``, ``measured`` and ``predicted`` in seconds, for every iteration or request.
    measurement : MeasuredIterations or MeasuredRequests
        What it was fitted to.
    """

    cluster: Cluster
    execution_time: Calibrated
    parameters: pd.DataFrame
    residuals: pd.DataFrame
    rows: pd.DataFrame
    measurement: MeasuredIterations | MeasuredRequests

    def __repr__(self) -> str:
        values = ", ".join(
            f"{name}={value:.4g}" for name, value in self.parameters["value"].items()
        )
        return f"<Calibration to {self.measurement!r}: {values}>"

    def _repr_html_(self) -> str:
        """Return the parameters and the residuals as two html tables."""
        drift = f"{self.execution_time.drift:.1%}"
        return (
            f"<p>{html.escape(repr(self.measurement))}</p>"
            + self.parameters.to_html(float_format="{:.4g}".format)
            + self.residuals.to_html(float_format="{:.3g}".format)
            + f"<p>drift of the machine from block to block: {drift}</p>"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw predicted over measured times on `ax`, each a point, on the line of agreement.

        Quantities differ in colour and in mark.
        """
        ax = make_axes(ax, height=4.5)
        # Each iteration is drawn once, as one of decodes only or one with a prefill.
        shown = self.rows[self.rows["quantity"] != "iteration"]
        for index, (quantity, rows) in enumerate(shown.groupby("quantity", sort=False)):
            look: Any = {"color": COLOURS[index], "markerfacecolor": "none", "alpha": 0.6}
            measured, predicted = rows["measured"], rows["predicted"]
            ax.plot(measured, predicted, MARKS[index], markersize=4, label=str(quantity), **look)
        times = self.rows[["measured", "predicted"]].to_numpy()
        ends = [times[times > 0].min(), np.nanmax(times)]
        ax.plot(ends, ends, color="black", linewidth=1, label="agreement")
        for axis in (ax.xaxis, ax.yaxis):
            make_axis_logarithmic(axis, np.array(ends))
        ax.set_xlabel("measured (s)")
        ax.set_ylabel("predicted (s)")
        ax.set_title("Calibrated times against measured ones")
        legend_above(ax)
        ax.grid(alpha=0.3)
        return ax


def calibrate(
    cluster: Cluster,
    measurement: str | Path | MeasuredIterations | MeasuredRequests,
    *,
    parameters: Sequence[str] = PARAMETERS,
) -> Calibration:
    """Fit a few parameters of the cluster's execution time to what was measured.

    From iterations they follow by robust least squares of the relative errors, on the parts of the
    cluster's own execution time (see :class:`vidur_simpy.Calibrated`): the replica scheduler plays
    no part. From requests they are those with which the simulated TTFT and E2E come closest to the
    measured ones, as logarithms of their ratios; then the scheduler, the KV cache and the replicas
    have to be those of the server, and requests arrive when they did, whatever the client waited
    for.

    Each parameter is held to its neutral value as if by one more observation, of the size of the
    base's least time for overheads and of one for scales, so that what a measurement does not
    tell stays as it is; its standard error says so. The fit is deterministic.

    Parameters
    ----------
    cluster : Cluster
        As it was measured. Its execution time is what is corrected; if that is a
        :class:`vidur_simpy.Calibrated` one, its base is.
    measurement : path, MeasuredIterations or MeasuredRequests
        What was measured; :mod:`vidur_simpy.measurements` says which files.
    parameters : sequence of str
        Which to fit, of ``overhead``, ``per_sequence``, ``compute_scale`` and ``context_scale``.

    Notes
    -----
    Standard errors are the sum of two: as if rows were independent, and from blocks of rows (the
    runs of the measurement, or eight pieces of it), which also sees what rows of one block share.
    ``drift`` is the standard deviation of the logarithm of measured over predicted time from
    block to block: for iterations of their durations, for requests of their time after the first
    token.

    Raises
    ------
    ConfigError
        An argument of another kind, another model than the one measured, requests that the
        cluster refuses, or an unknown parameter.
    TraceError
        A measurement that cannot be used.
    ProfileError
        Fewer than 20 rows, or times that are more than 100 times off before any fit, as
        milliseconds for seconds are.

    Examples
    --------
    >>> from vidur_simpy import Linear
    >>> from vidur_simpy.measurements import Iteration, MeasuredIterations
    >>> iterations = [Iteration(n, 500 * n) for n in range(1, 41)]
    >>> durations = np.array([0.006 + 3e-5 * each.num_tokens for each in iterations])
    >>> measured = MeasuredIterations("mine", iterations, durations, np.zeros(40, int))
    >>> cluster = Cluster(execution_time=Linear(base=0.004, per_token=3e-5, per_context_token=0))
    >>> calibrate(cluster, measured, parameters=["overhead"]).execution_time.overhead.__round__(6)
    0.002
    """
    if not isinstance(cluster, Cluster):
        raise ConfigError(f"cluster = {cluster!r}: expected a Cluster.")
    base = cluster.execution_time
    base = base.base if isinstance(base, Calibrated) else base
    if isinstance(measurement, str | Path):
        measurement = read_measurement(measurement)
    if not isinstance(measurement, MeasuredIterations | MeasuredRequests):
        raise ConfigError(
            f"measurement = {measurement!r}: expected a path, MeasuredIterations or "
            "MeasuredRequests."
        )
    if len(measurement) < FEWEST_ROWS:
        raise ProfileError(f"{measurement!r}: expected at least {FEWEST_ROWS} to fit to.")
    fitted = _checked_parameters(parameters)
    if isinstance(measurement, MeasuredIterations):
        return _fit_iterations(cluster, base, measurement, fitted)
    _check_model(cluster, measurement)
    return _fit_requests(cluster, base, measurement, fitted)


def _checked_parameters(parameters: Sequence[str]) -> NDArray[np.intp]:
    """Return the places of the parameters to fit."""
    if isinstance(parameters, str) or not parameters:
        raise ConfigError(f"parameters = {parameters!r}: expected some of {', '.join(PARAMETERS)}.")
    for name in parameters:
        if name not in PARAMETERS:
            raise unknown_name("calibration parameter", name, PARAMETERS)
    return np.array(sorted({PARAMETERS.index(name) for name in parameters}))


def _check_model(cluster: Cluster, measured: MeasuredRequests) -> None:
    """Refuse a measurement of another model of the catalogue."""
    try:
        model = Model.from_name(measured.model)
    except ConfigError:
        return
    ours = cluster.deployment.model
    if (model.num_layers, model.hidden_size) != (ours.num_layers, ours.hidden_size):
        raise ConfigError(
            f"{measured.source} was measured on {model.name}, the cluster serves {ours.name}: "
            "expected the same model."
        )


def _check_ratio(
    measured: NDArray[np.float64], predicted: NDArray[np.float64], what: str, source: str
) -> None:
    ratio = float(np.median(measured / predicted))
    if not 1 / LARGEST_RATIO < ratio < LARGEST_RATIO:
        raise ProfileError(
            f"{source}: the median {what} is {np.median(measured):.4g} s, predicted are "
            f"{np.median(predicted):.4g} s: expected a factor of less than {LARGEST_RATIO:.0f}. "
            "Are the times in seconds, and of this model on this device?"
        )


def _calibration(
    cluster: Cluster,
    model: Calibrated,
    fitted: NDArray[np.intp],
    rows: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    measured: MeasuredIterations | MeasuredRequests,
) -> Calibration:
    import pandas as pd

    errors = np.full(len(PARAMETERS), np.nan)
    errors[fitted] = np.sqrt(np.diag(np.array(model.covariance)))[fitted]
    values = [getattr(model, name) for name in PARAMETERS]
    parameters = pd.DataFrame(
        {"value": values, "standard_error": errors, "unit": UNITS}, index=list(PARAMETERS)
    )
    return Calibration(
        cluster=dataclasses.replace(cluster, execution_time=model),
        execution_time=model,
        parameters=parameters,
        residuals=pd.DataFrame({name: _residuals(*times) for name, times in rows.items()}).T,
        rows=pd.concat(
            [
                pd.DataFrame({"quantity": name, "measured": times[0], "predicted": times[1]})
                for name, times in rows.items()
            ],
            ignore_index=True,
        ),
        measurement=measured,
    )


def _residuals(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, float]:
    """Return the row of a quantity in `Calibration.residuals`."""
    is_there = ~np.isnan(measured)
    measured, predicted = measured[is_there], predicted[is_there]
    if not len(measured):
        return {"count": 0, "bias": np.nan, "median_bias": np.nan, "spread": np.nan}
    return {
        "count": len(measured),
        "bias": float(predicted.sum() / measured.sum()) - 1,
        "median_bias": float(np.median(predicted) / np.median(measured)) - 1,
        "spread": float(log_ratio(measured, predicted).std()),
    }


# Iterations


def _fit_iterations(
    cluster: Cluster, base: Any, measured: MeasuredIterations, fitted: NDArray[np.intp]
) -> Calibration:
    durations = measured.durations
    stage_time = Calibrated(base).for_replica(cluster.deployment)
    design = design_of(stage_time, cluster.pipeline_parallel_size, measured.iterations)
    least = design[0, 0]
    neutral = np.insert(START, 0, 1.0)
    _check_ratio(durations, design @ neutral, "iteration", measured.source)
    design[:, 0] = design @ np.where(np.isin(np.arange(5), 1 + fitted), 0.0, neutral)
    design = design[:, [0, *(1 + fitted)]]
    lowest = lowest_of(least)[fitted]
    fit = robust_least_squares(design, durations, START[fitted], prior_of(least)[fitted], lowest)
    predicted = design @ np.insert(fit.values, 0, 1.0)
    has_prefill = np.array([bool(each.prefills) for each in measured.iterations])
    quantities = {"iteration": np.full(len(durations), True)}
    quantities |= {"decode iteration": ~has_prefill, "prefill iteration": has_prefill}
    blocks = blocks_of(measured.runs)
    model = model_of(
        base, fitted, fit.values, covariance_of(fit, blocks), drift_of(durations, predicted, blocks)
    )
    rows = {name: (durations[kind], predicted[kind]) for name, kind in quantities.items()}
    return _calibration(cluster, model, fitted, rows, measured)


# Requests


def _fit_requests(
    cluster: Cluster, base: Any, measured: MeasuredRequests, fitted: NDArray[np.intp]
) -> Calibration:
    replay = Replay(cluster, base, measured, fitted)
    _check_ratio(measured.e2e, replay.latencies(replay.start)[1], "E2E", measured.source)
    far = ROBUST_AT * REQUEST_SPREAD
    steps = averaged_least_squares(replay.residuals, replay.jacobian, replay.lowest, far=far)
    ttft, e2e = replay.latencies(steps)
    num_rows = 2 * len(measured)
    residuals = replay.residuals(steps)[:num_rows]
    weights = np.sqrt(far / np.maximum(np.abs(residuals), far))
    slopes = replay.jacobian(steps)[:num_rows] * weights[:, None] / replay.prior
    fit = Fit(replay.values(steps), residuals * weights, slopes, replay.prior)
    blocks = blocks_of(measured.runs)
    covariance = covariance_of(fit, np.tile(blocks, 2))
    drift = drift_of(measured.e2e - measured.ttft, e2e - ttft, blocks)
    model = model_of(base, fitted, fit.values, covariance, drift)
    num_later = np.where(measured.num_decode_tokens > 1, measured.num_decode_tokens - 1.0, np.nan)
    rows = {
        "ttft": (measured.ttft, ttft),
        "tpot": (measured.tpot, (e2e - ttft) / num_later),
        "e2e": (measured.e2e, e2e),
    }
    return _calibration(cluster, model, fitted, rows, measured)
