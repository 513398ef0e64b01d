"""How well a calibrated simulation predicts another load of a real vLLM server.

The server is vLLM 0.32 on two CPU cores with a tiny random Llama; each of eight runs of 40 requests
at a low load (``cal``) is followed by one at a high load (``high``), because the machine varies by
8 to 23 % from time to time. The execution time is fitted to ``cal``, from iterations and from
requests alone, and predicts ``high``. Run it by hand::

    python tests/benchmarks/calibration_vllm_cpu.py [--shared DIRECTORY] [--pairs N]

It prints the fitted parameters, the errors of the fit and of the prediction in percent (of the
mean, the median and the 95th percentile over all requests), and how many of the measured
statistics of single runs lie in their band of 90 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import vidur_simpy as vs

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FOLDER = Path("data/reference/vllm_cpu")
KINDS = ("steps", "requests")
QUANTITIES = ("ttft", "tpot", "e2e")
STATISTICS = {
    "mean": np.mean,
    "p50": np.median,
    "p95": lambda times: np.quantile(times, 0.95),
}

# Neither its geometry nor the cores were recorded: the calibration has to make up for that.
MODEL = {
    "name": "tiny random Llama",
    "num_layers": 8,
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32000,
}
DEVICE = {
    "name": "two cores",
    "bf16_dense_tflops": 0.1,
    "memory_bandwidth_gbps": 20,
    "memory_gb": 8,
    "scaleup_bidir_gbps": 10,
}


class Comparison(NamedTuple):
    """One calibration and what it predicts.

    Attributes
    ----------
    calibration : Calibration
    errors : DataFrame
        Relative errors of the prediction: a row per latency, a column per statistic.
    bands : DataFrame
        A row per run, latency and statistic: ``low``, ``value``, ``high`` and ``measured``, in
        seconds.
    """

    calibration: vs.Calibration
    errors: pd.DataFrame
    bands: pd.DataFrame


def server(folder: Path) -> vs.Cluster:
    """Return the server, with the settings of its engine."""
    engine = json.loads((folder / "conditions.json").read_text())["engine"]
    return vs.Cluster(
        model=MODEL,
        device=DEVICE,
        max_model_len=engine["max_model_len"],
        # The first request of 4 blocks left 4091 of them, and vLLM keeps one back.
        kv_cache=vs.KVCache(block_size=engine["block_size"], num_blocks=4096),
        replica_scheduler=vs.VllmV1(
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=engine["max_num_batched_tokens"],
            enable_prefix_caching=engine["enable_prefix_caching"],
            async_scheduling=False,
        ),
    )


def run(shared: Path, kinds: Sequence[str] = KINDS, num_pairs: int = 8) -> dict[str, Comparison]:
    """Calibrate on ``cal`` from each kind of measurement and predict ``high``."""
    folder = shared / FOLDER
    cluster = server(folder)
    measured = vs.read_measurement(folder / "high_requests.csv")
    return {
        kind: compare(vs.calibrate(cluster, folder / f"cal_{kind}.csv"), measured, num_pairs)
        for kind in kinds
    }


def compare(
    calibration: vs.Calibration, measured: vs.MeasuredRequests, num_pairs: int
) -> Comparison:
    """Predict measured requests."""
    rows, latencies = [], []
    for one in measured.split():
        result = vs.simulate_with_uncertainty(calibration.cluster, one, num_pairs=num_pairs)
        latencies.append(result.requests[list(QUANTITIES)])
        band = result.uncertainty()
        for quantity in QUANTITIES:
            for name, statistic in STATISTICS.items():
                row = {"quantity": quantity, "statistic": name, **band.loc[(quantity, name)]}
                rows.append(row | {"measured": statistic(getattr(one, quantity))})
    predicted = pd.concat(latencies)
    errors = {
        quantity: {
            name: statistic(predicted[quantity]) / statistic(getattr(measured, quantity)) - 1
            for name, statistic in STATISTICS.items()
        }
        for quantity in QUANTITIES
    }
    return Comparison(calibration, pd.DataFrame(errors).T, pd.DataFrame(rows))


def num_in_band(bands: pd.DataFrame) -> pd.DataFrame:
    """Return how many runs measured what lies in the band, by latency and statistic."""
    is_in = bands["measured"].between(bands["low"], bands["high"])
    return is_in.groupby([bands["quantity"], bands["statistic"]], sort=False).sum().unstack()


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with the measurements")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of machines behind a band")
    arguments = parser.parse_args()
    for kind, comparison in run(arguments.shared, num_pairs=arguments.pairs).items():
        calibration = comparison.calibration
        print(f"calibrated from {kind}\n\n{calibration.parameters.to_string()}\n")
        print(f"{(100 * calibration.residuals.drop(columns='count')).round(1).to_string()}\n")
        print(f"drift {100 * calibration.execution_time.drift:.1f} %\n")
        print(f"errors of the prediction (%)\n{(100 * comparison.errors).round(1).to_string()}\n")
        num_runs = len(comparison.bands) // len(QUANTITIES) // len(STATISTICS)
        in_band = num_in_band(comparison.bands)
        print(f"in the band of 90 %, of {num_runs} runs\n{in_band.to_string()}\n")


if __name__ == "__main__":
    main()
