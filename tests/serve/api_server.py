"""A real server on a random port of the loopback address, in a thread of this process."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import scratch, text_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import save_model
from linspec.llm import LLM
from linspec.serve.app import make_app
from linspec.serve.run import Server, address_of, listening, server_config
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'hush' %}{{ raise_exception('no such turn') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@functools.cache
def talker(mixer: str = "aug", max_positions: int = 256) -> Path:
    """A model directory with a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|eos|>"
    )
    tokenizer.chat_template = TEMPLATE
    model = text_model(mixer, max_positions=max_positions)
    return save_model(model, tokenizer, scratch("talker") / mixer)


@contextmanager
def running(
    llms: dict[str, LLM], settings: Settings | None = None, **more: Any
) -> Iterator[tuple[str, dict[str, Worker]]]:
    """The address of a server of these models, and their workers."""
    settings = settings or Settings.read(port=0, queue_limit=400)
    workers = {name: Worker(llm, queue_limit=settings.queue_limit) for name, llm in llms.items()}
    with listening("127.0.0.1", 0) as listener:
        app = make_app(workers, settings, **more)
        server = Server(server_config(app, settings), list(workers.values()), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            yield address_of(listener, settings), workers
        finally:
            server.should_exit = True
            for worker in workers.values():
                worker.stop(5)
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def quiet(worker: Worker, seconds: float = 20.0) -> bool:
    """Whether nothing runs or waits, now or soon."""
    until = time.monotonic() + seconds
    while worker.running or worker.waiting or worker.llm.engine.busy:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True
