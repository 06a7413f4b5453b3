"""Linearization recipes at an equal budget: linspec's, the paper's, LoLCATs, Liger, and the control.

The published ones are run with linspec's mixers and trainer. Their rates are chosen for this size of
model, where those published for billions of weights would hardly move anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.evaluate.perplexity import evaluate
from linspec.evaluate.recall import DISTANCES, evaluate_recall
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.data import train_and_heldout
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_record import RECORD, read_record
from linspec.train.run import begun
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
    Table,
    with_spread,
)

# so many times the tokens and the context of a cell of the quality table
_LONGER = 2
# recall is measured in texts of up to so many times the training context
_BEYOND = 4
_COLUMN = "recipe"
_LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16, "kl_weight": 0.0, "lr": 1e-3}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Arguments of `linearize`, and what differs from the defaults of LinearizeConfig.

    far: only for teachers that can read more than the training context.
    """

    label: str
    paper: str
    mixer: str | MixerConfig = "aug"
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    far: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        mixer = self.mixer if isinstance(self.mixer, str) else self.mixer.recorded()
        # the name of 0.1.0: cells are named by the hash of their settings
        options = {"rows" if k == "exact_tokens" else k: v for k, v in self.options.items()}
        return {"mixer": mixer, "options": options}


def _lolcats(span: int) -> MixerConfig:
    return MixerConfig(name="hedgehog", group=64, span=span)


def _liger(span: int) -> MixerConfig:
    return MixerConfig(name="gla", group=64, span=span, kernel="softmax")


_TRANSFER = {"transfer_share": 0.5, "transfer_lr": 1e-2} | _LORA
_NO_TRANSFER = {"transfer_share": 0.0} | _LORA
_OURS = "docs/results/core.md"
_LOLCATS = "Zhang et al. 2024, arXiv 2410.10254"
_LIGER = "Lan et al. 2025, arXiv 2503.01496"
RECIPES = (
    Recipe("control: the teacher trained on", "", "softmax", training={"lr": 3e-4}),
    Recipe("linspec", _OURS),
    Recipe("linspec, one softmax layer", _OURS, options={"softmax_layers": 1}),
    Recipe(
        "linspec, one softmax layer, 128 rows",
        _OURS,
        options={"softmax_layers": 1, "exact_tokens": 128},
    ),
    Recipe(
        "linspec, two softmax layers, 128 rows",
        _OURS,
        options={"softmax_layers": 2, "exact_tokens": 128},
    ),
    Recipe("linspec, 1,024 exact rows", _OURS, options={"exact_tokens": 1024}, far=True),
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
    Recipe("linspec, gdn beyond reach", _OURS, "gdn", far=True),
    Recipe("linspec, hedgehog beyond reach", _OURS, "hedgehog", {"kernel": "softmax"}, far=True),
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
            context=min(_LONGER * size.context, self.plan.config.max_positions),
            batch_tokens=size.batch_tokens,
            recall_share=self.plan.recall_share,
            **recipe.training,
        )

    @cached_property
    def _telling(self) -> list[Recipe]:
        """Those that say something about this teacher: at most a quarter of its layers stay softmax."""
        config, context = self.plan.config, self._config(RECIPES[0]).context
        return [
            recipe
            for recipe in RECIPES
            if (config.max_positions > context or not recipe.far)
            and 4 * recipe.options.get("softmax_layers", 0) <= max(4, config.layers)
        ]

    def choices(self) -> list[str]:
        return [recipe.label for recipe in self._telling]

    @cached_property
    def recipes(self) -> list[Recipe]:
        """Those to fill."""
        return [recipe for recipe in self._telling if recipe.label in self.rows]

    def cells(self) -> list[Cell]:
        return [
            Cell(
                table=self.name,
                row=recipe.label,
                column=_COLUMN,
                kind="recipe",
                settings={
                    "teacher": self.plan.weights,
                    "text": self.plan.text,
                    "limit_bytes": self.plan.size.limit_bytes,
                    **recipe.to_json(),
                    "training": _told(self._config(recipe)),
                },
                seed=seed,
                rank=1.0 + 2 * seed,
            )
            for recipe in self.recipes
            for seed in range(self.plan.seeds)
        ]

    def measure(self, cell: Cell, folder: Path) -> Result:
        recipe = next(recipe for recipe in RECIPES if recipe.label == cell.row)
        out, data = folder / "model", self.plan.everything
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
        record = read_record(out)
        return {
            "bits_per_byte": score.bits_per_byte,
            **self._recall(model, tokenizer, texts, config.context),
            "state_bytes": model.new_state().bytes(0),
            "far_state_bytes": model.new_state().bytes_at(_BEYOND * config.context),
            "train_seconds": sum(record["seconds"].values()),
        }

    def _recall(self, model: Decoder, tokenizer: Any, texts: Sequence[str], context: int) -> Result:
        if context < 2 * min(DISTANCES):
            # a text has no room for a line and its repetition
            return {}
        most = self.plan.config.max_positions
        lengths = [context // 2, *(context * n for n in (1, 2, _BEYOND) if context * n <= most)]
        found = evaluate_recall(
            model,
            teacher=self.plan.teacher,
            tokenizer=tokenizer,
            data=self.plan.everything,
            texts=texts,
            lengths=lengths,
        )
        far = [(c.tokens, c.teacher_tokens or 0.0) for c in found.cells if c.length > context]
        ours, wanted = (sum(part) for part in zip(*far, strict=True)) if far else (0.0, 0.0)
        return {
            "recall": found.tokens,
            "relative_recall": found.relative,
            "far_relative_recall": ours / wanted if wanted else None,
            "recall_cells": [asdict(cell) for cell in found.cells],
        }

    def section(self, results: Results) -> Section:
        control = (RECIPES[0].label, _COLUMN)

        def show(row: str, column: str) -> str:
            if column == "above the control":
                pairs = results.pairs(self.name, (row, _COLUMN), control, "bits_per_byte")
                above = [100 * (ours / theirs - 1) for ours, theirs in zip(*pairs, strict=True)]
                return with_spread(above, 1, sign="+", unit="%")
            name, digits = _COLUMNS[column]
            return with_spread(results.figures(self.name, row, _COLUMN, name), digits)

        text = (
            f"{_LONGER * self.plan.size.tokens:,} tokens each. Recall: likeliest tokens that repeat "
            "a random name or number from above, over texts of half and all of the training "
            f"context and, where the teacher can read them, of two and {_BEYOND} times of it (far); "
            "relative is to the teacher on the same texts. State is that of an empty sequence, 0 "
            f"for layers whose cache grows, and that at {_BEYOND} times the context (far).\n\n"
            + "\n".join(f"- {r.label}: {r.paper}" for r in self.recipes if r.paper)
            + "\n\n"
            + self.reasons(results)
        )
        columns = ("bits per byte", "above the control", *list(_COLUMNS)[1:])
        return Section("Recipes", text, (self.grid(results, self.rows, columns, show, "recipe"),))


_COLUMNS = {
    "bits per byte": ("bits_per_byte", 3),
    "recall": ("recall", 3),
    "relative recall": ("relative_recall", 3),
    "relative recall, far": ("far_relative_recall", 3),
    "state bytes": ("state_bytes", 0),
    "state bytes, far": ("far_state_bytes", 0),
}


def _told(config: LinearizeConfig) -> dict[str, Any]:
    """The whole recipe of training; None where `linearize` chooses by the mixers."""
    return {k: v for k, v in config.to_json().items() if k not in ("seed", "save_every")}
