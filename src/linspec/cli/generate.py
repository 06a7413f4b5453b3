"""The verb `generate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import whole
from linspec.cli.console import guarded, importing, print_json, quiet_stdout, read_prompt, say
from linspec.cli.groups import grouped
from linspec.cli.language import Language
from linspec.cli.options import Decoding, Json, MaxTokens, MinTokens, Model, Sampling, given
from linspec.errors import ConfigError


@grouped
@guarded()
def generate(
    model: Model,
    sampling: Sampling,
    decoding: Decoding,
    language: Language,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - is stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    max_tokens: MaxTokens = 128,
    min_tokens: MinTokens = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            callback=whole(0), help="With --json: log-probabilities, and of the K likeliest."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text; streams it to stdout as it is decided."""
    with importing():
        from linspec.cli.advice import on_weights
        from linspec.decoding.sampling import SamplingParams
        from linspec.llm import LLM

    if logprobs is not None and not as_json:
        raise ConfigError("--logprobs are printed with --json only; give that too, or leave it out")
    text = read_prompt(prompt, prompt_file)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        grammar=language.to_library(),
        **given({**asdict(sampling), "stop": stop, "logprobs": logprobs}),
    )
    with quiet_stdout():
        llm = LLM(model, **decoding.to_library())
    if as_json:
        with quiet_stdout():
            result = llm.generate(text, params)[0]
        print_json(result.to_json())
        return
    for piece in llm.stream(text, params):
        print(piece.text, end="", flush=True)
        if piece.done:
            print(flush=True)
            say(piece.done.summary())
    if advice := on_weights(llm.model):
        say(advice)
