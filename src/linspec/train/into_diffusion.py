"""`linspec pretrain --from MODEL`: an autoregressive decoder becomes a masked-diffusion model.

    into_diffusion("smollm2", "filling", config=DiffusionTraining(steps=2000))

Dream's way (Ye et al. 2025, arXiv 2508.15487): the weights of the decoder without its causal mask, logits
still one position ahead. What is trained is a low-rank change of all matrices and the embedding of the mask,
a token of the vocabulary that no text has. Of a model that a package holds a *delta* is written (see
`checkpoints.delta`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.fingerprint import source_fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer, resolve
from linspec.errors import ConfigError, TrainingError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.changed_model import save_changed
from linspec.train.data import (
    Sources,
    Windows,
    check_sources,
    end_of_text,
    tokenize,
    train_and_heldout,
)
from linspec.train.loop import TrainConfig, Trainer, log_lines
from linspec.train.low_rank import MATRICES, add_low_rank, add_row
from linspec.train.masked_tokens import MaskedWindows, masked_loss
from linspec.train.run import make_accelerator, training_run
from linspec.utils.format_version import stamped
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_instance, check_positive, check_sizes

# those of `pretrain`, whose verb this is
KIND, RECORD = "pretrain", "pretrain.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionTraining:
    """How long and how to train.

    rank: of the change of each matrix. mask: the token that becomes the mask; None for one that the
    tokenizer calls so, or the last special token that neither the model nor its chat template uses. context:
    tokens of a window; batch_tokens: of a step.
    """

    rank: int = 16
    mask: str | None = None
    steps: int = 2000
    context: int = 256
    batch_tokens: int = 1024
    lr: float = 2e-3
    precision: str = "auto"
    compile: str = "off"
    save_every: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "rank steps context batch_tokens")
        check_sizes(self, "seed", least=0)
        check_positive("lr", self.lr)
        check_positive("save_every", self.save_every, zero=True)
        check_instance("mask", self.mask, str, none=True)
        # it checks the rest
        self.training()

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return max(1, self.batch_tokens // self.context)

    def training(self) -> TrainConfig:
        """As the training loop takes it."""
        names = ("steps", "lr", "precision", "compile", "save_every", "seed")
        return TrainConfig(warmup=10, **{name: getattr(self, name) for name in names})


def into_diffusion(
    source: str | Path,
    out: str | Path,
    *,
    data: Sources = ("stdlib",),
    config: DiffusionTraining | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a masked-diffusion model that is made of the decoder `source` into `out`; returns it.

    A run that was killed continues with the same call and `resume`.

    Args:
        source: a directory, a GGUF file or a name; of softmax attention in all layers.
        out: a directory that is new or empty.
        data: files, folders or 'stdlib'. The held-out documents are not trained on.
        config: None for the defaults.
        resume: continue a run from its last saved state.
        overwrite: replace a model that this function wrote to `out` before.

    Raises:
        ConfigError: a setting breaks a rule, the model cannot become one, or `out` may not be written.
        UnsupportedModel: the model is no decoder, or one without a causal mask already.
        TrainingError: the loss is not finite, there is nothing to resume, or the run was started with other
            settings.
    """
    check_instance("config", config, DiffusionTraining, none=True)
    config, data = config or DiffusionTraining(), check_sources(data)
    place = Place(as_path(out), KIND, inputs=(resolve(source),), holders=data, overwrite=overwrite)
    place.check(resume=resume)
    decoder, tokenizer = load_model(source), load_tokenizer(source)
    check_tokenizer(tokenizer, decoder.config)
    model = without_causal_mask(decoder, mask_of(tokenizer, decoder.config, config.mask))
    if config.context > (model.config.position_limit or config.context):
        raise ConfigError(
            f"a training context of {config.context} tokens is beyond the {model.config.position_limit} "
            "positions of this model; choose a shorter one"
        )
    plan = {
        "from": str(source),
        "source_weights": source_fingerprint(decoder),
        "data": [str(each) for each in data],
        "config": asdict(config),
    }
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("such a change is trained by one process; start it without a launcher")
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            model.to(accelerator.device)
            stream = _stream(data, tokenizer, decoder.config)
            log = _train(
                model, Windows(stream, config.context, config.seed), config, folder, resume
            )
            facts = {
                "mask": tokenizer.convert_ids_to_tokens(model.config.mask_id),
                "tokens": log[-1]["tokens"],
            }
            told = json.dumps(stamped({"plan": plan, **facts}), indent=2) + "\n"
            files = {RECORD: told, "log.jsonl": log_lines(log)}
            save_changed(model, source, tokenizer, place, files=files, facts=facts)
    return place.path


def without_causal_mask(decoder: Decoder, mask_id: int) -> MaskedDiffusion:
    """A masked-diffusion model with the weights of `decoder`, logits one position ahead.

    Raises ConfigError for a decoder with other attention than softmax, or blocks of their own kind.
    """
    shape = decoder.config
    others = sorted({mixer.name for mixer in shape.mixers} - {"softmax"})
    if others or type(shape) is not DecoderConfig:
        raise ConfigError(
            "a decoder with softmax attention in all layers becomes a masked-diffusion model, this one has "
            f"{', '.join(others) or 'units of its own'}; take the model that it was made from"
        )
    with torch.device("meta"):
        model = MaskedDiffusion(DiffusionConfig.of(shape, mask_id=mask_id, logit_shift=1))
    model.load_state_dict(decoder.state_dict(), assign=True)
    model.tie()
    return model


def mask_of(tokenizer: Any, config: DecoderConfig, name: str | None = None) -> int:
    """The token that becomes the mask; see `DiffusionTraining`. Raises ConfigError where there is none."""
    if name is not None:
        words = tokenizer.get_vocab()
        if name not in words:
            raise ConfigError(
                f"the tokenizer has no token {shown(repr(name))}, so it cannot be the mask"
                f"{did_you_mean(name, words)}"
            )
        return int(words[name])
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    used = {config.bos_id, config.pad_id, *config.eos_ids, *tokenizer.all_special_ids}
    template = str(tokenizer.chat_template or "")
    free = [
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in used and token.content not in template
    ]
    if not free:
        raise ConfigError(
            "this tokenizer has no special token that is free to be the mask; name a token that your texts "
            "do not have (--mask)"
        )
    return max(free)


def _stream(
    data: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, config: DecoderConfig
) -> Any:
    documents, _ = train_and_heldout(data)
    return tokenize(documents, tokenizer, end_of_text(tokenizer, config))


def _train(
    model: MaskedDiffusion, windows: Windows, config: DiffusionTraining, folder: Path, resume: bool
) -> list[dict[str, float]]:
    """Train the change of `model`, in place; returns the log."""
    add_low_rank(model, dict.fromkeys(MATRICES, config.rank), config.seed)
    add_row(model, model.config.mask_id)
    masked = MaskedWindows(windows)
    trainer = Trainer(
        model.train(),
        partial(masked_loss, model),
        partial(masked.batch, rows=config.rows),
        config.training(),
        folder / "diffusion",
        label="diffusion",
    )
    return trainer.run(resume=resume and trainer.has_state)
