"""Linearization recipes at an equal budget: linspec's, the paper's, LoLCATs, Liger, and the control.

The published ones are run with linspec's mixers and trainer. Their rates are chosen for this size of
model, where those published for billions of weights would hardly move anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from linspec.config import MixerConfig
from linspec.evaluate.perplexity import evaluate
from linspec.evaluate.recall import DISTANCES, evaluate_recall
from linspec.evaluate.study.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
    Table,
    with_spread,
)
from linspec.models.decoder import Decoder
from linspec.models.hub import load_model, load_tokenizer
from linspec.train.data import train_and_heldout
from linspec.train.linearize import RECORD, LinearizeConfig, linearize
from linspec.train.run import begun

# so many times the tokens of a cell of the quality table, at the teacher's full context
_LONGER = 2
_COLUMN = "recipe"
_LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16, "kl_weight": 0.0, "lr": 1e-3}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Arguments of `linearize`, and what differs from the defaults of LinearizeConfig."""

    label: str
    paper: str
    mixer: str | MixerConfig = "aug"
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        mixer = self.mixer if isinstance(self.mixer, str) else asdict(self.mixer)
        return {"mixer": mixer, "options": self.options}


def _lolcats(span: int) -> MixerConfig:
    return MixerConfig(name="hedgehog", group=64, span=span)


def _liger(span: int) -> MixerConfig:
    return MixerConfig(name="gla", group=64, span=span, kernel="softmax")


_TRANSFER = {"transfer_share": 0.5, "transfer_lr": 1e-2} | _LORA
_NO_TRANSFER = {"transfer_share": 0.0} | _LORA
_LOLCATS = "Zhang et al. 2024, arXiv 2410.10254"
_LIGER = "Lan et al. 2025, arXiv 2503.01496"
RECIPES = (
    Recipe("control: the teacher trained on", "", "softmax", training={"lr": 3e-4}),
    Recipe("linspec", "docs/results/core.md"),
    Recipe(
        "linspec, one softmax layer",
        "docs/results/core.md",
        options={"softmax_layers": 1, "rows": 128},
    ),
    Recipe(
        "aug as published",
        "You et al. 2024, arXiv 2406.07368",
        MixerConfig(name="aug", taps=32),
        training=_NO_TRANSFER,
    ),
    Recipe("LoLCATs, window of a group", _LOLCATS, _lolcats(1), training=_TRANSFER),
    Recipe("LoLCATs, six groups", _LOLCATS, _lolcats(6), training=_TRANSFER),
    Recipe("Liger, window of a group", _LIGER, _liger(1), training=_NO_TRANSFER),
    Recipe("Liger, six groups", _LIGER, _liger(6), training=_NO_TRANSFER),
)


@TABLES.register(
    "recipes",
    summary="linearization recipes at an equal budget: bits per byte, recall, state",
    paper="LoLCATs (arXiv 2410.10254), Liger (arXiv 2503.01496), You et al. 2024",
)
class Recipes(Table):
    """Who keeps the teacher's quality best with few tokens."""

    name = "recipes"
    place = 2

    def _config(self, recipe: Recipe) -> LinearizeConfig:
        size = self.plan.size
        return LinearizeConfig(
            tokens=_LONGER * size.tokens,
            context=min(2 * size.context, self.plan.config.max_positions),
            batch_tokens=size.batch_tokens,
            **recipe.training,
        )

    def cells(self) -> list[Cell]:
        return [
            Cell(
                table=self.name,
                row=recipe.label,
                column=_COLUMN,
                kind="recipe",
                settings={
                    "teacher": self.plan.weights,
                    "text": self.plan.texts[self.plan.domain],
                    "limit_bytes": self.plan.size.limit_bytes,
                    **recipe.to_json(),
                    "training": _told(self._config(recipe)),
                },
                seed=seed,
                rank=1.0 + 2 * seed,
            )
            for recipe in RECIPES
            for seed in range(self.plan.seeds)
        ]

    def measure(self, cell: Cell, folder: Path) -> Result:
        recipe = next(recipe for recipe in RECIPES if recipe.label == cell.row)
        out, data = folder / "model", self.plan.domains[self.plan.domain]
        config = LinearizeConfig(**cell.settings["training"], seed=cell.seed)
        linearize(
            self.plan.teacher,
            out,
            mixer=recipe.mixer,
            data=data,
            config=config,
            resume=begun(out, RECORD),
            **recipe.options,
        )
        model, tokenizer = load_model(out), load_tokenizer(out)
        texts = train_and_heldout(data)[1]
        score = evaluate(model, tokenizer, texts, limit_bytes=cell.settings["limit_bytes"])
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return {
            "bits_per_byte": score.bits_per_byte,
            **self._recall(model, tokenizer, data, config.context),
            "state_bytes": model.new_state().bytes(0),
            "train_seconds": sum(record["seconds"].values()),
        }

    def _recall(self, model: Decoder, tokenizer: Any, data: Sequence[str], context: int) -> Result:
        if context < 2 * min(DISTANCES):
            # a text has no room for a line and its repetition
            return {}
        lengths = (context // 2, context)
        found = evaluate_recall(
            model, teacher=self.plan.teacher, tokenizer=tokenizer, data=data, lengths=lengths
        )
        return {"recall": found.tokens, "relative_recall": found.relative}

    def section(self, results: Results) -> Section:
        control = results.mean(self.name, RECIPES[0].label, _COLUMN, "bits_per_byte")

        def show(row: str, column: str) -> str:
            if column == "above the control":
                mean = results.mean(self.name, row, _COLUMN, "bits_per_byte")
                return (
                    "–"
                    if mean is None or control is None
                    else f"{100 * (mean / control - 1):+.1f}%"
                )
            name, digits = _COLUMNS[column]
            return with_spread(results.figures(self.name, row, _COLUMN, name), digits)

        text = (
            f"{_LONGER * self.plan.size.tokens:,} tokens each. Recall: likeliest tokens that repeat "
            "a random name or number from above, over texts of half and all of the training "
            "context; relative is to the teacher on the same texts. State is that of an empty "
            "sequence, 0 for layers whose cache grows.\n\n"
            + "\n".join(f"- {r.label}: {r.paper}" for r in RECIPES if r.paper)
            + "\n\n"
            + self.reasons(results)
        )
        rows = [recipe.label for recipe in RECIPES]
        columns = ("bits per byte", "above the control", *list(_COLUMNS)[1:])
        return Section("Recipes", text, (self.grid(results, rows, columns, show, "recipe"),))


_COLUMNS = {
    "bits per byte": ("bits_per_byte", 3),
    "recall": ("recall", 3),
    "relative recall": ("relative_recall", 3),
    "state bytes": ("state_bytes", 0),
}


def _told(config: LinearizeConfig) -> dict[str, Any]:
    """The whole recipe of training; None where `linearize` chooses by the mixers."""
    return {k: v for k, v in asdict(config).items() if k not in ("seed", "save_every")}
