"""Linearize: a softmax checkpoint in, a checkpoint with other mixers out.

Stage 1, *transfer*, matches each new mixer to the teacher's; stage 2, *finetune*, trains the
student on text and on the teacher's distribution. Both resume from where they were killed.

    linearize("embedded-softmax", "student", mixer="aug")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.gguf.model import stored_dtype as gguf_dtype
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.hub import (
    check_tokenizer,
    load_causal_model,
    load_tokenizer,
    resolve,
    save_model,
)
from linspec.errors import CheckpointError, ConfigError
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig, Seq2SeqConfig
from linspec.train.compiled import LossFn
from linspec.train.data import Windows, check_sources, end_of_text, tokenize, train_and_heldout
from linspec.train.finetune import add_lora, finetune_loss, merge_lora
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.loop import TrainConfig, Trainer, log_lines, mean_loss
from linspec.train.objective import Predictor
from linspec.train.recall_texts import with_recall
from linspec.train.run import make_accelerator, training_run
from linspec.train.search import span_losses
from linspec.train.student import (
    DEFAULT_GROUP,
    DEFAULT_ROWS,
    by_need,
    changed_layers,
    check_mixers,
    check_taps,
    leaves_span,
    make_mixer,
    spread,
    student_mixers,
    with_mixers,
)
from linspec.train.sums import keep_useful_sums
from linspec.train.transfer import Transfer
from linspec.utils.border import read_json
from linspec.utils.messages import shown
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_size

RECORD = "linearize.json"


def linearize(
    source: str | Path,
    out: str | Path,
    *,
    mixer: str | MixerConfig = "aug",
    group: int = DEFAULT_GROUP,
    taps: int | None = None,
    window: int | None = None,
    span: int | Sequence[int] | None = None,
    rows: int = DEFAULT_ROWS,
    kernel: str | None = None,
    features: int = 0,
    keep: int = 0,
    mixer_seed: int = 0,
    keep_softmax: Sequence[int] = (),
    softmax_layers: int = 0,
    data: Sequence[str | Path] = ("stdlib",),
    field: str = "text",
    config: LinearizeConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Train a model with other mixers; returns the directory of the new model.

    Transfer matches the teacher layer by layer, then finetuning trains the whole model. Sums over closed
    groups stay only where they lower the loss of texts of four times the context (kernel 'softmax'). A run
    that was killed continues with the same call and `resume`. A mixer that changes nothing trains the
    teacher itself.

    An encoder-decoder (T5) counts the layers of its encoder first, keeps its cross-attention, and learns to
    predict the second half of each window from the first half.

    Paper: You et al. 2024, arXiv 2406.07368.

    Args:
        source: a model directory, a GGUF file or the name of a model.
        out: a directory that is new or empty.
        mixer: a spec of `linspec list` such as 'aug:taps=16', or a MixerConfig. A spec goes before the
            sizes below.
        group: tokens of a group.
        taps: taps of the causal convolution over values; None for the default of the mixer.
        window: tokens that the mixer 'window' sees; None for its default.
        span: groups that a layer sees exactly, for all layers or one for each; None searches.
        rows: exact positions of a layer, in the mean over the layers, that the search for spans may spend.
        kernel: weights of the exact positions: 'softmax' (those of the teacher), 'own' or 'relu2'.
        features: random features of 'performer' and 'rfa', positions of a group of 'linformer'; 0 for the
            default.
        keep: groups that 'linformer' remembers; 0 for the default.
        mixer_seed: of the random features.
        keep_softmax: numbers of the layers that keep their mixer.
        softmax_layers: how many more layers keep theirs: those that need distant positions most.
        data: files, folders, 'stdlib' or data sets; the held-out documents are not trained on.
        field: the entry of a `.jsonl` line that holds the text.
        config: tokens, rates and precision; None for the defaults of LinearizeConfig.
        resume: continue a run from its last saved state.
        overwrite: replace a model that this function wrote to `out` before.
        dtype: of the saved weights; None for that of `source`.

    Raises:
        ConfigError: a setting breaks a rule, or `out` may not be written.
        CheckpointError: the model cannot be read, or the disk refuses.
        InputError: the data cannot be read or hold too little text. These come before any long work.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    check_size("rows", rows)
    check_sources(data)
    wanted = make_mixer(
        mixer,
        group=group,
        span=span if isinstance(span, int) else None,
        kernel=kernel,
        taps=taps,
        window=window,
        features=features,
        keep=keep,
        seed=mixer_seed,
    )
    place = output_place(out, source, data, overwrite)
    place.check(resume=resume)
    teacher, tokenizer = load_causal_model(source), load_tokenizer(source)
    check_tokenizer(tokenizer, teacher.config)
    mixers = student_mixers(teacher.config, wanted, keep_softmax)
    if isinstance(span, Sequence):
        mixers = spread(mixers, span, keep_softmax)
    free = span is None and leaves_span(mixer) and wanted.kernel == "softmax"
    task = _Task(teacher, mixers, rows if free else None, softmax_layers, data, field)
    config = task.checked(config or LinearizeConfig())
    plan = task.to_json(source, config)
    accelerator = make_accelerator()
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            windows = _windows(data, field, tokenizer, teacher.config, config, accelerator)
            student = with_mixers(
                teacher, task.final_mixers(windows, folder, config.tokens, accelerator)
            )
            stages = _Stages(teacher, student, windows, config, folder, accelerator, resume)
            logs = stages.run()
            if accelerator.is_main_process:
                sums = keep_useful_sums(stages.student, windows)
                size = sum(p.numel() for p in student.parameters())
                files = record_files(plan, logs, size, sums=sums.to_json() if sums else None)
                kind = dtype or stored_dtype(source)
                save_model(stages.student, tokenizer, place, kind, extra_files=files)
    return place.path


def output_place(
    out: str | Path, source: str | Path, data: Sequence[str | Path], overwrite: bool
) -> Place:
    """Where a linearization of `source` may write."""
    inputs = (resolve(source),)
    return Place(as_path(out), "linearize", inputs=inputs, holders=data, overwrite=overwrite)


@dataclass(frozen=True)
class _Task:
    """What is asked of one linearization. rows: to share out by need, None for the spans of `mixers`."""

    teacher: Predictor
    mixers: tuple[MixerConfig, ...]
    rows: int | None
    softmax_layers: int
    data: Sequence[str | Path]
    field: str

    @property
    def changed(self) -> list[int]:
        """Layers that get another mixer."""
        config = self.teacher.config
        return changed_layers(config, config.with_mixers(self.mixers))

    def checked(self, config: LinearizeConfig) -> LinearizeConfig:
        """The completed configuration; raises ConfigError when the task cannot be done with it."""
        changed = self.changed
        config = config.completed([self.mixers[layer] for layer in changed])
        _check_context(self.teacher.config, config.context)
        halves = 2 if isinstance(self.teacher.config, Seq2SeqConfig) else 1
        check_taps((self.mixers[layer] for layer in changed), config.context // halves)
        check_mixers(self.teacher, self.mixers)
        if not 0 <= self.softmax_layers < max(1, len(changed)):
            raise ConfigError(
                f"softmax_layers must be in 0..{max(0, len(changed) - 1)}, got "
                f"{self.softmax_layers}"
            )
        return config

    def to_json(self, source: str | Path, config: LinearizeConfig) -> dict[str, Any]:
        """Plain JSON types: what a run that is resumed must have been asked for."""
        return {
            "source": str(source),
            "mixers": [asdict(m) for m in self.mixers],
            "rows": self.rows if self.changed else None,
            "softmax_layers": self.softmax_layers,
            "data": [str(d) for d in self.data],
            "field": self.field,
            "config": config.to_json(),
        }

    def final_mixers(
        self, windows: Windows, folder: Path, tokens: int, accelerator: Accelerator
    ) -> tuple[MixerConfig, ...]:
        """The mixers, after what the teacher's layers need where that is to be measured.

        tokens: of the training that follows. One process measures, all read what it found.
        """
        changed, kept = self.changed, self.softmax_layers
        if not changed or (self.rows is None and not kept):
            return self.mixers
        losses = partial(
            span_losses,
            self.teacher,
            self.mixers[changed[0]],
            changed,
            windows,
            tokens,
            folder / "reach.json",
            groups=(self.rows or 0) // self.mixers[changed[0]].group,
            needed=kept > 0,
        )
        if accelerator.is_main_process:
            losses()
        accelerator.wait_for_everyone()
        reach = losses()
        return by_need(
            self.teacher, self.mixers, changed, reach, rows=self.rows, softmax_layers=kept
        )


def continue_training(
    source: str | Path,
    out: str | Path,
    *,
    data: Sequence[str | Path] = ("stdlib",),
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


def _windows(
    data: Sequence[str | Path],
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    model: DecoderConfig | Seq2SeqConfig,
    config: LinearizeConfig,
    accelerator: Accelerator,
) -> Windows:
    texts, _ = train_and_heldout(data, field)
    stream = tokenize(texts, tokenizer, end_of_text(tokenizer, model))
    windows = Windows(stream, config.context, config.seed, process=accelerator.process_index)
    return with_recall(windows, tokenizer, data, config.recall_share)


def record_files(
    plan: dict[str, Any], logs: dict[str, list[dict[str, float]]], size: int, **facts: Any
) -> dict[str, str]:
    """The files that say what was done: linearize.json, with further facts, and log.jsonl."""
    done = {
        "plan": plan,
        "parameters": size,
        "tokens": {stage: log[-1]["tokens"] for stage, log in logs.items()},
        "seconds": {stage: log[-1]["seconds"] for stage, log in logs.items()},
        "losses": {stage: round(mean_loss(log), 5) for stage, log in logs.items()},
        **facts,
    }
    lines: list[dict[str, float | str]] = [
        {"stage": stage, **entry} for stage, log in logs.items() for entry in log
    ]
    return {RECORD: json.dumps(done, indent=2) + "\n", "log.jsonl": log_lines(lines)}


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
        with Transfer(self.teacher, self.student, self.changed) as transfer:
            train = self.config.stage(steps, transfer=True)
            return self._train("transfer", transfer.parameters(), transfer.loss, train)

    def _finetune(self, steps: int) -> list[dict[str, float]]:
        # a student with the teacher's own mixers has nothing to learn from it
        teacher = self.teacher if self.changed else None
        loss = partial(
            finetune_loss, self.student, teacher=teacher, kl_weight=self.config.kl_weight
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
            loss,
            partial(self._batch, offset=0 if stage == "transfer" else self.config.steps),
            train,
            self.folder / stage,
            label=stage,
            accelerator=self.accelerator,
        )
        return trainer.run(resume=self.resume and trainer.has_state)

    def _batch(self, step: int, *, offset: int) -> torch.Tensor:
        """Windows of a step; stages do not share theirs."""
        return self.windows.batch(offset + step, self.config.rows)
