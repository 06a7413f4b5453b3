"""What a GPU makes of linspec, in one prepared run of some minutes: every figure of docs/results/gpu.md.

    python -m benchmarks.gpu --out gpu
    python -m benchmarks.gpu --out smoke --quick --device cpu     # no figures, only whether it runs

Each section writes one JSON file when it ends, so a run that was stopped goes on with the next one. A step is
timed between two synchronisations, after steps that are not counted; of all repeats the median and the spread
are kept. Sizes that the memory has no room for are left out by name.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from linspec.bench.machine import machine
from linspec.checkpoints.convert import convert
from linspec.checkpoints.hub import load_model
from linspec.cli.console import guarded, say
from linspec.decoding.judged import JudgeBy, Onward
from linspec.decoding.step import StepInput, Want
from linspec.decoding.target import Target
from linspec.decoding.tree import root_only
from linspec.errors import ConfigError, LinspecError
from linspec.kernels.device import pick_device
from linspec.kernels.gpu.graphs import recorder_for
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep
from linspec.models.whole_step import whole_step
from studies.lib.cells import Cells
from studies.lib.command import called, command

# of TinyLlama: 1.1 billion weights
LARGE = DecoderConfig(
    vocab_size=32_000, width=2048, layers=22, heads=32, kv_heads=4, head_width=64, mlp_width=5632,
    tied_embeddings=False,
)  # fmt: skip
SMALL = DecoderConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=64
)
NODES = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class Run:
    """device: of all sections. quick: tiny sizes. model: what `plain` decodes. repeats: of each timing."""

    device: torch.device
    quick: bool
    model: str
    repeats: int


Timing = dict[str, float]


def wait(device: torch.device) -> None:
    """Until all that was launched on `device` has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Run, call: Callable[[], object], count: int = 1) -> Timing:
    """Milliseconds of one of `count` calls in a row: median and spread of the repeats."""
    for _ in range(3):
        call()
    found = []
    for _ in range(run.repeats):
        wait(run.device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        wait(run.device)
        found.append((time.perf_counter() - began) / count * 1e3)
    middle = statistics.median(found)
    return {"ms": round(middle, 4), "spread": round((max(found) - min(found)) / middle, 3)}


def limits(run: Run) -> dict[str, Any]:
    """What the card can do: a copy of 1 GiB, and a product of two bf16 matrices."""
    size, edge = (2**20, 64) if run.quick else (2**30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = timed(run, lambda: target.copy_(source))
    a, b = (torch.randn(edge, edge, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(run, lambda: a @ b)
    return {
        "copy_gb_per_s": round(2 * size / copy["ms"] / 1e6, 1),
        "product_tflop_per_s": round(2 * edge**3 / product["ms"] / 1e9, 2),
    }


def random_model(
    run: Run, config: DecoderConfig, dtype: torch.dtype, mixer: str = "softmax"
) -> Decoder:
    """A decoder of random weights, in its inference form."""
    mixers: tuple[MixerConfig, ...] = (make_mixer(mixer),) * config.layers
    with torch.device(run.device):
        made = Decoder(replace(config, mixers=mixers))
    made.to(dtype)
    return made.to_inference()


def ways(model: Decoder) -> Mapping[str, Any]:
    """How a step can run: as linspec chooses, unrecorded, and layer by layer."""
    return {"chosen": whole_step(model), "unrecorded": StaticStep(model, None), "by layer": None}


def filled(model: Decoder, slots: int, context: int) -> Any:
    """A state whose slots have read `context` random tokens."""
    state = model.new_state(slots)
    for slot in range(slots):
        for first in range(0, context, 2048):
            count = min(2048, context - first)
            ids = torch.randint(model.config.vocab_size, (count,)).tolist()
            model.step([StepInput(slot, ids, all_logits=False)], state)
            state.commit(slot, range(count))
    return state


def step_of(model: Decoder, state: Any, slots: int, nodes: int) -> Callable[[], object]:
    """A step of random binary trees, which is dropped again."""
    parents = [-1, *((node - 1) // 2 for node in range(1, nodes))]
    inputs = [StepInput(slot, list(range(nodes)), parents) for slot in range(slots)]

    def step() -> None:
        model.step(inputs, state)
        for slot in range(slots):
            state.drop(slot)

    return step


def weight_bytes(model: Decoder) -> int:
    """Bytes that a step reads: all weights but the rows of the embedding, unless it is the output layer."""
    own = [*model.blocks.parameters(), *model.norm.parameters(), *model.head.parameters()]
    return sum(each.nbytes for each in own)


def plain(run: Run) -> dict[str, Any]:
    """A real model at batch 1: tokens per second of steps with their argmax, by dtype and by way.

    In the blocks of its file too, where LINSPEC_TRITON is 'on'.
    """
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_model(run.model, device=str(run.device)).to(dtype).to_inference()
        for name, way in ways(loaded).items():
            loaded.native = way
            found[f"{dtype} {name}"] = timed(run, _token(loaded), 8 if run.quick else 64)
    kept = load_model(run.model, dtype=torch.bfloat16, device=str(run.device), keep_blocks=True)
    if kept.is_inference:
        found["blocks"] = timed(run, _token(kept), 8 if run.quick else 64)
    return found


def _token(model: Decoder) -> Callable[[], object]:
    """One more token of a text of its own, greedy."""
    state, last = filled(model, 1, 128), [1]

    def token() -> None:
        logits = model.step([StepInput(0, last)], state).logits
        state.commit(0, (0,))
        last[0] = int(logits[-1].argmax())

    return token


def rounds(run: Run) -> dict[str, Any]:
    """Greedy rounds of the real model in bf16, judged in their step: one at a time, and eight in a row."""
    model = load_model(run.model, device=str(run.device)).to(torch.bfloat16).to_inference()
    model.native = StaticStep(model, recorder_for(run.device))
    found: dict[str, Any] = {}
    for slots in (1, 2) if run.quick else (1, 16, 64):
        target = Target(model, filled(model, slots, 128))
        for count in (1, 8):
            timing = timed(run, _rounds(target, slots, count), 2)
            found[f"{slots} slots, {count} in a row"] = {
                "ms": round(timing["ms"] / count, 4),
                "spread": timing["spread"],
            }
    return found


def _rounds(target: Target, slots: int, count: int) -> Callable[[], object]:
    """So many rounds without drafts, each read by the host, and dropped again."""
    judge = JudgeBy(regrow=(0,))
    given = [StepInput.tree(slot, root_only(1), judge) for slot in range(slots)]
    want = Want(onward=Onward(rounds=count))

    def step() -> None:
        for output in target.step(given, want=want):
            judged = output.judged
            while judged is not None and judged.next is not None:
                judged = judged.next()
        for slot in range(slots):
            target.state.drop(slot)

    return step


def transformers(run: Run) -> dict[str, Any]:
    """The same model through transformers' `generate`, static cache and compiled forward; bf16."""
    from transformers import AutoModelForCausalLM

    tokens = 8 if run.quick else 128
    with tempfile.TemporaryDirectory() as folder:
        convert(run.model, Path(folder) / "same")
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/same", dtype=torch.bfloat16)
    loaded = loaded.to(run.device)
    prompt = torch.ones(1, 128, dtype=torch.long, device=run.device)
    given = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0}

    def generate(count: int) -> Callable[[], object]:
        counts = {"min_new_tokens": count, "max_new_tokens": count}
        mask = torch.ones_like(prompt)
        return lambda: loaded.generate(prompt, attention_mask=mask, **given, **counts)

    one, many = timed(run, generate(1)), timed(run, generate(tokens + 1))
    return {"ms": round((many["ms"] - one["ms"]) / tokens, 4), "spread": many["spread"]}


def large(run: Run) -> dict[str, Any]:
    """1.1B random weights in bf16: steps of 1, 8 and 64 nodes, and the bytes of weights that each reads."""
    model = random_model(run, SMALL if run.quick else LARGE, torch.bfloat16)
    state = filled(model, 1, 128)
    steps = {str(nodes): timed(run, step_of(model, state, 1, nodes), 8) for nodes in NODES}
    return {"weight_bytes": weight_bytes(model), "nodes": steps}


def contexts(run: Run) -> dict[str, Any]:
    """Random weights of one shape, aug and softmax, bf16: a step at each context."""
    lengths = (16, 64) if run.quick else (128, 2048, 32_768)
    shape = SMALL if run.quick else replace(LARGE, layers=8)
    found: dict[str, Any] = {}
    for mixer in ("aug", "softmax"):
        model = random_model(run, shape, torch.bfloat16, mixer)
        for length in lengths:
            step = step_of(model, filled(model, 1, length), 1, 1)
            found[f"{mixer} {length}"] = timed(run, step, 8)
    return found


def batches(run: Run) -> dict[str, Any]:
    """The shape of the real model with random weights, bf16: a step of several sequences."""
    config = load_model(run.model).config
    model = random_model(run, config, torch.bfloat16)
    sizes = (1, 4) if run.quick else (1, 16, 64)
    return {
        str(slots): timed(run, step_of(model, filled(model, slots, 128), slots, 1), 8)
        for slots in sizes
    }


SECTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    each.__name__: each for each in (limits, plain, rounds, large, contexts, batches, transformers)
}


def measure(run: Run, cells: Cells, names: Sequence[str]) -> None:
    """The sections that are missing; one that fails for want of memory or of a package says so."""
    for name in names:
        if cells.read(name) is not None:
            say(f"{name}: kept")
            continue
        say(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
        began = time.perf_counter()
        try:
            found = SECTIONS[name](run)
        except (torch.OutOfMemoryError, ImportError, LinspecError) as error:
            found = {"left_out": str(error).splitlines()[0]}
        seconds = round(time.perf_counter() - began, 1)
        cells.write(name, {"seconds": seconds, "machine": machine(), "found": found})
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


@guarded("give the same command to go on; finished sections are kept")
def gpu(
    out: Annotated[Path, typer.Option(help="Folder of the sections' files.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu for a trial.")] = "cuda",
    model: Annotated[
        str, typer.Option(help="A Hugging Face directory or a known model.")
    ] = "smollm2",
    only: Annotated[str, typer.Option(help="Sections, with commas; all by default.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed repeats.", min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it runs.")] = False,
) -> None:
    """Time decoding on a GPU: limits of the card, plain steps, rounds, trees, contexts, batches, and more."""
    names = [each.strip() for each in only.split(",") if each.strip()] or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise ConfigError(f"no section {unknown[0]!r}; sections are {', '.join(SECTIONS)}")
    cells = Cells(out)
    measure(Run(torch.device(pick_device(device)), quick, model, repeats), cells, names)
    typer.echo(json.dumps({name: cells.read(name) for name in names}, indent=1))


app = command(gpu, "benchmarks.gpu", "--out gpu")

if __name__ == "__main__":
    app(prog_name=called("benchmarks.gpu"))
