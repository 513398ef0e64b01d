"""How much power a device draws, from how busy its matrix units and its memory are."""

from __future__ import annotations

__all__ = ["IDLE_SHARE", "mean_power_w"]

IDLE_SHARE = 0.25
"""Power of a device that holds a model and waits, as a share of its limit."""

# Matrix units at half of their peak, and memory at its peak, draw all the power there is.
_WEIGHT_OF_MFU = 2.0


def mean_power_w(
    peak_power_w: float,
    *,
    utilisation: float,
    mfu: float,
    mbu: float,
    idle_power_w: float | None = None,
) -> float:
    """Return the mean power of one device, in watts.

    It is ``idle + (peak - idle) * min(utilisation, mbu + 2 * mfu)``: what it draws doing nothing,
    and on top what memory traffic and matrix products draw in proportion, at most the limit while
    it is busy at all. Being linear, it holds for the means of a run as for each of its batches,
    unless long prefills reach more than half of peak FLOP/s, where it is a little too much.

    The two constants are those that measured A100s suggest (Patel et al., Splitwise, ISCA 2024;
    github.com/Mutinifni/splitwise-sim, data/perf_model.csv). Decoding Llama-2-70B (on 2, 4 and 8)
    and BLOOM-176B (on 8) at 20 to 63 % of bandwidth drew 44 to 74 % of 400 W; this is 1 to 8 %
    below. The prefills before, of 128 to 1024 tokens at 11 to 60 % of peak FLOP/s, drew up to 46
    to 104 %; this is 4 % below to 33 % above, in the median 1 % above. Idle devices with a model
    loaded were reported at 18 to 37 % of their limit (V100: github.com/zai-org/GLM-130B/issues/32;
    A40: github.com/NVIDIA/open-gpu-kernel-modules/issues/874). For other devices it is a guess:
    newer ones may stay further below their limit in decoding. Hosts, fans, switches, power
    supplies and cooling are not in it.

    Parameters
    ----------
    peak_power_w : float
        The limit: the TDP, or a power cap.
    utilisation, mfu, mbu : float
        Shares of the time busy, of peak FLOP/s and of bandwidth, 0 to 1, over the same time.
    idle_power_w : float, optional
        What it draws while no batch runs; by default a quarter of the limit.

    Examples
    --------
    >>> mean_power_w(400.0, utilisation=0.0, mfu=0.0, mbu=0.0)
    100.0
    >>> mean_power_w(400.0, utilisation=0.5, mfu=0.05, mbu=0.2)
    190.0
    """
    idle = IDLE_SHARE * peak_power_w if idle_power_w is None else idle_power_w
    return idle + (peak_power_w - idle) * min(utilisation, mbu + _WEIGHT_OF_MFU * mfu)
