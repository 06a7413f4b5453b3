"""The command line: one verb per goal. Each verb parses and calls a function that can be imported.

linspec generate embedded-aug --prompt 'def add(a, b):' --drafter medusa
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linspec.cli_peers import VERB, Verbs, bench_peers
from linspec.console import (
    RESUME,
    configure,
    guarded,
    numbers,
    place_on,
    print_facts,
    print_json,
    print_measured,
    print_speed,
    print_table,
    quiet_stdout,
    read_prompt,
    report_written,
    say,
    sources,
)
from linspec.options import (
    BatchTokens,
    Context,
    Data,
    Device,
    DrafterName,
    Field,
    Json,
    Kv,
    Model,
    Order,
    Quantize,
    Rate,
    Resume,
    Threads,
    Tokens,
)

app = typer.Typer(
    cls=Verbs,
    name="linspec",
    help="Checkpoint in, fast model out: linear attention and lossless tree speculation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(epilog="Example: linspec demo --quick --out demo")
@guarded("give the same command to go on with what is trained")
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under 90 seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")] = Path(
        "linspec-demo"
    ),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Linearize the embedded model, train its drafter, race it against plain decoding; report."""
    place_on("cpu", threads)
    with quiet_stdout(as_json):
        from linspec.demo import run_demo

        result = run_demo(out=out, quick=quick)
    if as_json:
        print_json(result.to_json())


@app.command(epilog="Example: linspec pretrain --recipe embedded --out teacher")
@guarded(RESUME)
def pretrain(
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "embedded",
    resume: Resume = False,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="the recipe's")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small softmax model from nothing on the standard library's source."""
    from linspec.errors import ConfigError
    from linspec.train import pretrain as library

    if steps is not None and steps < 1:
        raise ConfigError(f"--steps must be 1 or more, got {steps}")
    place_on("cpu", threads)
    with quiet_stdout():
        library.pretrain(out, recipe=recipe, resume=resume, steps=steps)
    report_written(out, as_json)


@app.command(epilog="Example: linspec linearize embedded-softmax --mixer aug --out student")
@guarded(RESUME)
def linearize(
    source: Model,
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    mixer: Annotated[str, typer.Option(help="A mixer that linspec list shows.")] = "aug",
    group: Annotated[int, typer.Option(help="Tokens per group.")] = 64,
    taps: Annotated[
        int | None,
        typer.Option(help="Causal convolution taps.", show_default="32 for aug, else 0"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of mixer 'window'.", show_default="64")
    ] = None,
    span: Annotated[
        str,
        typer.Option(
            help="Groups seen exactly, the open one included: 2, or one for each layer.",
            show_default="by --rows with kernel softmax",
        ),
    ] = "",
    rows: Annotated[
        int,
        typer.Option(help="Tokens seen exactly, mean of the layers; each gets what it needs."),
    ] = 384,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Weights of tokens seen exactly: own, softmax or relu2.",
            show_default="softmax for local, grouped, aug, gla, gdn",
        ),
    ] = None,
    keep_softmax: Annotated[str, typer.Option(help="Layers that stay as they are, like 0,5.")] = "",
    softmax_layers: Annotated[
        int, typer.Option(help="How many more stay: those that need to see far most.")
    ] = 0,
    data: Data = None,
    field: Field = "text",
    tokens: Tokens = None,
    transfer_share: Annotated[
        float | None,
        typer.Option(
            help="Share of them that matches the teacher by layer.",
            show_default="0.4, or 0 with kernel softmax",
        ),
    ] = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    lr: Rate = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="Weight of the KL to the teacher.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="0 trains all weights.")] = None,
    seed: Order = None,
    resume: Resume = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Replace a checkpoint's softmax attention by linear mixers and train it back to quality."""
    from linspec.train.linearize import LinearizeConfig
    from linspec.train.linearize import linearize as library

    place_on("cpu", threads)
    config = configure(LinearizeConfig, locals())
    chosen = numbers(span, "--span")
    with quiet_stdout():
        library(
            source,
            out,
            mixer=mixer,
            group=group,
            taps=taps,
            window=window,
            span=chosen[0] if len(chosen) == 1 else chosen or None,
            rows=rows,
            kernel=kernel,
            keep_softmax=numbers(keep_softmax, "--keep-softmax"),
            softmax_layers=softmax_layers,
            data=sources(data),
            field=field,
            config=config,
            resume=resume,
        )
    report_written(out, as_json)


