"""What limits a run: memory, compute, the batch limit, the router, the pipeline, or nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vidur_simpy.explanation.saturation import Saturation, saturation_of
from vidur_simpy.series import load_samples
from vidur_simpy.summary import aligned, digits, html_table, usual_refusal

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["Bottleneck", "bottleneck_of"]

# Requests that lose less than this share of their time to all causes together are not held up.
LEAST_LOSS = 0.1
# If this share of the requests or more were refused, no wait of the others is what limits a run.
MOST_REFUSED = 0.1

# cause -> (what it is called, what may help).
CAUSES = {
    "kv_memory": ("KV-cache memory", "more memory per replica, or more replicas"),
    "batch_limit": ("the limit of requests in a batch", "a higher max_num_seqs"),
    "compute": ("the speed of iterations", "faster devices, more replicas or shorter prompts"),
    "router": ("the router", "a router that heeds the load, such as least_outstanding_requests"),
    "pipeline_bubbles": ("pipeline bubbles", "fewer stages, or more and more even batches"),
}


@dataclass(frozen=True, repr=False)
class Bottleneck:
    """What limits a run, with the numbers behind it; `Result.bottleneck` makes it.

    Attributes
    ----------
    verdict : str
        ``"refusals"`` if a tenth of the requests or more were refused; else what most of the lost
        time is lost for: ``"kv_memory"``, ``"batch_limit"``, ``"compute"``, ``"router"`` or
        ``"pipeline_bubbles"``; ``"none"`` if requests lose less than a tenth of their time, or
        ``"unknown"`` if they lose more and the result does not say why, as one that was measured.
    text : str
        A few sentences; the first says how many requests were refused and why, if any were.
    table : DataFrame
        A row per cause: its ``share`` of the time of all requests, and the ``evidence``.
    saturation : Saturation
    """

    verdict: str
    text: str
    table: pd.DataFrame
    saturation: Saturation

    def __repr__(self) -> str:
        return f"<Bottleneck: {self.text}>"

    def __str__(self) -> str:
        lines = [self.text]
        if self.saturation.is_saturated:
            lines.append(self.saturation.text)
        return "\n".join([*lines, "", *aligned([["cause", "lost", "evidence"], *self._rows()])])

    def _repr_html_(self) -> str:
        """Return text and table as html; what users can name is escaped."""
        texts = [self.text] + ([self.saturation.text] if self.saturation.is_saturated else [])
        shown = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
        return shown + html_table(self._rows(), ["cause", "share of time lost", "evidence"])

    def _rows(self) -> list[list[str]]:
        return [
            [CAUSES[str(cause)][0], _percent(row["share"]), str(row["evidence"])]
            for cause, row in self.table.iterrows()
        ]


def bottleneck_of(result: Result) -> Bottleneck:
    """Judge a run, as `Result.bottleneck` describes it."""
    import pandas as pd

    setting = _Setting(result.config)
    waiting, stalled, preempted = _losses(result)
    bubbles = _bubbles(result)
    is_known = len(result.timeline) > 0
    causes = _causes_of_waiting(result, setting) if is_known else dict.fromkeys(CAUSES, math.nan)
    is_pipeline = setting.num_stages > 1
    idle_share = bubbles if is_pipeline else 0.0
    shares = {
        "kv_memory": waiting * causes["kv_memory"] + preempted,
        "batch_limit": waiting * causes["batch_limit"],
        "compute": waiting * causes["compute"] * (1 - idle_share)
        + (0.0 if is_pipeline else stalled),
        "router": waiting * causes["router"],
        "pipeline_bubbles": waiting * causes["compute"] * idle_share
        + (stalled if is_pipeline else 0.0),
    }
    evidence = _evidence(result, setting, bubbles)
    table = pd.DataFrame({"share": shares, "evidence": evidence}).rename_axis("cause")
    lost = waiting + stalled + preempted
    verdict = _verdict(lost, shares)
    figures = result.figures
    num_refused = figures["refused"]
    text = _text(verdict, lost, shares, figures["utilisation"], is_of_all=not num_refused)
    if num_refused:
        is_all = num_refused == figures["num_requests"]
        text = _refusals(result) + ("" if is_all else f" {text}")
        verdict = "refusals" if num_refused >= MOST_REFUSED * figures["num_requests"] else verdict
    return Bottleneck(verdict, text, table, saturation_of(result))


class _Setting:
    """What the configuration says, where it is known."""

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        cluster = (config or {}).get("cluster", {})
        scheduler = cluster.get("replica_scheduler", {})
        self.num_stages = int(cluster.get("pipeline_parallel_size", 1))
        self.scheduler = str(scheduler.get("type", ""))
        self.max_num_seqs = float(scheduler.get("max_num_seqs", math.inf))
        self.block_size = int(cluster.get("kv_cache", {}).get("block_size", 16))
        self.watermark = float(cluster.get("kv_cache", {}).get("watermark", 0.0))


def _losses(result: Result) -> tuple[float, float, float]:
    """Return the shares of the time of all requests that they wait, are stalled, are preempted.

    Stalled and preempted are the waits between two stages, of requests that were never preempted
    and of those that were.
    """
    requests = result.requests[result.requests["refusal"] == ""]
    arrived_at = requests["arrived_at"]
    end = requests["completed_at"].fillna(result.info["simulated_time"])
    total = float((end - arrived_at).sum())
    if not total > 0:
        return 0.0, 0.0, 0.0
    scheduled_at = requests["scheduled_at"]
    if scheduled_at.isna().all():  # a measurement, which knows no more than first tokens
        scheduled_at = requests["first_token_at"]
    waiting = float((scheduled_at.fillna(end) - arrived_at).sum())
    between = requests.get("preempted_time", 0.0 * arrived_at).fillna(0.0)
    is_preempted = requests["num_restarts"] > 0
    return (
        waiting / total,
        float(between[~is_preempted].sum()) / total,
        float(between[is_preempted].sum()) / total,
    )


def _causes_of_waiting(result: Result, setting: _Setting) -> dict[str, float]:
    """Return what those who wait on replicas wait for, as shares of all their waiting.

    At each sample of the timeline, which is taken when a batch has been formed: for the router if
    another replica has room, else for the batch limit if it is reached, else for memory if the
    prompt of one who waits does not fit, else for iterations to end.
    """
    samples = load_samples(result)
    usual = _prompt_of_one_who_waits(result)
    num_tokens = result.replicas["num_blocks"].mean() * setting.block_size
    needed = usual / num_tokens + setting.watermark if num_tokens else 0.0
    is_closed = setting.scheduler == "faster_transformer"  # a batch, once formed, lets nobody in
    is_limit = (samples["running"] >= setting.max_num_seqs) | (is_closed & (samples["running"] > 0))
    is_full = ~is_limit & (samples["usage"] + needed > 1)
    levels = {
        "batch_limit": samples["waiting"] * is_limit,
        "kv_memory": samples["waiting"] * is_full,
        "compute": samples["waiting"] * ~(is_limit | is_full),
        "room": (samples["waiting"] == 0) & ~is_limit & ~is_full,
    }
    sums = _summed_over_replicas(samples, levels, len(result.replicas))
    seconds = np.diff(samples["time"].to_numpy(), append=samples["time"].iloc[-1])
    has_room = sums.pop("room") > 0.5
    waited = {cause: float((level * ~has_room * seconds).sum()) for cause, level in sums.items()}
    waited["router"] = float((sum(sums.values()) * has_room * seconds).sum())
    total = sum(waited.values())
    if not total > 0:  # nobody waits when a batch has been formed: only for the one under way
        return dict.fromkeys(CAUSES, 0.0) | {"compute": 1.0}
    return dict.fromkeys(CAUSES, 0.0) | {cause: time / total for cause, time in waited.items()}


def _summed_over_replicas(
    samples: pd.DataFrame, levels: Mapping[str, pd.Series[Any]], num_replicas: int
) -> dict[str, Any]:
    """Return levels summed over replicas, each of which keeps its last until its next sample."""
    import pandas as pd

    frame = pd.DataFrame(levels).astype(np.float64)
    changes = frame.groupby(samples["replica_id"]).diff().fillna(frame)
    sums = changes.cumsum().clip(lower=0.0)  # a sum of changes may end at -1e-13
    # A replica that was not sampled yet is idle.
    num_seen = (~samples["replica_id"].duplicated()).cumsum()
    sums["room"] += num_replicas - num_seen
    return {str(name): sums[name].to_numpy() for name in sums}


def _prompt_of_one_who_waits(result: Result) -> float:
    """Return the mean prompt in tokens, by how long each waited."""
    requests = result.requests
    weight = requests["scheduling_delay"].fillna(0.0)
    prompts = requests["num_prefill_tokens"]
    return float((prompts * weight).sum() / weight.sum()) if weight.sum() > 0 else 0.0


def _bubbles(result: Result) -> float:
    """Return the share of the time of stages, while their replica has work, that they are idle."""
    if not len(result.timeline) or "utilisation" not in result.replicas:
        return math.nan
    samples = load_samples(result)
    end = float(result.info["simulated_time"])
    until = samples.groupby("replica_id")["time"].shift(-1).fillna(end)
    is_at_work = (samples["running"] > 0) | (samples["waiting"] > 0)
    working = float(((until - samples["time"]) * is_at_work).sum())
    busy = float(result.replicas["utilisation"].sum()) * end
    return max(0.0, 1 - busy / working) if working > 0 else 0.0


def _evidence(result: Result, setting: _Setting, bubbles: float) -> dict[str, str]:
    figures, replicas, timeline = result.figures, result.replicas, result.timeline
    usage = f"{_percent(figures['kv_cache_usage_mean'])} used on average"
    usage += f", {_percent(figures['kv_cache_usage_peak'])} at most"
    running = "not known"
    if len(timeline):
        running = f"{digits(timeline['num_running'].mean())} run when a batch is formed"
        if math.isfinite(setting.max_num_seqs):
            running += f", {setting.max_num_seqs:.0f} may"
    busy = replicas.get("utilisation")
    spread = "one replica"
    if len(replicas) > 1:
        counts = replicas["num_requests"]
        spread = f"{counts.min():,} to {counts.max():,} requests per replica"
        if busy is not None:
            spread += f", busy {_percent(busy.min())} to {_percent(busy.max())}"
    stages = "one stage"
    if setting.num_stages > 1:
        stages = f"stages are idle {_percent(bubbles)} of the time with work"
    return {
        "kv_memory": f"{usage}; {figures['restarts']:,} preemptions",
        "batch_limit": running,
        "compute": f"busy {_percent(figures['utilisation'])}, MFU {_percent(figures['mfu'])}",
        "router": spread,
        "pipeline_bubbles": stages,
    }


def _verdict(lost: float, shares: Mapping[str, float]) -> str:
    if lost < LEAST_LOSS:
        return "none"
    if any(math.isnan(share) for share in shares.values()):
        return "unknown"
    return max(shares, key=shares.__getitem__)


def _text(
    verdict: str, lost: float, shares: Mapping[str, float], utilisation: float, *, is_of_all: bool
) -> str:
    run, this_run_is = (
        ("this run", "This run is") if is_of_all else ("the others", "The others are")
    )
    held_up = f"requests lose {_percent(lost)} of their time waiting"
    if verdict == "none":
        return f"Nothing limits {run}: {held_up}; the stages are busy {_percent(utilisation)}."
    if verdict == "unknown":
        return f"What limits {run} is not known, because there is no timeline: {held_up}."
    name, remedy = CAUSES[verdict]
    share = _percent(shares[verdict] / lost)
    return (
        f"{this_run_is} limited by {name}: {held_up}, {share} of it for this. May help: {remedy}."
    )


def _refusals(result: Result) -> str:
    """Return how many requests were refused, with an example of the most common reason."""
    num_refused, num_requests = result.figures["refused"], result.figures["num_requests"]
    were = "was" if num_refused == 1 else "were"
    return (
        f"{num_refused:,} of {num_requests:,} requests {were} refused, most often for this: "
        f"{usual_refusal(result).rstrip('.')}."
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
