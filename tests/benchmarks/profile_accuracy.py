"""How well each regressor predicts points left out of real operator tables.

The tables are those in Vidur's formats in the reference material. Run it by hand::

    python tests/benchmarks/profile_accuracy.py [--profiles FOLDER] [--regressors NAME ...]

It prints each operator's cross-validated mean absolute error in percent, the seconds to fit, and
the microseconds to look up the time of a batch of 32 decodes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import vidur_simpy as vs

PROFILES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "vidur_profiles"
REGRESSORS = ("random_forest", "polynomial", "interpolation")

# folder, network, model, device, tensor parallel size
REPLICAS = {
    "A100, Llama-2-70B, TP 2": (
        "a100/meta-llama/Llama-2-70b-hf",
        "network/a100_dgx",
        "llama-2-70b",
        "a100",
        2,
    ),
    "A800, Llama-2-7B": ("a800/meta-llama/Llama-2-7b-hf", None, "llama-2-7b", "a800", 1),
    "A30, Qwen2-7B": ("a30/Qwen/Qwen-2-7B", None, "qwen2.5-7b", "a30", 1),
}


class Decodes(NamedTuple):
    """A batch of decodes by its counts."""

    num_decodes: int
    decode_context: int
    prefills: tuple[Any, ...] = ()

    @property
    def num_tokens(self) -> int:
        """One per decode."""
        return self.num_decodes


def run(folder: Path, regressors: tuple[str, ...] = REGRESSORS) -> pd.DataFrame:
    """Fit every profile with every regressor; one column for each."""
    columns = {}
    for label, (path, network, model, device, width) in REPLICAS.items():
        replica = vs.Deployment(vs.Model.from_name(model), vs.Device.from_name(device), width)
        for regressor in regressors:
            profile = vs.Profile(
                folder / path,
                regressor=regressor,
                network=network and folder / network,
                # The A30 table holds times of the bias alone for some projections.
                skip_bad_rows=device == "a30",
            )
            columns[label, regressor] = figures(profile, replica)
    return pd.DataFrame(columns)


def figures(profile: vs.Profile, replica: vs.Deployment) -> dict[str, float]:
    """Return the errors in percent, the time to fit and the time of a look-up."""
    started = time.perf_counter()
    stage_time = profile.for_replica(replica)
    errors = {name: 100 * error for name, error in stage_time.errors.items()}
    fit = time.perf_counter() - started
    batch = Decodes(32, 32 * 1000)
    stage_time(batch, 0)
    started = time.perf_counter()
    for _ in range(10_000):
        stage_time(batch, 0)
    lookup = (time.perf_counter() - started) / 10_000
    return errors | {"fit, s": fit, "look-up, us": 1e6 * lookup}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--regressors", nargs="+", default=REGRESSORS, choices=REGRESSORS)
    arguments = parser.parse_args()
    table = run(arguments.profiles, tuple(arguments.regressors))
    print(table.round(2).T.to_string(na_rep="-"))


if __name__ == "__main__":
    main()
