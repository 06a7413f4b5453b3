"""A front on a random port of the loopback address, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from linspec.serve.fleet import Fleet
from linspec.serve.relay import make_front
from linspec.serve.run import Server, listening, server_config
from linspec.serve.settings import Settings


@contextmanager
def front(fleet: Fleet, settings: Settings | None = None) -> Iterator[str]:
    """The address of a front of `fleet`."""
    settings = settings or Settings.read(port=0)
    with listening("127.0.0.1", 0) as listener:
        server = Server(server_config(make_front(fleet, settings), settings), [], settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the front did not start"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the front did not end"
