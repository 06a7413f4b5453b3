"""A copy of the target in fewer bits drafts for it (as in QuantSpec, Tiwari et al. 2025).

A step of a small batch reads every weight once: a quarter of the bytes is about a quarter of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.self_draft import SelfDraft
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.own_forms import bits_per_weight, rounded
from linspec.quantization.codes import check_bits
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# of weights in 4 and in 8 bits, with the scales of their groups
_KEPT = {4: 4.5, 8: 8.0}


@dataclass(frozen=True, slots=True)
class SelfBitsOptions:
    """How the copy is rounded, and how much it drafts."""

    bits: int = option("bits of the copy's weights: 4 or 8", default=4, short=True)
    tokens: int = option("most draft tokens of a chain", default=16)
    least: float = option("drafting ends behind a token that is held less likely", default=0.5)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_drafting(self.tokens, self.least)


def check_drafting(tokens: int, least: float) -> None:
    """Raise ConfigError for sizes that no self-draft has."""
    check_size("tokens", tokens)
    if not 0 <= least <= 1:
        raise ConfigError(f"least must be a share in 0..1, got {least}")


@DRAFTERS.register(
    "self-bits",
    summary="a copy of the target with weights in 4 (or 8) bits drafts a tree on the target's own state",
    paper="Tiwari et al. 2025 (QuantSpec), arXiv 2502.10424",
    needs="nothing; memory for the copy",
    options=SelfBitsOptions,
)
class SelfBits(SelfDraft):
    """The target, rounded. Embeddings, norms and the state stay the target's."""

    def __init__(self, context: DrafterContext, options: SelfBitsOptions) -> None:
        super().__init__(context, tokens=options.tokens, least=options.least)
        self.bits = options.bits
        model = context.decoder(self.name)
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise DrafterError(
                f"drafter {self.name!r} computes in float32 on the CPU, and this model in "
                f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}; use self-window or swift"
            )
        have = bits_per_weight(model)
        if have <= 1.1 * _KEPT[self.bits]:
            raise DrafterError(
                f"drafter {self.name!r}: the weights of this model have {have:.1f} bits each, so a copy of "
                f"{self.bits} bits costs as much as the model itself; use fewer bits, self-window or swift"
            )

    def make(self, model: Decoder) -> Decoder:
        return rounded(model, self.bits)
