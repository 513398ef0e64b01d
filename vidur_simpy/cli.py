"""The command line: parse, call, print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vidur_simpy.errors import ConfigError, SimulationError, VidurError

if TYPE_CHECKING:
    import pandas as pd

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
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what an earlier command left at --out."
)
store_option = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps each run as it is done: the same command goes on after a kill.",
)
jobs_option = click.option(
    "--jobs", type=int, default=-1, help="Workers; one per core if not given."
)


def table_option(rows: str) -> Callable[[Any], Any]:
    """Return the option of a command that prints a table; see `_check_file` and `_keep`."""
    return click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"CSV file for {rows}; nothing is written without it.",
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
    help="Also keep batches, stages, events, tokens, operators or phases; several times.",
)
@click.option(
    "--record-to",
    type=click.Path(file_okay=False, path_type=Path),
    help="New folder to which rows go as they come, so that a run that is killed keeps them.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the tables and figures; nothing is written without it.",
)
@overwrite_option
def run(
    config: str,
    overrides: Sequence[str],
    record: Sequence[str],
    record_to: Path | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Run CONFIG and print the summary."""
    from vidur_simpy import Simulation
    from vidur_simpy.storage import check_target, make_target

    arguments, until = _arguments(config, overrides)
    arguments["record"] = [*_names(arguments.get("record", ())), *record]
    if out is not None:
        check_target(out, overwrite=overwrite)
        if record_to is not None and record_to.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"--record-to {record_to}: expected a folder outside of --out {out}.")
    simulation = Simulation(**arguments, record_to=record_to)
    if out is not None:
        make_target(out, overwrite=overwrite)
    try:
        simulation.run(until)
    finally:
        # Whatever ended the run, what it computed is shown and kept.
        _show(simulation.result(), out, overwrite)


@commands.command()
@config_argument
@set_option
@click.option(
    "--grid",
    "grid",
    metavar="KEY=VALUE,...",
    multiple=True,
    required=True,
    help="Values of a setting, as in cluster.num_replicas=1,2,4; all combinations of several.",
)
@click.option("--replications", type=int, default=1, help="Runs of each, with seeds of their own.")
@store_option
@table_option("the whole table")
@overwrite_option
@jobs_option
def sweep(
    config: str,
    overrides: Sequence[str],
    grid: Sequence[str],
    replications: int,
    store: Path | None,
    out: Path | None,
    overwrite: bool,
    jobs: int,
) -> None:
    """Run CONFIG with every combination of some settings and print a row for each."""
    import vidur_simpy
    from vidur_simpy.config import read_grid

    arguments, until = _arguments(config, overrides)
    _check_file(out, overwrite)
    arguments["record"] = _names(arguments.get("record", ()))
    values = read_grid(grid)
    made = vidur_simpy.sweep(
        **arguments, grid=values, until=until, replications=replications, store=store, jobs=jobs
    )
    click.echo(str(made))
    _keep(made.table, out, overwrite, "The table is")
    errors = [error for error in made.table["error"] if error]
    if errors:
        raise SimulationError(f"{len(errors)} of {len(made)} runs failed; the first: {errors[0]}")


@commands.command()
@config_argument
@set_option
@click.option(
    "--slo",
    metavar="NAME=SECONDS",
    multiple=True,
    required=True,
    help="Limit, as in ttft:p99=2 or tpot:mean=0.05; or on each request, as in ttft=2 beside "
    "fraction=0.99; may be given several times.",
)
@click.option("--tolerance", type=float, default=0.05, help="How close to come, 0.05 if not given.")
@click.option("--max-replications", type=int, default=32, help="Most runs at one rate.")
@store_option
@table_option("the rates that were tried")
@overwrite_option
@jobs_option
def capacity(
    config: str,
    overrides: Sequence[str],
    slo: Sequence[str],
    tolerance: float,
    max_replications: int,
    store: Path | None,
    out: Path | None,
    overwrite: bool,
    jobs: int,
) -> None:
    """Find the highest arrival rate at which CONFIG meets a service-level objective."""
    import vidur_simpy

    arguments, _ = _arguments(config, overrides)
    _check_file(out, overwrite)
    found = vidur_simpy.capacity(
        arguments["cluster"],
        arguments["workload"],
        slo,
        tolerance=tolerance,
        max_replications=max_replications,
        seed=arguments.get("seed", 0),
        store=store,
        jobs=jobs,
    )
    click.echo(found.curve.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    click.echo(str(found))
    _keep(found.curve, out, overwrite, "The rates that were tried are")


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


def _check_file(out: Path | None, overwrite: bool) -> None:
    """Refuse a file that cannot be written before anything runs."""
    from vidur_simpy.exchange.files import check_new

    if out is not None:
        check_new(out, overwrite=overwrite)


def _keep(table: pd.DataFrame, out: Path | None, overwrite: bool, what: str) -> None:
    from vidur_simpy.exchange.files import new_path

    if out is not None:
        with new_path(out, overwrite=overwrite) as path:
            table.to_csv(path, index=False, lineterminator="\n")
        click.echo(f"{what} in {out}.")


def _show(result: Any, out: Path | None, overwrite: bool) -> None:
    from vidur_simpy.exchange.files import new_path

    click.echo(str(result))
    if out is None:
        return
    result.save(out, overwrite=overwrite)
    for name, axes in (("timeline", result.plot.timeline()), ("ttft", result.plot.cdf("ttft"))):
        with new_path(out / f"{name}.png", overwrite=overwrite) as path:
            axes.figure.savefig(path, dpi=150, bbox_inches="tight")
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
