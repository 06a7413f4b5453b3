"""The command line: one verb per goal. Each verb parses and calls a function that can be imported.

linspec generate embedded-aug --prompt 'def add(a, b):' --drafter medusa
"""

from __future__ import annotations

import sys

import typer

from linspec.cli import (
    about,
    bench,
    chat,
    compress,
    demo,
    evaluate,
    generate,
    get,
    linearize,
    train,
)
from linspec.cli.verbs import Verbs

app = typer.Typer(
    cls=Verbs,
    name="linspec",
    help="Checkpoint in, fast model out: linear attention and lossless tree speculation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# each with its name and an example that runs
for _verb, _name, _example in (
    (demo.demo, "demo", "--quick --out demo"),
    (train.pretrain, "pretrain", "--recipe embedded --out teacher"),
    (linearize.linearize, "linearize", "embedded-softmax --mixer aug --out student"),
    (train.train_drafter, "train-drafter", "student --kind medusa"),
    (generate.generate, "generate", "embedded-aug --prompt 'class Stack:' --drafter medusa"),
    (chat.chat, "chat", "path/to/a/chat-model --drafter prompt-lookup"),
    (compress.quantize, "quantize", "embedded-softmax --bits 4 --out small"),
    (evaluate.evaluate, "eval", "embedded-aug --data stdlib --limit-bytes 100000"),
    (evaluate.verify, "verify", "embedded-aug --drafter medusa"),
    (bench.bench, "bench", "embedded-aug --contexts 128,2048,8192 --drafter medusa"),
    (bench.bench_load, "bench-load", "small"),
    (get.get, "get", "smollm2"),
    (about.info, "info", "--json"),
    (about.list_plugins, "list", ""),
):
    _words = _name.replace("bench-", "bench ")
    app.command(_name, epilog=f"Example: linspec {_words} {_example}".rstrip())(_verb)


def main() -> None:
    """Entry point of the `linspec` command."""
    if sys.stdout is None:
        # what is printed would be lost without a word
        sys.exit("error: standard output is closed; send it to a file or to /dev/null")
    app()
