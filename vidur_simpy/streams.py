"""The streams of random numbers of a run: one for each source of randomness."""

from __future__ import annotations

import numpy as np

__all__ = ["STREAMS", "streams_of"]

STREAMS = ("arrivals", "lengths", "routing", "timing", "faults")
"""What draws from a stream of its own. Append only: a stream is known by its place."""


def streams_of(seed: int) -> dict[str, np.random.Generator]:
    """Return a generator for each source of randomness, independent of the others.

    Examples
    --------
    >>> bool(streams_of(0)["arrivals"].random() == streams_of(0)["lengths"].random())
    False
    """
    return {
        name: np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        for index, name in enumerate(STREAMS)
    }
