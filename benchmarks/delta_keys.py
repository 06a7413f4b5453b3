"""Keys as changes: what a threshold saves of the products of scores, and of the bytes of keys.

    python -m benchmarks.delta_keys --thresholds 0.25 0.5 1 --length 1024

Of the softmax layers of a model over running text, its keys after their rotation: for each threshold the
share of multiply-adds of causal scores that need not be done (the last groups whole), and of the bytes of all
keys, as bits and values in float32, against whole keys. Means over layers, and products of each layer. No
speed is claimed: dense products are faster than sparse ones until nearly all is saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator

import torch

from linspec.decoding.protocols import CausalModel
from linspec.decoding.step import StepInput
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.mixers.ops.key_changes import encoded, products_saved
from linspec.train.data import end_of_text, tokenize


def keys_of(model: CausalModel, tokens: list[int]) -> Iterator[torch.Tensor]:
    """The keys [Hkv, T, K] of each layer that keeps a cache."""
    state = model.new_state()
    model.step([StepInput(0, tokens)], state)
    state.commit(0, range(len(tokens)))
    for part in state.parts:
        if part.bytes_at(2 * len(tokens)) > part.bytes_at(len(tokens)):
            yield from part.keys[:, 0, :, : len(tokens)]


def savings(keys: torch.Tensor, threshold: float, group: int, span: int) -> tuple[float, float]:
    """Shares of products, and of the bytes of keys, that a threshold saves."""
    changes = encoded(keys, threshold, group)
    return products_saved(changes.kept, group, span), 1 - changes.nbytes / keys.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--span", type=int, default=2)
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="running text")
    options = parser.parse_args()
    llm = LLM(options.model)
    stream = tokenize(
        held_out_documents(options.data),
        llm.tokenizer,
        end_of_text(llm.tokenizer, llm.model.config),
    )
    layers = list(keys_of(llm.model, stream[: options.length].tolist()))
    for threshold in options.thresholds:
        found = [savings(each, threshold, options.group, options.span) for each in layers]
        products, saved = zip(*found, strict=True)
        row = {
            "threshold": threshold,
            "products_saved": round(statistics.mean(products), 3),
            "bytes_saved": round(statistics.mean(saved), 3),
            "products_by_layer": [round(each, 3) for each in products],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
