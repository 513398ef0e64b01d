"""Runs a case of the plain oracle on the package itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from oracle.vidur import PlainCase

import vidur_simpy as vs
from vidur_simpy.workload import RequestArrays

Rows = Sequence[tuple[float, int, int]]


class Given:
    """A workload of given rows: (arrived_at, num_prefill_tokens, num_decode_tokens)."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def requests(self, *_: Any) -> RequestArrays:
        arrived_at, prefill, decode = (
            np.array([row[column] for row in self.rows], kind)
            for column, kind in enumerate((float, int, int))
        )
        return RequestArrays(arrived_at, prefill, decode)


POLICIES = {
    "vllm": lambda case: vs.Vllm(
        max_num_seqs=case.max_num_seqs, max_num_batched_tokens=case.max_num_batched_tokens
    ),
    "sarathi": lambda case: vs.Sarathi(max_num_seqs=case.max_num_seqs, chunk_size=case.chunk_size),
    "orca": lambda case: vs.Orca(max_num_seqs=case.max_num_seqs),
    "faster_transformer": lambda case: vs.FasterTransformer(max_num_seqs=case.max_num_seqs),
    "lightllm": lambda case: vs.LightLLM(
        max_num_seqs=case.max_num_seqs,
        max_num_batched_tokens=case.max_num_batched_tokens,
        max_waiting_iterations=case.max_waiting_iterations,
    ),
    "mnemosyne": lambda case: vs.Mnemosyne(
        ordering=case.ordering,
        max_num_seqs=case.max_num_seqs,
        chunk_size=case.chunk_size,
        target_batch_time=None if case.chunk_size else case.target_batch_time,
        deadline_multiplier=case.deadline_multiplier,
        min_deadline=case.min_deadline,
        long_request_threshold=case.long_request_threshold,
        kv_parallel_size=case.kv_parallel_size,
        max_num_tokens_per_kvp_group=case.max_num_tokens_per_kvp_group,
    ),
}


def cluster_of(case: PlainCase) -> vs.Cluster:
    """The cluster that a case describes."""
    return vs.Cluster(
        model="llama-3-8b",
        device="a100-80gb-sxm",
        num_replicas=case.num_replicas,
        pipeline_parallel_size=case.pipeline_parallel_size,
        sequence_pipeline_parallel=case.sequence_pipeline_parallel,
        max_model_len=case.max_model_len,
        kv_cache=vs.KVCache(
            block_size=case.block_size, num_blocks=case.num_blocks, watermark=case.watermark
        ),
        replica_scheduler=POLICIES[case.scheduler](case),
        global_scheduler=case.global_scheduler,
        execution_time=vs.Linear(
            base=case.base,
            per_token=case.per_token,
            per_context_token=case.per_context_token,
        ),
    )


def simulate_case(case: PlainCase, rows: Rows, **options: Any) -> vs.Result:
    """Run a case on the package."""
    return vs.simulate(cluster_of(case), Given(rows), event_order=case.event_order, **options)
