"""Linearize an encoder: its softmax attention replaced by bidirectional linear mixers.

    python -m linspec.train.encoder MODEL --out student --mixer aug --data corpus.txt

The same two stages as for a decoder. *Transfer* matches each new mixer to the teacher's; *finetune*
matches the hidden states of every block and the sentence embedding, as there is no next token to
learn from (layer-wise distillation: Jiao et al. 2020, TinyBERT, arXiv 1909.10351).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from linspec.checkpoints.hub import load_encoder, load_tokenizer, save_model
from linspec.errors import ConfigError, InputError
from linspec.mixers.config import MixerConfig
from linspec.models.bert import Bert
from linspec.train.compiled import LossFn
from linspec.train.data import train_and_heldout
from linspec.train.linearize import RECORD, output_place, record_files
from linspec.train.linearize_config import FROM_NOTHING
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.run import make_accelerator, training_run
from linspec.train.student import changed_layers, check_taps, make_mixer, student_mixers
from linspec.train.transfer import Transfer, relative_error

# shorter paragraphs are headings and lines of code fences
_LEAST_CHARACTERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTraining:
    """How long and how to train.

    transfer_steps, finetune_steps: of the two stages. rows: texts of a step; context: most tokens of a
    text. mixer_lr_factor: on the rate of α, taps and what else starts at nothing and has far to go.
    """

    transfer_steps: int = 60
    finetune_steps: int = 60
    rows: int = 16
    context: int = 256
    transfer_lr: float = 1e-3
    lr: float = 3e-4
    mixer_lr_factor: float = 10.0
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.transfer_steps + self.finetune_steps < 1:
            raise ConfigError("both stages have no steps; give one of them some")

    def stage(self, steps: int, lr: float) -> TrainConfig:
        """Settings of the training loop for one stage."""
        factors = tuple((name, self.mixer_lr_factor) for name in FROM_NOTHING)
        return TrainConfig(
            steps=steps,
            lr=lr,
            warmup=self.warmup,
            lr_factors=factors,
            seed=self.seed,
            compile="off",
        )


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
    data: Sequence[str | Path] = ("stdlib",),
    field: str = "text",
    config: EncoderTraining | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train the encoder `source` with other mixers into the model directory `out`; returns it.

    mixer: a registered name with the sizes of `make_mixer`, or a MixerConfig. The other arguments are
    those of `linearize`, and so are the errors.
    """
    config, place = config or EncoderTraining(), output_place(out, source, data, overwrite)
    place.check(resume=resume)
    teacher, tokenizer = load_encoder(source), load_tokenizer(source)
    mixers = student_mixers(teacher.config, make_mixer(mixer), keep_softmax)
    check_taps(mixers, config.context)
    student = Bert(teacher.config.with_mixers(mixers))
    student.load_state_dict(teacher.state_dict(), strict=False)
    texts = Texts(
        tokenizer, paragraphs(train_and_heldout(data, field)[0]), config.context, config.seed
    )
    plan = {
        "source": str(source),
        "mixers": [asdict(m) for m in mixers],
        "data": [str(d) for d in data],
        "field": field,
        "config": asdict(config),
    }
    accelerator = make_accelerator()
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            logs = _train(teacher, student, texts, config, folder, resume=resume)
            size = sum(weight.numel() for weight in student.parameters())
            save_model(student, tokenizer, place, extra_files=record_files(plan, logs, size))
    return place.path


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


def main(
    source: Annotated[Path, typer.Argument(help="Directory of the encoder.")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    mixer: Annotated[
        str, typer.Option(help="A mixer that linspec list shows; NAME:key=value,… sets sizes.")
    ] = "aug",
    group: Annotated[int, typer.Option(help="Tokens per group.")] = 32,
    span: Annotated[int | None, typer.Option(help="Groups to each side, its own included.")] = None,
    kernel: Annotated[str | None, typer.Option(help="'own' or 'softmax'.")] = None,
    taps: Annotated[int | None, typer.Option(help="Taps to each side, its own included.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text files; stdlib if left out.")] = None,
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
    transfer_steps: int = 60,
    finetune_steps: int = 60,
    rows: int = 16,
    context: int = 256,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Linearize an encoder; see `linearize_encoder`."""
    config = EncoderTraining(
        transfer_steps=transfer_steps,
        finetune_steps=finetune_steps,
        rows=rows,
        context=context,
        seed=seed,
    )
    linearize_encoder(
        source,
        out,
        mixer=make_mixer(mixer, group=group, span=span, kernel=kernel, taps=taps),
        data=data or ["stdlib"],
        field=field,
        config=config,
        resume=resume,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    typer.run(main)
