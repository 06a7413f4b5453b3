"""Train a masked-diffusion model to be sure of many tokens at once (dParallel; see `certainty`).

    train_parallel("path/to/llada", "faster", prompts, ParallelConfig(tokens=256))
    LLM("faster", loop="masked-diffusion:commit=entropy,block=fixed:32")

The model answers the prompts one token a forward. A copy of it learns these answers, and says afterwards more
of them in one forward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from linspec.checkpoints.fingerprint import full_fingerprint
from linspec.checkpoints.hub import (
    load_any_config,
    load_diffusion,
    load_tokenizer,
    resolve,
    save_model,
)
from linspec.engine.encoding import TextEncoder
from linspec.engine.prompts import Prompt
from linspec.errors import ConfigError, InputError, UnsupportedModel
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.answers import AnswersConfig, Tokens, answered, prompts_of
from linspec.train.certainty import Spans, Text, certainty, certainty_loss
from linspec.train.loop import TrainConfig, Trainer, log_lines
from linspec.train.low_rank import MATRICES, add_low_rank, merge_low_rank
from linspec.train.run import make_accelerator, training_run
from linspec.utils.format_version import stamped
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_positive, check_size, check_sizes

KIND, RECORD = "train-parallel", "parallel.json"
# one text in so many, but no more than _MOST, is kept aside to measure
_ASIDE, _MOST = 10, 64

# whether an answer (second) to a prompt (first) is right
Right = Callable[[Tokens, Tokens], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a model is trained to be sure.

    tokens: masks that an answer is written into; what follows its end is filled with ends. block: of the
    decoder, and of what is hidden; None for whole answers. weight: of the entropy. temperature: at which it
    is taken. steps, rows: optimizer steps and texts of each. rank: of the change; 0 trains all weights.
    batch: answers that are made at once, which changes none.
    """

    tokens: int = 128
    block: int | None = 32
    weight: float = 2.0
    temperature: float = 0.5
    steps: int = 1000
    rows: int = 8
    lr: float = 2e-4
    warmup: int = 20
    weight_decay: float = 0.01
    rank: int = 0
    batch: int = 8
    precision: str = "auto"
    save_every: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "tokens steps rows batch")
        check_sizes(self, "warmup rank seed", least=0)
        if self.block is not None:
            check_size("block", self.block)
        for name in ("lr", "temperature"):
            check_positive(name, getattr(self, name))
        for name in ("weight", "weight_decay", "save_every"):
            check_positive(name, getattr(self, name), zero=True)
        # it checks the rest
        self.training()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what decides the result."""
        kept = asdict(self)
        del kept["batch"], kept["save_every"]
        return kept

    def training(self) -> TrainConfig:
        """As the training loop takes it. Each step hides another number of tokens, so none is compiled."""
        names = ("steps", "lr", "warmup", "weight_decay", "precision", "save_every", "seed")
        return TrainConfig(compile="off", **{name: getattr(self, name) for name in names})


def train_parallel(
    source: str | Path,
    out: str | Path,
    prompts: Sequence[Prompt],
    config: ParallelConfig | None = None,
    *,
    right: Right | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a copy of a masked-diffusion model on its own answers, so that it needs fewer forwards.

    A run that was killed continues with the same call and `resume`. `parallel.json` in the output names the
    model that it was made of, with its fingerprint, and says how sure it was before and after.

    Args:
        source: a directory of a masked-diffusion model, or its name.
        out: a directory that is new or empty.
        prompts: texts or token ids. Keep those that you measure with out of them.
        config: None for the defaults.
        right: says of a prompt and its answer, as token ids, whether it is learned; None learns all.
        tokenizer: in place of that of the directory, for one without.
        resume: continue a run from its last saved state.
        overwrite: replace a model that this function wrote to `out` before.

    Raises:
        ConfigError: a setting breaks a rule, or `out` may not be written.
        UnsupportedModel: the model is no masked-diffusion model that sees the whole text.
        InputError: no answer is left to learn.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    config = config or ParallelConfig()
    place = Place(as_path(out), KIND, inputs=(resolve(source),), overwrite=overwrite)
    place.check(resume=resume)
    student = _loaded(source)
    kept = load_tokenizer(source) if tokenizer is None else None
    encoder = TextEncoder(kept if tokenizer is None else tokenizer, student.config.vocab_size)
    asked = _encoded(encoder, prompts, student, config)
    facts = {"source": str(source), "fingerprint": full_fingerprint(student)}
    plan = {**facts, "prompts": _hash(asked), "config": config.to_json()}
    accelerator = make_accelerator()
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:

            def make() -> LLM:
                words = kept if tokenizer is None else tokenizer
                return LLM(
                    _loaded(source), tokenizer=words, loop=_loop(config), max_batch=config.batch
                )

            file, vocab = folder / "answers.jsonl", student.config.vocab_size
            answers = answered(make, asked, _answers(config), file, vocab=vocab)
            texts = _texts(asked, answers, student, config, right)
            run = _Run(config, student, texts, folder, accelerator)
            log, measured = run.train(resume)
            if accelerator.is_main_process:
                record = {"plan": plan, "answers": len(answers), "learned": len(texts), **measured}
                told = json.dumps(stamped(record), indent=2) + "\n"
                files = {RECORD: told, "log.jsonl": log_lines(log)}
                save_model(student, kept, place, extra_files=files)
    return place.path


def read_asked(model: str | Path, path: Path, config: ParallelConfig) -> list[Tokens]:
    """The prompts of a file as token ids of the model in a directory; raises like `prompts_of`."""
    tokenizer = load_tokenizer(model)
    encoder = TextEncoder(tokenizer, len(tokenizer))
    limit = load_any_config(model).position_limit
    room = None if limit is None else limit - config.tokens + 1
    return prompts_of(AnswersConfig(prompts=path, tokens=config.tokens), encoder, limit=room)


def _loaded(source: str | Path) -> MaskedDiffusion:
    model = load_diffusion(source)
    if model.config.block_length is not None:
        raise UnsupportedModel(
            f"{source} is a block-diffusion model, whose blocks never see a later one; training it to be "
            "sure is known for models that see the whole text"
        )
    return model


def _encoded(
    encoder: TextEncoder, prompts: Sequence[Prompt], model: MaskedDiffusion, config: ParallelConfig
) -> list[Tokens]:
    asked = [tuple(encoder.encode(each)) for each in prompts]
    longest = max(map(len, asked), default=0)
    limit = model.config.position_limit
    if limit is not None and longest + config.tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and {config.tokens} masks are more than the {limit} positions of "
            "this model; ask for fewer tokens, or leave out long prompts"
        )
    if not asked:
        raise InputError("there is no prompt to answer; give some")
    return asked


def _hash(prompts: Sequence[Tokens]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _loop(config: ParallelConfig) -> str:
    """Static decoding, as the model is decoded before it is trained."""
    return f"masked-diffusion:block=fixed:{str(config.block).lower()},commit=static"


def _answers(config: ParallelConfig) -> AnswersConfig:
    return AnswersConfig(tokens=config.tokens, batch=config.batch, seed=config.seed)


def _texts(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    model: MaskedDiffusion,
    config: ParallelConfig,
    right: Right | None,
) -> list[Text]:
    """What is learned: answers that are right, filled with ends of text where the model knows one."""
    pairs = zip(prompts, answers, strict=True)
    wanted = [(p, a) for p, a in pairs if a and (right is None or right(p, a))]
    # one is kept aside
    if len(wanted) < 2:
        raise InputError(
            f"{len(wanted)} of {len(prompts)} answers are right; two are needed, so give more prompts"
        )
    ends = model.config.eos_ids[:1]
    return [Text((*p, *a, *ends * (config.tokens - len(a))), len(p)) for p, a in wanted]


@dataclass(frozen=True)
class _Run:
    """One training, with its state in `folder`."""

    config: ParallelConfig
    student: MaskedDiffusion
    texts: Sequence[Text]
    folder: Path
    accelerator: Accelerator

    def train(self, resume: bool) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """The log, and what was measured on texts that are not learned."""
        config, student = self.config, self.student.to(self.accelerator.device)
        aside = max(1, min(_MOST, len(self.texts) // _ASIDE))
        apart = self._spans(self.texts[:aside]).of(self.texts[:aside], np.random.default_rng(0))
        apart = apart.to(self.accelerator.device)
        before = certainty(student.eval(), apart)
        student.train()
        if config.rank:
            add_low_rank(student, dict.fromkeys(MATRICES, config.rank), config.seed)
        trainer = Trainer(
            student,
            partial(certainty_loss, student, weight=config.weight, temperature=config.temperature),
            partial(self._spans(self.texts[aside:]).batch, rows=config.rows),
            config.training(),
            self.folder / "parallel",
            label="parallel",
            accelerator=self.accelerator,
        )
        log = trainer.run(resume=resume and trainer.has_state)
        merge_low_rank(student).requires_grad_(True).eval()
        return log, {"before": before, "after": certainty(student, apart)}

    def _spans(self, texts: Sequence[Text]) -> Spans:
        config = self.student.config
        seed = self.config.seed + self.accelerator.process_index
        return Spans(texts, config.mask_id, config.vocab_size, self.config.block, seed)
