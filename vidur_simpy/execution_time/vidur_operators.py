"""What Vidur's tables hold for a deployment: the rows, sizes and fits of each operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vidur_simpy.errors import ProfileError, unknown_name
from vidur_simpy.execution_time.regression import Regression, check_available, fitted
from vidur_simpy.execution_time.vidur_tables import Bounds, MeasuredTable, Sizes

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.profile import Profile

__all__ = [
    "CHUNK_STEP",
    "CONTEXT_STEP",
    "CPU_OPERATORS",
    "MLP_OPERATORS",
    "TOKEN_STEP",
    "Feature",
    "Measured",
    "MeasuredOperator",
    "read_measured",
]

TOKEN_STEP, CONTEXT_STEP, CHUNK_STEP = 8, 64, 32
"""Tokens, tokens in the KV cache, and (rules 0.0.26) tokens of a chunk are rounded up to these."""

MLP_OPERATORS = (
    "attn_pre_proj",
    "attn_post_proj",
    "mlp_up_proj",
    "mlp_down_proj",
    "mlp_act",
    "attn_rope",
    "input_layernorm",
    "post_attention_layernorm",
    "add",
)
OPTIONAL = ("input_layernorm", "post_attention_layernorm", "add", "attn_kv_cache_save")
"""What takes no time where it was not measured."""

CPU_COLUMNS = {
    "schedule": "schedule_median",
    "sampler_e2e": "sampler_e2e_median",
    "prepare_inputs_e2e": "prepare_inputs_e2e_median",
    "process_model_outputs": "process_model_outputs_median",
    "ray_comm_time": "ray_comm_time_mean",
}
CPU_OPERATORS = tuple(CPU_COLUMNS)


class Feature(NamedTuple):
    """A size that an operator's time depends on, and where it was measured.

    Attributes
    ----------
    name : str
    low, high : float
    step : float
        What sizes are rounded up to: one less than a step above `high` stands for `high`.
    """

    name: str
    low: float
    high: float
    step: float = 0.0

    def is_beyond(self, size: float) -> bool:
        """Whether a size is larger than what was measured."""
        return size > self.high and size >= self.high + self.step


class MeasuredOperator(NamedTuple):
    """One operator as it was measured.

    Attributes
    ----------
    name : str
    features : list of Feature
    fit : callable
        Gives the regression; fitted at the first call.
    """

    name: str
    features: list[Feature]
    fit: Callable[[], Regression]


class Measured(NamedTuple):
    """What the tables hold for a deployment.

    Attributes
    ----------
    operators : dict of str to MeasuredOperator
    absent : list of str
        Operators that were not measured and take no time.
    num_skipped : dict of str to int
        Rows left out by operator, where some were.
    """

    operators: dict[str, MeasuredOperator]
    absent: list[str]
    num_skipped: dict[str, int]


def read_measured(profile: Profile, deployment: Deployment) -> Measured:
    """Read and check the tables that a deployment needs.

    What was read is kept as long as the files do not change.

    Raises
    ------
    ProfileError
        If a table is missing, has no rows for the deployment, or a value that cannot be; or the
        deployment is none that such tables describe.
    ConfigError
        If the regressor needs scikit-learn and it is not installed.
    """
    check_available(profile.regressor)
    given = (profile.path, profile.network, profile.cpu_overheads)
    places = [Path(place) for place in given if place is not None]
    folders = {place if place.is_dir() else place.parent for place in places}
    files = sorted(file for folder in folders for file in folder.glob("*.csv"))
    stamps = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read_measured(profile, deployment, stamps)


@functools.lru_cache(maxsize=16)
def _read_measured(profile: Profile, deployment: Deployment, stamps: object) -> Measured:
    """Read the tables; `stamps` change when the files do."""
    return _Reader(profile, deployment).read()


class _Reader:
    """Reads what a deployment needs from the tables of a profile."""

    def __init__(self, profile: Profile, deployment: Deployment) -> None:
        self.profile = profile
        self.deployment = deployment
        self.bounds = Bounds(deployment)
        self.measured = Measured({}, [], {})

    def read(self) -> Measured:
        """Return everything that the deployment needs."""
        self._check_deployment()
        self._read_mlp()
        self._read_attention()
        if self.deployment.tensor_parallel_size > 1:
            self._read_all_reduce()
        if self.deployment.pipeline_parallel_size > 1:
            self._read_send_recv()
        if self.profile.cpu_overheads is not None:
            self._read_cpu()
        return self.measured

    def _check_deployment(self) -> None:
        model, deployment = self.deployment.model, self.deployment
        unlike = [
            (model.num_experts, "a mixture of experts"),
            (model.kv_latent_size, "latent attention"),
            (deployment.precision.weight_bytes != 2, "quantized weights"),
            (deployment.kv_bytes_per_value != 2, "a quantized KV cache"),
        ]
        for is_so, what in unlike:
            if is_so:
                raise ProfileError(
                    f"{self.profile.path}: tables in Vidur's format are of dense models in 16 "
                    f"bits, the deployment of {model.name} has {what}."
                )

    def _read_mlp(self) -> None:
        model = self.deployment.model
        # The vocabulary is in the table, too, but in none of these operators; Vidur pads it.
        table = MeasuredTable(Path(self.profile.path) / "mlp.csv").where(
            {
                "n_embd": model.hidden_size,
                "n_head": model.num_heads,
                "n_kv_head": model.num_kv_heads,
                "n_expanded_embd": model.intermediate_size,
                "use_gated_mlp": model.gated_mlp,
                "num_tensor_parallel_workers": self.deployment.tensor_parallel_size,
            }
        )
        table.require([_column(name) for name in MLP_OPERATORS if name not in OPTIONAL])
        for name in MLP_OPERATORS:
            self._add_kernel(table, name, {"num_tokens": table.numbers("num_tokens")}, [TOKEN_STEP])

    def _read_attention(self) -> None:
        model, profile = self.deployment.model, self.profile
        table = MeasuredTable(Path(profile.path) / "attention.csv").where(
            {
                "n_embd": model.hidden_size,
                "n_q_head": model.num_heads,
                "n_kv_head": model.num_kv_heads,
                "num_tensor_parallel_workers": self.deployment.tensor_parallel_size,
            }
        )
        table = self._with_block_size(table)
        chunk, batch_size = table.numbers("prefill_chunk_size"), table.numbers("batch_size")
        context = table.numbers("kv_cache_size")
        table.require([_column("attn_prefill"), _column("attn_decode")])
        num_tokens = {"num_tokens": chunk.clip(min=batch_size)}
        self._add_kernel(table, "attn_kv_cache_save", num_tokens, [0])
        is_prefill = chunk > 0
        sizes = {"batch_size": batch_size[~is_prefill], "kv_cache_size": context[~is_prefill]}
        decodes = MeasuredTable(table.path, table.frame[~is_prefill])
        self._add_kernel(decodes, "attn_decode", sizes, [0, CONTEXT_STEP])
        sizes = {"kv_cache_size": context[is_prefill], "prefill_chunk_size": chunk[is_prefill]}
        prefills = MeasuredTable(table.path, table.frame[is_prefill])
        step = 0 if profile.rules == "main" else CHUNK_STEP
        self._add_kernel(prefills, "attn_prefill", sizes, [CONTEXT_STEP, step])

    def _with_block_size(self, table: MeasuredTable) -> MeasuredTable:
        """Take the rows of the block size asked for, or of the only one."""
        chosen = self.profile.block_size
        sizes = sorted(set(table.numbers("block_size").tolist()))
        if chosen is None and len(sizes) > 1:
            raise ProfileError(
                f"{table.path} has the block sizes {', '.join(f'{size:g}' for size in sizes)}: "
                "choose one with Profile.block_size."
            )
        return table if chosen is None else table.where({"block_size": chosen})

    def _read_all_reduce(self) -> None:
        width = self.deployment.tensor_parallel_size
        table = self._network("all_reduce").where({"num_workers": width, "devices_per_node": width})
        self._add_transfer(table, "all_reduce")

    def _read_send_recv(self) -> None:
        is_on_one_node = self.deployment.num_devices <= self.profile.devices_per_node
        table = self._network("send_recv").where({"devices_per_node": 2 if is_on_one_node else 1})
        self._add_transfer(table, "send_recv")

    def _network(self, name: str) -> MeasuredTable:
        profile, deployment = self.profile, self.deployment
        path = Path(profile.network or profile.path) / f"{name}.csv"
        if not path.is_file():
            raise ProfileError(
                f"{path} is missing: tensor_parallel_size {deployment.tensor_parallel_size} and "
                f"pipeline_parallel_size {deployment.pipeline_parallel_size} need the time of "
                f"{name}; say with Profile.network which folder has it."
            )
        return MeasuredTable(path)

    def _read_cpu(self) -> None:
        path = Path(str(self.profile.cpu_overheads))
        table = MeasuredTable(path / "cpu_overheads.csv" if path.is_dir() else path)
        table.require(["model_name", "batch_size", "tensor_parallel_degree"])
        names = sorted(table.frame["model_name"].unique())
        name = self.deployment.model.name
        found = [known for known in names if known.lower() == name.lower()]
        if not found:
            raise ProfileError(f"{table.path}: {unknown_name('model_name', name, names)}")
        width = self.deployment.tensor_parallel_size
        table = table.where({"model_name": found[0], "tensor_parallel_degree": width})
        sizes = {"batch_size": table.numbers("batch_size")}
        for operator, column in CPU_COLUMNS.items():
            self._add(table, operator, column, sizes, self.bounds.cpu(sizes["batch_size"]), [0])

    def _add_kernel(
        self, table: MeasuredTable, name: str, sizes: Sizes, steps: Sequence[int]
    ) -> None:
        """Add an operator of the layers, if it was measured or has to be."""
        column = _column(name)
        if name in OPTIONAL and (column not in table.frame or table.frame[column].isna().all()):
            self.measured.absent.append(name)
            return
        self._add(table, name, column, sizes, self.bounds.kernel(name, sizes), steps)

    def _add_transfer(self, table: MeasuredTable, name: str) -> None:
        """Add an operator that moves the hidden states of so many tokens."""
        num_tokens = table.numbers("size") / self.deployment.model.hidden_size / 2
        sizes, bounds = {"num_tokens": num_tokens}, self.bounds.transfer(num_tokens)
        self._add(table, name, _column(name), sizes, bounds, [TOKEN_STEP])

    def _add(
        self,
        table: MeasuredTable,
        name: str,
        column: str,
        sizes: Sizes,
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
        steps: Sequence[int],
    ) -> None:
        profile = self.profile
        points, times, num_skipped = table.times(column, sizes, bounds, profile.skip_bad_rows)
        if num_skipped:
            self.measured.num_skipped[name] = num_skipped
        features = [
            Feature(size, float(values.min()), float(values.max()), step)
            for size, values, step in zip(sizes, points.T, steps, strict=True)
        ]
        if name == "attn_prefill":
            contexts = points.sum(axis=1)
            low, high = float(contexts.min()), float(contexts.max())
            features.append(Feature("their sum", low, high, sum(steps)))
            fit = functools.partial(_fit_prefill, profile, points, times)
        else:
            fit = functools.partial(fitted, name, points, times, profile.regressor, profile.grid)
        self.measured.operators[name] = MeasuredOperator(name, features, functools.cache(fit))


def _fit_prefill(
    profile: Profile, points: NDArray[np.float64], times: NDArray[np.float64]
) -> Regression:
    """Fit the attention of prefill chunks, as a function of prefix and chunk.

    Vidur's features are the prefix and the square of the chunk, in 0.0.26 the chunk itself.
    Between points on no full grid, what can be interpolated is the time per query-key pair, with
    as many pairs added as take the least time.
    """
    kv_cache_size, chunk = points.T
    if profile.regressor == "interpolation":
        pairs = chunk * (kv_cache_size + (chunk + 1) / 2)
        start = float(times.min() / (times / pairs).min())
        rates = fitted(
            "attn_prefill", points[:, ::-1], times / (pairs + start), "interpolation", profile.grid
        )

        def predict(point: Sequence[float]) -> float:
            prefix, length = point
            num_pairs = length * (prefix + (length + 1) / 2)
            return rates.predict((length, prefix)) * (num_pairs + start)

        return rates._replace(predict=predict)
    power = 2 if profile.rules == "main" else 1
    features = np.column_stack([kv_cache_size, chunk**power])
    fit = fitted("attn_prefill", features, times, profile.regressor, profile.grid)
    return fit._replace(predict=lambda point: fit.predict((point[0], point[1] ** power)))


def _column(operator: str) -> str:
    """Name the column that Vidur fits to."""
    return f"time_stats.{operator}.median"
