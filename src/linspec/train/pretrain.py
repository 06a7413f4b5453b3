"""Train the small teachers: `linspec pretrain --recipe embedded`.

`embedded` and the FLASH recipes start from nothing; `recall` trains the embedded teacher on, on texts
that ask for what stood up to 4,096 tokens above; `embedded-diffusion` turns it into a masked-diffusion model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.hub import load_config, load_model, load_tokenizer, resolve, save_model
from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig, Seq2SeqConfig
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.flash_config import FlashConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import of_config
from linspec.train.compiled import LossFn
from linspec.train.corpora import known_sources
from linspec.train.data import (
    Sources,
    Windows,
    check_sources,
    end_of_text,
    tokenize,
    train_and_heldout,
)
from linspec.train.loop import TrainConfig, Trainer, log_lines
from linspec.train.masked_tokens import MaskedWindows, masked_loss
from linspec.train.objective import Predictor, next_tokens
from linspec.train.pieces import Labels, loss_in_pieces
from linspec.train.recall_texts import with_recall
from linspec.train.run import begun, make_accelerator, training_run
from linspec.train.sequence_parallel import (
    SequenceParallel,
    check_processes,
    shard_unit,
    uncompiled,
)
from linspec.train.tokenizer import MASK, train_tokenizer
from linspec.utils.files import replace_dir
from linspec.utils.format_version import stamped
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_size

KIND, RECORD = "pretrain", "pretrain.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole pretraining run: shape, data, schedule. `stages` are (share of steps, context).

    base: the model whose weights and tokenizer it starts from, or empty. recall_share: of the windows,
    how many are texts that ask for what stood above (see `RecallWindows`).
    """

    model: DecoderConfig | Seq2SeqConfig
    train: TrainConfig
    base: str = ""
    sources: tuple[str, ...] = ("stdlib",)
    recall_share: float = 0.0
    tokens_per_step: int = 8192
    stages: tuple[tuple[float, int], ...] = ((1.0, 1024),)


def _embedded() -> Recipe:
    return Recipe(
        model=DecoderConfig(
            vocab_size=4096,
            width=256,
            layers=6,
            heads=4,
            kv_heads=2,
            head_width=64,
            mlp_width=688,
            max_positions=1024,
            eos_ids=(0,),
            bos_id=0,
        ),
        train=TrainConfig(
            steps=1800,
            lr=3e-3,
            muon_lr=5e-3,
            warmup=100,
            decay=0.4,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=1,
        ),
        stages=((0.85, 512), (0.15, 1024)),
    )


def _flash(variant: str, taps: int) -> Recipe:
    """FLASH at about the size of the embedded model, on the same tokens."""
    return Recipe(
        model=FlashConfig(
            vocab_size=4096,
            width=256,
            layers=12,
            mlp_width=512,
            variant=variant,
            taps=taps,
            eos_ids=(0,),
            bos_id=0,
        ),
        train=TrainConfig(steps=1800, lr=2e-3, warmup=100, decay=0.9, weight_decay=0.01, seed=1),
        stages=((1.0, 1024),),
    )


def _recall() -> Recipe:
    """The embedded teacher with four times the positions, which it learns to use."""
    base = "embedded-softmax"
    return Recipe(
        model=replace(load_config(base), max_positions=4096),
        train=TrainConfig(
            steps=500,
            lr=1e-3,
            muon_lr=2e-3,
            warmup=20,
            decay=0.7,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=2,
        ),
        base=base,
        recall_share=0.5,
        stages=((0.75, 1024), (0.25, 4096)),
    )


def _embedded_diffusion() -> Recipe:
    """The embedded teacher without its causal mask, its logits one position ahead (Dream's way)."""
    base = "embedded-softmax"
    known = load_config(base)
    return Recipe(
        model=DiffusionConfig.of(
            known, vocab_size=known.vocab_size + 1, mask_id=known.vocab_size, logit_shift=1
        ),
        train=TrainConfig(
            steps=1500,
            lr=2e-3,
            muon_lr=4e-3,
            warmup=50,
            decay=0.6,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=3,
        ),
        base=base,
        stages=((0.85, 512), (0.15, 1024)),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "embedded": _embedded,
    "recall": _recall,
    "embedded-diffusion": _embedded_diffusion,
    "flash-aug": lambda: _flash("aug", 32),
    "flash-quadratic": lambda: _flash("quadratic", 0),
}


