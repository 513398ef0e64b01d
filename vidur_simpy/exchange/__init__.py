"""Files that other tools write and read: vllm bench, AIPerf, event traces, Perfetto."""

from __future__ import annotations

from vidur_simpy.exchange.exports import Exports
from vidur_simpy.exchange.vllm_bench import VllmBench, read_vllm_bench

__all__ = ["Exports", "VllmBench", "read_vllm_bench"]
