"""Linearize an encoder: its softmax attention replaced by bidirectional linear mixers.

    linearize("path/to/bert", "student", mixer="aug", data=["corpus.txt"])

The same two stages as for a decoder. *Transfer* matches each new mixer to the teacher's; *finetune*
matches the hidden states of every block and the sentence embedding, as there is no next token to
learn from (layer-wise distillation: Jiao et al. 2020, TinyBERT, arXiv 1909.10351).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.fingerprint import source_fingerprint
from linspec.checkpoints.hub import load_encoder, load_tokenizer, save_model
from linspec.errors import ConfigError, InputError
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import DEFAULT_GROUP
from linspec.models.bert import Bert
from linspec.train.compiled import LossFn
from linspec.train.data import Sources, train_and_heldout
from linspec.train.encoder_training import EncoderTraining
from linspec.train.linearize_recipe import LinearizeRecipe
from linspec.train.linearize_record import RECORD, output_place, record_files
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.run import make_accelerator, training_run
from linspec.train.student import changed_layers, check_reach, check_taps, spread, student_mixers
from linspec.train.transfer import Transfer, relative_error
from linspec.utils.messages import now_called
from linspec.utils.places import Place

# texts are short, so groups are
ENCODER_GROUP = 32
# shorter paragraphs are headings and lines of code fences
_LEAST_CHARACTERS = 60


class Texts:
    """Random padded batches of texts: the same for the same seed and step, so resuming is exact."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], context: int, seed: int) -> None:
        if not texts:
            raise InputError("no paragraph is long enough to train on; give more text")
        self.ids = tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
        self.seed = seed

    def batch(self, step: int, rows: int) -> torch.Tensor:
        """Token ids [rows, T], -1 at padding."""
        picked = np.random.default_rng([self.seed, step]).integers(0, len(self.ids), size=rows)
        found = [torch.tensor(self.ids[i]) for i in picked]
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def paragraphs(documents: Sequence[str]) -> list[str]:
    """The texts of `documents` that an encoder would be given: lines with something in them."""
    lines = (line.strip() for text in documents for line in text.split("\n"))
    return [line for line in lines if len(line) >= _LEAST_CHARACTERS]


def imitation_loss(teacher: Bert, student: Bert, batch: torch.Tensor) -> torch.Tensor:
    """Mean relative error of the blocks' hidden states, plus 1 - cosine of the embeddings.

    batch [B, T] is negative at padding.
    """
    ids, real = batch.clamp_min(0), batch >= 0
    with torch.no_grad():
        wanted = teacher.encoder.trace(ids, real)
    given = student.encoder.trace(ids, real)
    errors = [relative_error(a[real], b[real]) for a, b in zip(given, wanted, strict=True)]
    ours, theirs = student.pool(given[-1], real), teacher.pool(wanted[-1], real)
    return torch.stack(errors).mean() + (1 - (ours * theirs).sum(-1)).mean()


def linearize_encoder(
    source: str | Path,
    out: str | Path,
    *,
    mixer: str | MixerConfig = "aug",
    keep_softmax: Sequence[int] = (),
    data: Sources = ("stdlib",),
    field: str = "text",
    config: EncoderTraining | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """`linearize` for an encoder, with the groups of 64 tokens that this function had in 0.1.0."""
    recipe = LinearizeRecipe.of(
        mixer=mixer,
        group=DEFAULT_GROUP,
        keep_softmax=keep_softmax,
        data=data,
        field=field,
        config=config or EncoderTraining(),
    )
    place = output_place(out, source, recipe.sources, overwrite)
    place.check(resume=resume)
    return train_encoder(source, place, recipe, resume=resume)


def train_encoder(
    source: str | Path, place: Place, recipe: LinearizeRecipe, *, resume: bool
) -> Path:
    """Train the encoder `source` with other mixers into `place`; returns its path."""
    teacher, tokenizer = load_encoder(source), load_tokenizer(source)
    config, student = recipe.encoder_training, _student(teacher, recipe)
    plan = {
        "source": str(source),
        "source_weights": source_fingerprint(teacher),
        "mixers": [m.recorded() for m in student.config.mixers],
        "data": [str(d) for d in recipe.sources],
        "field": recipe.field,
        "config": asdict(config),
    }
    texts = _texts(tokenizer, recipe, config)
    accelerator = make_accelerator()
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            logs = _train(teacher, student, texts, config, folder, resume=resume)
            size = sum(weight.numel() for weight in student.parameters())
            files = record_files(recipe.to_json(), plan, logs, size)
            save_model(student, tokenizer, place, recipe.dtype, extra_files=files)
    return place.path


def _student(teacher: Bert, recipe: LinearizeRecipe) -> Bert:
    """The teacher's weights under other mixers; raises ConfigError for what no encoder can have."""
    if recipe.exact_tokens is not None or recipe.softmax_layers:
        raise ConfigError(
            "what each layer needs is measured on models that predict text, and this source is an "
            "encoder; leave out exact_tokens and softmax_layers, and give span and keep_softmax"
        )
    context, limit = recipe.encoder_training.context, teacher.config.max_positions
    if context > limit:
        raise ConfigError(
            f"texts of {context} tokens are beyond the encoder's {limit} positions; choose a shorter "
            "--context"
        )
    mixers = student_mixers(teacher.config, recipe.mixer_config(ENCODER_GROUP), recipe.keep_softmax)
    if isinstance(recipe.span, Sequence):
        mixers = spread(mixers, recipe.span, recipe.keep_softmax)
    check_reach(mixers, limit, None)
    check_taps(mixers, context)
    student = Bert(teacher.config.with_mixers(mixers))
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def _texts(
    tokenizer: PreTrainedTokenizerBase, recipe: LinearizeRecipe, config: EncoderTraining
) -> Texts:
    found = paragraphs(train_and_heldout(recipe.data, recipe.field)[0])
    return Texts(tokenizer, found, config.context, config.seed)


def _train(
    teacher: Bert,
    student: Bert,
    texts: Texts,
    config: EncoderTraining,
    folder: Path,
    *,
    resume: bool,
) -> dict[str, list[dict[str, float]]]:
    """Both stages; returns the log of each."""
    teacher.requires_grad_(False)
    logs = {}

    def run(stage: str, module: nn.Module, loss: LossFn, train: TrainConfig, offset: int) -> None:
        batch = partial(_batch, texts, config.rows, offset)
        trainer = Trainer(module, loss, batch, train, folder / stage, label=stage)
        logs[stage] = trainer.run(resume=resume and trainer.has_state)

    layers = changed_layers(teacher.config, student.config)
    if config.transfer_steps and layers:
        with Transfer(teacher.encoder, student.encoder, layers) as transfer:
            train = config.stage(config.transfer_steps, config.transfer_lr)
            run("transfer", transfer.parameters(), transfer.loss, train, 0)
    if config.finetune_steps:
        loss = partial(imitation_loss, teacher, student)
        train = config.stage(config.finetune_steps, config.lr)
        run("finetune", student.encoder, loss, train, config.transfer_steps)
    return logs


def _batch(texts: Texts, rows: int, offset: int, step: int) -> torch.Tensor:
    """Texts of a step; stages do not share theirs."""
    return texts.batch(offset + step, rows)


if __name__ == "__main__":
    now_called("linspec linearize")
