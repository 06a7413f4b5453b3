"""Drafters: one file each, registered by name; `make_drafter` reads the names that users write."""

from __future__ import annotations

from pathlib import Path

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
from linspec.kernels.linear import Quantizer, integer_bits
from linspec.messages import did_you_mean, shown
from linspec.models.backbone import Generator
from linspec.models.decoder import Decoder
from linspec.models.hub import EMBEDDED, load_model

__all__ = ["DRAFTERS", "Drafter", "draft_model", "lookup", "make_drafter", "medusa"]


def make_drafter(
    drafter: str | Drafter, model: Generator, source: Path | None, slots: int
) -> Drafter | None:
    """The drafter that NAME or NAME:DIR stands for; None for 'none'.

    Without DIR, 'medusa' looks in the model's own directory and 'student' takes the embedded student
    for the embedded teacher. Raises ConfigError for an unknown name, DrafterError for a misfit.
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
        kind = DRAFTERS[name]
        assert issubclass(kind, DraftModel)
        device = str(model.embed.weight.device)
        small = load_model(_draft_source(name, where, source), dtype=model.dtype, device=device)
        bits = integer_bits(model.head)
        if bits and not small.prepared:
            # a target that was quantised at load wants a draft model that was
            quantize_model(small, bits, {})
        return kind(small.prepare(), model.config, slots)
    known = ("none", *DRAFTERS.names())
    raise ConfigError(
        f"unknown drafter {shown(repr(name))}; known: {', '.join(known)}{did_you_mean(name, known)}"
    )


def _medusa(where: str, model: Decoder, source: Path | None) -> Medusa:
    folder = Path(where) if where else source / "medusa" if source else None
    if folder is None or not folder.exists():
        raise DrafterError(
            f"no Medusa heads in {folder}; train them with `linspec train-drafter MODEL`, or name "
            "their directory: medusa:DIR"
        )
    heads = load_heads(folder, model)
    # heads are matched to the plain weights; they run on the prepared output layer
    head = model.prepare().head
    heads.bind(head)
    # other forms of layers are torch's, and so are the heads then
    native: nn.Module = head
    if isinstance(heads, MedusaHeads) and isinstance(native, NativeLinear):
        heads = PackedHeads.of(heads, Quantizer(integer_bits(native) or 8, {}))
    return Medusa(heads)


def _draft_source(name: str, where: str, source: Path | None) -> str:
    if where:
        return where
    if name == "student" and source is not None and source.name == EMBEDDED["embedded-softmax"]:
        return "embedded-aug"
    raise DrafterError(f"drafter {name!r} needs a model directory: --drafter {name}:DIR")
