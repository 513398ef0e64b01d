"""In what weights and the KV cache are kept, and in what the matrix units multiply."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vidur_simpy.errors import unknown_name

__all__ = [
    "BF16_BYTES",
    "KV_CACHE_BYTES",
    "PRECISIONS",
    "Format",
    "Precision",
    "kv_cache_bytes",
    "precision",
]

BF16_BYTES = 2
"""Bytes of a value that is not quantized: activations, embeddings, LM head, norms, router."""

Format = Literal["bf16", "fp8", "int8"]
"""What matrix units multiply."""


class Precision(NamedTuple):
    """How the weight matrices of a model's layers are kept and multiplied.

    Attributes
    ----------
    weight_bytes : float
        Bytes per weight, scales included.
    format : {"bf16", "fp8", "int8"}
        What is multiplied, on devices that can; elsewhere, and for weights of 4 bits, weights are
        turned into bf16 on the way and bf16 is multiplied.
    is_experts_only : bool
        Whether all but the routed experts stay in bf16.
    """

    weight_bytes: float
    format: Format
    is_experts_only: bool = False


# Groups of 128 weights of 4 bits share a scale of 16 bits and a zero point of 4.
_FOUR_BITS = Precision((4 + 20 / 128) / 8, "bf16")

PRECISIONS: dict[str, Precision] = {
    "bf16": Precision(BF16_BYTES, "bf16"),
    "fp8": Precision(1.0, "fp8"),
    "int8": Precision(1.0, "int8"),
    "int4": _FOUR_BITS,
    "awq": _FOUR_BITS,
    "gptq": _FOUR_BITS,
    # Blocks of 32 weights of 4 bits share a scale of 8 bits (OCP Microscaling Formats 1.0).
    "mxfp4": Precision((4 + 8 / 32) / 8, "bf16", is_experts_only=True),
}
"""By vLLM's name of the method; bf16 is what is not quantized, int8 is W8A8."""

KV_CACHE_BYTES: dict[str, int] = {
    "auto": BF16_BYTES,
    "bf16": BF16_BYTES,
    "bfloat16": BF16_BYTES,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
"""Bytes per value by vLLM's name; auto is the model's own type, bf16."""


def precision(name: str, where: str = "quantization") -> Precision:
    """Return the precision of a name.

    Raises
    ------
    ConfigError
        If there is no such precision, with the nearest.

    Examples
    --------
    >>> precision("fp8").weight_bytes
    1.0
    """
    if name not in PRECISIONS:
        raise unknown_name(where, name, PRECISIONS)
    return PRECISIONS[name]


def kv_cache_bytes(name: str, where: str = "kv_cache_dtype") -> int:
    """Return the bytes of a cached value, or raise a ConfigError with the nearest name."""
    if name not in KV_CACHE_BYTES:
        raise unknown_name(where, name, KV_CACHE_BYTES)
    return KV_CACHE_BYTES[name]
