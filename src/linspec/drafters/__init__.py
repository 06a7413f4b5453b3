"""Drafters: one file each, registered by name; `make_drafter` reads the names that users write."""

from __future__ import annotations

from linspec.drafters import (
    aded,
    auto,
    block,
    chimera,
    draft_model,
    eagle,
    first,
    grammar,
    hidden_transfer,
    lookup,
    lud,
    medusa,
    mixed,
    ppd,
    self_bits,
    self_pages,
    self_window,
    specdec_head,
    specdiff,
    suffix,
    swift,
    universal,
)
from linspec.drafters.base import DRAFTERS, ChainDrafter, Drafter, DrafterContext
from linspec.errors import WrongType
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.messages import shown

__all__ = [
    "DRAFTERS",
    "ChainDrafter",
    "Drafter",
    "DrafterContext",
    "aded",
    "auto",
    "block",
    "chimera",
    "draft_model",
    "eagle",
    "first",
    "grammar",
    "hidden_transfer",
    "lookup",
    "lud",
    "make_drafter",
    "medusa",
    "mixed",
    "ppd",
    "self_bits",
    "self_pages",
    "self_window",
    "specdec_head",
    "specdiff",
    "suffix",
    "swift",
    "universal",
]


def make_drafter(drafter: str | Drafter, context: DrafterContext) -> Drafter | None:
    """The drafter that NAME or NAME:key=value,… stands for, or several of these with + between them.

    None for 'none', and for 'auto' beside a masked-diffusion model. The target stays as it is. Raises
    ConfigError for unknown names and settings, DrafterError for a misfit.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if not isinstance(drafter, str):
        raise WrongType(
            f"a drafter is a name or a Drafter, got {shown(repr(drafter))}; use 'none' for plain decoding"
        )
    # what fills masks has no drafter that could be the best
    if drafter == "none" or (drafter == "auto" and isinstance(context.target, MaskedDiffusion)):
        return None
    return DRAFTERS.build(drafter, context)
