"""Arguments and options that several verbs share, one by one and in groups (see `groups`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.checks import cache_dtype, named, real, sources, whole
from linspec.cli.console import place_on
from linspec.errors import ConfigError

Model = Annotated[
    str,
    typer.Argument(
        help="A directory, a GGUF file, embedded-softmax, embedded-aug, smollm2, smollm2-aug or "
        "smollm2-aug-22."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Threads = Annotated[
    int | None,
    typer.Option(
        callback=whole(), help="CPU threads.", envvar="LINSPEC_THREADS", show_default="all"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
DrafterName = Annotated[
    str,
    typer.Option(
        help="none, NAME or NAME:key=value,… of linspec list, such as medusa or medusa:DIR."
    ),
]
Quantize = Annotated[
    int | None, typer.Option(help="Turn the weights into 8 or 4 bits as they are loaded.")
]
Kv = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        callback=cache_dtype,
        help="How softmax caches are kept: auto (16 bits if the weights are stored so), float32, float16, "
        "bfloat16, int8 or int4.",
    ),
]
MaxTokens = Annotated[int, typer.Option(callback=whole(), help="Most tokens to add.")]
MinTokens = Annotated[
    int, typer.Option(callback=whole(0), help="Tokens before the output may end.")
]
Temperature = Annotated[
    float, typer.Option(callback=real(least=0), help="0 takes the likeliest token.")
]
TopK = Annotated[int, typer.Option(callback=whole(0), help="Sample among k tokens; 0 is all.")]
TopP = Annotated[
    float, typer.Option(callback=real(above=0, most=1), help="Sample among this mass.")
]
MinP = Annotated[
    float,
    typer.Option(
        callback=real(least=0, most=1), help="Sample what is this many times as likely as the best."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(callback=real(above=0), help="Above 1 repeats less.")
]
PresencePenalty = Annotated[
    float, typer.Option(callback=real(least=-2, most=2), help="Taken from tokens of the output.")
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(callback=real(least=-2, most=2), help="The same, each time that they occur."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        callback=whole(0, 2**64 - 1), help="Equal seeds, equal text.", show_default="random"
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        help="auto, specdec-pp, goodput or a number of draft tokens, 0..63; of a diffusion model "
        "commit=…,cache=….",
    ),
]
AttentionName = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help="Sparse attention in the place of softmax, such as pages:budget=1024; linspec calibrate finds "
        "what lserve:budget=1024 needs.",
        show_default="all tokens",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        help="More positions than the model was trained for: yarn:4 for four times as many.",
        show_default="none",
    ),
]
# a text: of an empty one a path would make the working directory
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Directory for a file with what the attention need not have in memory, such as values with "
        "--attention shadow.",
        show_default="memory",
    ),
]
LoopName = Annotated[str, typer.Option(help="auto, or a spec such as beam:width=4.")]
VerifierName = Annotated[
    str, typer.Option(help="lossless, block, greedy; lossy: typical, trusting.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        callback=sources,
        help="stdlib, a text file, a folder, a .jsonl file or a datasets directory.",
    ),
]
Field = Annotated[str, typer.Option(help="Where the text is in .jsonl and datasets.")]
Tokens = Annotated[int | None, typer.Option(callback=whole(), help="Training tokens.")]
Context = Annotated[int | None, typer.Option(callback=whole(), help="Tokens of a window.")]
BatchTokens = Annotated[int | None, typer.Option(callback=whole(), help="Tokens of a step.")]
Rate = Annotated[float | None, typer.Option(callback=real(above=0), help="Learning rate.")]
RecallShare = Annotated[
    float | None,
    typer.Option(
        callback=real(least=0, most=1),
        help="Share of the windows that ask for what stood far above.",
    ),
]
Compile = Annotated[
    str,
    typer.Option(
        help="Compile the training step: auto (where it pays), on or off. The result is the same."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="What products are computed in: auto (bf16 where the processor is fast at it), float32 or bf16. "
        "Weights and moments stay float32."
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        "--sequence-parallel",
        callback=whole(),
        help="So many processes share each window, started by torchrun. The result is the same.",
        show_default="1",
    ),
]
Order = Annotated[int | None, typer.Option("--seed", callback=whole(0), help="Order of the data.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last saved state in the output.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the same command wrote there before.")
]
Out = Annotated[Path, typer.Option(callback=named, help="Model directory to write.")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    seed: Seed = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What decodes, and on what."""

    drafter: DrafterName = "none"
    policy: PolicyName = "auto"
    verifier: VerifierName = "lossless"
    loop: LoopName = "auto"
    attention: AttentionName = None
    rope_scaling: RopeScaling = None
    offload: Offload = None
    quantize: Quantize = None
    kv: Kv = "auto"
    device: Device = "cpu"
    threads: Threads = None

    def to_library(self) -> dict[str, Any]:
        """As `LLM` takes them, for one request at a time; --threads is applied."""
        return {
            "drafter": self.drafter,
            "policy": self.policy,
            "verifier": self.verifier,
            "loop": self.loop,
            "attention": self.attention,
            "rope_scaling": self.rope_scaling,
            "offload": self.offload,
            "max_batch": 1,
            "device": place_on(self.device, self.threads),
            "quantize": self.quantize,
            "kv_cache_dtype": self.kv,
        }


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Which texts."""

    data: Data = None
    field: Field = "text"

    def to_library(self) -> dict[str, Any]:
        """As functions of the library take them; the standard library where --data is left out."""
        return {"data": self.data or ["stdlib"], "field": self.field}


@dataclass(frozen=True, kw_only=True)
class Computing:
    """On what a model computes."""

    device: Device = "cpu"
    threads: Threads = None

    def to_library(self) -> dict[str, Any]:
        """As functions of the library take it; --threads is applied."""
        return {"device": place_on(self.device, self.threads)}


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded, and on what it computes."""

    attention: AttentionName = None
    rope_scaling: RopeScaling = None
    quantize: Quantize = None
    kv: Kv = "auto"
    device: Device = "cpu"
    threads: Threads = None

    def to_library(self) -> dict[str, Any]:
        """As functions of the library take it; --threads is applied."""
        return {
            "attention": self.attention,
            "rope_scaling": self.rope_scaling,
            "quantize": self.quantize,
            "kv": self.kv,
            "device": place_on(self.device, self.threads),
        }


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how to train; what is left out (None) keeps the default of the library."""

    tokens: Tokens = None
    context: Context = None
    batch_tokens: BatchTokens = None
    lr: Rate = None
    seed: Order = None
    compile: Compile = "auto"
    precision: Precision = "auto"

    def given(self) -> dict[str, Any]:
        """Those that the user gave."""
        asked = asdict(self)
        # what each kind of training takes by itself, and encoders have none
        if self.precision == "auto":
            del asked["precision"]
        return given(asked)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a long run begins and where it computes."""

    resume: Resume = False
    overwrite: Overwrite = False
    threads: Threads = None

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError(
                "--resume continues a run and --overwrite begins it again; give one of the two"
            )


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None: the library has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}
