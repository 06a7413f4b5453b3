"""One GGUF file, linspec and llama.cpp: tokens per second, reading of a prompt, and a step of 8 nodes.

    python -m benchmarks.same_file MODEL.gguf --contexts 128,2048 --batches 1

Each engine runs in a process of its own and the engines take turns, a round after the other. llama.cpp runs
with flash attention and without; its float16 cache is compared with linspec's float16 and int8 caches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.base import GGUF_FILE
from benchmarks.peers.client import Client, interpreter, worker
from linspec.checkpoints.gguf.reader import read_gguf
from linspec.utils.cores import usable_threads

# engine and form, as workers name them: the first is compared with the others
ENGINES = (
    ("linspec", "file-float16"),
    ("linspec", "file-int8"),
    ("llama.cpp", "q8_0"),
    ("llama.cpp", "q8_0-fa"),
)
_NAMES = {
    "file-float16": "float16 cache",
    "file-int8": "int8 cache",
    "q8_0": "flash attention off",
    "q8_0-fa": "flash attention on",
}
# room for what is decoded behind the context; nodes of the step that is compared with one of one node
_ROOM, _NODES = 512, 8
# thread pools spin for a while after their last work; the next engine must not pay for that
_REST = 0.2


@dataclass(slots=True)
class Measured:
    """What the rounds of one engine took, in seconds: prompts, steps of one token a sequence, steps of 8."""

    engine: str
    context: int
    batch: int
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    trees: list[float] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Plain numbers: medians over the rounds, the spread beside them."""
        step = statistics.median(self.steps)
        return {
            "engine": self.engine,
            "context": self.context,
            "batch": self.batch,
            "tokens_per_s": round(self.batch / step, 1),
            "spread": round((max(self.steps) - min(self.steps)) / step, 3),
            "prompt_tokens_per_s": round(self.batch * self.context / min(self.prompts), 1),
            "eight_nodes": round(statistics.median(self.trees) / step, 2) if self.trees else None,
        }


def same_file(
    file: Path,
    contexts: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    tokens: int,
    python: str,
) -> Iterator[dict[str, Any]]:
    """The facts of every engine at each context and batch; `python` runs llama.cpp."""
    vocabulary = len(read_gguf(file).keys["tokenizer.ggml.tokens"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GGUF_FILE).symlink_to(file.resolve())
        for context, batch in itertools.product(contexts, batches):
            size = {"context": context, "batch": batch}
            with contextlib.ExitStack() as stack:
                running = _started(stack, folder, python, **size)
                for number in range(rounds):
                    prompt = {**size, "vocab": vocabulary, "seed": 1} if number < 2 else None
                    _round(running if number % 2 == 0 else running[::-1], prompt, tokens)
                yield from (found.facts() for _, found in running)


Running = list[tuple[Client, Measured]]


def _started(
    stack: contextlib.ExitStack, folder: str, python: str, context: int, batch: int
) -> Running:
    """A process for each engine, with the model loaded."""
    running: Running = []
    for peer, form in ENGINES:
        program = interpreter(peer, {"llama.cpp": python})
        client = stack.enter_context(worker(program, usable_threads(), Path(folder) / "log.txt"))
        size = {"context": context + _ROOM, "batch": batch, "threads": usable_threads()}
        version = client.ask("load", peer_name=peer, form=form, folder=folder, **size)
        name = f"{version or peer}, {_NAMES[form]}"
        running.append((client, Measured(name, context, batch)))
    return running


def _round(running: Running, prompt: Mapping[str, int] | None, tokens: int) -> None:
    """Every engine once: a prompt where one is given, steps behind it, and steps of a tree."""
    for client, found in running:
        time.sleep(_REST)
        if prompt is not None:
            found.prompts.append(client.ask("open", **prompt))
        found.steps.append(statistics.median(client.ask("decode", tokens=tokens)))
        if found.batch == 1:
            passes = client.ask("rows", count=_NODES, repeats=5)
            found.trees.append(statistics.median(passes))


def main() -> None:
    """Print the table."""
    about = argparse.ArgumentParser(prog="python -m benchmarks.same_file", description=__doc__)
    about.add_argument("file", type=Path)
    about.add_argument("--contexts", default="128,2048")
    about.add_argument("--batches", default="1")
    about.add_argument("--rounds", type=int, default=5)
    about.add_argument("--tokens", type=int, default=24)
    about.add_argument("--python", default=sys.executable, help="a Python that has llama_cpp")
    given = about.parse_args()
    contexts, batches = (
        [int(each) for each in text.split(",")] for text in (given.contexts, given.batches)
    )
    head = True
    for row in same_file(given.file, contexts, batches, given.rounds, given.tokens, given.python):
        if head:
            print("\t".join(row))
            head = False
        print("\t".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
