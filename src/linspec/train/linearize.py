"""Linearize: a softmax checkpoint in, a checkpoint with other mixers out.

Stage 1, *transfer*, matches each new mixer to the teacher's; stage 2, *finetune*, trains the
student on text and on the teacher's distribution. Both resume from where they were killed.

    linearize("embedded-softmax", "student", mixer="aug")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.fingerprint import source_fingerprint
from linspec.checkpoints.gguf.model import stored_dtype as gguf_dtype
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.hub import (
    check_tokenizer,
    load_any_config,
    load_causal_model,
    load_tokenizer,
    resolve,
    save_model,
)
from linspec.errors import CheckpointError, ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import DEFAULT_EXACT_TOKENS, leaves_span
from linspec.models.config import DecoderConfig, Seq2SeqConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import of_config
from linspec.train.compiled import LossFn
from linspec.train.data import Sources, Windows, end_of_text, tokenize, train_and_heldout
from linspec.train.encoder import train_encoder
from linspec.train.finetune import add_lora, finetune_loss, merge_lora
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_recipe import LinearizeRecipe
from linspec.train.linearize_record import RECORD, output_place, record_files
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.masked_tokens import MaskedWindows, masked_finetune_loss
from linspec.train.objective import Predictor
from linspec.train.recall_texts import with_recall
from linspec.train.run import make_accelerator, training_run
from linspec.train.sequence_parallel import SequenceParallel, check_processes, shard_unit
from linspec.train.span_search import search_spans
from linspec.train.student import (
    by_need,
    changed_layers,
    check_mixers,
    check_reach,
    check_taps,
    spread,
    student_mixers,
    with_mixers,
)
from linspec.train.sums import keep_useful_sums
from linspec.train.transfer import Transfer
from linspec.utils.border import read_json
from linspec.utils.messages import shown


def linearize(
    source: str | Path,
    out: str | Path,
    recipe: LinearizeRecipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Train a model with other mixers; returns the directory of the new model.

    Transfer matches the teacher layer by layer, then finetuning trains the whole model. Sums over closed
    groups stay only where they lower the loss of texts of four times the context (kernel 'softmax'). A run
    that was killed continues with the same call and `resume`. A mixer that changes nothing trains the
    teacher itself.

    An encoder-decoder (T5) counts the layers of its encoder first, keeps its cross-attention, and learns to
    predict the second half of each window from the first half. A masked-diffusion model learns the hidden
    tokens of windows, and its own distribution of them. An encoder (BERT) learns to imitate its own
    hidden states.

    Paper: You et al. 2024, arXiv 2406.07368.

    Args:
        source: a model directory, a GGUF file or the name of a model.
        out: a directory that is new or empty.
        recipe: what is asked for; None for the defaults.
        resume: continue a run from its last saved state.
        overwrite: replace a model that this function wrote to `out` before.
        options: fields of LinearizeRecipe or LinearizeConfig, which change the recipe.

    Raises:
        ConfigError: a setting breaks a rule, or `out` may not be written.
        CheckpointError: the model cannot be read, or the disk refuses.
        InputError: the data cannot be read or hold too little text. These come before any long work.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    asked = LinearizeRecipe.of(recipe, **options)
    place = output_place(out, source, asked.sources, overwrite)
    place.check(resume=resume)
    model = of_config(load_any_config(source))
    if model.loop is None:
        return train_encoder(source, place, asked, resume=resume)
    teacher, tokenizer = load_causal_model(source), load_tokenizer(source)
    check_tokenizer(tokenizer, teacher.config)
    task = _Task.of(teacher, asked)
    plan = task.to_json(source)
    accelerator = make_accelerator()
    check_processes(accelerator, task.config.sequence_parallel)
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            windows = _windows(tokenizer, task, accelerator)
            student = with_mixers(teacher, task.final_mixers(windows, folder, accelerator))
            stages = _Stages(teacher, student, windows, task.config, folder, accelerator, resume)
            logs = stages.run()
            if accelerator.is_main_process:
                sums = keep_useful_sums(stages.student, windows, _loss_of(teacher))
                size = sum(p.numel() for p in student.parameters())
                told = sums.to_json() if sums else None
                files = record_files(asked.to_json(), plan, logs, size, sums=told)
                kind = asked.dtype or stored_dtype(source)
                save_model(stages.student, tokenizer, place, kind, extra_files=files)
    return place.path


@dataclass(frozen=True)
class _Task:
    """A recipe for one teacher. mixers: before anything is measured; config: completed.

    exact_tokens: to share out by need, None for the spans of `mixers`.
    """

    teacher: Predictor
    recipe: LinearizeRecipe
    mixers: tuple[MixerConfig, ...]
    exact_tokens: int | None
    config: LinearizeConfig

    @classmethod
    def of(cls, teacher: Predictor, recipe: LinearizeRecipe) -> _Task:
        """Raises ConfigError when the recipe cannot be done with this teacher."""
        wanted = recipe.mixer_config()
        mixers = student_mixers(teacher.config, wanted, recipe.keep_softmax)
        if isinstance(recipe.span, Sequence):
            mixers = spread(mixers, recipe.span, recipe.keep_softmax)
        changed = changed_layers(teacher.config, teacher.config.with_mixers(mixers))
        config = recipe.training.completed([mixers[layer] for layer in changed])
        free = recipe.span is None and leaves_span(recipe.mixer) and wanted.kernel == "softmax"
        if isinstance(teacher, MaskedDiffusion):
            _check_diffusion(recipe)
            free = False
        exact = recipe.exact_tokens or DEFAULT_EXACT_TOKENS
        task = cls(teacher, recipe, mixers, exact if free else None, config)
        task._check(changed)
        return task

    @property
    def changed(self) -> list[int]:
        """Layers that get another mixer."""
        config = self.teacher.config
        return changed_layers(config, config.with_mixers(self.mixers))

    def _check(self, changed: Sequence[int]) -> None:
        model, context = self.teacher.config, self.config.context
        _check_context(model, context)
        parts = of_config(model).parts
        # a T5 has no positions of its own: nobody says that it can read more than it trains on
        longest = getattr(model, "max_positions", context)
        check_reach([self.mixers[layer] for layer in changed], longest, self.recipe.exact_tokens)
        check_taps((self.mixers[layer] for layer in changed), context // parts)
        student = check_mixers(self.teacher, self.mixers)
        if self.config.sequence_parallel > 1:
            shard_unit([self.teacher, student])
        kept = self.recipe.softmax_layers
        if kept >= max(1, len(changed)):
            raise ConfigError(
                f"softmax_layers must be in 0..{max(0, len(changed) - 1)}, got {kept}"
            )

    def to_json(self, source: str | Path) -> dict[str, Any]:
        """Plain JSON types: what a run that is resumed must have been asked for."""
        return {
            "source": str(source),
            "source_weights": source_fingerprint(self.teacher),
            "dtype": str(self.recipe.dtype),
            "mixers": [m.recorded() for m in self.mixers],
            "exact_tokens": self.exact_tokens if self.changed else None,
            "softmax_layers": self.recipe.softmax_layers,
            "data": [str(d) for d in self.recipe.sources],
            "field": self.recipe.field,
            "config": self.config.to_json(),
        }

    def final_mixers(
        self, windows: Windows, folder: Path, accelerator: Accelerator
    ) -> tuple[MixerConfig, ...]:
        """The mixers, after what the teacher's layers need where that is to be measured.

        One process measures, all read what it found.
        """
        changed, kept = self.changed, self.recipe.softmax_layers
        if not changed or (self.exact_tokens is None and not kept):
            return self.mixers
        first = self.mixers[changed[0]]
        losses = partial(
            search_spans,
            self.teacher,
            first,
            changed,
            windows,
            self.config.tokens,
            folder / "reach.json",
            groups=(self.exact_tokens or 0) // first.group,
            needed=kept > 0,
        )
        if accelerator.is_main_process:
            losses()
        accelerator.wait_for_everyone()
        return by_need(
            self.teacher,
            self.mixers,
            changed,
            losses(),
            exact_tokens=self.exact_tokens,
            softmax_layers=kept,
        )


def continue_training(
    source: str | Path,
    out: str | Path,
    *,
    data: Sources = ("stdlib",),
    field: str = "text",
    config: LinearizeConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train `source` on with its own mixers, on cross-entropy alone, into `out`; returns it.

    The control of a linearization: what the same tokens do for the teacher.
    """
    layers = range(len(load_causal_model(source).config.mixers))
    return linearize(
        source,
        out,
        keep_softmax=layers,
        data=data,
        field=field,
        config=config,
        resume=resume,
        overwrite=overwrite,
    )


