"""Plain decoding beside transformers' `generate`: same weights, machine, threads and prompt.

    python -m benchmarks.against_transformers --context 128 --tokens 64

Random weights of a 110M-parameter Llama shape: speed needs no training. Repeats take turns, so that a busy
machine is busy for both.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from linspec.bench.machine import machine
from linspec.checkpoints.hub import load_model
from linspec.cli.console import guarded, quiet_stdout
from linspec.decoding.step import StepInput
from linspec.models.decoder import Decoder
from studies.lib.command import called, command
from studies.lib.plan import check_counts

# 12 layers of width 768 with 12 heads, feed-forward 2048, vocabulary 32,000, tied: 109.5M parameters
SHAPE_110M: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}


def compare(context: int, tokens: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Tokens per second of both engines, greedy, batch 1; raises ConfigError for counts below 1."""
    check_counts(context=context, tokens=tokens, repeats=repeats)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE_110M)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder).to_inference()
    prompt = torch.randint(3, SHAPE_110M["vocab_size"], (1, context))
    runs: dict[str, Callable[[], tuple[list[int], float]]] = {
        "linspec": lambda: _ours(ours, prompt[0].tolist(), tokens),
        "transformers": lambda: _theirs(theirs, prompt, tokens),
    }
    outputs = {name: run()[0] for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run()[1])
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "machine": machine(bandwidth=True),
        "shape": "llama 110M float32",
        "context": context,
        "same_output": outputs["linspec"] == outputs["transformers"],
        "tokens_per_s": {name: round(tokens / seconds, 2) for name, seconds in medians.items()},
        "spread": {
            name: round((max(found) - min(found)) / medians[name], 3)
            for name, found in times.items()
        },
        "ratio": round(medians["transformers"] / medians["linspec"], 3),
    }


def _ours(model: Decoder, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Generated ids, and the seconds after the prompt was read."""
    state = model.new_state()
    output = model.step([StepInput(0, prompt, all_logits=False)], state)
    state.commit(0, range(len(prompt)))
    found = [int(output.logits[-1].argmax())]
    began = time.perf_counter()
    for _ in range(tokens):
        output = model.step([StepInput(0, found[-1:])], state)
        state.commit(0, (0,))
        found.append(int(output.logits[-1].argmax()))
    return found, time.perf_counter() - began


@torch.inference_mode()
def _theirs(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """As `_ours`: what a prompt with one new token takes is not counted."""

    def generate(count: int) -> tuple[list[int], float]:
        began = time.perf_counter()
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return ids[0, prompt.shape[1] :].tolist(), time.perf_counter() - began

    first = generate(1)[1]
    found, total = generate(tokens + 1)
    return found, total - first


@guarded()
def against_transformers(
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats.")] = 5,
) -> None:
    """Time plain decoding beside transformers' generate, and print the comparison as JSON."""
    with quiet_stdout():
        found = compare(context, tokens, repeats)
    typer.echo(json.dumps(found, indent=2))


app = command(against_transformers, "benchmarks.against_transformers", "--tokens 32")

if __name__ == "__main__":
    app(prog_name=called("benchmarks.against_transformers"))
