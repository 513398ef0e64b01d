"""The command line: parse, call, print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click

from vidur_simpy.errors import ConfigError, SimulationError, VidurError

__all__ = ["main"]

CONTEXT = {"help_option_names": ["-h", "--help"]}

config_argument = click.argument("config", type=click.Path(dir_okay=False))
set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Replace a setting, as in cluster.num_replicas=8; may be given several times.",
)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="vidur-simpy")
def commands() -> None:
    """Simulate LLM inference clusters by discrete events."""


@commands.command()
@config_argument
@set_option
@click.option(
    "--record",
    multiple=True,
    help="Also keep batches, stages, events or tokens; may be given several times.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the tables and figures; nothing is written without it.",
)
def run(config: str, overrides: Sequence[str], record: Sequence[str], out: Path | None) -> None:
    """Run CONFIG and print the summary."""
    from vidur_simpy import Simulation
    from vidur_simpy.storage import check_target

    arguments, until = _arguments(config, overrides)
    arguments["record"] = [*_names(arguments.get("record", ())), *record]
    if out is not None:
        check_target(out)
    simulation = Simulation(**arguments)
    try:
        simulation.run(until)
    finally:
        # Whatever ended the run, what it computed is shown and kept.
        _show(simulation.result(), out)


@commands.command()
@config_argument
@set_option
def check(config: str, overrides: Sequence[str]) -> None:
    """Read CONFIG and its trace, plan the memory, and say what would run."""
    from vidur_simpy import Simulation

    arguments, _ = _arguments(config, overrides)
    simulation = Simulation(**arguments)
    cluster = simulation.cluster
    click.echo(
        f"{config}: ok. {cluster.num_replicas} x {cluster.deployment.model.name} on "
        f"{cluster.num_devices} x {cluster.deployment.device.name}, {cluster.num_blocks} KV-cache "
        f"blocks of {cluster.kv_cache.block_size} tokens per replica, "
        f"{simulation.num_expected} requests."
    )


def _arguments(config: str, overrides: Sequence[str]) -> tuple[dict[str, Any], float | None]:
    """Return what a Simulation takes, and until when it runs."""
    from vidur_simpy import load_config

    arguments = load_config(config, overrides)
    if "workload" not in arguments:
        raise ConfigError(f"{config} needs a workload, as in workload: {{type: trace, path: ...}}.")
    return arguments, arguments.pop("until", None)


def _names(record: Any) -> list[Any]:
    is_several = isinstance(record, Collection) and not isinstance(record, str)
    return list(record) if is_several else [record]


def _show(result: Any, out: Path | None) -> None:
    click.echo(str(result))
    if out is None:
        return
    result.save(out)
    for name, axes in (("timeline", result.plot.timeline()), ("ttft", result.plot.cdf("ttft"))):
        axes.figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
    click.echo(f"Tables and figures are in {out}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 1 (the run failed) or 2 (bad usage or configuration)."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            commands.main(args=arguments, prog_name="vidur-simpy", standalone_mode=True)
        except SimulationError as error:
            _fail(error, 1)
        except VidurError as error:
            _fail(error, 2)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning without the line of code that gave it."""
    click.echo(f"Warning: {message}", err=True)


def _fail(error: Exception, code: int) -> None:
    click.echo(f"Error: {error}", err=True)
    sys.exit(code)
