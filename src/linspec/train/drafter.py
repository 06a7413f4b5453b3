"""Train a drafter for a model: its backbone stays frozen, only the heads learn.

train_drafter("student", kind="medusa")     # into student/medusa
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer, resolve
from linspec.checkpoints.resolve import EMBEDDED
from linspec.drafters.heads import Heads, HeadsConfig, MedusaHeads
from linspec.drafters.saved import CONFIG_FILE, save_heads
from linspec.errors import ConfigError, InputError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.compiled import check_choice, check_precision
from linspec.train.data import (
    Sources,
    Windows,
    check_sources,
    end_of_text,
    tokenize,
    train_and_heldout,
)
from linspec.train.loop import TrainConfig, Trainer, mean_loss
from linspec.train.run import make_accelerator, training_run
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.places import Place, as_path
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_instance, check_positive, check_sizes

KINDS = ("medusa",)
# Ranks whose accuracy is measured for each head: no published tree uses more.
RANKS = 10
# no place of a token: what a cross-entropy leaves out
_NONE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """How to train Medusa heads.

    heads, blocks, hidden, shared_head, rooted, vocabulary: see HeadsConfig. tokens: of text to train
    on; context: tokens of a window; batch_tokens: tokens of a step. decay: weight of head k's loss is decay^k
    (the paper's 0.8). calibration_tokens: held-out tokens on which accuracies are measured.
    """

    heads: int = 3
    blocks: int = 1
    hidden: int = 512
    shared_head: bool = True
    rooted: bool = True
    vocabulary: int = 0
    tokens: int = 3_000_000
    context: int = 512
    batch_tokens: int = 4096
    lr: float = 5e-3
    decay: float = 0.8
    calibration_tokens: int = 65_536
    precision: str = "auto"
    compile: str = "auto"
    save_every: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.compile)
        check_precision(self.precision)
        check_positive("save_every", self.save_every, zero=True)
        check_sizes(self, "heads blocks tokens context batch_tokens calibration_tokens")
        check_sizes(self, "hidden vocabulary seed", least=0)
        check_positive("lr", self.lr)
        check_positive("decay", self.decay)
        if self.context <= self.heads:
            raise ConfigError(f"context must exceed the {self.heads} heads, got {self.context}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what decides the result; a compiled run is the same run."""
        return {name: value for name, value in asdict(self).items() if name != "compile"}

    def heads_for(self, target: DecoderConfig) -> HeadsConfig:
        """The shape of the heads that are trained for a target."""
        return HeadsConfig(
            width=target.width,
            vocab_size=target.vocab_size,
            heads=self.heads,
            blocks=self.blocks,
            hidden=self.hidden,
            shared_head=self.shared_head,
            rooted=self.rooted,
            vocabulary=min(self.vocabulary, target.vocab_size),
        )

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return max(1, self.batch_tokens // self.context)

    @property
    def training(self) -> TrainConfig:
        """Settings of the training loop."""
        return TrainConfig(
            steps=max(1, round(self.tokens / (self.rows * self.context))),
            lr=self.lr,
            precision=self.precision,
            compile=self.compile,
            save_every=self.save_every,
            seed=self.seed,
        )


def train_drafter(
    model: str | Path,
    out: str | Path | None = None,
    *,
    kind: str = "medusa",
    data: Sources = ("stdlib",),
    field: str = "text",
    config: DrafterConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train and calibrate Medusa heads for a model; returns their directory.

    Calibration measures how often the rank-i guess of each head is right, on text that training does not
    see. A run that was killed continues with the same call and `resume`. Heads that were in `out` before
    stay until the new heads are complete. Paper: Cai et al. 2024, arXiv 2401.10774.

    Args:
        model: a model directory or the name of a model.
        out: None for MODEL/medusa, where the drafter 'medusa' looks; else a directory that is new or empty.
        kind: 'medusa', the only kind that is trained today.
        data: files, folders, 'stdlib' or data sets; see the page on use.
        field: the entry of a `.jsonl` line that holds the text.
        config: sizes of the heads, tokens and rates; None for the defaults of DrafterConfig.
        resume: continue a run from its last saved state.
        overwrite: replace heads that this function wrote to `out` before.

    Raises:
        ConfigError: a setting breaks a rule, or `out` may not be written.
        CheckpointError: the model cannot be read, or the disk refuses.
        InputError: the data cannot be read or hold too little text. These come before any long work.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    check_instance("config", config, DrafterConfig, none=True)
    check_instance("field", field, str)
    config = config or DrafterConfig()
    _check_kind(kind)
    data = check_sources(data)
    place = _place(model, out, kind, data, overwrite)
    place.check(resume=resume)
    target, tokenizer = load_model(model), load_tokenizer(model)
    check_tokenizer(tokenizer, target.config)
    plan = {
        "target": fingerprint(target),
        "data": [str(d) for d in data],
        "field": field,
        "config": config.to_json(),
    }
    accelerator = make_accelerator()
    with training_run(place, plan, CONFIG_FILE, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            eos = end_of_text(tokenizer, target.config)
            train, heldout = (tokenize(t, tokenizer, eos) for t in train_and_heldout(data, field))
            target.to(accelerator.device).requires_grad_(False)
            heads, log = _train(target, train, config, folder, accelerator, resume)
            if accelerator.is_main_process:
                sizes = {"context": config.context, "tokens": config.calibration_tokens}
                heads.accuracies = calibrate(target, heads, heldout, **sizes)
                facts = {"loss": round(mean_loss(log), 5), "tokens": log[-1]["tokens"]}
                save_heads(heads, target, place, facts={"plan": plan, **facts})
    return place.path


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"cannot train a drafter of kind {shown(repr(kind))}; known: {', '.join(KINDS)}"
            f"{did_you_mean(kind, KINDS)}"
        )


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
    target: Decoder,
    stream: np.ndarray,
    config: DrafterConfig,
    folder: Path,
    accelerator: Accelerator,
    resume: bool,
) -> tuple[MedusaHeads, list[dict[str, float]]]:
    shape = config.heads_for(target.config)
    heads = MedusaHeads(shape, target, drafted=commonest(stream, shape))
    heads.initialize(torch.Generator().manual_seed(config.seed))
    heads.to(accelerator.device)
    windows = Windows(stream, config.context, config.seed, process=accelerator.process_index)
    _check_length(windows.context, config.heads)
    trainer = Trainer(
        heads,
        partial(heads_loss, target, heads, decay=config.decay),
        lambda step: windows.batch(step, config.rows),
        config.training,
        folder / "heads",
        label="train heads",
        accelerator=accelerator,
    )
    return heads, trainer.run(resume=resume and trainer.has_state)


def commonest(stream: np.ndarray, shape: HeadsConfig) -> torch.Tensor | None:
    """The ids of the tokens that heads of this shape draft, ascending: those that come up most often."""
    if not shape.vocabulary:
        return None
    counts = np.bincount(stream, minlength=shape.vocab_size)
    ids = np.sort(np.argsort(-counts, kind="stable")[: shape.vocabulary])
    return torch.from_numpy(ids.astype(np.int32))


def _check_length(context: int, heads: int) -> None:
    if context <= heads:
        raise InputError(f"{context} tokens of data are too few for {heads} heads; give more text")


def heads_loss(
    target: Decoder, heads: MedusaHeads, batch: torch.Tensor, decay: float
) -> torch.Tensor:
    """Σ_k decay^k · CE of head k on the target's own choice k + 1 places on; batch [B, T + 1].

    The target's choice (its argmax after the text so far) is what a draft is verified against; the
    text's own token is often one that no drafter could guess. Choices that are not among the drafted tokens
    teach nothing.
    """
    with torch.no_grad():
        hidden = target.hidden(batch[:, :-1])
        chosen = _places(heads, target.head(hidden).argmax(-1))
    features = heads.features(heads.seen(hidden, batch[:, 1:]))
    loss = hidden.new_zeros((), dtype=torch.float32)
    for k in range(1, heads.config.heads + 1):
        logits = heads.logits(features[:, :-k, k - 1], k - 1)
        labels = chosen[:, k:]
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_NONE, reduction="sum"
        )
        loss = loss + decay**k * each / (labels != _NONE).sum().clamp(min=1)
    return loss


def _places(heads: MedusaHeads, ids: torch.Tensor) -> torch.Tensor:
    """Where token ids stand among those that are drafted, _NONE for the others."""
    if heads.drafted is None:
        return ids
    places = torch.full((heads.config.vocab_size,), _NONE, device=ids.device)
    places[heads.drafted.long()] = torch.arange(len(heads.drafted), device=ids.device)
    return places[ids]


@torch.inference_mode()
def calibrate(
    target: Decoder, heads: Heads, stream: np.ndarray, *, context: int, tokens: int
) -> list[list[float]]:
    """a_k(i): the share of positions of `stream` where head k's rank-i guess is the target's choice.

    Measured on consecutive windows of `context` tokens, `tokens` in all; RANKS columns, or fewer
    for a tiny vocabulary.
    """
    length = min(len(stream), max(tokens, context))
    context = min(context, length)
    _check_length(context - 1, heads.config.heads)
    ranks = min(RANKS, heads.config.vocabulary or heads.config.vocab_size)
    device = target.embed.weight.device
    hits = torch.zeros(heads.config.heads, ranks, dtype=torch.long)
    seen = torch.zeros(heads.config.heads, 1, dtype=torch.long)
    starts = range(0, length - context + 1, context)
    with Progress("calibrate heads", len(starts)) as progress:
        for done, start in enumerate(starts, 1):
            ids = torch.from_numpy(np.asarray(stream[start : start + context], dtype=np.int64))
            hidden = target.hidden(ids[None].to(device))
            chosen = target.head(hidden).argmax(-1)
            # behind the last token nothing is known, and no head is asked there
            features = heads.features(heads.seen(hidden, ids[None].roll(-1, 1)))
            for k in range(1, heads.config.heads + 1):
                guesses = heads.logits(features[:, :-k, k - 1], k - 1).topk(ranks).indices
                right = heads.tokens(guesses) == chosen[:, k:, None]
                hits[k - 1] += right.sum((0, 1)).cpu()
                seen[k - 1] += right.shape[1]
            progress.update(done)
    return [[round(rate, 5) for rate in row] for row in (hits / seen).tolist()]
