"""How much of its product sheet a device delivers: fitted shares and latencies."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vidur_simpy.errors import unknown_name
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from vidur_simpy.hardware import Device

__all__ = ["RooflineFactors"]


@configuration
class RooflineFactors:
    """How much of its sheet a device delivers, and what each step costs besides.

    Shares are of the sheet's peak, in (0, 1] as a rule; above 1 where caches serve what the
    formula charges to memory.

    Parameters
    ----------
    gemm_compute, gemm_memory : float
        Shares of peak FLOP/s and of bandwidth in matrix products.
    prefill_compute, prefill_memory, decode_memory : float
        Shares in attention.
    elementwise_memory : float
        Share of bandwidth in norms, residuals and activations.
    kernel_time, attention_time : float
        Seconds that each kernel, each attention call takes at least.
    all_reduce_time : float
        Seconds that an all-reduce between two devices takes at least.
    all_reduce_link : float
        Share of the link's bandwidth in an all-reduce between two devices.
    smoothness : float
        Exponent of the smooth maximum of compute and memory time; the larger, the sharper.
    gemm_half_efficiency_rows : float
        Rows (tokens) at which a matrix product reaches half of its share of peak FLOP/s.
    prefill_extra_context : float
        Tokens of context that each token of a prefill costs as if it attended to them as well:
        tiles half empty, waves half full.
    all_reduce_time_growth, all_reduce_link_growth : float
        Exponents with which the least time, and the share of the link, of an all-reduce grow with
        half the number of devices: switches that reduce on the way make the share grow, a shared
        bus makes it shrink.
    large_all_reduce_time : float
        Seconds more that an all-reduce of 8 MiB and more takes: there vLLM's own kernel hands over
        to NCCL.
    quantized_compute : float
        Share of `gemm_compute` that products in fp8 and int8 reach of their own peak.
    expert_compute, expert_memory : float
        Shares of `gemm_compute` and of `elementwise_memory` that experts reach: their products are
        many and small, their rows are gathered and scattered.
    expert_time : float
        Seconds that routing takes at least, per layer: choosing experts, sorting rows, starting.
    latent_memory : float
        Share of bandwidth in decoding with latent attention.
    latent_time : float
        Seconds that latent attention takes at least on top, per layer: its norms, rotations and
        copies.
    name : str
        What the set is called.

    Examples
    --------
    >>> RooflineFactors.from_name("hopper").name
    'hopper'
    """

    gemm_compute: float = Field(gt=0)
    gemm_memory: float = Field(gt=0)
    prefill_compute: float = Field(gt=0)
    prefill_memory: float = Field(gt=0)
    decode_memory: float = Field(gt=0)
    elementwise_memory: float = Field(gt=0)
    kernel_time: float = Field(ge=0)
    attention_time: float = Field(ge=0)
    all_reduce_time: float = Field(ge=0)
    all_reduce_link: float = Field(gt=0)
    smoothness: float = Field(ge=1)
    gemm_half_efficiency_rows: float = Field(default=0.0, ge=0)
    prefill_extra_context: float = Field(default=0.0, ge=0)
    all_reduce_time_growth: float = 0.0
    all_reduce_link_growth: float = 0.0
    large_all_reduce_time: float = Field(default=0.0, ge=0)
    quantized_compute: float = Field(default=0.8, gt=0)
    expert_compute: float = Field(default=0.78, gt=0)
    expert_memory: float = Field(default=0.5, gt=0)
    expert_time: float = Field(default=2e-5, ge=0)
    latent_memory: float = Field(default=0.8, gt=0)
    latent_time: float = Field(default=4e-5, ge=0)
    name: str = "custom"

    @classmethod
    def from_name(cls, name: str) -> RooflineFactors:
        """Return a fitted set by its `name`: a100, b200, h100, h200, hopper, l40s, rtx-pro-6000.

        Raises
        ------
        ConfigError
            If there is no such set, with the nearest.
        """
        sets = _fitted()["sets"]
        if name not in sets:
            raise unknown_name("roofline factors", name, sets)
        return cls(name=name, **sets[name])

    @classmethod
    def of_device(cls, device: Device) -> RooflineFactors:
        """Return the set fitted to a device, else that of the nearest architecture.

        The 80 GB A100, H100, H200, B200 (all SXM), L40S and RTX PRO 6000 were fitted themselves.
        Other Hopper devices take the common fit of H100 and H200 (``hopper``), other Blackwell
        data-centre devices ``b200``, Ada devices ``l40s``, and Ampere, Turing and Volta ``a100``.
        Whatever else, of other vendors or not in the catalogue, takes ``hopper``: its shares are
        of the device's own sheet, but nobody has measured them there.
        """
        fitted = _fitted()
        return cls.from_name(fitted["devices"].get(device.name, fitted["default"]))


@functools.cache
def _fitted() -> dict[str, Any]:
    """Read the sheet of fitted factors: the sets, which device uses which, and the default."""
    sheet = resources.files("vidur_simpy") / "data" / "roofline_factors.json"
    fitted: dict[str, Any] = json.loads(sheet.read_text(encoding="utf-8"))
    return fitted
