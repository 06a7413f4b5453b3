"""Several replicas of the models behind one front, which listens as a server does.

SIGHUP replaces the replicas one after another; clients notice nothing.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from linspec.checkpoints.hub import load_any_config
from linspec.serve.fleet import Fleet
from linspec.serve.ray_found import check_ray_extra, cpus_of_each, ray_running
from linspec.serve.relay import make_front
from linspec.serve.run import Server, address_of, server_config
from linspec.serve.settings import Settings

_log = logging.getLogger("linspec.serve")


def serve_replicas(
    named: Mapping[str, str],
    settings: Settings,
    options: Mapping[str, Any],
    listener: socket.socket,
    say: Callable[[str], None] = print,
) -> None:
    """Serve models by name on Ray until a signal says otherwise; see run.serve."""
    check_ray_extra()
    # a wrong name is said before Ray starts, which takes its time
    for source in named.values():
        load_any_config(source)
    with ray_running():
        from linspec.serve.ray_fleet import RayFleet

        fleet = RayFleet(named, settings, options, cpus_of_each(settings.replicas))
        try:
            for line in fleet.told():
                say(f"{line}; {settings.replicas} replicas")
            run_front(fleet, settings, listener, say)
        finally:
            fleet.stop()


def run_front(
    fleet: Fleet, settings: Settings, listener: socket.socket, say: Callable[[str], None]
) -> None:
    """Answer with `fleet` until a signal says otherwise; the fleet is left running."""
    server = Server(server_config(make_front(fleet, settings), settings), [], settings)
    address = address_of(listener, settings)
    server.once_up = lambda: say(f"serving at {address}/v1 ({address}/docs); Ctrl-C ends it")
    with restarting(fleet):
        server.run(sockets=[listener])


@contextmanager
def restarting(fleet: Fleet) -> Iterator[None]:
    """While it lasts, SIGHUP replaces the replicas; one that comes meanwhile is left out."""
    busy = threading.Lock()

    def restart() -> None:
        if not busy.acquire(blocking=False):
            return
        try:
            _log.info("restart of all replicas")
            fleet.restart()
            _log.info("all replicas are new")
        except Exception:
            _log.exception("the restart has failed; the replicas that were there go on")
        finally:
            busy.release()

    def begin(*_: object) -> None:
        threading.Thread(target=restart, name="restart", daemon=True).start()

    before = signal.signal(signal.SIGHUP, begin)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
