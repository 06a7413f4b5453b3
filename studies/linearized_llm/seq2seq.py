"""T5: an encoder-decoder with each attention on both sides, softmax beside.

There is no small pretrained T5 that comes as a package, so the teacher is trained here, once for a
study folder: it reads half of a window of text and writes the other half.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_seq2seq, load_tokenizer
from linspec.evaluate.continuations import evaluate_continuations
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from linspec.train.data import end_of_text, train_and_heldout
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_record import RECORD
from linspec.train.loop import TrainConfig
from linspec.train.pretrain import Recipe, train_from_nothing
from linspec.train.run import begun
from studies.linearized_llm.attentions import AUG, PLAIN, Choice, choose
from studies.linearized_llm.cache import shared_teacher
from studies.linearized_llm.grid import BackboneTable
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
)
from studies.linearized_llm.training import recipe

_FIGURES = {"bits per byte": ("bits_per_byte", 3), "perplexity": ("perplexity", 1)}


def tiny_t5(vocab_size: int, end: int) -> Seq2SeqConfig:
    """T5 v1.1 at a size that a core trains in minutes; `end` closes texts and begins outputs."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": 128,
        "layers": 3,
        "heads": 4,
        "kv_heads": 4,
        "head_width": 32,
        "mlp_width": 344,
        "family": "t5",
        "activation": "gelu_tanh",
        "positions": "relative",
        "relative": RelativeConfig(),
        "scaled_scores": False,
    }
    return Seq2SeqConfig(
        encoder=EncoderConfig(**shared, post_norm=False),
        decoder=DecoderConfig(**shared, eos_ids=(end,)),
        start_id=end,
    )


@TABLES.register(
    "t5",
    summary="T5: each attention in encoder and decoder, plain and aug, softmax beside",
    paper="You et al. 2024, arXiv 2406.07368, tables 3 and 14",
)
class Seq2Seq(BackboneTable):
    """Held-out bits per byte of the second half of a window, given the first."""

    name = "t5"
    place = 5
    kind = "t5"

    def choose(self, row: str, part: str) -> Choice:
        return choose(row, part, self.plan.size, (EncoderConfig, DecoderConfig))

    def settings(self, choice: Choice) -> dict[str, Any]:
        size = self.plan.size
        return {
            "teacher": self._identity,
            "domain": self.plan.domain,
            "text": self.plan.texts[self.plan.domain],
            "limit_bytes": size.limit_bytes,
            "mixer": choice.mixer.recorded(),
            "training": recipe(size, choice.mixer, size.context),
        }

    @cached_property
    def _recipe(self) -> Recipe:
        """How the teacher is trained."""
        size = self.plan.size
        tokenizer = load_tokenizer(self.plan.teacher)
        end = end_of_text(tokenizer, self.plan.config)
        steps = max(1, size.t5_tokens // size.batch_tokens)
        return Recipe(
            model=tiny_t5(self.plan.config.vocab_size, end),
            train=TrainConfig(
                steps=steps,
                lr=3e-3,
                muon_lr=5e-3,
                warmup=max(1, steps // 20),
                decay=0.4,
                weight_decay=0.1,
                seed=1,
                # would cost about what it saves
                compile="off",
            ),
            tokens_per_step=size.batch_tokens,
            stages=((1.0, size.context),),
        )

    @cached_property
    def _identity(self) -> str:
        """Tells this teacher from others: all that determines its weights."""
        told = asdict(self._recipe)
        for name in ("save_every", "log_every", "compile"):
            del told["train"][name]
        # the tokenizer is that of the decoder's teacher
        parts = [told, self.plan.weights, self.plan.texts[self.plan.domain]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _teacher(self) -> Path:
        """Its directory in the study's folder; trained by the first cell that needs it."""
        documents = train_and_heldout(self.plan.domains[self.plan.domain])[0]
        tokenizer = load_tokenizer(self.plan.teacher)
        with shared_teacher(self.plan.out, f"t5-{self._identity}") as out:
            return train_from_nothing(out, self._recipe, documents, tokenizer)

    def measure(self, cell: Cell, folder: Path) -> Result:
        settings, data = cell.settings, self.plan.domains[cell.settings["domain"]]
        out = folder / "model"
        linearize(
            self._teacher(),
            out,
            mixer=MixerConfig(**settings["mixer"]),
            data=data,
            config=LinearizeConfig(**settings["training"], seed=cell.seed),
            resume=begun(out, RECORD),
        )
        score = evaluate_continuations(
            load_seq2seq(out),
            load_tokenizer(out),
            train_and_heldout(data)[1],
            context=settings["training"]["context"],
            limit_bytes=settings["limit_bytes"],
        )
        shutil.rmtree(out)
        return {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}

    def section(self, results: Results) -> Section:
        size = self.plan.size
        text = (
            f"The teacher is a T5 of 3 + 3 layers and width 128, trained here from nothing for "
            f"{size.t5_tokens:,} tokens. Every cell replaces the self-attention of its encoder and of "
            f"its decoder and is trained for {size.tokens:,} tokens; the softmax row is the teacher "
            f"trained on for the same. Held out: the second half of windows of {size.context} tokens, "
            "given the first. Its cross-attention stays softmax.\n\n" + self.reasons(results)
        )
        grids = self.figure_grids(results, self.rows, (PLAIN, AUG), _FIGURES)
        return Section("T5", text, grids)
