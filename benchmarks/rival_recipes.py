"""What other recipes make of SmolLM2 with the exact heads of `smollm2-aug`, each with the same few tokens.

    python -m benchmarks.rival_recipes --out runs/rivals --data texts/ --judge wikitext2_valid.txt

The other heads get a window of two or three groups, so that all states have about the same bytes, and what
the recipe adds. A line of `rows.jsonl` for each, for the original and for the untrained window: nats, KL
and top-1 agreement on running text, and needles found at the trained length and at four times that. A row
that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.evaluate.agreement import score
from linspec.evaluate.needles import questions, recalled
from linspec.evaluate.perplexity import held_out_documents
from linspec.mixers.exact_heads import Heads, by_head_mixers
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.train.data import Windows, end_of_text, tokenize, train_and_heldout
from linspec.train.exact_heads import RANKS
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.low_rank import add_low_rank
from linspec.train.match_teacher import KlLoss
from linspec.train.pretrain import next_token_loss
from linspec.train.student import changed_layers, with_mixers
from linspec.train.transfer import Transfer

TEACHER, HEADS_OF, CONTEXT, ROWS = "smollm2", "smollm2-aug", 1024, 2
JUDGED, WINDOWS, FAR = 2048, 6, 4 * CONTEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How heads that are not exact are replaced and trained.

    mixer, span: theirs. transfer: share of the tokens that match the teacher layer by layer, at
    `transfer_lr`. ranks: of low-rank changes, by matrix. kl: KL to the teacher, else cross-entropy of
    the text. starts: weights of the mixers that do not start at their own defaults; they and all
    others of the mixers are trained unless `frozen` names their end.
    """

    mixer: str
    span: int
    transfer: float = 0.0
    transfer_lr: float = 1e-2
    ranks: Mapping[str, int] = field(default_factory=lambda: RANKS)
    lr: float = 1e-3
    kl: bool = True
    starts: Mapping[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


RECIPES = {
    # as `linspec linearize --exact-heads` does
    "window": Recipe(mixer="streaming", span=3),
    "sum": Recipe(mixer="hedgehog", span=2, transfer=0.4),
    "gla": Recipe(mixer="gla", span=2, transfer=0.4),
    "gdn": Recipe(mixer="gdn", span=2, transfer=0.4),
    # Zhang et al. 2024, arXiv 2410.10254
    "lolcats": Recipe(
        mixer="hedgehog",
        span=2,
        transfer=0.5,
        ranks=dict.fromkeys(("q", "k", "v", "o"), 8),
        lr=1e-4,
        kl=False,
    ),
    # Lan et al. 2025, arXiv 2503.01496: gates are the keys', half of the sum is added to the window
    "liger": Recipe(
        mixer="gla",
        span=2,
        ranks=dict.fromkeys(("q", "k", "v"), 8),
        kl=False,
        starts={"alpha": 0.5},
        frozen=("alpha", "gate_scale", "gate_bias"),
    ),
}


def exact_heads_of(model: Decoder) -> Heads:
    """The KV heads of a model that see everything."""
    every = tuple(range(model.config.kv_heads))
    return tuple(
        every if mixer.name == "softmax" else mixer.exact_heads for mixer in model.config.mixers
    )


def make_student(teacher: Decoder, recipe: Recipe, heads: Heads) -> Decoder:
    """The teacher with `heads` exact and the recipe's mixer in the others, untrained."""
    mixer = make_mixer(recipe.mixer, span=recipe.span)
    student = with_mixers(teacher, by_head_mixers(teacher.config, mixer, heads))
    for name, start in recipe.starts.items():
        for each, weight in student.named_parameters():
            if each.endswith(name):
                weight.data.fill_(start)
    return student


def train(
    teacher: Decoder, student: Decoder, recipe: Recipe, windows: Windows, tokens: int, folder: Path
) -> None:
    """Transfer, then the whole model with low-rank changes; goes on from what is in `folder`."""
    steps = max(2, tokens // (CONTEXT * ROWS))
    first = round(recipe.transfer * steps)
    known = {name for name, _ in teacher.named_parameters()}
    own = [
        weight
        for name, weight in student.named_parameters()
        if name not in known and not name.endswith(recipe.frozen)
    ]

    def stage(name: str, module: torch.nn.Module, loss: Any, count: int, lr: float) -> None:
        config = TrainConfig(steps=count, lr=lr, warmup=max(1, count // 10), compile="off")
        begin = 0 if name == "transfer" else first
        trainer = Trainer(
            module,
            loss,
            lambda step: windows.batch(begin + step, ROWS),
            config,
            folder / name,
            label=name,
        )
        trainer.run(resume=trainer.has_state)

    student.requires_grad_(False)
    for weight in own:
        weight.requires_grad_(True)
    if first:
        layers = changed_layers(teacher.config, student.config)
        with Transfer(teacher, student, layers) as transfer:
            stage("transfer", transfer.parameters(), transfer.loss, first, recipe.transfer_lr)
    add_low_rank(student, recipe.ranks, seed=0)
    for weight in own:
        weight.requires_grad_(True)
    loss = KlLoss(teacher, student) if recipe.kl else partial(next_token_loss, student)
    stage("all", student, loss, steps - first, recipe.lr)


def judge(model: Decoder, teacher: Decoder, tokenizer: Any, ids: Any, items: int) -> dict[str, Any]:
    """Agreement on windows of running text, and needles found."""
    usable = len(ids) // (JUDGED + 1) * (JUDGED + 1)
    windows = torch.tensor(ids[:usable]).view(-1, JUDGED + 1)
    windows = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS]
    found = score(model, windows, None if model is teacher else teacher, rows=1).to_json()
    for length in (CONTEXT, FAR):
        asked = questions(tokenizer, ids, lengths=(length,), items=items)[length, 1]
        found[f"found of {items} at {length}"] = int(recalled(model, asked, 2 * length).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory, which is added to")
    parser.add_argument("--rows", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--tokens", type=int, default=290_000, help="of each row")
    parser.add_argument("--items", type=int, default=20, help="needles of a length")
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="text to train on")
    parser.add_argument("--judge", nargs="+", default=["stdlib"], help="text to measure on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "rows.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    teacher, tokenizer = load_model(TEACHER).requires_grad_(False), load_tokenizer(TEACHER)
    heads, end = exact_heads_of(load_model(HEADS_OF)), end_of_text(tokenizer, teacher.config)
    documents, _ = train_and_heldout(options.data)
    windows = Windows(tokenize(documents, tokenizer, end), CONTEXT, 0)
    ids = tokenize(held_out_documents(options.judge), tokenizer, end)
    for name in ("teacher", "untrained", *options.rows):
        asked = {"row": name, "tokens": options.tokens if name in RECIPES else 0}
        if any(row.items() >= asked.items() for row in done):
            continue
        student = teacher
        if name == "untrained":
            student = make_student(teacher, RECIPES["window"], heads)
        elif name in RECIPES:
            student = make_student(teacher, RECIPES[name], heads)
            folder = options.out / f"{name}-{options.tokens}"
            train(teacher, student, RECIPES[name], windows, options.tokens, folder)
        row = asked | judge(student.eval(), teacher, tokenizer, ids, options.items)
        print(json.dumps(row), flush=True)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
