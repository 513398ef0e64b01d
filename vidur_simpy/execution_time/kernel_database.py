"""NVIDIA's measured kernels: what they cover, and under which names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vidur_simpy.errors import ConfigError, ProfileError
from vidur_simpy.hardware import Model

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment

__all__ = [
    "Engine",
    "Request",
    "compiled",
    "measured_model",
    "package_version",
    "product_modes",
    "system_of",
]

PACKAGE = "aiconfigurator-core"
VERSIONS = "0.12."
EXTRA = "pip install 'vidur-simpy[aiconfigurator]'"

SYSTEMS = {
    "a100-80gb-sxm": "a100_sxm",
    "h100-80gb-sxm": "h100_sxm",
    "h200-141gb-sxm": "h200_sxm",
    "b200-sxm": "b200_sxm",
    "b300-sxm": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx-pro-6000-server": "rtx_pro_6000_server",
}
"""Our device -> the package's system."""

PRODUCT_MODES = {"bf16": "bfloat16", "fp8": "fp8", "int8": "sq", "mxfp4": "bfloat16"}
EXPERT_MODES = {"bf16": "bfloat16", "fp8": "fp8", "mxfp4": "w4a16_mxfp4"}
"""Our precision -> the package's mode of matrix products, of experts; all others are int4_wo."""


class Request(NamedTuple):
    """What the package is asked for, in its own names."""

    system: str
    backend: str
    backend_version: str | None
    model: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What it is, for messages."""
        version = f" {self.backend_version}" if self.backend_version else ""
        return f"{self.model} on {self.system} with {self.backend}{version}"


def package_version() -> str:
    """Return the version that is installed.

    Raises
    ------
    ConfigError
        If none is, or another than the one this module knows.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"AIConfigurator needs {PACKAGE}: {EXTRA}.") from None
    if not version.startswith(VERSIONS):
        raise ConfigError(f"{PACKAGE} {version}: expected {VERSIONS}*; {EXTRA}.")
    return version


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sort names by how near they are to one.

    >>> nearest_first("h100", ["a100_sxm", "b200_sxm", "h100_sxm"])
    ['h100_sxm', 'a100_sxm', 'b200_sxm']
    """

    def distance(candidate: str) -> tuple[float, str]:
        short = candidate.rpartition("/")[2].lower()
        own = name.rpartition("/")[2].lower()
        return -difflib.SequenceMatcher(None, own, short).ratio(), candidate

    return sorted(known, key=distance)


def uncovered(what: str, name: str, known: Iterable[str], advice: str = "") -> ConfigError:
    """Return the error for what the package does not cover, with its own names nearest first."""
    names = nearest_first(name, known)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return ConfigError(
        f"AIConfigurator: {PACKAGE} has no {what} {name!r}{advice}; nearest first it has: "
        f"{listed or 'none'}."
    )


def system_of(device: str) -> str:
    """Return the package's name of a device of ours.

    Raises
    ------
    ConfigError
        If it was not measured.

    Examples
    --------
    >>> system_of("h100-80gb-sxm")
    'h100_sxm'
    """
    if device not in SYSTEMS:
        raise uncovered("device", device, SYSTEMS, " (or name one of its own as system=)")
    return SYSTEMS[device]


def product_modes(deployment: Deployment) -> dict[str, str]:
    """Return the package's modes for the precisions of a deployment."""
    name = deployment.quantization or deployment.model.quantization or "bf16"
    return {
        "gemm_quant_mode": PRODUCT_MODES.get(name, "int4_wo"),
        "moe_quant_mode": EXPERT_MODES.get(name, "int4_wo"),
        "kvcache_quant_mode": "fp8" if deployment.kv_bytes_per_value == 1 else "bfloat16",
        "fmha_quant_mode": "bfloat16",
    }


