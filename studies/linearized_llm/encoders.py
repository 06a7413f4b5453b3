"""Encoders: a pretrained BERT with each bidirectional linear attention, against the original."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_encoder, load_tokenizer
from linspec.errors import ConfigError
from linspec.evaluate.embeddings import compare_encoders
from linspec.mixers.config import MixerConfig
from linspec.models.bert import Bert
from linspec.models.config import EncoderConfig
from linspec.train.data import train_and_heldout
from linspec.train.encoder import linearize_encoder, paragraphs
from linspec.train.encoder_training import EncoderTraining
from linspec.train.linearize_record import RECORD
from linspec.train.run import begun
from studies.linearized_llm.attentions import AUG, PLAIN, Choice, choose
from studies.linearized_llm.grid import BackboneTable
from studies.linearized_llm.table import (
    TABLES,
    Cell,
    Result,
    Results,
    Section,
)

# paragraphs are short: smaller groups than a decoder's, or everything would lie in one
_GROUP, _TAPS = 32, 16
_CONTEXT, _ROWS = 128, 8
_TRANSFER_SHARE = 0.4
_NONE = "no encoder at hand: pip install 'linspec[encoders]', or give --encoder"
_FIGURES = {
    "cosine": ("cosine", 3),
    "least cosine": ("least_cosine", 3),
    "rank correlation": ("spearman", 3),
}


@TABLES.register(
    "encoders",
    summary="BERT: sentence embeddings with each bidirectional attention, against the original's",
    paper="You et al. 2024, arXiv 2406.07368, table 1",
)
class Encoders(BackboneTable):
    """How close the embeddings of a linearized encoder are to those of the one it was made from."""

    name = "encoders"
    place = 4
    kind = "encoder"

    def choose(self, row: str, part: str) -> Choice:
        size = self.plan.size
        short = replace(size, group=min(_GROUP, size.group), taps=min(_TAPS, size.taps))
        choice = choose(row, part, short, (EncoderConfig,))
        if not self.plan.encoder:
            raise ConfigError(_NONE)
        return choice

    def settings(self, choice: Choice) -> dict[str, Any]:
        size, domain = self.plan.size, self.plan.prose
        original = self._original
        context = min(_CONTEXT, size.context, original.config.max_positions)
        rows = max(1, min(_ROWS, size.batch_tokens // context))
        steps = max(2, size.encoder_tokens // (rows * context))
        transfer = round(_TRANSFER_SHARE * steps)
        training = EncoderTraining(
            transfer_steps=transfer, finetune_steps=steps - transfer, rows=rows, context=context
        )
        return {
            "encoder": self._identity,
            "domain": domain,
            "text": self.plan.texts[domain],
            "texts": size.encoder_texts,
            "mixer": choice.mixer.recorded(),
            "training": {k: v for k, v in asdict(training).items() if k != "seed"},
        }

    @cached_property
    def _original(self) -> Bert:
        return load_encoder(self.plan.encoder)

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(self._original.state_dict().items()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()[:16]

    def measure(self, cell: Cell, folder: Path) -> Result:
        settings, data = cell.settings, self.plan.domains[cell.settings["domain"]]
        config = EncoderTraining(**settings["training"], seed=cell.seed)
        mixer, out = MixerConfig(**settings["mixer"]), folder / "model"
        student = self._original
        if mixer.name != "softmax":
            linearize_encoder(
                self.plan.encoder,
                out,
                mixer=mixer,
                data=data,
                config=config,
                resume=begun(out, RECORD),
            )
            student = load_encoder(out)
        found = compare_encoders(
            self._original,
            student,
            load_tokenizer(self.plan.encoder),
            paragraphs(train_and_heldout(data)[1])[: settings["texts"]],
            context=config.context,
        )
        # as large as the original, and no other cell needs it
        shutil.rmtree(out, ignore_errors=True)
        return asdict(found)

    def section(self, results: Results) -> Section:
        grids = self.figure_grids(results, self.rows, (PLAIN, AUG), _FIGURES)
        size = self.plan.size
        text = (
            f"all-MiniLM-L6-v2 unless another encoder is given, {size.encoder_tokens:,} training tokens "
            f"with padding, texts of up to {_CONTEXT} tokens, groups of {min(_GROUP, size.group)}, data "
            f"{self.plan.prose}. Cosine: of both encoders' embeddings of a held-out text, mean and "
            "least; rank correlation: Spearman's, of the similarities of all pairs of texts. The "
            "softmax row is the original against itself: a student with its own attention has "
            "nothing to learn from it.\n\n" + self.reasons(results)
        )
        return Section("Encoders", text, grids)
