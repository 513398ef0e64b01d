"""Batches by their counts, the least that an execution-time model is given."""

from __future__ import annotations

from hypothesis import strategies as st

from vidur_simpy.deployment import Deployment
from vidur_simpy.hardware import Device, Model
from vidur_simpy.measurements import Chunk
from vidur_simpy.measurements import Iteration as Counts


def replica(model="llama-3.1-8b", device="h100", tp=1, pp=1, **settings):
    return Deployment(Model.from_name(model), Device.from_name(device), tp, pp, **settings)


def decodes(num_decodes, context):
    return Counts(num_decodes, num_decodes * context)


def prefill(num_tokens, prefix=0):
    return Counts(0, 0, (Chunk(num_tokens, prefix + num_tokens),))


chunks = st.builds(
    lambda num_tokens, prefix: Chunk(num_tokens, prefix + num_tokens),
    st.integers(1, 4096),
    st.integers(0, 8192),
)
batches = st.builds(
    lambda n, mean, prefills: Counts(n, n * mean, tuple(prefills)),
    st.integers(0, 256),
    st.integers(1, 8192),
    st.lists(chunks, min_size=1, max_size=3),
) | st.builds(decodes, st.integers(1, 256), st.integers(1, 8192))
