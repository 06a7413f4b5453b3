"""The types of models: what each is to those who load, train, measure and decode it.

    of_config(config).model, type_of(model).blocks(model)

Who needs to know what kind of model it has asks here, so a new kind is one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from linspec.models.bert import Bert
from linspec.models.block import Block
from linspec.models.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.encoder import Encoder
from linspec.models.flash import Flash
from linspec.models.flash_config import FlashConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.t5 import T5

Model = Decoder | Bert | T5
M = TypeVar("M", bound=Model)
# final states [B, N, D] and the tokens [B, N] that the output layer should name there, of windows [B, T + 1]
Predict = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelType:
    """A kind of model.

    name: the key of its configuration in linspec's own format. loader: the function of
    `checkpoints.hub` that reads it. stack: the module that is linearized. loop: the generation loop
    by which it writes text, None for one that writes none. measure: the verb that measures its quality,
    None where there is none.
    parts: how many pieces a window of training text is cut into, one for each stack that it runs through.
    blocks: those with a mixer, in the order of the configuration's `mixers`. run: a batch through all blocks,
    without an output. predict: see `Predict`; None for one that predicts no text. head: the output layer.
    """

    name: str
    config: type[Any]
    model: type[Model]
    stack: type[Any]
    architecture: str
    loader: str
    loop: str | None
    measure: str | None
    parts: int = 1
    blocks: Callable[[Any], list[Block]]
    run: Callable[[Any, torch.Tensor], object]
    predict: Predict | None
    head: Callable[[Any], nn.Module] | None = None


def _layers(model: Any) -> list[Block]:
    return list(model.layers)


def _next_tokens(model: Decoder, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token of a window, from those before it."""
    return model.hidden(batch[:, :-1]), batch[:, 1:]


def _second_half(model: T5, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix language modelling (Raffel et al. 2020, arXiv 1910.10683): the second half, from the first."""
    source, target = batch.tensor_split(2, dim=1)
    start = target.new_full((len(target), 1), model.config.start_id)
    sources = model.decoder.sources(*model.encode(source))
    return model.decoder.decode(torch.cat((start, target[:, :-1]), dim=1), sources), target


_DECODER: dict[str, Any] = {
    "loader": "load_model",
    "loop": "autoregressive",
    "measure": "linspec eval perplexity",
    "blocks": _layers,
    "run": lambda model, batch: model.hidden(batch[:, :-1]),
    "predict": _next_tokens,
    "head": lambda model: model.head,
}
MODEL_TYPES = {
    each.name: each
    for each in (
        # these are decoders too: the narrower types come first
        ModelType(
            name="flash",
            config=FlashConfig,
            model=Flash,
            stack=Flash,
            architecture="LinspecFlash",
            **_DECODER,
        ),
        ModelType(
            name="diffusion",
            config=DiffusionConfig,
            model=MaskedDiffusion,
            stack=MaskedDiffusion,
            architecture="LinspecMaskedDiffusion",
            loader="load_diffusion",
            loop="masked-diffusion",
            measure="linspec eval perplexity",
            blocks=_layers,
            # hidden tokens are negative
            run=lambda model, batch: model(model.with_masks(batch)),
            predict=None,
        ),
        ModelType(
            name="decoder",
            config=DecoderConfig,
            model=Decoder,
            stack=Decoder,
            architecture="LinspecForCausalLM",
            **_DECODER,
        ),
        ModelType(
            name="encoder",
            config=EncoderConfig,
            model=Bert,
            stack=Encoder,
            architecture="LinspecEncoder",
            loader="load_encoder",
            loop=None,
            measure="linspec eval embeddings",
            blocks=_layers,
            # padding is negative
            run=lambda stack, batch: stack(batch.clamp_min(0), batch >= 0),
            predict=None,
        ),
        ModelType(
            name="seq2seq",
            config=Seq2SeqConfig,
            model=T5,
            stack=T5,
            architecture="LinspecSeq2Seq",
            loader="load_seq2seq",
            loop="autoregressive",
            measure="linspec eval continuations",
            parts=2,
            blocks=lambda model: [*model.encoder.layers, *model.decoder.layers],
            run=_second_half,
            predict=_second_half,
            head=lambda model: model.decoder.head,
        ),
    )
}


def of_config(config: ModelConfig) -> ModelType:
    """The type of model that `config` describes."""
    return next(each for each in MODEL_TYPES.values() if isinstance(config, each.config))


def loop_of(model: Any) -> str:
    """The generation loop of a model; that of decoders for a model of no known type."""
    known = (each.loop for each in MODEL_TYPES.values() if isinstance(model, each.model))
    return next(known, None) or "autoregressive"


def type_of(model: Any) -> ModelType:
    """The type of a model, or of the stack of one."""
    return next(each for each in MODEL_TYPES.values() if isinstance(model, each.model | each.stack))
