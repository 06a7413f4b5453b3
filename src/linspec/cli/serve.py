"""The verb `serve`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import check_serve_extra, real, whole
from linspec.cli.console import guarded, importing, quiet_stdout, say
from linspec.cli.groups import grouped
from linspec.cli.options import Decoding, DrafterName, given

Count = whole()


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to listen, whom to let in, what to allow; None is what serve.settings has."""

    host: Annotated[
        str | None, typer.Option(help="Address to listen at.", show_default="127.0.0.1")
    ] = None
    port: Annotated[
        int | None,
        typer.Option(callback=whole(0, 2**16 - 1), help="0 takes a free one.", show_default="8000"),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(help="A bearer key; better as LINSPEC_SERVE_API_KEY.")
    ] = None
    key_file: Annotated[Path | None, typer.Option(help="Bearer keys, lines NAME:SHA256.")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM), for https.")] = (
        None
    )
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of it.")] = None
    cors_origins: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="A web origin whose pages may ask; repeatable."),
    ] = None
    max_batch: Annotated[
        int | None,
        typer.Option(callback=Count, help="Sequences that run at once.", show_default="8"),
    ] = None
    queue_limit: Annotated[
        int | None,
        typer.Option(callback=whole(0), help="Sequences that may wait.", show_default="128"),
    ] = None
    tbt_ms: Annotated[
        float | None,
        typer.Option(
            callback=real(least=0),
            help="Milliseconds that a stream may wait while prompts are read; 0 is no limit.",
            show_default="50",
        ),
    ] = None
    state_mib: Annotated[
        int | None,
        typer.Option(callback=Count, help="MiB of the states of running sequences."),
    ] = None
    prefix_mib: Annotated[
        int | None,
        typer.Option(
            callback=whole(0),
            help="MiB for states of earlier prompts and answers; 0 keeps none.",
            show_default="256",
        ),
    ] = None
    prefix_store: Annotated[
        Path | None,
        typer.Option(help="A directory for those that leave this memory; it holds texts too."),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(
            callback=Count, help="Tokens of a prompt and its output.", show_default="the model's"
        ),
    ] = None
    max_prompt_tokens: Annotated[
        int | None, typer.Option(callback=Count, help="Tokens of a prompt.")
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            callback=Count, help="Output tokens a request may ask for.", show_default="4096"
        ),
    ] = None
    max_body_bytes: Annotated[
        int | None,
        typer.Option(callback=Count, help="Bytes of a request.", show_default="8388608"),
    ] = None
    body_seconds: Annotated[
        float | None,
        typer.Option(
            callback=real(above=0),
            help="Longest time in which a request arrives.",
            show_default="60",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=real(least=0), help="Of requests that name none.", show_default="1.0"
        ),
    ] = None
    request_seconds: Annotated[
        float | None,
        typer.Option(callback=real(above=0), help="Longest time of a request.", show_default="600"),
    ] = None
    shutdown_seconds: Annotated[
        float | None,
        typer.Option(
            callback=real(least=0),
            help="Time for running requests at the end.",
            show_default="30",
        ),
    ] = None
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts", help="Write prompts into the log.")
    ] = None
    otel: Annotated[
        bool | None,
        typer.Option("--otel", help="Send spans of requests to OTEL_EXPORTER_OTLP_ENDPOINT."),
    ] = None
    replicas: Annotated[
        int | None,
        typer.Option(
            callback=Count, help="Copies of the models behind one front.", show_default="1"
        ),
    ] = None
    ray: Annotated[
        bool | None,
        typer.Option("--ray", help="Run them on Ray Serve, on the cluster of RAY_ADDRESS or here."),
    ] = None

    def to_library(self) -> dict[str, Any]:
        """Those that were given."""
        found = given(asdict(self))
        return {name: value for name, value in found.items() if value != []}


@dataclass(frozen=True, kw_only=True)
class Drafting(Decoding):
    """What decodes, drafts included: the policy leaves them out where they do not pay."""

    drafter: DrafterName = "auto"


@grouped
@guarded("the server has ended")
def serve(
    serving: Serving,
    decoding: Drafting,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Names, directories or GGUF files, also as NAME=MODEL."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in TOML; flags and LINSPEC_SERVE_… go before.")
    ] = None,
) -> None:
    """Serve models over HTTP, with OpenAI's API; prompts of several clients share the steps."""
    with importing():
        check_serve_extra()
        from linspec.serve.logs import written
        from linspec.serve.run import serve as library
        from linspec.serve.settings import Settings

    settings = Settings.read(config, **serving.to_library())
    with written(), quiet_stdout():
        library(models or [], settings, decoding.to_library(), say)