def measured_model(model: Model, name: str | None = None) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the ``config.json`` under which the package takes a model.

    A model of the package of the same geometry is that model. Any other decoder with gated MLPs
    and full attention over keys and values, dense or of experts only, is described to it.

    Raises
    ------
    ConfigError
        If the package has no model called `name`, or none like `model`.
    """
    configs = dict(_bundled())
    if name is not None:
        if name not in configs:
            raise uncovered("model", name, configs)
        return name, configs[name]
    readable = [_readable(other, config) for other, config in configs.items()]
    alike = [other for other in readable if other is not None and _is_alike(other, model)]
    if alike:
        best = min(alike, key=lambda other: (other.name != model.name, other.name))
        return best.name, configs[best.name]
    reason = _why_not_described(model)
    if reason:
        raise uncovered("model", model.name, configs, f", which has {reason}")
    return model.name, _described(model)


def _bundled() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the models of the package with their ``config.json``, without importing it."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"AIConfigurator needs {PACKAGE}: {EXTRA}.")
    suffix = "_config.json"
    for file in sorted(Path(spec.submodule_search_locations[0], "model_configs").glob("*.json")):
        if file.name.endswith(suffix) and not file.name.endswith("_hf_quant" + suffix):
            name = file.name.removesuffix(suffix).replace("--", "/", 1)
            yield name, json.loads(file.read_text(encoding="utf-8"))


def _readable(name: str, config: Mapping[str, Any]) -> Model | None:
    try:
        return Model.from_huggingface(config, name)
    except ConfigError:
        return None


def _is_alike(other: Model, model: Model) -> bool:
    renamed = {
        field: getattr(model, field) for field in ("name", "max_position", "quantization", "source")
    }
    return dataclasses.replace(other, **renamed) == model


def _why_not_described(model: Model) -> str:
    reasons = {
        "latent attention": model.kv_latent_size,
        "sliding windows": model.num_sliding_layers,
        "MLPs without a gate": not model.gated_mlp,
        "shared experts": model.num_shared_experts,
        "dense layers among experts": model.num_dense_layers,
    }
    return " and ".join(reason for reason, is_so in reasons.items() if is_so)


def _described(model: Model) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position or 131_072,
        "torch_dtype": "bfloat16",
    }
    if model.num_experts:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": model.moe_intermediate_size,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
        }
    return config


class Engine(Protocol):
    """The package's estimator of one deployment, as far as it is used."""

    def run_static_per_op(
        self, *, batch_size: int, isl: int, osl: int, prefix: int = 0, mode: str = "static"
    ) -> Sequence[Sequence[tuple[Any, ...]]]:
        """Return (name, milliseconds, ...) of the operators of prefill and of decode."""


def compiled(request: Request) -> Engine:
    """Return the package's estimator.

    Raises
    ------
    ConfigError
        If the system, the backend, its version or a mode is not among the package's own, which
        the message lists.
    ProfileError
        If nothing was measured for it.
    """
    package_version()
    from aiconfigurator_core.sdk import EngineHandle, common, perf_database

    with _quiet():
        covered = perf_database.get_supported_databases()
        if request.system not in covered:
            raise uncovered("system", request.system, covered)
        backends = covered[request.system]
        if request.backend not in backends:
            raise uncovered("backend", request.backend, backends, f" on {request.system}")
        versions = backends[request.backend]
        if request.backend_version not in (None, *versions):
            what = f"version of {request.backend} on {request.system}"
            raise uncovered(what, str(request.backend_version), versions)
        for setting, modes in (
            ("gemm_quant_mode", common.GEMMQuantMode),
            ("moe_quant_mode", common.MoEQuantMode),
        ):
            if request.settings[setting] not in modes.__members__:
                raise uncovered(setting, request.settings[setting], modes.__members__)
        with tempfile.TemporaryDirectory() as folder, _refusals(request):
            # By its name alone the package might look for a model in the network.
            Path(folder, "config.json").write_text(json.dumps(request.config), encoding="utf-8")
            version = {"backend_version": request.backend_version}
            settings = {**request.settings, **version}
            handle = EngineHandle.compile(folder, request.system, request.backend, **settings)
            handle.predict_decode_latency(1, 1)
            handle.predict_prefill_latency(1, 16, 0)
    engine: Engine = handle
    return engine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's notes on what it loads out of the user's log."""
    logger = logging.getLogger("aiconfigurator_core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _refusals(request: Request) -> Iterator[None]:
    """Turn the package's refusals into ours; its other errors are bugs and pass."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = re.sub(r" at \S*aiconfigurator_core\S*", "", str(error)).rstrip(" .")
        modes = {key: value for key, value in request.settings.items() if value is not None}
        raise ProfileError(
            f"AIConfigurator: {PACKAGE} has no measurements for {request.name} ({modes}): {reason}."
        ) from error
