"""The command line: one verb per goal. Each verb parses and calls a function that can be imported.

linspec generate embedded-aug --prompt 'def add(a, b):' --drafter medusa
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from linspec.cli import (
    about,
    batch,
    bench,
    bench_serve,
    calibrate,
    chat,
    compress,
    convert,
    demo,
    evaluate,
    generate,
    get,
    linearize,
    parallel,
    serve,
    train,
    verify,
)
from linspec.cli.verbs import Verb, Verbs, epilog

app = typer.Typer(
    cls=Verbs,
    name="linspec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# each with its name and an example that runs
_VERBS: tuple[tuple[Callable[..., None], str, str], ...] = (
    (demo.demo, "demo", "--quick --out demo"),
    (train.pretrain, "pretrain", "--recipe embedded --out teacher"),
    (linearize.linearize, "linearize", "embedded-softmax --mixer aug --out student"),
    (calibrate.calibrate, "calibrate", "smollm2 --attention lserve:budget=1024 --seconds 3600"),
    (train.train_drafter, "train-drafter", "student --kind medusa"),
    (parallel.train_parallel, "train-parallel", "path/to/llada --prompts asked.jsonl --out faster"),
    (generate.generate, "generate", "embedded-aug --prompt 'class Stack:' --drafter medusa"),
    (chat.chat, "chat", "path/to/a/chat-model --drafter prompt-lookup"),
    (serve.serve, "serve", "smollm2 --drafter suffix"),
    (batch.batch, "batch", "in.jsonl out.jsonl --model smollm2"),
    (compress.quantize, "quantize", "embedded-softmax --bits 4 --out small"),
    (convert.convert, "convert", "path/to/llama llama.gguf --type q8_0"),
    (evaluate.perplexity, "eval perplexity", "embedded-aug --data stdlib --limit-bytes 100000"),
    (evaluate.recall, "eval recall", "embedded-aug --teacher embedded-softmax --lengths 512,1024"),
    (evaluate.ruler, "eval ruler", "smollm2 --lengths 1024,4096 --attention pages:budget=1024"),
    (evaluate.repeats, "eval repeats", "embedded-aug --teacher embedded-softmax"),
    (evaluate.positions, "eval positions", "embedded-aug --length 8192"),
    (evaluate.continuations, "eval continuations", "path/to/t5 --data texts/"),
    (evaluate.embeddings, "eval embeddings", "path/to/bert student --data texts/"),
    (evaluate.task, "eval task", "smollm2 arc_easy --limit 100"),
    (evaluate.parallel_bench, "eval parallel-bench", "tiny --tasks copy,shuffle --lengths 4"),
    (verify.verify, "verify", "embedded-aug --drafter medusa"),
    (bench.speed, "bench speed", "embedded-aug --contexts 128,2048,8192 --drafter medusa"),
    (bench.drafters, "bench drafters", "embedded-aug --per-family 8"),
    (bench.kernels, "bench kernels", "--formats int8,int4"),
    (bench.load, "bench load", "small"),
    (bench_serve.serve, "bench serve", "http://127.0.0.1:8000 --prompts prompts.jsonl --rate 2"),
    (get.get, "get", "smollm2"),
    (about.info, "info", "--json"),
    (about.list_plugins, "list", ""),
)


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=about.version, help="Name and version."),
    ] = False,
) -> None:
    """Checkpoint in, fast model out: linear attention and lossless tree speculation."""


_names = [name for _, name, _ in _VERBS]
for _verb, _name, _example in _VERBS:
    app.command(_name, cls=Verb, epilog=epilog(_name, _example, _names))(_verb)


def main() -> None:
    """Entry point of the `linspec` command."""
    if sys.stdout is None:
        # what is printed would be lost without a word
        sys.exit("error: standard output is closed; send it to a file or to /dev/null")
    try:
        # `python -m linspec` is the same command
        app(prog_name="linspec")
    finally:
        # all is done; what libraries clean up at the end would answer Ctrl-C with a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
