"""Drafters: one file each, registered by name; `make_drafter` reads the names that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from linspec.compress.load import quantize_model
from linspec.drafters import draft_model, lookup, medusa
from linspec.drafters.base import DRAFTERS, Drafter
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.heads import MedusaHeads
from linspec.drafters.lookup import PromptLookup
from linspec.drafters.medusa import Medusa
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import load_heads
from linspec.errors import ConfigError, DrafterError, WrongType
from linspec.kernels.cpu.linear import NativeLinear
from linspec.kernels.linear import Quantizer, integer_bits, pick_kernel
from linspec.messages import did_you_mean, shown
from linspec.models.backbone import Generator
from linspec.models.decoder import Decoder
from linspec.models.hub import EMBEDDED, load_model
from linspec.models.same_tokenizer import check_same_tokenizer
from linspec.models.tokenizer import load_text_tokenizer

__all__ = ["DRAFTERS", "Drafter", "draft_model", "lookup", "make_drafter", "medusa"]


def make_drafter(
    drafter: str | Drafter,
    model: Generator,
    source: Path | None,
    slots: int,
    tokenizer: Any = None,
) -> Drafter | None:
    """The drafter that NAME or NAME:DIR stands for; None for 'none'.

    Without DIR, 'medusa' looks in the model's own directory and 'student' takes the embedded student
    for the embedded teacher. tokenizer: of `model`, by default the one in `source`; a draft model must
    have the same. `model` stays as it is. Raises ConfigError for an unknown name, DrafterError for a
    misfit.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if not isinstance(drafter, str):
        raise WrongType(f"a drafter is a name or a Drafter, got {shown(repr(drafter))}")
    name, _, where = drafter.partition(":")
    if name == "none":
        return None
    if name == "prompt-lookup":
        return PromptLookup()
    if name in DRAFTERS and not isinstance(model, Decoder):
        raise DrafterError(
            f"drafter {name!r} drafts for decoders, and this is a {type(model).__name__}; use "
            "prompt-lookup"
        )
    if name == "medusa":
        assert isinstance(model, Decoder)
        return _medusa(where, model, source)
    if name in ("draft-model", "student"):
        assert isinstance(model, Decoder)
        folder = _draft_source(name, where, source)
        if tokenizer is None and source is not None:
            tokenizer = load_text_tokenizer(source)
        if tokenizer is not None:
            check_same_tokenizer(tokenizer, load_text_tokenizer(folder), folder)
        return _draft_model(name, folder, model, slots)
    known = ("none", *DRAFTERS.names())
    raise ConfigError(
        f"unknown drafter {shown(repr(name))}; known: {', '.join(known)}{did_you_mean(name, known)}"
    )


def _draft_model(name: str, folder: str, model: Decoder, slots: int) -> DraftModel:
    kind = DRAFTERS[name]
    assert issubclass(kind, DraftModel)
    device = str(model.embed.weight.device)
    small = load_model(folder, dtype=model.dtype, device=device)
    bits = integer_bits(model.head)
    if bits and not small.prepared:
        # a target that was quantised at load wants a draft model that was
        quantize_model(small, bits, {})
    return kind(small.prepare(), model.config, slots)


def _medusa(where: str, model: Decoder, source: Path | None) -> Medusa:
    folder = Path(where) if where else source / "medusa" if source else None
    if folder is None or not folder.exists():
        raise DrafterError(
            f"no Medusa heads in {folder}; train them with `linspec train-drafter MODEL`, or name "
            "their directory: medusa:DIR"
        )
    heads = load_heads(folder, model)
    if isinstance(heads, MedusaHeads) and _runs_natively(model.head):
        heads = PackedHeads.of(heads, Quantizer(integer_bits(model.head) or 8, {}))
    # the target may be prepared after its drafter is made
    heads.follow(model)
    return Medusa(heads)


def _runs_natively(head: nn.Module) -> bool:
    """Whether an output layer is one of linspec's own, or becomes one when it is prepared."""
    if isinstance(head, nn.Linear):
        return pick_kernel(head.weight).own
    return isinstance(head, NativeLinear)


def _draft_source(name: str, where: str, source: Path | None) -> str:
    if where:
        return where
    if name == "student" and source is not None and source.name == EMBEDDED["embedded-softmax"]:
        return "embedded-aug"
    raise DrafterError(f"drafter {name!r} needs a model directory: --drafter {name}:DIR")
