"""From names of models to a server that listens.

serve(["smollm2"], Settings(), say=print)
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from linspec.checkpoints.hub import load_any_config
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.models.config import EncoderConfig
from linspec.serve.app import make_app
from linspec.serve.budget import MemoryBudget
from linspec.serve.connection import limited
from linspec.serve.embedder import Embedder
from linspec.serve.keys import Keys
from linspec.serve.settings import Settings
from linspec.serve.tls import check_tls
from linspec.serve.worker import Worker
from linspec.utils.messages import shown

# how much longer than the requests' last seconds the server waits for their answers to be read
_GRACE_SECONDS = 5


def serve(
    models: Sequence[str],
    settings: Settings,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve models until a signal says otherwise.

    Args:
        models: SOURCE or NAME=SOURCE each; those of the settings if there are none.
        settings: how to listen, and what to allow.
        options: of `LLM`, for all models.
        say: gets lines for people.

    Raises:
        ConfigError: no models, two of one name, an address that cannot be listened at, no such certificate,
            a bad key.
        LinspecError: a model cannot be loaded.
    """
    named = named_models(models or settings.models)
    # before anything is loaded: an address in use, a key that is none
    check_tls(settings.tls_cert, settings.tls_key)
    Keys.of(settings)
    with listening(settings.host, settings.port) as listener:
        if settings.ray:
            from linspec.serve.replicas import serve_replicas

            serve_replicas(named, settings, options or {}, listener, say)
            return
        workers, embedders = loaded(named, settings, options or {}, say)
        try:
            app = make_app(workers, settings, embedders)
            address = address_of(listener, settings)
            server = Server(server_config(app, settings), list(workers.values()), settings)
            server.once_up = lambda: say(
                f"serving {', '.join(named)} at {address}/v1 ({address}/docs); Ctrl-C ends it"
            )
            _listen(listener, settings)
            server.run(sockets=[listener])
            if not server.force_exit:
                _keep_prefixes(workers)
        finally:
            for worker in workers.values():
                worker.stop(0)
                if (cache := worker.llm.engine.prefix_cache) is not None:
                    # for the next start
                    cache.flush()


def named_models(models: Sequence[str]) -> dict[str, str]:
    """Sources by the name that clients give: NAME=SOURCE, or the last part of a path."""
    found: dict[str, str] = {}
    for each in models:
        name, sign, source = each.partition("=")
        if not sign or "/" in name:
            name, source = Path(each).name, each
        if not name or not source:
            raise ConfigError(f"a model is MODEL or NAME=MODEL, got {shown(each)}")
        if name in found:
            raise ConfigError(f"two models are called {shown(name)}; name one, as other={source}")
        found[name] = source
    if not found:
        raise ConfigError("no model is named; give one, such as smollm2")
    return found


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at an address; raises ConfigError where it cannot."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"there is no address {shown(host)}: {error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # connections inherit it: else the body of an answer waits 40 ms until the client confirms its head
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind(place)
        except OSError as error:
            raise _taken(host, port, error) from error
        yield listener


def _listen(listener: socket.socket, settings: Settings) -> None:
    """Only now can clients come; another server may have bound the address too, while models were loaded."""
    try:
        listener.listen()
    except OSError as error:
        raise _taken(settings.host, settings.port, error) from error


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen at {host} port {port}: {error.strerror}; take another --port, or 0 for any free one"
    )


def _keep_prefixes(workers: Mapping[str, Worker]) -> None:
    """Move what prefix caches have in memory to their stores, for the next process."""
    for worker in workers.values():
        worker.stop(0)
        if worker.llm.engine.prefix_cache is not None:
            worker.llm.engine.prefix_cache.flush()


def loaded(
    named: Mapping[str, str],
    settings: Settings,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, Worker], dict[str, Embedder]]:
    """Every model with its worker, and every encoder; says what each needs of the memory."""
    workers: dict[str, Worker] = {}
    embedders: dict[str, Embedder] = {}
    more = _engine_options(settings)
    try:
        for name, source in named.items():
            if isinstance(load_any_config(source), EncoderConfig):
                embedders[name] = Embedder(source, longest=settings.max_prompt_tokens)
                say(f"{name}: an encoder, for /v1/embeddings")
                continue
            llm = LLM(source, **{**options, **more})
            workers[name] = Worker(llm, queue_limit=settings.queue_limit)
            budget = MemoryBudget.of(workers[name], more["state_bytes"])
            say(f"{name}: {budget.text()}")
    except BaseException:
        for worker in workers.values():
            worker.stop(0)
        raise
    return workers, embedders


def _engine_options(settings: Settings) -> dict[str, Any]:
    mib = settings.state_mib
    return {
        "max_batch": settings.max_batch,
        "max_model_len": settings.max_model_len,
        "tbt_ms": settings.tbt_ms or None,
        "state_bytes": None if mib is None else mib * 2**20,
        "prefix_cache": settings.prefix_mib * 2**20 or None,
        "prefix_store": settings.prefix_store,
    }


class Server(uvicorn.Server):
    """uvicorn's, which lets the workers know of the end as soon as it is asked for."""

    def __init__(
        self, config: uvicorn.Config, workers: Sequence[Worker], settings: Settings
    ) -> None:
        super().__init__(config)
        self._workers, self._settings = workers, settings
        self.once_up: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As SIGTERM does, a terminal that closes ends the server, unless that means something else."""
        with super().capture_signals():
            hangup = getattr(signal, "SIGHUP", None)
            here = threading.current_thread() is threading.main_thread()
            # nohup ignores it, replicas are replaced by it
            if hangup is None or not here or signal.getsignal(hangup) is not signal.SIG_DFL:
                yield
                return
            before = signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, before)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.once_up()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it when all is answered, or in time; a second Ctrl-C ends it now."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        for worker in self._workers:
            worker.close(0 if self.force_exit else self._settings.shutdown_seconds)


def server_config(app: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs `app`."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        # what else is installed, such as Ray, must not change how requests are read
        loop="asyncio",
        http=limited(head_seconds=settings.body_seconds, answer_seconds=settings.request_seconds),
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + _GRACE_SECONDS,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def address_of(listener: socket.socket, settings: Settings) -> str:
    """The URL of a server that listens there."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
