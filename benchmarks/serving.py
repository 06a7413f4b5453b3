"""One model, several servers of OpenAI's API under the same load: linspec, llama.cpp's, transformers'.

    python -m benchmarks.serving MODEL.gguf --prompts spec_bench.jsonl --clients 1,4 --seconds 45 \\
        --directory MODEL --transformers transformers --llama-python python

Each server runs alone, in a process of its own, with as many threads as the machine has cores, and gets the
same prompts from the same number of clients, greedily, for so many seconds or requests of each client. What
is timed is timed from outside. llama.cpp's server is that of llama-cpp-python, told not to interrupt a
request for the next. transformers takes a Hugging Face directory, which `linspec convert` makes of the file;
linspec serves that too. Its cache is told to be as large as the clients need: by itself it takes nearly all
memory, and answers late.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linspec.bench.arrivals import Workload
from linspec.bench.prompts import read_questions
from linspec.bench.serving import bench_serving
from linspec.utils.cores import usable_threads

_PATIENCE = 180.0
# of transformers' cache: tokens of a block, and of a step
_BLOCK, _BATCH = 32, 256
# more requests than anything answers in the seconds of a cell
_MANY = 10**5


@dataclass(frozen=True, slots=True)
class Contender:
    """A server: its name, its command line without the port, its model's name there, its environment."""

    name: str
    command: list[str]
    model: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def contenders(given: argparse.Namespace) -> list[Contender]:
    """The servers that can be had with what is given, and are wanted."""
    found = [*_ours(given), *_llama(given), *_transformers(given)]
    return [each for each in found if not given.only or given.only in each.name]


def _ours(given: argparse.Namespace) -> Iterator[Contender]:
    """linspec's with and without drafts, and with the directory that transformers gets."""
    options = ["--max-batch", str(max(given.clients)), "--max-model-len", str(given.context)]

    def server(model: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "linspec", "serve", f"model={model}", *options, *more]

    yield Contender("linspec", server(given.file))
    yield Contender("linspec, no drafts", server(given.file, "--drafter", "none"))
    if given.directory:
        yield Contender("linspec, directory", server(given.directory.resolve()))


def _llama(given: argparse.Namespace) -> Iterator[Contender]:
    if given.llama_python:
        threads = str(usable_threads())
        command = [given.llama_python, "-m", "llama_cpp.server", "--model", str(given.file)]
        command += ["--n_threads", threads, "--n_threads_batch", threads]
        command += ["--n_ctx", str(given.context)]
        command += ["--interrupt_requests", "false", "--flash_attn", "true"]
        yield Contender("llama.cpp", command)


def _transformers(given: argparse.Namespace) -> Iterator[Contender]:
    """In batches, and one request after the other."""
    if not given.directory:
        return
    folder = str(given.directory.resolve())
    # its list of models looks through a cache of the hub, which has to be there
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": folder}
    offline["OMP_NUM_THREADS"] = str(given.threads or usable_threads())
    command = [given.transformers, "serve", folder, "--device", "cpu"]
    blocks = max(given.clients) * -(-given.context // _BLOCK)
    batches = ["--continuous-batching", "--attn-implementation", "sdpa"]
    batches += ["--cb-num-blocks", str(blocks), "--cb-block-size", str(_BLOCK)]
    batches += ["--cb-max-batch-tokens", str(_BATCH)]
    yield Contender("transformers", [*command, *batches], folder, offline)
    yield Contender("transformers, no batches", command, folder, offline)


@contextlib.contextmanager
def running(contender: Contender, log: Path) -> Iterator[tuple[str, int]]:
    """The address of a server that answers, and its process; it ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [*contender.command, "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **contender.environment},
            start_new_session=True,
        )
        try:
            _wait_for(address, process)
            yield address, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}; see its log")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            # it listens, and has no such page
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {_PATIENCE:.0f} s")


def serving(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of every server at each number of clients."""
    questions = read_questions(given.prompts, given.per_family)
    for contender in contenders(given):
        try:
            with running(contender, given.log) as (address, _):
                left = deque(questions)
                for clients in given.clients:
                    found = bench_serving(
                        address,
                        list(left),
                        _load(given, clients),
                        model=contender.model,
                        max_tokens=given.tokens,
                        timeout=given.timeout,
                    )
                    yield {"server": contender.name, "clients": clients, **found.to_json()}
                    # no server is to know a prompt from before
                    left.rotate(-found.requests)
        except RuntimeError as error:
            yield {"server": contender.name, "error": str(error)}


def _load(given: argparse.Namespace, clients: int) -> Workload:
    if given.seconds is not None:
        return Workload(requests=_MANY, clients=clients, seconds=given.seconds)
    return Workload(requests=given.requests * clients, clients=clients)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines, as Spec-Bench's")
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument(
        "--clients",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1, 4, 8, 16],
    )
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--seconds", type=float, help="in which clients ask, instead of --requests")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp.server")
    parser.add_argument("--directory", type=Path, help="the model as a Hugging Face directory")
    parser.add_argument("--transformers", default="transformers", help="its command")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds in which a server says nothing: an error",
    )
    parser.add_argument("--threads", type=int, help="of transformers; all cores by default")
    parser.add_argument("--only", default="", help="servers whose names have this in them")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="output of the servers")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each measurement."""
    for found in serving(_arguments(words)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
