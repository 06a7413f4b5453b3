"""The verb `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import real, whole
from linspec.cli.console import (
    configure,
    guarded,
    importing,
    place_on,
    print_json,
    quiet_stdout,
    read_prompt,
    say,
)
from linspec.cli.options import Device, DrafterName, Json, Kv, Model, Quantize, Threads


@guarded()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - is stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    max_tokens: Annotated[int, typer.Option(callback=whole(), help="Most tokens to add.")] = 128,
    temperature: Annotated[
        float, typer.Option(callback=real(least=0), help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(callback=whole(0), help="Sample among k tokens; 0 is all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(callback=real(above=0, most=1), help="Sample among this mass.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(callback=real(above=0), help="Above 1 repeats less.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            callback=whole(0, 2**64 - 1), help="Equal seeds, equal text.", show_default="random"
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            callback=whole(0), help="With --json: log-probabilities, and of the K likeliest."
        ),
    ] = None,
    drafter: DrafterName = "none",
    policy: Annotated[str, typer.Option(help="auto, or a number of draft tokens.")] = "auto",
    verifier: Annotated[
        str, typer.Option(help="lossless, greedy or typical (lossy), with options as a drafter.")
    ] = "lossless",
    quantize: Quantize = None,
    kv: Kv = "float",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text; streams it to stdout as it is decided."""
    with importing():
        from linspec.llm import LLM
        from linspec.sampling import SamplingParams

    text = read_prompt(prompt, prompt_file)
    params = configure(SamplingParams, locals())
    place = place_on(device, threads)
    with quiet_stdout():
        llm = LLM(
            model,
            drafter=drafter,
            policy=policy,
            verifier=verifier,
            max_batch=1,
            device=place,
            quantize=quantize,
            kv=kv,
        )
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
