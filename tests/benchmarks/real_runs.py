"""How far replays of real vLLM runs are from what the servers measured.

The runs are those that LLMServingSim publishes (casys-kaist/LLMServingSim, bench/examples, MIT):
vLLM 0.19 serving 300 ShareGPT requests, with the times of each request. They are replayed with
their arrivals, lengths, engine arguments and KV-cache blocks, through the ``vllm_v1`` scheduler
and the kernel profiles of the same hosts. Run it by hand::

    python tests/benchmarks/real_runs.py [--runs FOLDER] [--profiles FOLDER] [--only NAME]

For each run it prints mean, median, p90, p95 and p99 of TTFT, TPOT and E2E in milliseconds: the
server's, ours, our error, and LLMServingSim's on the same run (its ``summary.txt``).

TTFT and E2E count from the instant at which the engine takes a request in, as the server measured
them: between two steps, not when it was sent.

What the tables of kernels do not hold are four constants, the same for all runs. They were fitted
to durations of single steps, not to the figures that are printed (``real_steps.py`` shows them):

- `CPU_OVERHEAD`: steps that only decode took 0.5 to 0.7 ms more than their kernels with few or
  many decodes (Llama-3.1-8B; up to 2.8 ms in between, where lengths differ and waves are few).
- `PREFILL_OVERHEAD`: steps with a prefill took 3.8 to 4.3 ms more than their kernels, whatever
  their size: they are not run as one CUDA graph (Llama-3.1-8B).
- `LINK_GBPS` and `LINK_LATENCY`, of the two devices that share experts: with 16 GB/s, steps with
  a prefill took 5.8 ms more whatever their size, of which 17 us are left for each of 96 hops
  (Qwen3-30B-A3B). LLMServingSim's ``config.json`` says 16 GB/s and 20 us.

Two things are not known here: which prompts share prefixes (the server caches them; one step in
ten with a prefill was far shorter than its prompt allows), and what the first request waits for
besides (60 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import vidur_simpy as vs
from vidur_simpy.execution_time.profile import Profile
from vidur_simpy.replica_scheduler.vllm_v1_release import VLLM_VERSIONS

SHARED = Path(
    os.environ.get("VIDUR_SHARED") or Path(__file__).resolve().parents[2].parent / "shared"
)
RUNS = SHARED / "data/reference/llmservingsim_vllm_bench"
PROFILES = SHARED / "data/reference/llmservingsim_profiles"

CPU_OVERHEAD = 0.6e-3
PREFILL_OVERHEAD = 3.5e-3
LINK_GBPS = 16.0
LINK_LATENCY = 17e-6

DEVICES = {"RTXPRO6000": "rtx-pro-6000-server", "RTX4090": "rtx-4090"}
MODELS = {"Qwen/Qwen3-30B-A3B-Instruct-2507": "Qwen/Qwen3-30B-A3B"}
"""Models that the catalogue has under the name of another with the same sizes."""

BLOCK_SIZE = 16
STATISTICS = ("Mean", "Median", "P90", "P95", "P99")
METRICS = ("TTFT", "TPOT", "E2E")


class Run(NamedTuple):
    """A real run: what was asked of the server, and what it measured.

    Attributes
    ----------
    name : str
        The folder, as ``RTXPRO6000/Llama-3.1-8B``.
    folder : Path
    meta : dict
        Engine arguments, and KV blocks where they were recorded.
    requests : DataFrame
        ``input_toks``, ``output_toks``, and the instants in seconds.
    """

    name: str
    folder: Path
    meta: dict[str, Any]
    requests: pd.DataFrame

    @property
    def engine(self) -> dict[str, Any]:
        """The engine's arguments."""
        return self.meta["engine_kwargs"]

    @property
    def num_replicas(self) -> int:
        """Data parallel replicas."""
        return self.engine.get("data_parallel_size", 1)

    @property
    def shares_experts(self) -> bool:
        """Whether the replicas share experts, and step in step."""
        return self.num_replicas > 1 and bool(self.model.num_experts)

    @property
    def model(self) -> vs.Model:
        """The model served."""
        return vs.Model.from_name(MODELS.get(self.meta["model"], self.meta["model"]))

    @property
    def deployment(self) -> vs.Deployment:
        """The model on the devices of one replica."""
        is_shared = self.shares_experts
        return vs.Deployment(
            self.model,
            vs.Device.from_name(DEVICES[self.folder.parent.name]),
            self.engine.get("tensor_parallel_size", 1),
            data_parallel_size=self.num_replicas if is_shared else 1,
            enable_expert_parallel=bool(self.engine.get("enable_expert_parallel")) and is_shared,
        )

    @property
    def recorded_blocks(self) -> int | None:
        """KV-cache blocks of a replica, where the run recorded them."""
        places = (self.meta, self.meta.get("kv_cache") or {})
        found = (place.get("num_gpu_blocks") for place in places)
        return next((blocks for blocks in found if blocks), None)

    @property
    def planned_blocks(self) -> int:
        """KV-cache blocks of a replica as memory planning has them."""
        longest = int((self.requests.input_toks + self.requests.output_toks).max())
        return self.deployment.plan_num_blocks(
            BLOCK_SIZE,
            self.engine.get("gpu_memory_utilization") or 0.9,
            self.engine.get("max_model_len") or longest,
            max_num_batched_tokens=self.engine["max_num_batched_tokens"],
        )


