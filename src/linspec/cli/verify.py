"""The verb `verify`: whether a drafter or a policy changes nothing, and whether files are whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linspec.cli.checks import whole
from linspec.cli.console import guarded, place_on, print_facts, print_json, quiet_stdout
from linspec.cli.options import (
    AttentionName,
    Data,
    Device,
    DrafterName,
    Json,
    Kv,
    Model,
    Quantize,
    Threads,
)
from linspec.errors import ConfigError


@guarded()
def verify(
    model: Model,
    drafter: DrafterName = "none",
    prompts: Annotated[
        int, typer.Option(callback=whole(), help="Prompts, from held-out text.")
    ] = 64,
    tokens: Annotated[int, typer.Option(callback=whole(), help="New tokens of each.")] = 128,
    draws: Annotated[
        int, typer.Option(callback=whole(0), help="Samples for the test of the distribution.")
    ] = 2000,
    policy: Annotated[str, typer.Option(help="Number of draft tokens, or auto.")] = "12",
    loop: Annotated[
        str | None,
        typer.Option(
            help="Of a diffusion model: a spec such as masked-diffusion:verify=freedave.",
            show_default="all that is lossless",
        ),
    ] = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(callback=whole(0), help="Choice of the prompts.")] = 0,
    attention: AttentionName = None,
    quantize: Quantize = None,
    kv: Kv = "auto",
    files: Annotated[
        bool, typer.Option("--files", help="Read all files instead: checksums, every value.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check that a drafter changes nothing: greedy token for token, samples by a chi-square test.

    Of a diffusion model: that policies give the tokens of static decoding, also with seeds; --drafter,
    --policy and --draws do not count there. Exits with 1 when output differs by more than near ties (logits
    closer than 1e-4), and with --files when a file of the model or of a drafter in it is damaged.
    """
    if files:
        from linspec.evaluate.files import verify_files

        with quiet_stdout():
            found = verify_files(model).to_json()
        _show(found, as_json)
        return
    from linspec.evaluate.lossless import verify as library
    from linspec.evaluate.lossless_denoising import verify_denoising, writes_by_masks

    shared: dict[str, Any] = {
        "prompts": prompts,
        "tokens": tokens,
        "data": data or ["stdlib"],
        "device": place_on(device, threads),
        "seed": seed,
        "quantize": quantize,
        "kv": kv,
    }
    with quiet_stdout():
        if writes_by_masks(model):
            _check_no_drafter(drafter)
            _check_no_attention(attention)
            denoised = verify_denoising(model, loop, **shared)
            report, lossless = denoised.to_json(), denoised.lossless
        else:
            _check_no_loop(loop)
            drafted = library(
                model, drafter, draws=draws, policy=policy, attention=attention, **shared
            )
            report, lossless = drafted.to_json(), drafted.lossless_greedy
    _show(report, as_json)
    if not lossless:
        raise typer.Exit(1)


def _check_no_drafter(drafter: str) -> None:
    if drafter not in ("none", "auto"):
        raise ConfigError(
            f"a diffusion model takes no drafter, got {drafter!r}; --loop says which policies are compared"
        )


def _check_no_loop(loop: str | None) -> None:
    if loop is not None:
        raise ConfigError(
            f"--loop {loop} is compared for a diffusion model; this one is verified with --drafter"
        )


def _show(found: dict[str, Any], as_json: bool) -> None:
    print_json(found) if as_json else print_facts(found)


def _check_no_attention(attention: str | None) -> None:
    if attention is not None:
        raise ConfigError(
            "tokens of a diffusion model see later ones, which sparse attention does not; leave out "
            "--attention"
        )
