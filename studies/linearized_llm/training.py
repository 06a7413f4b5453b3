"""A cell that trains: the teacher with other mixers, at a budget, scored on held-out text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.evaluate.perplexity import Score, evaluate
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.data import train_and_heldout
from linspec.train.linearize import linearize
from linspec.train.linearize_config import CLOSE_LR, LinearizeConfig
from linspec.train.linearize_record import RECORD, read_record
from linspec.train.run import begun
from studies.linearized_llm.attentions import Choice
from studies.linearized_llm.cache import shared_teacher
from studies.linearized_llm.plan import Plan, Size
from studies.linearized_llm.table import Cell, Result
from studies.linearized_llm.variants import Unmasked, variant

KIND = "train"
# a teacher of another domain trains this much longer than its students before they start from it
_TEACHER_FACTOR = 4


def training_settings(plan: Plan, choice: Choice, domain: str, **changed: Any) -> dict[str, Any]:
    """Everything that determines the figures of a training cell; `changed` goes to LinearizeConfig."""
    size = plan.size
    context = min(size.context, plan.config.max_positions)
    return {
        "teacher": plan.weights,
        "teacher_tokens": 0 if domain == plan.domain else _TEACHER_FACTOR * size.tokens,
        "domain": domain,
        "text": plan.texts[domain],
        "limit_bytes": size.limit_bytes,
        **choice.to_json(),
        "training": recipe(size, choice.mixer, context, **changed),
    }


def recipe(size: Size, mixer: MixerConfig, context: int, **changed: Any) -> dict[str, Any]:
    """The whole recipe of a cell, so that the figures are others when its defaults change."""
    if mixer.name in ("softmax", "window"):
        # the teacher's own weights, if of fewer tokens: no transfer, and a rate that keeps them near
        changed = {"transfer_share": 0.0, "lr": CLOSE_LR} | changed
    options = {"tokens": size.tokens, "context": context, "batch_tokens": size.batch_tokens}
    training = LinearizeConfig(**options | changed).completed([mixer]).to_json()
    return {k: v for k, v in training.items() if k not in ("seed", "save_every")}


def train_and_score(plan: Plan, cell: Cell, folder: Path) -> Result:
    """Held-out bits per byte, perplexity and the last training loss of one cell.

    The unmasked convolution is scored twice: as it trains, and as it is when decoding, where the
    future that it reads does not exist.
    """
    settings = cell.settings
    mixer = MixerConfig(**settings["mixer"])
    with variant(mixer, settings["variant"]) as named:
        out = train(plan, settings, cell.seed, folder, named)
        model, tokenizer = load_model(out), load_tokenizer(out)
        record = read_record(out)
        texts = train_and_heldout(plan.domains[settings["domain"]])[1]

        def score() -> Score:
            limit, context = settings["limit_bytes"], settings["training"]["context"]
            return evaluate(model, tokenizer, texts, context=context, limit_bytes=limit)

        found: Result = {}
        if settings["variant"] == "unmasked":
            found["leaking_bits_per_byte"] = score().bits_per_byte
            stop_leaking(model)
        held_out = score()
    losses, seconds = record["losses"], record["seconds"]
    found |= {
        "bits_per_byte": held_out.bits_per_byte,
        "perplexity": held_out.perplexity,
        "train_loss": losses.get("finetune"),
        "train_seconds": sum(seconds.values()),
        "parameters": record["parameters"],
    }
    if settings["variant"] or cell.seed:
        shutil.rmtree(out)
    return found


def stop_leaking(model: Decoder) -> None:
    """Take the future away from every unmasked convolution of `model`."""
    for block in model.layers:
        if isinstance(block.mixer, Unmasked):
            block.mixer.leaking = False


def train(
    plan: Plan, settings: dict[str, Any], seed: int, folder: Path, mixer: MixerConfig
) -> Path:
    """The model directory of a training cell in `folder`; goes on with what is there."""
    domain = settings["domain"]
    source: str | Path = plan.teacher
    if settings["teacher_tokens"]:
        source = _domain_teacher(plan, settings)
    config = LinearizeConfig(**settings["training"], seed=seed)
    return _linearize(source, folder / "model", mixer, plan.domains[domain], config)


def _domain_teacher(plan: Plan, settings: dict[str, Any]) -> Path:
    """The teacher, trained on in another domain; shared by all cells of it."""
    tokens, context = settings["teacher_tokens"], settings["training"]["context"]
    config = LinearizeConfig(
        tokens=tokens, context=context, batch_tokens=settings["training"]["batch_tokens"]
    )
    name = f"{settings['domain']}-{settings['text']}-{settings['teacher'][:12]}-{tokens}-{context}"
    data = plan.domains[settings["domain"]]
    with shared_teacher(plan.out, name) as out:
        return _linearize(plan.teacher, out, MixerConfig(), data, config)


def _linearize(
    source: str | Path,
    out: Path,
    mixer: MixerConfig,
    data: tuple[str, ...],
    config: LinearizeConfig,
) -> Path:
    return linearize(source, out, mixer=mixer, data=data, config=config, resume=begun(out, RECORD))
