"""How far simulated servers are from those that NVIDIA measured.

NVIDIA publishes mean TTFT and TPOT of real servers at a stated concurrency (aiconfigurator-core
0.12, ``systems/silicon_sample.csv``, Apache-2.0). Each row for vLLM is played again as a closed
loop: so many clients, each of which submits its next request when the last one is complete. Run it
by hand::

    python tests/benchmarks/nvidia_rows.py --rows FILE [--execution-time NAME ...] [--each] [--fit]

It prints the errors by model, device and precision, over the half of the rows that constants were
fitted on and over the other half (by a hash of the row's id), and the worst rows. ``--each`` prints
every row, ``--fit`` fits the CPU overhead again.

Whoever measured decided how the load looked and how vLLM was started, not the row. There were two
benchmarks, recognised by where the row says it comes from:

*InferenceMAX* (Llama-70B; github.com/InferenceMAX, ``benchmarks/70b_fp8_*.sh``): all clients start
at once, 10 requests for each; lengths are uniform between 0.8 of what is stated and it; the server
had ``--max-num-seqs`` of the concurrency, 8192 batched tokens, asynchronous scheduling and no
prefix caching. Its scripts have an fp8 cache on H200; those for H100 had one at times and none at
others. The row that runs out of memory says which: 64 clients with up to 8192 output tokens on two
H100 wait 30.8 s for their first token, 29.0 s when simulated without, 0.4 s with an fp8 cache.

*AIPerf* on servers that AIConfigurator set up (Qwen3-32B, Llama-8B; its rules for vLLM give
``max_num_batched_tokens`` of the prompt, the batch and 1500): all lengths are as stated. AIPerf
takes prompts in turn from a few different ones. The Llama-8B rows leave time for one prefill in
five to twenty requests only, so that prefixes were cached there (`NUM_PROMPTS`); those of Qwen3-32B
compute every prompt. NVIDIA's fp8 checkpoints ask for an fp8 cache.

The mean TTFT is of all requests, those of the start among them: with 10 requests a client, their
wait for each other's prompts is most of it. Between two requests a client takes some milliseconds
(`TURNAROUND`); with equal lengths, this is what keeps clients from moving in step.

Where it is far off: where the KV cache is full (TTFT of seconds), 10 to 20 % fewer blocks than we
plan make up for it; with 8 to 32 clients of equal lengths, TTFT is that of clients that bunched,
which a step more or less in their turnaround undoes; of Llama-8B we do not know which prompts were
cached when the clients started. TTFT on H200 lacks some 25 ms throughout, as of a server in front.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import vidur_simpy as vs

DEVICES = {"h100_sxm": "h100-80gb-sxm", "h200_sxm": "h200-141gb-sxm"}
MODELS = {
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
}

ROUNDS = 10
"""Requests of each client. Stated for InferenceMAX; of 8, 10, 12 and 15 the best for AIPerf."""

TURNAROUND = 0.01
"""Mean seconds (exponential) between an answer and the next request, of 10 to 200 ms the best."""

NUM_PROMPTS = 64
"""Different prompts of the Llama-8B rows: of 50, 64, 80 and 100 the best for their TPOT."""

CPU_OVERHEADS = {"roofline": (1.4e-3, 4.8e-5), "aiconfigurator": (1.35e-3, 3.1e-5)}
"""Seconds per iteration, and for each sequence in it; see `fit`."""


class Row(NamedTuple):
    """One measurement, in seconds."""

    name: str
    model: str
    device: str
    precision: str
    tensor_parallel_size: int
    num_prefill_tokens: int
    num_decode_tokens: int
    concurrency: int
    is_inferencemax: bool
    ttft: float
    tpot: float

    @property
    def is_held_out(self) -> bool:
        """Whether no constant was fitted on it."""
        return hashlib.sha256(self.name.encode()).digest()[-1] % 2 == 1

    @property
    def has_fp8_cache(self) -> bool:
        """Whether the server kept keys and values in fp8."""
        is_bf16 = self.is_inferencemax and self.device == DEVICES["h100_sxm"]
        return self.precision == "fp8" and not is_bf16

    @property
    def has_cached_prefixes(self) -> bool:
        """Whether the server knew prompts that came again."""
        return self.model == "llama-3.1-8b"


class Played(NamedTuple):
    """A row, and the mean TTFT and TPOT of its simulation in seconds."""

    row: Row
    ttft: float
    tpot: float

    @property
    def ttft_error(self) -> float:
        """Relative error, in percent."""
        return 100 * (self.ttft / self.row.ttft - 1)

    @property
    def tpot_error(self) -> float:
        """Relative error, in percent."""
        return 100 * (self.tpot / self.row.tpot - 1)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows for vLLM on Hopper, of known concurrency and on one server."""
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            source = cells["silicon_data_source"]
            concurrency = re.search(r"silicon_concurrency=(\d+)", source)
            kind = cells["backend"], cells["mode"]
            is_known = cells["model_path"] in MODELS and cells["system"] in DEVICES
            if kind == ("vllm", "agg") and is_known and concurrency:
                yield Row(
                    name=cells["id"],
                    model=MODELS[cells["model_path"]],
                    device=DEVICES[cells["system"]],
                    precision=cells["precision"] or "bf16",
                    tensor_parallel_size=int(float(cells["tp_size"])),
                    num_prefill_tokens=int(cells["isl"]),
                    num_decode_tokens=int(cells["osl"]),
                    concurrency=int(concurrency[1]),
                    is_inferencemax=source.startswith("source_file=2026-04-06.csv"),
                    ttft=float(cells["silicon_ttft_ms"]) / 1e3,
                    tpot=float(cells["silicon_tpot_ms"]) / 1e3,
                )


