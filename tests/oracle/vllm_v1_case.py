"""What goes into a run of the plain vLLM V1 engine and what comes out of it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "VLLM_VERSIONS",
    "PlainVllmV1Case",
    "PlainVllmV1Request",
    "PlainVllmV1RequestRow",
    "PlainVllmV1Run",
    "PlainVllmV1Step",
    "read_vllm_v1_case",
]

#: Releases whose rules are known, oldest first.
VLLM_VERSIONS = ("0.9.2", "0.11.2", "0.15.1", "0.19.1", "0.23.0", "0.27.1", "0.32.0")


@dataclass(frozen=True, kw_only=True)
class PlainVllmV1Case:
    """Engine parameters under vLLM's names and defaults, and how long a step takes.

    A step lasts ``base_ns + per_token_ns * scheduled tokens + per_kv_ns * context after the
    step``, or nothing if it has no tokens. `hash_block_size` is the number of prompt tokens that
    one of a request's `hash_ids` stands for. `async_scheduling` has no automatic setting here.

    Raises
    ------
    ValueError
        A release that is not known, a setting that the release lacks, or an engine that vLLM
        refuses to start because one request could not finish.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    num_gpu_blocks: int
    max_model_len: int
    max_num_active_seqs: int | None = None
    block_size: int = 16
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    async_scheduling: bool = False
    base_ns: int = 1_000_000
    per_token_ns: int = 10_000
    per_kv_ns: int = 0
    hash_block_size: int | None = None
    vllm_version: str = "0.32.0"

    def __post_init__(self) -> None:
        if self.vllm_version not in VLLM_VERSIONS:
            raise ValueError(f"vllm_version {self.vllm_version!r} is none of {VLLM_VERSIONS}")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError(f"policy {self.policy!r} is neither 'fcfs' nor 'priority'")
        if self.blocks_for(self.max_model_len) > self.num_gpu_blocks - 1:
            raise ValueError("max_model_len tokens do not fit the usable blocks")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError("without chunked prefill, max_num_batched_tokens >= max_model_len")
        if self.watermark and not self.since("0.27.1"):
            raise ValueError(f"vLLM {self.vllm_version} has no watermark")
        new = self.long_prefill_token_threshold_adaptive or self.max_num_active_seqs
        if new and not self.since("0.32.0"):
            raise ValueError(f"vLLM {self.vllm_version} has no adaptive cap, no active limit")

    def since(self, version: str) -> bool:
        """Say whether this release is `version` or a later one."""
        return VLLM_VERSIONS.index(self.vllm_version) >= VLLM_VERSIONS.index(version)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, kw_only=True)
class PlainVllmV1Request:
    """One line of a workload; ids are in the order of the lines."""

    request_id: int
    arrival_ns: int
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int = 0
    hash_ids: tuple[int, ...] = ()


@dataclass
class PlainVllmV1Step:
    """What one schedule() call planned, when it ran, and the state it left behind."""

    step: int = -1
    sched_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0
    tokens: int = 0
    kv_tokens: int = 0
    scheduled: dict[int, int] = field(default_factory=dict)
    hits: dict[int, int] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    free_blocks_end: int = 0
    sampled: list[int] = field(default_factory=list)


@dataclass
class PlainVllmV1RequestRow:
    """What happened to one request."""

    request_id: int
    arrival_ns: int
    first_scheduled_ns: int | None = None
    first_token_ns: int | None = None
    finish_ns: int | None = None
    num_preemptions: int = 0
    cached_tokens_first_admission: int | None = None
    scheduled_tokens_total: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class PlainVllmV1Run:
    """The steps that had tokens or preemptions, in order, and a row per request."""

    steps: list[PlainVllmV1Step]
    requests: list[PlainVllmV1RequestRow]


def read_vllm_v1_case(folder: Path) -> tuple[PlainVllmV1Case, list[PlainVllmV1Request]]:
    """Read the engine and the workload of a golden case: `case.json` and `workload.csv`."""
    described = json.loads((folder / "case.json").read_text())
    case = PlainVllmV1Case(
        **described["engine"],
        **described["time_model"],
        hash_block_size=described["hash_block_size"],
        vllm_version=described["vllm_version"],
    )
    with (folder / "workload.csv").open(newline="") as file:
        return case, [
            PlainVllmV1Request(
                **{name: int(value) for name, value in row.items() if name != "hash_ids"},
                hash_ids=tuple(int(value) for value in row.get("hash_ids", "").split()),
            )
            for row in csv.DictReader(file)
        ]
