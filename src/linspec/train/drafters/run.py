"""Train a drafter for a model: the model stays frozen, only the drafter learns.

train_drafter("student", kind="medusa")     # into student/medusa
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from linspec.checkpoints.fingerprint import full_fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer, resolve, save_model
from linspec.checkpoints.resolve import EMBEDDED
from linspec.drafters.saved import CONFIG_FILE, save_drafter
from linspec.drafters.trained import TrainedDrafter
from linspec.engine.encoding import TextEncoder
from linspec.errors import ConfigError, DrafterError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.answers import (
    AnswersConfig,
    Tokens,
    answers_key,
    kept_answers,
    prompts_of,
    streams_of,
)
from linspec.train.data import (
    Sources,
    Windows,
    check_sources,
    end_of_text,
    load_documents,
    tokenize,
    train_and_heldout,
)
from linspec.train.drafters.base import TRAININGS, DrafterConfig, DrafterTraining, check_length
from linspec.train.drafters.joint import JointTraining, joint_place, train_joint
from linspec.train.drafters.states import StateCache, states_of
from linspec.train.drafters.walk import Prediction
from linspec.train.loop import BatchFn, Trainer, mean_loss
from linspec.train.run import make_accelerator, training_run
from linspec.utils.border import read_json
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_instance


def train_drafter(
    model: str | Path,
    out: str | Path | None = None,
    *,
    kind: str = "medusa",
    data: Sources = ("stdlib",),
    field: str = "text",
    config: DrafterConfig | None = None,
    answers: AnswersConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a drafter for a model, and measure it; returns its directory.

    It is measured on text that training does not see. A run that was killed continues with the same call and
    `resume`. A drafter that was in `out` before stays until the new one is complete.

    Args:
        model: a model directory or the name of a model.
        out: None for MODEL/KIND, where the drafter of that name looks; else a directory that is new or empty.
        kind: NAME or NAME:key=value,… of a kind that can be trained, such as 'medusa:heads=4'.
        data: files, folders, 'stdlib' or data sets; see the page on use.
        field: the entry of a `.jsonl` line that holds the text.
        config: tokens and rates; None for the defaults of DrafterConfig.
        answers: learn from the model's own answers, made first, to prompts of a file or from `data`.
        resume: continue a run from its last saved state.
        overwrite: replace a drafter that this function wrote to `out` before.

    Raises:
        ConfigError: a setting breaks a rule, or `out` may not be written.
        CheckpointError: the model cannot be read, or the disk refuses.
        InputError: the data cannot be read or hold too little text. These come before any long work.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    check_instance("config", config, DrafterConfig, none=True)
    check_instance("answers", answers, AnswersConfig, none=True)
    check_instance("field", field, str)
    config = config or DrafterConfig()
    training = TRAININGS.build(kind)
    check_length(config.context, training.ahead, training.name)
    data = check_sources(data)
    if isinstance(training, JointTraining):
        place = joint_place(out, resolve(model), training.name, data, overwrite)
        record = f"{training.drafter}/{CONFIG_FILE}"
    else:
        place, record = _place(model, out, training.name, data, overwrite), CONFIG_FILE
    place.check(resume=resume)
    target, tokenizer = load_model(model), load_tokenizer(model)
    check_tokenizer(tokenizer, target.config)
    plan, prompts = _plan(training, target, data, field, config), list[Tokens]()
    if answers is not None:
        encoder = TextEncoder(tokenizer, len(tokenizer))
        prompts = _prompts(answers, encoder, data, field, config, target.config)
        plan["answers"] = _answers_plan(answers, prompts, plan["target"])
    accelerator = make_accelerator()
    with training_run(place, plan, record, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            eos = end_of_text(tokenizer, target.config)
            if answers is None:
                train, heldout = (
                    tokenize(t, tokenizer, eos) for t in train_and_heldout(data, field)
                )
            else:
                made = _answers(model, prompts, answers, plan, folder, accelerator)
                train, heldout = streams_of(prompts, made, eos)
            check_length(min(len(train), len(heldout)) - 1, training.ahead, training.name)
            target.to(accelerator.device).requires_grad_(False)
            target, drafter, log = _train(
                training, target, train, config, folder, accelerator, resume
            )
            if accelerator.is_main_process:
                sizes = {"context": config.context, "tokens": config.calibration_tokens}
                predicted = training.measure(drafter, heldout, **sizes)
                facts = predicted.to_json() if predicted else {}
                facts |= {"plan": plan, "loss": round(mean_loss(log), 5)}
                facts["tokens"] = log[-1]["tokens"]
                _save(training, target, tokenizer, drafter, place, facts)
    return place.path


def _plan(
    training: DrafterTraining[Any],
    target: Decoder,
    data: Sequence[str | Path],
    field: str,
    config: DrafterConfig,
) -> dict[str, Any]:
    """What decides the result of a run, in plain JSON types."""
    return {
        "target": full_fingerprint(target),
        "kind": {"name": training.name, **asdict(training.options)},
        "data": [str(each) for each in data],
        "field": field,
        "config": config.to_json(),
    }


def _prompts(
    answers: AnswersConfig,
    encoder: TextEncoder,
    data: Sequence[str | Path],
    field: str,
    config: DrafterConfig,
    target: DecoderConfig,
) -> list[Tokens]:
    """What the model is to answer: a file whole, or of texts as much as training reads once."""
    limit = target.position_limit
    if answers.prompts is not None:
        return prompts_of(answers, encoder, limit=limit)
    most = -(-config.tokens // (answers.prompt_tokens + answers.tokens))
    texts = load_documents(data, "all", field)
    return prompts_of(answers, encoder, texts=texts, most=most, limit=limit)


def _answers_plan(answers: AnswersConfig, prompts: Sequence[Tokens], target: str) -> dict[str, Any]:
    """What decides the answers, in plain JSON types."""
    source = None if answers.prompts is None else str(answers.prompts)
    key = answers_key(target, prompts, answers)
    return {"prompts": source, "count": len(prompts), **answers.to_json(), "key": key}


def _answers(
    model: str | Path,
    prompts: Sequence[Tokens],
    answers: AnswersConfig,
    plan: dict[str, Any],
    folder: Path,
    accelerator: Accelerator,
) -> list[Tokens]:
    """The answers, which one process makes and all read."""
    key, device = plan["answers"]["key"], accelerator.device.type
    if accelerator.is_main_process:
        kept_answers(model, prompts, answers, key, folder, device=device)
    accelerator.wait_for_everyone()
    return kept_answers(model, prompts, answers, key, folder, device=device)


def _save(
    training: DrafterTraining[Any],
    target: Decoder,
    tokenizer: Any,
    drafter: TrainedDrafter,
    place: Place,
    facts: dict[str, Any],
) -> None:
    """Write the drafter, inside the model where that was trained too."""
    if isinstance(training, JointTraining):
        save_model(target, tokenizer, place)
        save_drafter(drafter, target, place.path / training.drafter, facts=facts)
    else:
        save_drafter(drafter, target, place, facts=facts)


def predicted(out: Path) -> Prediction | None:
    """What the drafter that `train_drafter` wrote to `out` was measured to bring; None where it was not."""
    for path in (out / CONFIG_FILE, *out.glob(f"*/{CONFIG_FILE}")):
        if path.exists():
            data = read_json(path, DrafterError)
            tokens, drafts = data.get("tokens_per_round"), data.get("drafts")
            return Prediction(tokens, drafts) if tokens and drafts else None
    return None


def _place(
    model: str | Path,
    out: str | Path | None,
    kind: str,
    data: Sequence[str | Path],
    overwrite: bool,
) -> Place:
    folder = resolve(model)
    if out is None:
        if str(model) in EMBEDDED:
            raise ConfigError(f"{model} ships with linspec and cannot be written to; give --out")
        if folder.is_file():
            raise ConfigError(f"{folder} is a file, and heads need a directory; give --out")
        out = folder / kind
    elif Path(out).resolve() == folder.resolve():
        raise ConfigError(
            f"{out} is the model itself, and heads lie in a directory of their own; leave out --out "
            f"and they go to {folder / kind}, where `--drafter {kind}` looks for them"
        )
    holders = (folder, *data)
    return Place(as_path(out), "train-drafter", holders=holders, overwrite=overwrite)


def _train(
    training: DrafterTraining[Any],
    target: Decoder,
    stream: np.ndarray,
    config: DrafterConfig,
    folder: Path,
    accelerator: Accelerator,
    resume: bool,
) -> tuple[Decoder, TrainedDrafter, list[dict[str, float]]]:
    """The model, which some kinds change, the trained drafter and its log."""
    if isinstance(training, JointTraining):
        windows = Windows(stream, config.context, config.seed, process=accelerator.process_index)
        drafter = training.make(target, stream, config.seed).to(accelerator.device)
        model, log = train_joint(
            training,
            target,
            drafter,
            lambda step: windows.batch(step, config.rows),
            config,
            folder,
            accelerator,
            resume,
        )
        return model, drafter, log
    layers = training.reads(target.config)
    batches = _batches(target, stream, config, layers, folder, accelerator)
    drafter = training.make(target, stream, config.seed).to(accelerator.device)
    trainer = Trainer(
        drafter,
        lambda batch: training.loss(drafter, states_of(target, batch, layers)),
        batches,
        config.training(training.lr),
        folder / "drafter",
        label=f"train {training.name}",
        accelerator=accelerator,
    )
    return target, drafter, trainer.run(resume=resume and trainer.has_state)


def _batches(
    target: Decoder,
    stream: np.ndarray,
    config: DrafterConfig,
    layers: Sequence[int],
    folder: Path,
    accelerator: Accelerator,
) -> BatchFn:
    """What each step learns from: windows of ids, or of kept states where the text is read twice or more."""
    size = StateCache.size_gb(stream, layers, target.config.width)
    process = accelerator.process_index
    if size <= config.cache_gb and config.tokens >= 2 * len(stream) > 2 * config.context:
        states = folder / "states"
        # the files are there for the others when the main process has made them
        if accelerator.is_main_process:
            StateCache(target, stream, config.context, layers, states).fill()
        accelerator.wait_for_everyone()
        cache = StateCache(target, stream, config.context, layers, states)
        return lambda step: cache.batch(step, config.rows, config.seed, process)
    windows = Windows(stream, config.context, config.seed, process=process)
    return lambda step: windows.batch(step, config.rows)
