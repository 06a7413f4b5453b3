"""The kinds of models on disk: what each is called, built from and loaded by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from linspec.models.bert import Bert
from linspec.models.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.flash import Flash
from linspec.models.flash_config import FlashConfig
from linspec.models.t5 import T5

Model = Decoder | Bert | T5
M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Kind:
    """`name` is the key of the configuration in linspec's own format."""

    name: str
    config: Any
    model: type[Model]
    architecture: str
    loader: str


KINDS = {
    kind.name: kind
    for kind in (
        # a FLASH model is a decoder too: the narrower kind comes first
        Kind("flash", FlashConfig, Flash, "LinspecFlash", "load_model"),
        Kind("decoder", DecoderConfig, Decoder, "LinspecForCausalLM", "load_model"),
        Kind("encoder", EncoderConfig, Bert, "LinspecEncoder", "load_encoder"),
        Kind("seq2seq", Seq2SeqConfig, T5, "LinspecSeq2Seq", "load_seq2seq"),
    )
}


def kind_of(config: ModelConfig) -> Kind:
    """The kind of model that `config` describes."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))