def stored_dtype(source: str | Path) -> torch.dtype:
    """The dtype of a model's weights as its config.json or GGUF file gives it, else float32."""
    if is_gguf(resolve(source)):
        return gguf_dtype(read_gguf(resolve(source)))
    data = read_json(resolve(source) / "config.json")
    name = data.get("dtype") or data.get("torch_dtype") or "float32"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(
            f"{source}: config.json names an unknown dtype {shown(repr(name))}; known: float32, bfloat16, "
            "float16, float64"
        )
    return found


def _check_context(config: DecoderConfig | Seq2SeqConfig, context: int) -> None:
    if isinstance(config, Seq2SeqConfig):
        if context < 2:
            raise ConfigError(
                f"a window of {context} token has no source and target; give 2 or more"
            )
    elif context > config.max_positions:
        raise ConfigError(
            f"a training context of {context} tokens is beyond the teacher's "
            f"{config.max_positions} positions; choose a shorter --context"
        )


def _check_diffusion(recipe: LinearizeRecipe) -> None:
    """Raise ConfigError for what is measured on the next token, or shared out by the tokens before one."""
    if recipe.exact_tokens is not None or recipe.softmax_layers:
        raise ConfigError(
            "what each layer needs is measured on models that predict the next token, and this source is a "
            "masked-diffusion model; leave out exact_tokens and softmax_layers, and give span and "
            "keep_softmax"
        )


