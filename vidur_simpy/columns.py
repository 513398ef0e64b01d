"""The dictionary of every column of every table, with its unit."""

from __future__ import annotations

__all__ = ["COLUMNS"]

# table -> column -> (unit, meaning). Seconds and tokens are the units of time and length.
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "requests": {
        "request_id": ("", "number of the request in order of arrival"),
        "replica_id": ("", "replica that served it; missing if it never reached one"),
        "arrived_at": ("s", "instant at which it entered the global queue"),
        "scheduled_at": ("s", "first instant at which it was part of a batch"),
        "first_token_at": ("s", "end of its prefill, which yields the first output token"),
        "completed_at": ("s", "instant of its last output token"),
        "num_prefill_tokens": ("tokens", "prompt length, as it arrived"),
        "num_decode_tokens": ("tokens", "output length, as it arrived"),
        "num_restarts": ("", "preemptions by recomputation it went through"),
        "execution_time": ("s", "time of every stage of every batch it was part of"),
        "preempted_time": ("s", "waits between its stages after the first one started"),
        "ttft": ("s", "time to first token: first_token_at - arrived_at"),
        "tpot": ("s", "time per output token after the first: (e2e - ttft) / (output - 1)"),
        "e2e": ("s", "end-to-end latency: completed_at - arrived_at"),
        "scheduling_delay": ("s", "scheduled_at - arrived_at"),
        "refusal": ("", "why it was refused at arrival; empty if it was accepted"),
    },
    "batches": {
        "replica_id": ("", "replica that formed the batch"),
        "batch_index": ("", "number of the batch on its replica, from 0"),
        "scheduled_at": ("s", "instant at which the batch was formed"),
        "completed_at": ("s", "end of its last stage; missing while it runs"),
        "request_ids": ("", "its requests, in order"),
        "num_tokens": ("tokens", "tokens processed for each of them, in the same order"),
        "num_prefill_tokens": ("tokens", "prompt tokens in the batch"),
        "num_decode_tokens": ("tokens", "decode tokens in the batch, one per decoding request"),
    },
    "stages": {
        "replica_id": ("", "replica"),
        "batch_index": ("", "number of the batch on its replica"),
        "stage_id": ("", "pipeline stage, from 0"),
        "started_at": ("s", "instant at which the stage took the batch"),
        "ended_at": ("s", "instant at which it was done with it"),
        "num_prefill_tokens": ("tokens", "prompt tokens in the batch"),
        "num_decode_tokens": ("tokens", "decode tokens in the batch"),
    },
    "events": {
        "time": ("s", "instant of the event"),
        "event_type": ("", "one of the seven event types"),
        "replica_id": ("", "replica, where the event has one"),
        "stage_id": ("", "pipeline stage, where the event has one"),
        "batch_index": ("", "batch, where the event has one"),
        "request_id": ("", "request, where the event has one"),
    },
    "tokens": {
        "time": ("s", "instant at which the tokens were produced"),
        "replica_id": ("", "replica"),
        "inter_token_latency": ("s", "time since the previous token of the same request"),
        "num_tokens": ("tokens", "how many requests produced a token with this latency"),
    },
    "timeline": {
        "time": ("s", "instant of the sample (when a batch is formed)"),
        "replica_id": ("", "replica"),
        "num_running": ("", "requests that hold KV-cache blocks"),
        "num_waiting": ("", "requests that wait on the replica"),
        "kv_cache_usage": ("", "share of the KV-cache blocks in use, 0 to 1"),
    },
    "replicas": {
        "replica_id": ("", "replica"),
        "num_requests": ("", "requests routed to it"),
        "num_batches": ("", "batches it has completed"),
        "num_restarts": ("", "preemptions by recomputation"),
        "num_prefill_tokens": ("tokens", "prompt tokens processed, recomputation included"),
        "num_decode_tokens": ("tokens", "decode tokens processed"),
        "num_blocks": ("", "KV-cache blocks per pipeline stage"),
        "utilisation": ("", "share of the time its stages were busy, mean over stages, 0 to 1"),
        "kv_cache_usage_mean": ("", "time-weighted mean share of KV-cache blocks in use, 0 to 1"),
        "kv_cache_usage_peak": ("", "largest share of KV-cache blocks in use, 0 to 1"),
        "mfu": ("", "model FLOPs utilisation while busy and idle, 0 to 1"),
    },
}
