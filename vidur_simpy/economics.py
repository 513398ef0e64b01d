"""The methods of a result that say what a run takes: energy and money."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, SupportsFloat, cast

from vidur_simpy.errors import ConfigError, VidurError
from vidur_simpy.power import mean_power_w
from vidur_simpy.summary import num_output_tokens, ratio

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["Economics"]


class Economics:
    """The methods of a `Result` that say what the run takes.

    Every device of every replica counts, busy or idle, from the start of the run (after
    `Result.after`, from there on) to its end. What a million tokens take is the whole divided by
    the input, by the output or by all tokens of the requests that were completed: three ways to
    quote the same, not parts of it.
    """

    def energy(
        self, *, idle_power_w: float | None = None, peak_power_w: float | None = None
    ) -> pd.Series:
        """Return the energy that the devices take.

        `power.mean_power_w` is the model, with its sources and limits: between idle and peak power,
        in proportion to MFU and MBU. After `Result.after` the mean power is that of the whole run.

        Parameters
        ----------
        idle_power_w : float, optional
            Watts of a device while no batch runs; by default a quarter of its peak.
        peak_power_w : float, optional
            Watts of a device at most, such as a power cap; by default the TDP of its data sheet.

        Returns
        -------
        Series
            ``energy_kwh``; ``mean_power_w`` of all devices together; ``joules_per_output_token``;
            and ``kwh_per_million_input_tokens``, ``kwh_per_million_output_tokens`` and
            ``kwh_per_million_tokens``.

        Raises
        ------
        ConfigError
            If a power is not a positive number, idle is more than peak, or the data sheet has no
            TDP and none is given.
        VidurError
            If the result does not say how busy its devices were.
        """
        import pandas as pd

        if idle_power_w is not None:
            idle_power_w = _positive("energy", "idle_power_w", idle_power_w, "watts")
        if peak_power_w is not None:
            peak_power_w = _positive("energy", "peak_power_w", peak_power_w, "watts")
        result = cast("Result", self)
        power = 0.0
        for row in _devices(result, "utilisation", "mfu", "mbu", "tdp_w").to_dict("records"):
            peak = row["tdp_w"] if peak_power_w is None else peak_power_w
            if math.isnan(peak):
                raise ConfigError(
                    "energy(): the data sheet of the device has no TDP; give peak_power_w in watts."
                )
            if idle_power_w is not None and idle_power_w > peak:
                raise ConfigError(
                    f"energy() idle_power_w = {idle_power_w:g}: expected at most the peak of "
                    f"{peak:g} W."
                )
            shares = {name: row[name] for name in ("utilisation", "mfu", "mbu")}
            power += row["num_devices"] * mean_power_w(peak, **shares, idle_power_w=idle_power_w)
        kwh = power * _duration(result) / 3.6e6
        figures = {
            "energy_kwh": kwh,
            "mean_power_w": power,
            "joules_per_output_token": ratio(3.6e6 * kwh, _num_tokens(result)[1]),
        }
        return pd.Series(figures | _per_million(result, "kwh", kwh), name="energy")

    def cost(self, price_per_gpu_hour: float) -> pd.Series:
        """Return what the devices cost, in the currency of the price.

        Parameters
        ----------
        price_per_gpu_hour : float
            Price of one device for an hour, idle or busy.

        Returns
        -------
        Series
            ``gpu_hours``, ``cost``, and ``cost_per_million_input_tokens``,
            ``cost_per_million_output_tokens`` and ``cost_per_million_tokens``.

        Raises
        ------
        ConfigError
            If the price is not a positive number.
        VidurError
            If the result does not say how many devices there were.

        Examples
        --------
        >>> import vidur_simpy as vs
        >>> workload = vs.Workload(vs.Constant(rate=2.0), vs.FixedLengths(512, 16), num_requests=9)
        >>> result = vs.simulate(vs.Cluster(tensor_parallel_size=2), workload)
        >>> cost = result.cost(price_per_gpu_hour=3.0)
        >>> round(cost["gpu_hours"] * 3600 / result.info["simulated_time"])
        2
        """
        import pandas as pd

        price = _positive("cost", "price_per_gpu_hour", price_per_gpu_hour, "money")
        result = cast("Result", self)
        gpu_hours = int(_devices(result)["num_devices"].sum()) * _duration(result) / 3600
        cost = price * gpu_hours
        figures = {"gpu_hours": gpu_hours, "cost": cost}
        return pd.Series(figures | _per_million(result, "cost", cost), name="cost")


def _devices(result: Result, *columns: str) -> pd.DataFrame:
    """Return columns of the replicas, if they are there."""
    replicas = result.replicas
    for column in ("num_devices", *columns):
        if column not in replicas or replicas.empty:
            raise VidurError(
                f"the result has no replicas with a column {column!r}: it is a measurement, or "
                "was simulated by a version that did not note it."
            )
    return replicas[["num_devices", *columns]]


def _duration(result: Result) -> float:
    """Return the seconds that the result is about."""
    return float(result.info["simulated_time"] - result.info.get("measured_from", 0.0))


def _num_tokens(result: Result) -> tuple[int, int]:
    """Return the input and the output tokens of the completed requests."""
    completed = result.requests[result.requests["completed_at"].notna()]
    return int(completed["num_prefill_tokens"].sum()), int(num_output_tokens(completed).sum())


def _per_million(result: Result, what: str, total: float) -> dict[str, float]:
    num_input, num_output = _num_tokens(result)
    return {
        f"{what}_per_million_input_tokens": ratio(1e6 * total, num_input),
        f"{what}_per_million_output_tokens": ratio(1e6 * total, num_output),
        f"{what}_per_million_tokens": ratio(1e6 * total, num_input + num_output),
    }


def _positive(method: str, name: str, value: float, unit: str) -> float:
    is_number = isinstance(value, SupportsFloat) and not isinstance(value, (bool, str))
    if not (is_number and 0 < float(value) < math.inf):
        raise ConfigError(f"{method}() {name} = {value!r}: expected a positive amount of {unit}.")
    return float(value)