def _loss_of(teacher: Predictor) -> Callable[..., torch.Tensor]:
    """What the student of this teacher is finetuned on."""
    return masked_finetune_loss if isinstance(teacher, MaskedDiffusion) else finetune_loss


def _windows(tokenizer: PreTrainedTokenizerBase, task: _Task, accelerator: Accelerator) -> Windows:
    recipe, config = task.recipe, task.config
    texts, _ = train_and_heldout(recipe.data, recipe.field)
    stream = tokenize(texts, tokenizer, end_of_text(tokenizer, task.teacher.config))
    reader = accelerator.process_index // config.sequence_parallel
    windows = Windows(stream, config.context, config.seed, process=reader)
    windows = with_recall(windows, tokenizer, recipe.sources, config.recall_share)
    return MaskedWindows(windows) if isinstance(task.teacher, MaskedDiffusion) else windows


class _Stages:
    """The two stages of one linearization; `student` is what they train."""

    def __init__(
        self,
        teacher: Predictor,
        student: Predictor,
        windows: Windows,
        config: LinearizeConfig,
        folder: Path,
        accelerator: Accelerator,
        resume: bool,
    ) -> None:
        device = accelerator.device
        self.teacher, self.student = teacher.to(device).requires_grad_(False), student.to(device)
        self.windows, self.config, self.folder = windows, config, folder
        self.accelerator, self.resume = accelerator, resume
        self.changed = changed_layers(teacher.config, student.config)
        self.sequence = SequenceParallel(
            accelerator, config.sequence_parallel, (self.teacher, self.student)
        )

    def run(self) -> dict[str, list[dict[str, float]]]:
        """Both stages; returns the log of each."""
        share = self.config.transfer_share if self.changed else 0.0
        transfer = round((share or 0.0) * self.config.steps)
        logs = {}
        if transfer:
            logs["transfer"] = self._transfer(transfer)
        if self.config.steps > transfer:
            logs["finetune"] = self._finetune(self.config.steps - transfer)
        return logs

    def _transfer(self, steps: int) -> list[dict[str, float]]:
        mean = self.sequence.mean
        with Transfer(self.teacher, self.student, self.changed, mean) as transfer:
            train = self.config.stage(steps, transfer=True)
            return self._train("transfer", transfer.parameters(), transfer.loss, train)

    def _finetune(self, steps: int) -> list[dict[str, float]]:
        # a student with the teacher's own mixers has nothing to learn from it
        teacher = self.teacher if self.changed else None
        loss = partial(
            _loss_of(self.teacher), self.student, teacher=teacher, kl_weight=self.config.kl_weight
        )
        train = self.config.stage(steps, transfer=False)
        if not self.config.lora_rank:
            return self._train("finetune", self.student, loss, train)
        adapted = add_lora(
            self.student, self.config.lora_rank, self.config.lora_alpha, self.config.seed
        )
        log = self._train("finetune", adapted, loss, train)
        self.student = merge_lora(adapted)
        return log

    def _train(
        self, stage: str, module: nn.Module, loss: LossFn, train: TrainConfig
    ) -> list[dict[str, float]]:
        trainer = Trainer(
            module,
            self.sequence.loss(loss),
            partial(self._batch, offset=0 if stage == "transfer" else self.config.steps),
            train,
            self.folder / stage,
            label=stage,
            accelerator=self.accelerator,
            sequence_parallel=self.sequence.parts,
        )
        return trainer.run(resume=self.resume and trainer.has_state)

    def _batch(self, step: int, *, offset: int) -> torch.Tensor:
        """Windows of a step; stages do not share theirs."""
        return self.windows.batch(offset + step, self.config.rows)