def cluster_of(row: Row, execution_time: Any) -> vs.Cluster:
    """Return the server of a row."""
    prompt, concurrency = row.num_prefill_tokens, row.concurrency
    if row.is_inferencemax:
        policy = vs.VllmV1(
            max_num_seqs=concurrency,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            async_scheduling=True,
        )
    else:
        policy = vs.VllmV1(
            max_num_seqs=max(512, concurrency),
            max_num_batched_tokens=prompt + concurrency + 1500,
            enable_prefix_caching=row.has_cached_prefixes,
        )
    return vs.Cluster(
        model=row.model,
        device=row.device,
        tensor_parallel_size=row.tensor_parallel_size,
        quantization=row.precision,
        kv_cache_dtype="fp8" if row.has_fp8_cache else "auto",
        max_model_len=prompt + row.num_decode_tokens + (200 if row.is_inferencemax else 1500),
        replica_scheduler=policy,
        execution_time=execution_time,
    )


def requests_of(row: Row, rounds: int, rng: np.random.Generator) -> Iterator[vs.Request]:
    """Yield the requests of all clients, in the order in which they are taken."""
    num_requests = rounds * row.concurrency
    shortest = 0.8 if row.is_inferencemax else 1.0
    lengths = [
        rng.integers(int(shortest * longest), longest + 1, num_requests).tolist()
        for longest in (row.num_prefill_tokens, row.num_decode_tokens)
    ]
    for index, (prompt, output) in enumerate(zip(*lengths, strict=True)):
        blocks = -(-prompt // 16)
        first = index % NUM_PROMPTS * blocks
        hash_ids = range(first, first + blocks) if row.has_cached_prefixes else None
        yield vs.Request(prompt, output, hash_ids=hash_ids, hash_block_size=16)


def client(
    sim: vs.Simulation, requests: Iterable[vs.Request], rng: np.random.Generator
) -> Iterator[Any]:
    """Submit the next request when the last one is complete, as long as there are any."""
    for request in requests:
        yield sim.env.timeout(rng.exponential(TURNAROUND))
        yield sim.submit(request)


def play(row: Row, execution_time: Any, rounds: int = ROUNDS) -> Played:
    """Simulate a row."""
    sim = vs.Simulation(cluster_of(row, execution_time), progress=False)
    rng = np.random.default_rng(0)
    requests = requests_of(row, rounds, rng)
    for _ in range(row.concurrency):
        sim.env.process(client(sim, requests, rng))
    sim.run()
    table = sim.result().requests
    return Played(row, table["ttft"].mean(), table["tpot"].mean())


def execution_time_of(name: str, row: Row, overheads: tuple[float, float] | None = None) -> Any:
    """Return an execution-time model with the CPU overheads of a server."""
    overhead, per_sequence = overheads or CPU_OVERHEADS[name]
    base: Any = vs.Roofline(cpu_overhead=overhead)
    if name == "aiconfigurator":
        # Both fp8 checkpoints bring the scales of their activations.
        mode = "fp8_static" if row.precision == "fp8" else None
        base = vs.AIConfigurator(cpu_overhead=overhead, gemm_quant_mode=mode)
    return vs.Calibrated(base, per_sequence=per_sequence)


def fit(name: str, rows: list[Row]) -> tuple[float, float]:
    """Fit the CPU overheads to TPOT, on half of the rows; return seconds.

    Rows of 8192 output tokens are played with two requests a client.
    """
    from scipy.optimize import least_squares

    chosen = [row for row in rows if not row.is_held_out]

    def errors(overheads: Any) -> list[float]:
        found = []
        for row in chosen:
            execution_time = execution_time_of(name, row, tuple(1e-3 * overheads))
            rounds = 2 if row.num_decode_tokens > 2000 else ROUNDS
            found.append(np.log(play(row, execution_time, rounds).tpot / row.tpot))
        return found

    found = least_squares(
        errors, [1.5, 0.05], diff_step=0.05, loss="soft_l1", f_scale=0.05, max_nfev=6
    )
    overhead, per_sequence = 1e-3 * found.x
    return overhead, per_sequence


def show(title: str, played: list[Played]) -> None:
    """Print a line of errors over some rows."""
    if played:
        tpot = [one.tpot_error for one in played]
        ttft = [one.ttft_error for one in played]
        print(
            f"{title:<44} {len(played):4} {np.mean(np.abs(tpot)):6.1f} {np.mean(tpot):+6.1f} "
            f"{np.median(np.abs(ttft)):8.1f} {np.mean(np.abs(ttft)):6.1f} {np.median(ttft):+6.1f}"
        )


def show_rows(played: list[Played]) -> None:
    """Print a line for each row."""
    print(
        f"{'model':<14} {'device':<14} TP prompt output clients   "
        "TTFT measured, simulated (ms)   TPOT measured, simulated (ms)"
    )
    for one in played:
        row, ttft, tpot = one
        print(
            f"{row.model:<14} {row.device:<14} {row.tensor_parallel_size:2} "
            f"{row.num_prefill_tokens:6} {row.num_decode_tokens:6} {row.concurrency:7}   "
            f"{1e3 * row.ttft:8.0f} {1e3 * ttft:8.0f} {one.ttft_error:+6.0f} %      "
            f"{1e3 * row.tpot:8.1f} {1e3 * tpot:8.1f} {one.tpot_error:+6.0f} %"
        )


def show_model(name: str, rows: list[Row], each: bool) -> None:
    """Print the tables of one execution-time model."""
    played = [play(row, execution_time_of(name, row)) for row in rows]
    print(f"\n{name:<44} rows   TPOT MAPE, bias   TTFT median, mean, bias (%)")
    groups: dict[str, Callable[[Played], bool]] = {
        "fitted half": lambda one: not one.row.is_held_out,
        "other half": lambda one: one.row.is_held_out,
        "all": lambda one: True,
    }
    for kind in sorted({(row.model, row.device, row.precision) for row in rows}):
        groups[", ".join(kind)] = lambda one, kind=kind: (
            kind
            == (
                one.row.model,
                one.row.device,
                one.row.precision,
            )
        )
    for title, is_in in groups.items():
        show(title, [one for one in played if is_in(one)])
    worst = sorted(played, key=lambda one: -max(abs(one.tpot_error) * 2, abs(one.ttft_error)))
    show_rows(played if each else worst[:12])


def main() -> None:
    """Print the tables, or fit."""
    shared = Path(__file__).resolve().parents[2].parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        type=Path,
        default=shared / "data" / "reference" / "nvidia_silicon_sample.csv",
        help="the measurements",
    )
    names = ("roofline", "aiconfigurator")
    parser.add_argument("--execution-time", nargs="+", choices=names, default=names)
    parser.add_argument("--limit", type=int, help="take the first so many rows only")
    parser.add_argument("--each", action="store_true", help="print every row")
    parser.add_argument("--fit", action="store_true", help="fit the CPU overheads")
    arguments = parser.parse_args()
    rows = list(read_rows(arguments.rows))[: arguments.limit]
    for name in arguments.execution_time:
        if arguments.fit:
            overhead, per_sequence = fit(name, rows)
            print(f"{name}: {1e3 * overhead:.2f} ms + {1e6 * per_sequence:.1f} us per sequence")
        else:
            show_model(name, rows, arguments.each)


if __name__ == "__main__":
    main()