@app.command("train-drafter", epilog="Example: linspec train-drafter student --kind medusa")
@guarded(RESUME)
def train_drafter(
    model: Model,
    kind: Annotated[str, typer.Option(help="Kind of drafter.")] = "medusa",
    out: Annotated[
        Path | None, typer.Option(help="Where it goes.", show_default="MODEL/medusa")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Medusa heads.")] = None,
    data: Data = None,
    field: Field = "text",
    tokens: Tokens = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    lr: Rate = None,
    seed: Order = None,
    resume: Resume = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train and calibrate heads that draft for a model; its own weights stay as they are."""
    from linspec.train.drafter import DrafterConfig
    from linspec.train.drafter import train_drafter as library

    place_on("cpu", threads)
    config = configure(DrafterConfig, locals())
    with quiet_stdout():
        written = library(
            model, out, kind=kind, data=sources(data), field=field, config=config, resume=resume
        )
    report_written(written, as_json)


@app.command(
    epilog="Example: linspec generate embedded-aug --prompt 'class Stack:' --drafter medusa"
)
@guarded()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - is stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among k tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among this mass.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds, equal text.", show_default="random")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and of the K likeliest.")
    ] = None,
    drafter: DrafterName = "none",
    policy: Annotated[str, typer.Option(help="auto, or a number of draft tokens.")] = "auto",
    verifier: Annotated[
        str, typer.Option(help="lossless, greedy or typical (lossy).")
    ] = "lossless",
    quantize: Quantize = None,
    kv: Kv = "float",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text; streams it to stdout as it is decided."""
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


@app.command(epilog="Example: linspec quantize embedded-softmax --bits 4 --out small")
@guarded()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight, 8 or 4.")] = 8,
    data: Data = None,
    field: Field = "text",
    calibration_bytes: Annotated[
        int, typer.Option(help="Text that 4-bit weights are fitted to; 0 fits to none.")
    ] = 200_000,
    limit_bytes: Annotated[int, typer.Option(help="Held-out text for the quality.")] = 100_000,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Turn a model's weights into 8- or 4-bit integers for the CPU, and say what quality that costs."""
    from linspec.compress.quantize import quantize as library

    place_on("cpu", threads)
    with quiet_stdout():
        report = library(
            model,
            out,
            bits=bits,
            data=sources(data),
            field=field,
            calibration_bytes=calibration_bytes,
            limit_bytes=limit_bytes,
        )
    print_json(report.to_json()) if as_json else print_facts(report.to_json())
    say(f"written to {out}")


@app.command("eval", epilog="Example: linspec eval embedded-aug --data stdlib --limit-bytes 100000")
@guarded()
def evaluate(
    model: Model,
    data: Data = None,
    field: Field = "text",
    limit_bytes: Annotated[int | None, typer.Option(help="Stop after this much text.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="the model's")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    quantize: Quantize = None,
    kv: Kv = "float",
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall from far above instead.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="With --recall: the model to compare with.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="With --recall: tokens of the texts.")
    ] = "512,1024,2048,4096",
    samples: Annotated[int, typer.Option(help="With --recall: texts of a kind and seed.")] = 16,
    seeds: Annotated[int, typer.Option(help="With --recall: seeds.")] = 1,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Measure perplexity along long texts instead.")
    ] = False,
    length: Annotated[int, typer.Option(help="With --by-position: tokens of a text.")] = 32768,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity on text; 'stdlib' means its held-out files."""
    from linspec.errors import ConfigError

    if recall and by_position:
        raise ConfigError("give one of --recall and --by-position, not both")
    place, text = place_on(device, threads), sources(data)
    if recall:
        from linspec.evaluate.recall import evaluate_recall

        with quiet_stdout():
            found = evaluate_recall(
                model,
                teacher=teacher,
                data=text,
                field=field,
                lengths=numbers(lengths, "--lengths"),
                samples=samples,
                seeds=seeds,
                device=place,
            ).to_json()
        print_json(found) if as_json else print_measured("recall", found, "cells")
    elif by_position:
        from linspec.evaluate.positions import by_position as measure

        with quiet_stdout():
            drift = measure(
                model, data=text, field=field, length=length, context=context, device=place
            ).to_json()
        print_json(drift) if as_json else print_measured("perplexity", drift, "stretches")
    else:
        from linspec.evaluate.perplexity import evaluate_source

        with quiet_stdout():
            score = evaluate_source(
                model,
                text,
                field=field,
                limit_bytes=limit_bytes,
                context=context,
                bf16=bf16,
                device=place,
                quantize=quantize,
                kv=kv,
            ).to_json()
        print_json(score) if as_json else print_facts(score)


@app.command(epilog="Example: linspec study --table quality --budget 30 --out runs/study")
@guarded("give the same command to go on; finished cells are kept")
def study(
    out: Annotated[Path, typer.Option(help="Folder of finished cells and of the page.")] = Path(
        "runs/study"
    ),
    table: Annotated[
        list[str] | None, typer.Option(help="A table; repeatable.", show_default="all")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Minutes of this sitting.", show_default="no limit")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="default, small or tiny cells.", show_default="by --budget"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of cells that train.")] = 1,
    mixer: Annotated[
        list[str] | None, typer.Option(help="Rows to fill; repeatable.", show_default="all")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Training tokens of a cell.", show_default="the size's")
    ] = None,
    teacher: Annotated[str, typer.Option(help="The softmax model.")] = "embedded-softmax",
    data: Data = None,
    page: Annotated[
        Path | None, typer.Option(help="The markdown page.", show_default="OUT/paper.md")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train and measure the paper's tables, cell by cell; goes on where it was stopped."""
    from linspec.evaluate.study import make_plan
    from linspec.evaluate.study import study as library

    place_on("cpu", threads)
    with quiet_stdout():
        plan = make_plan(
            out,
            teacher=teacher,
            data=sources(data),
            size=size,
            budget=budget,
            tokens=tokens,
            seeds=seeds,
            mixers=mixer or (),
        )
        found = library(plan, table or (), budget=budget, page=page)
    if as_json:
        print_json(found.to_json())
        return
    say(f"{found.measured} cells measured, {found.remaining} to go; written to {found.page}")


@app.command(epilog="Example: linspec verify embedded-aug --drafter medusa")
@guarded()
def verify(
    model: Model,
    drafter: DrafterName = "none",
    prompts: Annotated[int, typer.Option(help="Prompts, from held-out text.")] = 64,
    tokens: Annotated[int, typer.Option(help="New tokens of each.")] = 128,
    draws: Annotated[int, typer.Option(help="Samples for the test of the distribution.")] = 2000,
    policy: Annotated[str, typer.Option(help="Number of draft tokens, or auto.")] = "12",
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Choice of the prompts.")] = 0,
    quantize: Quantize = None,
    kv: Kv = "float",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check that a drafter changes nothing: greedy token for token, samples by a chi-square test.

    Exits with 1 when greedy output differs by more than near ties (logits closer than 1e-4).
    """
    from linspec.evaluate.lossless import verify as library

    place = place_on(device, threads)
    with quiet_stdout():
        report = library(
            model,
            drafter,
            prompts=prompts,
            tokens=tokens,
            draws=draws,
            policy=policy,
            data=sources(data),
            device=place,
            seed=seed,
            quantize=quantize,
            kv=kv,
        )
    print_json(report.to_json()) if as_json else print_facts(report.to_json())
    if not report.lossless_greedy:
        raise typer.Exit(1)


@app.command(epilog="Example: linspec bench embedded-aug --contexts 128,2048,8192 --drafter medusa")
@guarded()
def bench(
    model: Model,
    contexts: Annotated[str, typer.Option(help="Tokens before decoding, by commas.")] = "128,1024",
    drafter: Annotated[
        list[str] | None, typer.Option(help="A drafter beside plain decoding; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in a repeat.")] = 64,
    repeats: Annotated[int, typer.Option(help="Repeats after a warm-up; the median counts.")] = 5,
    policy: Annotated[str, typer.Option(help="auto, or a number of draft tokens.")] = "auto",
    data: Data = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Measure the memory's speed too.")
    ] = False,
    quantize: Quantize = None,
    kv: Kv = "float",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time decoding after long and short contexts, plain and with drafters, in one run."""
    from linspec.bench.speed import bench as library

    place = place_on(device, threads)
    with quiet_stdout():
        result = library(
            model,
            numbers(contexts, "--contexts"),
            drafter or (),
            tokens=tokens,
            repeats=repeats,
            policy=policy,
            data=sources(data),
            device=place,
            bandwidth=bandwidth,
            quantize=quantize,
            kv=kv,
        ).to_json()
    if as_json:
        print_json(result)
        return
    print_speed(result)


app.command(VERB, epilog="Example: linspec bench peers --shapes 110m --quick")(bench_peers)


@app.command(epilog="Example: linspec info --json")
@guarded()
def info(threads: Threads = None, as_json: Json = False) -> None:
    """Versions, devices and the kernels that will be used, with the reason."""
    from linspec.bench.machine import info as library

    place_on("cpu", threads)
    facts = library()
    print_json(facts) if as_json else print_facts(facts)


@app.command("list", epilog="Example: linspec list")
@guarded()
def list_plugins(as_json: Json = False) -> None:
    """Every mixer, drafter, verifier and policy, with the paper it comes from."""
    from linspec.plugins import catalogue

    found = catalogue()
    if as_json:
        print_json(found)
        return
    for axis, entries in found.items():
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        print_table(axis, columns, [[e.get(key, "") for key in columns] for e in entries])


def main() -> None:
    """Entry point of the `linspec` command."""
    app()