def initialize(model: nn.Module, layers: int, generator: torch.Generator) -> None:
    """Small normal weights; projections back into the residual stream shrink with depth."""
    for name, weight in model.named_parameters():
        # a unit's shifts start at zero and its taps where a convolution starts
        if weight.ndim < 2 or name.endswith(("mixer.beta", "mixer.taps")):
            continue
        std = 0.02
        if name.endswith(("mixer.o.weight", "cross.o.weight", "mlp.down.weight")):
            std /= (2 * layers) ** 0.5
        with torch.no_grad():
            weight.normal_(0.0, std, generator=generator)


def next_token_loss(model: Predictor, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of windows [B, T + 1]; see `next_tokens`."""
    states, output, labels = next_tokens(model, batch)
    return loss_in_pieces(states, output, Labels(labels))


def context_at(step: int, recipe: Recipe) -> int:
    """Training context of `step`: later stages are longer."""
    done = 0.0
    for share, context in recipe.stages:
        done += share
        if step < done * recipe.train.steps:
            return context
    return recipe.stages[-1][1]


def pretrain(
    out: str | Path,
    *,
    recipe: str = "embedded",
    data: Sources = (),
    resume: bool = False,
    steps: int | None = None,
    compile: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    sequence_parallel: int = 1,
) -> Path:
    """Train a small model from random weights; returns its directory.

    A run that was killed continues with the same call and `resume`.

    Args:
        out: a directory that is new or empty.
        recipe: 'embedded', 'recall', 'embedded-diffusion', 'flash-aug' or 'flash-quadratic': shape, text,
            rates.
        data: files, folders or 'stdlib'; empty for those of the recipe. The held-out documents are not
            trained on.
        resume: continue a run from its last saved state.
        steps: optimizer steps; None for those of the recipe.
        compile: 'on', 'off' or 'auto': whether steps are compiled. The result is the same.
        precision: 'bf16', 'float32' or 'auto', as in TrainConfig.
        overwrite: replace a model that this function wrote to `out` before.
        sequence_parallel: so many processes share each window; the result is the same up to rounding.

    Raises:
        ConfigError: the recipe is unknown or cannot be shared among these processes, or `out` may not be
            written.
        CheckpointError: the disk refuses, or another process writes to `out`.
        TrainingError: the loss is not finite, there is nothing to resume, or the run was started with other
            settings.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConfigError(
            f"unknown recipe {shown(repr(recipe))}; known: {', '.join(RECIPES)}"
            f"{did_you_mean(recipe, RECIPES)}"
        )
    wanted = RECIPES[recipe]()
    wanted = replace(wanted, train=replace(wanted.train, precision=precision))
    data = () if data in ((), []) else check_sources(data)
    if steps is not None:
        wanted = replace(wanted, train=replace(wanted.train, steps=steps))
    base = (resolve(wanted.base),) if wanted.base else ()
    place = Place(as_path(out), KIND, inputs=base, holders=data, overwrite=overwrite)
    place.check(resume=resume)
    plan = {"recipe": asdict(wanted), "data": [str(each) for each in data]}
    # not part of the plan: a compiled run is the same run, and so is one that several processes share
    check_size("sequence_parallel", sequence_parallel)
    if sequence_parallel > 1:
        with torch.device("meta"):
            shard_unit([_shaped(wanted)])
    compile = uncompiled(compile, sequence_parallel)
    wanted = replace(wanted, train=replace(wanted.train, compile=compile))
    accelerator = make_accelerator()
    check_processes(accelerator, sequence_parallel)
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            if data:
                wanted = replace(wanted, sources=_files(data, folder))
            documents, _ = train_and_heldout(wanted.sources)
            tokenizer = _tokenizer(documents, wanted, folder, accelerator)
            run = _Run(wanted, plan, place, folder, accelerator, resume, sequence_parallel)
            run.train(documents, tokenizer, torch.bfloat16)
    return place.path


def train_from_nothing(
    out: Path,
    recipe: Recipe,
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """As `pretrain` with a recipe and a tokenizer of one's own, on `documents`; returns `out`.

    The same call goes on with what is there. dtype: of the saved weights.
    """
    place, accelerator = Place(as_path(out), KIND), make_accelerator()
    # the last file of a model to be written; models of linspec 0.1 have no record
    if (place.path / "config.json").exists() and not begun(place.path, RECORD):
        return place.path
    plan, resume = {"recipe": asdict(recipe)}, begun(place.path, RECORD)
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            run = _Run(recipe, plan, place, folder, accelerator, resume)
            run.train(documents, tokenizer, dtype)
    return place.path


def _files(data: Sequence[str | Path], folder: Path) -> tuple[str, ...]:
    found = [files for source in data for files in known_sources(str(source), folder).values()]
    return tuple(file for files in found for file in files)


@dataclass(frozen=True)
class _Run:
    """One pretraining in `place`, with its state in `folder`."""

    recipe: Recipe
    plan: Mapping[str, Any]
    place: Place
    folder: Path
    accelerator: Accelerator
    resume: bool
    sequence_parallel: int = 1

    def train(
        self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> None:
        """Train a model of the recipe's shape and save it."""
        recipe = self.recipe
        model = _model(recipe).to(self.accelerator.device)
        stream = tokenize(documents, tokenizer, end_of_text(tokenizer, recipe.model))
        sequence = SequenceParallel(self.accelerator, self.sequence_parallel, [model])
        texts = with_recall(
            Windows(stream, recipe.stages[-1][1], recipe.train.seed, process=sequence.index),
            tokenizer,
            recipe.sources,
            recipe.recall_share,
        )
        loss: LossFn = partial(next_token_loss, model)
        windows: Windows | MaskedWindows = texts
        if isinstance(model, MaskedDiffusion):
            loss, windows = partial(masked_loss, model), MaskedWindows(texts)
        trainer = Trainer(
            model,
            sequence.loss(loss),
            partial(self._batch, windows),
            recipe.train,
            self.folder / "pretrain",
            label="pretrain",
            accelerator=self.accelerator,
            sequence_parallel=sequence.parts,
        )
        log = trainer.run(resume=self.resume and trainer.has_state)
        if self.accelerator.is_main_process:
            record = stamped({"plan": self.plan, "tokens": log[-1]["tokens"]})
            files = {RECORD: json.dumps(record, indent=2) + "\n", "log.jsonl": log_lines(log)}
            save_model(model, tokenizer, self.place, dtype, extra_files=files)

    def _batch(self, windows: Windows | MaskedWindows, step: int) -> torch.Tensor:
        context = context_at(step, self.recipe)
        return windows.batch(step, self.recipe.tokens_per_step // context, context)


def _shaped(plan: Recipe) -> Predictor:
    """A model of the recipe's shape."""
    kind: Callable[..., Any] = of_config(plan.model).model
    model: Predictor = kind(plan.model)
    return model


def _model(plan: Recipe) -> Predictor:
    """The recipe's model with the weights that it starts from."""
    model = _shaped(plan)
    if plan.base:
        weights = load_model(plan.base).state_dict()
        model.load_state_dict(_with_mask(weights, plan.model.vocab_size))
    else:
        initialize(model, plan.model.layers, torch.Generator().manual_seed(plan.train.seed))
    return model


def _with_mask(weights: dict[str, torch.Tensor], vocab: int) -> dict[str, torch.Tensor]:
    """Weights with tables of `vocab` tokens: what is new (the mask) starts as the mean of all tokens."""
    tables = {name: w for name, w in weights.items() if name in ("embed.weight", "head.weight")}
    grown = {
        name: torch.cat((table, table.mean(0, keepdim=True).expand(vocab - len(table), -1)))
        for name, table in tables.items()
    }
    return weights | grown


def _tokenizer(
    documents: list[str], recipe: Recipe, folder: Path, accelerator: Accelerator
) -> PreTrainedTokenizerBase:
    """The run's tokenizer: trained once, then kept beside the state so that resuming reads it."""
    if recipe.base:
        tokenizer = load_tokenizer(recipe.base)
        if isinstance(recipe.model, DiffusionConfig):
            tokenizer.add_special_tokens({"mask_token": MASK})
        return tokenizer
    kept = folder / "tokenizer"
    if kept.exists():
        return load_tokenizer(kept)
    tokenizer = train_tokenizer(documents, recipe.model.vocab_size)
    if accelerator.is_main_process:
        with replace_dir(kept) as aside:
            tokenizer.save_pretrained(aside)
    return tokenizer