def runs(folder: Path = RUNS) -> Iterator[Run]:
    """Yield the runs of a folder."""
    for file in sorted(folder.glob("*/*/meta.json")):
        lines = (file.parent / "requests.jsonl").read_text().splitlines()
        requests = pd.DataFrame([json.loads(line) for line in lines])
        name = f"{file.parent.parent.name}/{file.parent.name}"
        yield Run(name, file.parent, json.loads(file.read_text()), requests)


class InStep:
    """Stage times of replicas that share experts, whose steps begin and end together.

    A replica that begins while the others are in a step begins with their next one; those whose
    queue is empty take part without requests. Made for a scheduler that plans a step ahead, so that
    each replica's next batch is known when a step begins.

    Attributes
    ----------
    replicas : sequence of Replica
        To be set once they are there.
    """

    def __init__(self, profile: Profile) -> None:
        self.replicas: Sequence[Any] = ()
        self._profile = profile
        self._members: list[Any] = []
        self._ends_at = -1.0

    def for_replica(self, deployment: vs.Deployment) -> Callable[[Any, int], float]:
        """Return the stage times of any of the replicas."""
        self._together = self._profile.for_replica(deployment).together
        return self._time_left

    def _time_left(self, batch: Any, stage_id: int) -> float:
        """Return the seconds to the end of the step that a batch takes part in."""
        now = self.replicas[batch.replica_id].env.now
        if not any(member is batch for member in self._members):
            starts_at = max(now, self._ends_at)
            self._members = [self._next_of(replica, batch) for replica in self.replicas]
            self._ends_at = starts_at + self._together(self._members)
        return max(self._ends_at - now, 0.0)

    @staticmethod
    def _next_of(replica: Any, batch: Any) -> Any:
        if replica.replica_id == batch.replica_id:
            return batch
        queue = replica.stages[0].queue
        return queue[0] if queue else None


def balancer(interval: float = 0.1) -> Callable[[Any, Sequence[Any]], Any]:
    """Return vLLM's router over data parallel replicas.

    It takes the least of 4 times the waiting plus the running requests. The counts are reported
    every `interval` seconds; in between, each request it sends adds one that waits.
    """
    reported_at, counts = -interval, []

    def route(request: Any, replicas: Sequence[Any]) -> Any:
        nonlocal reported_at, counts
        now = replicas[0].env.now
        if now - reported_at >= interval:
            reported_at = now
            counts = [[r.num_waiting, r.num_outstanding - r.num_waiting] for r in replicas]
        chosen = min(range(len(replicas)), key=lambda i: 4 * counts[i][0] + counts[i][1])
        counts[chosen][0] += 1
        return replicas[chosen]

    return route


def nearest_release(version: str) -> str:
    """Return the release whose rules are known that is nearest to a version.

    >>> nearest_release("0.19.0")
    '0.19.1'
    """

    def number(text: str) -> float:
        minor, patch = text.split(".")[1:3]
        return int(minor) + int(patch) / 100

    return min(VLLM_VERSIONS, key=lambda known: abs(number(known) - number(version)))


def profile_of(run: Run, folder: Path = PROFILES, **changes: float) -> Profile:
    """Return the kernel profile of a run's host with the constants of all runs."""
    constants = {
        "cpu_overhead": CPU_OVERHEAD,
        "prefill_overhead": PREFILL_OVERHEAD,
        "link_gbps": LINK_GBPS,
        "link_latency": LINK_LATENCY,
    }
    return Profile(folder / run.name, **(constants | changes))


