"""Many calls of one function through joblib, which decides where they happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vidur_simpy.errors import ConfigError, VidurError

__all__ = ["as_completed"]

# What Dask raises of a task that brought several workers down, and Ray of a single one.
DEAD_WORKER = frozenset(
    {
        "distributed.KilledWorker",
        "ray.OutOfMemoryError",
        "ray.RayActorError",
        "ray.WorkerCrashedError",
    }
)

Task = TypeVar("Task")
Value = TypeVar("Value")


def as_completed(
    function: Callable[[Task], Value],
    tasks: Sequence[Task],
    jobs: int | None = None,
    *,
    usual_jobs: int = 1,
) -> Iterator[tuple[int, Value]]:
    """Call a function with each task; yield the number of the task and what came out of it.

    They come in the order in which they are completed. A backend that cannot hand over values
    while others are under way (``multiprocessing``, ``ray``) yields all of them at the end. Dask
    calls again what a worker that died was about; ``multiprocessing`` waits for it for ever.

    Parameters
    ----------
    jobs : int, optional
        Workers; -1 for one per core. None leaves it to ``joblib.parallel_config``, where a backend
        without a number of workers uses all it has.
    usual_jobs : int
        Workers where that says nothing, either; with 1 the calls happen here, one by one.

    Raises
    ------
    ConfigError
        If joblib is not installed, or `jobs` is no number of workers.
    VidurError
        If a worker process died, most often for want of memory.
    """
    if not tasks:
        return
    joblib = _joblib()
    parallel = joblib.Parallel(
        n_jobs=_num_jobs(joblib, jobs, usual_jobs),
        return_as=_order_of_return(joblib),
        max_nbytes=None,
    )
    calls = (joblib.delayed(_numbered)(function, *task) for task in enumerate(tasks))
    try:
        yield from parallel(calls)
    except Exception as error:
        if not _is_of_a_dead_worker(error):
            raise
        raise VidurError(
            "a worker process died, most often because memory ran out; use fewer workers. "
            f"({' '.join(str(error).split())})"
        ) from error


def _is_of_a_dead_worker(error: Exception) -> bool:
    """Whether an exception is a backend's word for a worker process that died."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return isinstance(error, BrokenProcessPool) or not kinds.isdisjoint(DEAD_WORKER)


def _numbered(function: Callable[[Task], Value], number: int, task: Task) -> tuple[int, Value]:
    return number, function(task)


def _joblib() -> Any:
    try:
        import joblib
    except ImportError:
        raise ConfigError(
            "many runs need joblib, which is not installed: pip install 'vidur-simpy[search]'."
        ) from None
    return joblib


def _num_jobs(joblib: Any, jobs: int | None, usual_jobs: int) -> int | None:
    if jobs is not None:
        if isinstance(jobs, bool) or not isinstance(jobs, int) or not (jobs == -1 or jobs >= 1):
            raise ConfigError(
                f"jobs = {jobs!r}: expected a number of workers, or -1 for one per core."
            )
        return jobs
    # A hint changes a backend that nobody chose, and no other.
    active = joblib.parallel.get_active_backend
    by_hint = {type(active(prefer=hint)[0]) for hint in ("threads", "processes")}
    is_chosen = len(by_hint) == 1
    if active()[1] is not None:
        return None
    return -1 if is_chosen else usual_jobs


def _order_of_return(joblib: Any) -> str:
    backend, _ = joblib.parallel.get_active_backend()
    return "generator_unordered" if backend.supports_return_generator else "list"
