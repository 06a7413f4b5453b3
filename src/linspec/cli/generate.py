"""The verb `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli.checks import whole
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
from linspec.cli.options import (
    Device,
    DrafterName,
    FrequencyPenalty,
    Json,
    Kv,
    MaxTokens,
    MinP,
    MinTokens,
    Model,
    PolicyName,
    PresencePenalty,
    Quantize,
    RepetitionPenalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    VerifierName,
)


@guarded()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - is stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    max_tokens: MaxTokens = 128,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text.")
    ] = False,
    seed: Seed = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            callback=whole(0), help="With --json: log-probabilities, and of the K likeliest."
        ),
    ] = None,
    drafter: DrafterName = "none",
    policy: PolicyName = "auto",
    verifier: VerifierName = "lossless",
    quantize: Quantize = None,
    kv: Kv = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text; streams it to stdout as it is decided."""
    with importing():
        from linspec.decoding.sampling import SamplingParams
        from linspec.llm import LLM

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
            kv_cache_dtype=kv,
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