def replayed(run: Run, profile: Profile) -> vs.Result:
    """Replay a run: its arrivals and lengths on a cluster with its engine's arguments."""
    requests = run.requests
    deployment = run.deployment
    in_step = InStep(profile) if run.shares_experts else None
    longest = int((requests.input_toks + requests.output_toks).max())
    cluster = vs.Cluster(
        model=deployment.model,
        device=deployment.device,
        num_replicas=run.num_replicas,
        tensor_parallel_size=deployment.tensor_parallel_size,
        data_parallel_size=deployment.data_parallel_size,
        enable_expert_parallel=deployment.enable_expert_parallel,
        max_model_len=run.engine.get("max_model_len") or longest,
        kv_cache=vs.KVCache(
            block_size=BLOCK_SIZE, num_blocks=run.recorded_blocks or run.planned_blocks
        ),
        global_scheduler=balancer(),
        replica_scheduler=vs.VllmV1(
            max_num_seqs=run.engine["max_num_seqs"],
            max_num_batched_tokens=run.engine["max_num_batched_tokens"],
            async_scheduling=True,
            vllm_version=nearest_release(run.meta["vllm_version"]),
        ),
        execution_time=in_step or profile,
    )
    trace = pd.DataFrame(
        {
            "arrived_at": requests.arrival_time - requests.arrival_time.min(),
            "num_prefill_tokens": requests.input_toks,
            "num_decode_tokens": requests.output_toks,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        trace.to_csv(path, index=False)
        workload = vs.Trace(str(path))
        simulation = vs.Simulation(cluster, workload, record=("batches",), progress=False)
    if in_step is not None:
        in_step.replicas = simulation.replicas
    simulation.run()
    return simulation.result()


def simulated(run: Run, profile: Profile) -> pd.DataFrame:
    """Return TTFT, TPOT and E2E of each request of a replay in milliseconds."""
    result = replayed(run, profile)
    served = result.requests.sort_values("request_id")
    return times(
        taken_in(served, result.batches),
        served.first_token_at.to_numpy(),
        served.completed_at.to_numpy(),
        run.requests.output_toks.to_numpy(),
    )


def taken_in(requests: pd.DataFrame, batches: pd.DataFrame) -> np.ndarray:
    """Return when each request's engine took it in: when it planned the next step."""
    instants = np.empty(len(requests))
    for replica_id, planned in batches.groupby("replica_id").scheduled_at:
        is_here = (requests.replica_id == replica_id).to_numpy()
        plans = np.sort(planned.to_numpy())
        arrivals = requests.arrived_at.to_numpy()[is_here]
        instants[is_here] = plans[np.searchsorted(plans, arrivals)]
    return instants


def times(
    queued: np.ndarray, first: np.ndarray, last: np.ndarray, num_tokens: np.ndarray
) -> pd.DataFrame:
    """Return TTFT, TPOT and E2E in milliseconds from instants in seconds."""
    tpot = (last - first) / np.maximum(num_tokens - 1, 1)
    return 1e3 * pd.DataFrame({"TTFT": first - queued, "TPOT": tpot, "E2E": last - queued})


def measured(run: Run) -> pd.DataFrame:
    """Return the server's TTFT, TPOT and E2E of each request in milliseconds."""
    instants = (run.requests[f"{name}_ts"].to_numpy() for name in ("queued", "first_token"))
    last = run.requests.last_token_ts.to_numpy()
    return times(*instants, last, run.requests.output_toks.to_numpy())


def statistics(each: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Return the statistics of each metric."""
    found = {}
    for metric in METRICS:
        values = each[metric].to_numpy()
        row = (values.mean(), *np.percentile(values, (50, 90, 95, 99)))
        found.update({(metric, name): float(v) for name, v in zip(STATISTICS, row, strict=True)})
    return found


def published(run: Run) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the server's figures and LLMServingSim's error in percent, as its summary has them."""
    file = run.folder / "summary.txt"
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        words = line.replace("Latency", "E2E").split()
        if len(words) == 5 and words[0] in METRICS:
            found[words[0], words[1]] = float(words[2]), float(words[4].rstrip("%"))
    return found


def compare(run: Run, profile: Profile) -> pd.DataFrame:
    """Return a row per statistic: the server, ours, our error, theirs, in ms and percent."""
    server, ours, others = (
        statistics(measured(run)),
        statistics(simulated(run, profile)),
        published(run),
    )
    rows = []
    for key, value in server.items():
        error = 100 * (ours[key] / value - 1)
        row: dict[str, Any] = {
            "metric": " ".join(key),
            "server": value,
            "ours": ours[key],
            "error": error,
        }
        if key in others:
            row["theirs"] = others[key][1]
            row["closer"] = "ours" if abs(error) <= abs(row["theirs"]) else "theirs"
        rows.append(row)
    return pd.DataFrame(rows).set_index("metric")


def show(run: Run, table: pd.DataFrame) -> None:
    """Print a run's table."""
    engine = run.engine
    print(
        f"{run.name}: vLLM {run.meta['vllm_version']}, TP {engine['tensor_parallel_size']}, DP "
        f"{run.num_replicas}{', expert parallel' if run.shares_experts else ''}"
    )
    blocks, planned = run.recorded_blocks, run.planned_blocks
    if blocks:
        print(f"KV blocks: {blocks} recorded, {planned} planned ({planned / blocks - 1:+.1%})")
    else:
        print(f"KV blocks: not recorded, {planned} planned")
    print(table.to_string(float_format="{:.1f}".format))
    if "closer" in table:
        print(f"closer than LLMServingSim: {(table.closer == 'ours').sum()} of {len(table)} rows")
    print(f"largest error: {table.error.abs().max():.1f} %\n")


def main(arguments: Mapping[str, Any]) -> None:
    """Compare all runs, or those whose name contains a text."""
    for run in runs(arguments["runs"]):
        if arguments["only"] in run.name:
            show(run, compare(run, profile_of(run, arguments["profiles"])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--only", default="")
    main(vars(parser.parse_args()))
