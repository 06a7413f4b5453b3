"""One model, three servers of OpenAI's API: linspec, llama.cpp's and transformers', under the same load.

    python -m benchmarks.serving MODEL.gguf --directory MODEL --prompts spec_bench.jsonl --clients 1,4,8,16

Each server runs alone, in a process of its own, with as many threads as the machine has cores, and gets the
same prompts from the same number of clients, greedily. What is timed is timed from outside. llama.cpp's
server is that of llama-cpp-python, told not to interrupt a request for the next; transformers' batches
continuously and takes a Hugging Face directory, which `linspec convert` makes of the file.
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


@dataclass(frozen=True, slots=True)
class Contender:
    """A server: its name, its command line without the port, its model's name there, its environment."""

    name: str
    command: list[str]
    model: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def contenders(given: argparse.Namespace) -> list[Contender]:
    """The servers that can be had with what is given, linspec's with and without drafts."""
    threads, slots = str(usable_threads()), str(max(given.clients))
    context = str(given.context)
    ours = [sys.executable, "-m", "linspec", "serve", f"model={given.file}"]
    ours += ["--max-batch", slots, "--max-model-len", context]
    found = [
        Contender("linspec", ours),
        Contender("linspec, no drafts", [*ours, "--drafter", "none"]),
    ]
    if given.llama_python:
        theirs = [given.llama_python, "-m", "llama_cpp.server", "--model", str(given.file)]
        theirs += ["--n_threads", threads, "--n_threads_batch", threads, "--n_ctx", context]
        theirs += ["--interrupt_requests", "false", "--flash_attn", "true"]
        found.append(Contender("llama.cpp", theirs))
    if given.directory:
        folder = str(given.directory.resolve())
        theirs = [given.transformers, "serve", folder, "--continuous-batching", "--device", "cpu"]
        found.append(Contender("transformers", theirs, folder, {"OMP_NUM_THREADS": threads}))
    return found


@contextlib.contextmanager
def running(contender: Contender, log: Path) -> Iterator[str]:
    """The address of a server that answers; it ends with the context."""
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
            yield address
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
            with running(contender, given.log) as address:
                left = deque(questions)
                for clients in given.clients:
                    load = Workload(requests=given.requests * clients, clients=clients)
                    found = bench_serving(
                        address,
                        list(left),
                        load,
                        model=contender.model,
                        max_tokens=given.tokens,
                    )
                    yield {"server": contender.name, "clients": clients, **found.to_json()}
                    # no server is to know a prompt from before
                    left.rotate(-load.requests)
        except RuntimeError as error:
            yield {"server": contender.name, "error": str(error)}


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
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp.server")
    parser.add_argument("--directory", type=Path, help="the model as a Hugging Face directory")
    parser.add_argument("--transformers", default="transformers", help="its command")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="output of the servers")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each measurement."""
    for found in serving(_arguments(words)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
