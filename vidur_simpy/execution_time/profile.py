"""Execution time from tables of operators measured on a real device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vidur_simpy.errors import ProfileError
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from vidur_simpy.deployment import Deployment
    from vidur_simpy.execution_time.interface import StageTime

__all__ = ["Profile"]


@configuration
class Profile:
    """Stage times from tables of operators that were measured on the device itself.

    Two formats are read. Vidur's: ``mlp.csv`` and ``attention.csv`` in one folder, for more than
    one device ``all_reduce.csv`` and ``send_recv.csv``, all in milliseconds; `VidurStageTime` has
    the rules. LLMServingSim's: ``dense.csv``, ``per_sequence.csv``, ``attention.csv`` and for
    mixtures of experts ``moe.csv``, in microseconds.

    The stage times that `for_replica` returns have ``errors``, the cross-validated error of each
    operator, and ``operators(batch, stage_id)``, seconds by operator. What lies beyond the largest
    size that was measured is refused; less than the least size takes as long as that, which it
    does at most.

    Vidur's tables are fitted when the first batch asks for them, and the fits are kept in
    `cache_directory`: once some 20 s for forests, 5 s for polynomials, 0.2 s for interpolation
    (not kept). Points left out of the tables of Llama-2-70B on A100 were predicted to 1 to 2 % by
    forests (all-reduces: 5 %), to 1 to 3 % by interpolation (5 %), to 3 to 9 % by polynomials
    (``tests/benchmarks/profile_accuracy.py``).

    Parameters
    ----------
    path : str or Path
        The folder of one model on one device.
    format : str
        ``"vidur"``, ``"llmservingsim"``, or ``"auto"``: whichever has its files in the folder.
    regressor : str
        For Vidur's format: ``"random_forest"`` as Vidur does it, ``"polynomial"``, or
        ``"interpolation"`` between neighbouring measurements, which needs no scikit-learn.
    extrapolate : bool
        Go beyond what was measured in proportion to the work, with one warning per operator,
        instead of raising a ProfileError.
    cpu_overhead : float
        Seconds of CPU time per iteration, spent in the first stage.
    prefill_overhead : float
        LLMServingSim's format: seconds more of an iteration with a prefill, which a server does
        not run as one CUDA graph.
    link_gbps, link_latency : float or None
        LLMServingSim's format, which holds no transfers: what one device sends to the next while
        all do, in 1e9 bytes per second, and the seconds of each hop. None for the roofline's.
    longest_decode : float
        LLMServingSim's format: the longest context of the requests that decode, as a multiple of
        their mean. Above 1 attention of decodes is looked up with the cost of uneven lengths, where
        that was fitted (``skew_fit.csv``).
    network : str, Path or None
        Vidur's format: the folder of ``all_reduce.csv`` and ``send_recv.csv``; None for `path`.
    cpu_overheads : str, Path or None
        Vidur's format: a table of CPU times by batch size, or its folder. None counts none, which
        is Vidur's default.
    rules : str
        Vidur's format: ``"main"`` for the rules of its repository, ``"0.0.26"`` for those of its
        last release, which differ for several prefills in a batch.
    block_size : int or None
        Vidur's format: the block size that attention was measured with, if there are several.
    devices_per_node : int
        Vidur's format: a replica of more devices sends from stage to stage between nodes.
    skip_bad_rows : bool
        Vidur's format: leave out rows outside physical bounds instead of refusing the table.
    grid : str
        What cross-validation searches: ``"fast"``, 5 folds over 3 forests of 50 trees, or
        ``"vidur"``, 10 folds over 27 forests of 250 to 750 trees.

    Raises
    ------
    ProfileError
        From `for_replica`: files, columns or rows that are missing, or a time that cannot be; from
        the stage times: a batch beyond what was measured.
    ConfigError
        A setting that is unknown, of the wrong type or out of range; scikit-learn is missing.

    Examples
    --------
    >>> Profile("profiles/a100/llama-2-70b", regressor="interpolation").extrapolate
    False
    """

    path: str | Path
    format: Literal["auto", "vidur", "llmservingsim"] = "auto"
    regressor: Literal["random_forest", "polynomial", "interpolation"] = "random_forest"
    extrapolate: bool = False
    cpu_overhead: float = Field(default=0.0, ge=0)
    prefill_overhead: float = Field(default=0.0, ge=0)
    link_gbps: float | None = Field(default=None, gt=0)
    link_latency: float | None = Field(default=None, ge=0)
    longest_decode: float = Field(default=1.0, ge=1)
    network: str | Path | None = None
    cpu_overheads: str | Path | None = None
    rules: Literal["main", "0.0.26"] = "main"
    block_size: int | None = Field(default=None, ge=1)
    devices_per_node: int = Field(default=8, ge=1)
    skip_bad_rows: bool = False
    grid: Literal["fast", "vidur"] = "fast"

    def for_replica(self, deployment: Deployment) -> StageTime:
        """Return the stage times of a replica."""
        # Tables need pandas, which a run without profiles should not load.
        if self.format_found == "vidur":
            from vidur_simpy.execution_time.vidur_profile import vidur_stage_time

            return vidur_stage_time(self, deployment)
        from vidur_simpy.execution_time.operator_tables import llmservingsim_stage_time

        return llmservingsim_stage_time(self, deployment)

    @property
    def format_found(self) -> Literal["vidur", "llmservingsim"]:
        """The format given, or the one whose files are in the folder."""
        if self.format != "auto":
            return self.format
        folder = Path(self.path)
        if (folder / "mlp.csv").is_file():
            return "vidur"
        if (folder / "dense.csv").is_file() or any(folder.glob("tp*/dense.csv")):
            return "llmservingsim"
        if not folder.is_dir():
            raise ProfileError(f"{folder}: there is no such folder.")
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ProfileError(
            f"{folder}: expected Vidur's mlp.csv and attention.csv, or LLMServingSim's dense.csv "
            f"(or folders tp1, tp2, ... with it); found {found}."
        )
