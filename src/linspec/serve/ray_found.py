"""Ray, where it is installed: what is built on it is imported behind `check_ray_extra`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from linspec.errors import ConfigError

# how much Ray lets its processes stand back behind others
_NICENESS = "RAY_worker_niceness"


def check_ray_extra() -> None:
    """Raise ConfigError where Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--ray needs {error.name}, which is not installed; pip install 'linspec[serve,ray]'"
        ) from error


@contextmanager
def ray_running() -> Iterator[None]:
    """Ray while it lasts: the cluster that RAY_ADDRESS names, or one on this machine that ends with it.

    A Ray that this process has started before is used as it is. Raises ConfigError where there is none.
    """
    check_ray_extra()
    import ray

    if ray.is_initialized():
        yield
        return
    hushed("ray")
    more = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
    try:
        with _as_urgent_as_others():
            ray.init(log_to_driver=False, configure_logging=False, **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Ray does not start: {error}; check RAY_ADDRESS, or unset it for this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _as_urgent_as_others() -> Iterator[None]:
    """Let a Ray that starts meanwhile give its processes the priority that a server without it has.

    Ray's own niceness is 15. Beside other programs replicas then hardly get any time: they start in minutes,
    and are not done with their requests when `shutdown_seconds` are over.
    """
    if _NICENESS in os.environ:
        yield
        return
    os.environ[_NICENESS] = "0"
    try:
        yield
    finally:
        del os.environ[_NICENESS]


def hushed(name: str) -> None:
    """Let a part of Ray, which is imported already, log errors alone."""
    logging.getLogger(name).setLevel(logging.ERROR)


def enter(folder: str) -> None:
    """Read relative paths, in a process of Ray's, as whoever gave them does; other machines may not."""
    with suppress(OSError):
        os.chdir(folder)


def cpus_of_each(replicas: int) -> float:
    """CPUs that each of them may reserve: an equal share of the cluster, whole where there are enough."""
    import ray

    every = ray.cluster_resources().get("CPU", 1.0)
    return every // replicas if every >= replicas else every / replicas
