"""Tables of measured operators in Vidur's CSV formats, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vidur_simpy.errors import ProfileError
from vidur_simpy.precision import BF16_BYTES

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment

__all__ = ["Bounds", "MeasuredTable", "Sizes"]

MILLISECOND = 1e-3

FEWEST_POINTS = 3
"""With fewer distinct points no error can be told."""

SHORTEST_KERNEL = 0.5e-6
"""Seconds: no kernel starts and ends in less."""

SLOWEST = 300
"""No kernel takes so many times what the device's peaks allow, or so many times 5 us."""

USUAL_KERNEL = 5e-6
SLOWEST_LINK = 0.25e9
"""Bytes per second: a fifth of 10-gigabit Ethernet."""

CPU_TIMES = (1e-6, 0.1)
"""Seconds between which the CPU's part of an iteration lies."""

CACHE_BYTES = 128 * 2**20
"""What a device may hold in caches from one repetition to the next; B200 has the most, 126 MB."""

BOOST = 1.25
"""Above the peaks of the data sheet, which are stated at some clock."""

Sizes = Mapping[str, NDArray[np.float64]]


class MeasuredTable:
    """One CSV file of measurements.

    Parameters
    ----------
    path : Path
    frame : DataFrame
        Its rows, or some of them, by their line in the file.

    Raises
    ------
    ProfileError
        If the file is missing, no table, or has no rows.
    """

    def __init__(self, path: Path, frame: pd.DataFrame | None = None) -> None:
        self.path = path
        self.frame = _read(path) if frame is None else frame

    def require(self, columns: Sequence[str]) -> None:
        """Raise a ProfileError that names the columns which are not there."""
        missing = [column for column in columns if column not in self.frame]
        if missing:
            names = map(str, self.frame.columns)
            others = [name for name in names if not name.startswith("Unnamed")]
            raise ProfileError(
                f"{self.path} has no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(others)}."
            )

    def where(self, wanted: Mapping[str, Any]) -> MeasuredTable:
        """Return the rows with these values, or raise a ProfileError that says which there are."""
        self.require(list(wanted))
        frame = self.frame
        for column, value in wanted.items():
            here = frame[frame[column] == value]
            if here.empty:
                given = ", ".join(sorted(map(str, frame[column].dropna().unique())))
                raise ProfileError(
                    f"{self.path}: column {column!r} has {given or 'no value'}, expected {value}, "
                    "as the deployment has it; measure it, or simulate what was measured."
                )
            frame = here
        return MeasuredTable(self.path, frame)

    def numbers(self, column: str) -> NDArray[np.float64]:
        """Return a column as numbers, nan where a cell is empty."""
        self.require([column])
        numbers = pd.to_numeric(self.frame[column], errors="coerce").to_numpy(np.float64)
        bad = np.flatnonzero((np.isnan(numbers) | np.isinf(numbers)) & self.frame[column].notna())
        if len(bad):
            raise ProfileError(
                f"{self.place(int(bad[0]))}: {column} = {self.frame[column].iloc[bad[0]]!r}: "
                "expected a number."
            )
        return numbers

    def place(self, row: int) -> str:
        """Name a row by its line in the file."""
        return f"{self.path}, line {self.frame.index[row]}"

    def times(
        self,
        column: str,
        sizes: Sizes,
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
        skip_bad_rows: bool,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Return the points that were measured, their times, and how many rows were left out.

        Parameters
        ----------
        column : str
            Of times in milliseconds; empty cells were not measured.
        sizes : mapping of str to ndarray
            The features by name, a value per row.
        bounds : tuple of ndarray
            The least and most seconds that each row can take.
        skip_bad_rows : bool
            Leave out the rows that are outside instead of refusing them.

        Returns
        -------
        points : ndarray of float, shape (n, len(sizes))
        times : ndarray of float, shape (n,)
            Seconds.
        num_skipped : int
        """
        seconds = self.numbers(column) * MILLISECOND
        measured = ~np.isnan(seconds)
        for name, values in sizes.items():
            self._check_sizes(name, values, measured)
        least, most = bounds
        bad = measured & ~((seconds >= least) & (seconds <= most))
        if bad.any() and not skip_bad_rows:
            raise self._refusal(column, sizes, bounds, seconds, int(np.flatnonzero(bad)[0]))
        good = measured & ~bad
        points = np.column_stack(list(sizes.values()))[good]
        if len(np.unique(points, axis=0)) < FEWEST_POINTS:
            raise ProfileError(
                f"{self.path}: {column} has {good.sum()} usable rows for this deployment, expected "
                f"at least {FEWEST_POINTS} of different sizes."
            )
        return points, seconds[good], int(bad.sum())

    def _check_sizes(
        self, name: str, values: NDArray[np.float64], measured: NDArray[np.bool_]
    ) -> None:
        bad = np.flatnonzero(measured & ~(values >= 0))
        if len(bad):
            given = values[bad[0]]
            raise ProfileError(
                f"{self.place(int(bad[0]))}: {name} {'is missing' if np.isnan(given) else given}: "
                "expected a number of at least 0."
            )

    def _refusal(
        self,
        column: str,
        sizes: Sizes,
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
        seconds: NDArray[np.float64],
        row: int,
    ) -> ProfileError:
        """Say what is wrong with a time, and whether all are in another unit."""
        least, most = bounds
        known = ~np.isnan(seconds)
        hint = ""
        for factor, unit in ((1e3, "seconds"), (1e-3, "microseconds")):
            inside = (seconds * factor >= least) & (seconds * factor <= most)
            if inside[known].all():
                hint = f" (all would fit if they were {unit})"
        point = ", ".join(f"{name} = {values[row]:g}" for name, values in sizes.items())
        return ProfileError(
            f"{self.place(row)}: {column} = {seconds[row] / MILLISECOND:g} for {point}: expected "
            f"{least[row] / MILLISECOND:.3g} to {most[row] / MILLISECOND:.3g} ms, what the device "
            f"can do{hint}; correct the table, or leave out such rows with skip_bad_rows=True."
        )


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, low_memory=False)
    except FileNotFoundError:
        raise ProfileError(f"{path} is missing.") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ProfileError(f"{path} is not a table: {' '.join(str(error).split())}.") from None
    if frame.empty:
        raise ProfileError(f"{path} has no rows.")
    # The header is line 1.
    frame.index = pd.RangeIndex(2, len(frame) + 2)
    return frame.drop_duplicates()


class Bounds:
    """What an operator can take at least and at most on the devices of a deployment, in seconds.

    At least: its operations at the peak of the device, its bytes (but for what may be in caches)
    at its bandwidth. At most: 300 times that, for transfers what slow Ethernet takes. So times in
    another unit, which are off by a thousand, are told from slow kernels.

    Parameters
    ----------
    deployment : Deployment
    """

    def __init__(self, deployment: Deployment) -> None:
        model, device, tp = deployment.model, deployment.device, deployment.tensor_parallel_size
        self._flops = device.peak_flops()
        self._bandwidth = device.memory_bandwidth_gbps * 1e9
        self._hidden = model.hidden_size
        self._queries = model.num_heads * model.head_dim / tp
        self._keys = deployment.kv_heads_per_device * model.head_dim
        self._width = model.intermediate_size / tp
        self._num_inputs = 2 if model.gated_mlp else 1
        self._work: dict[str, Callable[..., tuple[Any, Any]]] = {
            "attn_pre_proj": self._product(self._queries + 2 * self._keys, self._hidden),
            "attn_post_proj": self._product(self._hidden, self._queries),
            "mlp_up_proj": self._product(self._num_inputs * self._width, self._hidden),
            "mlp_down_proj": self._product(self._hidden, self._width),
            "mlp_act": self._moved((self._num_inputs + 1) * self._width),
            "attn_rope": self._moved(2 * (self._queries + self._keys)),
            "input_layernorm": self._moved(2 * self._hidden),
            "post_attention_layernorm": self._moved(2 * self._hidden),
            "add": self._moved(3 * self._hidden),
            "attn_kv_cache_save": self._moved(4 * self._keys),
            "attn_prefill": self._prefill,
            "attn_decode": self._decode,
        }

    def kernel(
        self, operator: str, sizes: Sizes
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the least and the most that an operator of the layers takes at some sizes."""
        flops, num_bytes = self._work[operator](*sizes.values())
        uncached = np.maximum(num_bytes - CACHE_BYTES, 0)
        least = np.maximum(flops / self._flops, uncached / self._bandwidth) / BOOST
        usual = np.maximum(flops / self._flops, num_bytes / self._bandwidth)
        return _widened(least, SLOWEST * usual)

    def transfer(
        self, num_tokens: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the least and the most that sending hidden states between devices takes."""
        num_bytes = num_tokens * self._hidden * BF16_BYTES
        # Links may be others than the data sheet's, but none is faster than memory.
        return _widened(num_bytes / self._bandwidth / BOOST, num_bytes / SLOWEST_LINK)

    def cpu(
        self, num_requests: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the least and the most that the CPU takes for a part of an iteration."""
        least, most = CPU_TIMES
        return np.full(len(num_requests), least), np.full(len(num_requests), most)

    def _product(self, columns: float, depth: float) -> Callable[..., tuple[Any, Any]]:
        def work(rows: NDArray[np.float64]) -> tuple[Any, Any]:
            num_values = rows * (columns + depth) + columns * depth
            return 2 * rows * columns * depth, BF16_BYTES * num_values

        return work

    def _moved(self, values_per_token: float) -> Callable[..., tuple[Any, Any]]:
        return lambda num_tokens: (0 * num_tokens, BF16_BYTES * num_tokens * values_per_token)

    def _prefill(
        self, kv_cache_size: NDArray[np.float64], chunk: NDArray[np.float64]
    ) -> tuple[Any, Any]:
        num_pairs = chunk * kv_cache_size + chunk * (chunk + 1) / 2
        num_values = 2 * chunk * self._queries + 2 * (kv_cache_size + chunk) * self._keys
        return 4 * self._queries * num_pairs, BF16_BYTES * num_values

    def _decode(
        self, num_decodes: NDArray[np.float64], kv_cache_size: NDArray[np.float64]
    ) -> tuple[Any, Any]:
        context = num_decodes * kv_cache_size
        return 4 * self._queries * context, BF16_BYTES * 2 * context * self._keys


def _widened(
    least: NDArray[np.float64], most: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.maximum(least, SHORTEST_KERNEL), np.maximum(most, SLOWEST * USUAL_KERNEL)
