"""What goes into one inference step, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.tree import TokenTree

# nodes that one slot can stage in place; longer chains (prefill) are staged in a temporary buffer
MAX_STAGED = 64


@dataclass(frozen=True, slots=True)
class StepInput:
    """New tokens of one slot.

    parents: index of each token's parent among the slot's staged nodes (those of earlier steps come
    first), -1 for the last committed token. None means a chain from the last committed token.
    all_logits: False asks for the logits of the last token only.
    """

    slot: int
    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    all_logits: bool = True

    @classmethod
    def tree(cls, slot: int, tree: TokenTree) -> StepInput:
        """The step_input that verifies a whole tree."""
        return cls(slot, tree.tokens, tree.parents)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step computed for the nodes whose logits were asked for.

    hidden [P, D] are final normalised hidden states, logits [P, vocab]; `slices[i]` says which of the P
    belong to step_input i.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    slices: list[slice]
