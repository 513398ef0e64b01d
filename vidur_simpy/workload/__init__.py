"""What arrives and when: arrivals, lengths and traces, in pure numpy.

To add a kind, write it in its file and name it in a table below; the name is for YAML and the
command line only.
"""

from __future__ import annotations

from vidur_simpy.workload.arrivals import (
    AllAtOnce,
    Arrivals,
    Constant,
    Gamma,
    Poisson,
    TraceArrivals,
)
from vidur_simpy.workload.lengths import (
    FixedLengths,
    Lengths,
    LognormalLengths,
    PublishedLengths,
    TraceLengths,
    UniformLengths,
    ZipfLengths,
    clip_lengths,
)
from vidur_simpy.workload.requests import RequestArrays
from vidur_simpy.workload.traces import read_arrivals, read_lengths, read_trace
from vidur_simpy.workload.workload import RequestSource, Trace, Workload, requests_of

__all__ = [
    "ARRIVALS",
    "LENGTHS",
    "WORKLOADS",
    "AllAtOnce",
    "Arrivals",
    "Constant",
    "FixedLengths",
    "Gamma",
    "Lengths",
    "LognormalLengths",
    "Poisson",
    "PublishedLengths",
    "RequestArrays",
    "RequestSource",
    "Trace",
    "TraceArrivals",
    "TraceLengths",
    "UniformLengths",
    "Workload",
    "ZipfLengths",
    "clip_lengths",
    "read_arrivals",
    "read_lengths",
    "read_trace",
    "requests_of",
]

ARRIVALS = {
    "poisson": Poisson,
    "gamma": Gamma,
    "constant": Constant,
    "all_at_once": AllAtOnce,
    "trace": TraceArrivals,
}

LENGTHS = {
    "fixed": FixedLengths,
    "uniform": UniformLengths,
    "zipf": ZipfLengths,
    "lognormal": LognormalLengths,
    "published": PublishedLengths,
    "trace": TraceLengths,
}

WORKLOADS = {"trace": Trace, "synthetic": Workload}
