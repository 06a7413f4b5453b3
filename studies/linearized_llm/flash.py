"""FLASH from nothing: gated attention units with augmented attention against quadratic ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.evaluate.perplexity import evaluate
from linspec.models.flash_config import VARIANTS, FlashConfig
from linspec.train.data import train_and_heldout
from linspec.train.loop import TrainConfig
from linspec.train.pretrain import Recipe, train_from_nothing
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
    Table,
)

COLUMN = "from nothing"
_FIGURES = {"bits per byte": ("bits_per_byte", 3), "perplexity": ("perplexity", 1)}
# groups of a training window, as in the paper's 110M model
_GROUPS = 4


@TABLES.register(
    "flash",
    summary="FLASH trained from nothing: aug, local and grouped against quadratic attention",
    paper="You et al. 2024, arXiv 2406.07368, table 15",
)
class FromNothing(Table):
    """Held-out bits per byte of each variant after the same tokens."""

    name = "flash"
    place = 6

    def cells(self) -> list[Cell]:
        ranks = {"aug": 0.7, "quadratic": 0.7}
        return [
            Cell(
                table=self.name,
                row=variant,
                column=COLUMN,
                kind="flash",
                settings=self._settings(variant),
                seed=seed,
                rank=ranks.get(variant, 1.7),
            )
            for variant in VARIANTS
            for seed in range(self.plan.seeds)
        ]

    def _settings(self, variant: str) -> dict[str, Any]:
        size = self.plan.size
        model = {
            "vocab_size": self.plan.config.vocab_size,
            "width": 128,
            "layers": 6,
            "head_width": 64,
            "mlp_width": 256,
            "max_positions": size.context,
            "variant": variant,
            "group": max(1, size.context // _GROUPS),
            "taps": size.taps if variant == "aug" else 0,
            "eos_ids": self.plan.config.eos_ids,
            "bos_id": self.plan.config.bos_id,
        }
        steps = max(1, size.flash_tokens // size.batch_tokens)
        training = {
            "steps": steps,
            "lr": 2e-3,
            "warmup": max(1, steps // 18),
            "decay": 0.9,
            "weight_decay": 0.01,
        }
        return {
            "model": model,
            "training": training,
            "tokens_per_step": size.batch_tokens,
            # its tokenizer is that of the study's teacher
            "tokenizer": self.plan.weights,
            "text": self.plan.texts[self.plan.domain],
            "limit_bytes": size.limit_bytes,
        }

    def measure(self, cell: Cell, folder: Path) -> Result:
        settings, out = cell.settings, folder / "model"
        shape = FlashConfig(**settings["model"])
        found = Recipe(
            model=shape,
            # compiling would cost about what it saves
            train=TrainConfig(**settings["training"], seed=cell.seed, compile="off"),
            tokens_per_step=settings["tokens_per_step"],
            stages=((1.0, shape.max_positions),),
        )
        documents, held_out = train_and_heldout(self.plan.domains[self.plan.domain])
        train_from_nothing(out, found, documents, load_tokenizer(self.plan.teacher))
        model, limit = load_model(out), settings["limit_bytes"]
        score = evaluate(
            model, load_tokenizer(out), held_out, context=shape.max_positions, limit_bytes=limit
        )
        shutil.rmtree(out)
        return {
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }

    def section(self, results: Results) -> Section:
        size = self.plan.size
        text = (
            f"6 gated attention units of width 128 trained from nothing for {size.flash_tokens:,} tokens, "
            f"context {size.context}, groups of {size.context // _GROUPS}; held-out text as in the "
            "quality table, and the same tokenizer.\n\n" + self.reasons(results)
        )
        grids = self.figure_grids(results, VARIANTS, (COLUMN,), _FIGURES, "variant")
        return Section("FLASH from nothing", text, grids)
