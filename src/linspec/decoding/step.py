"""What goes into one inference step, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from linspec.decoding.judged import JudgeBy, Judged, Onward
from linspec.decoding.tree import TokenTree

# nodes that one slot can stage in place; longer chains (prefill) are staged in a temporary buffer
MAX_STAGED = 64
# what an input is, each computed in a way of its own: nodes of a tree, a chain that is longer than that,
# tokens that overwrite and see all positions, or only those before them
TREE, CHAIN, OVERWRITING, OVERWRITING_CAUSAL = range(4)
# in place of a layer's number: the normalized states that the output layer reads
FINAL = -1


# from states [R, D] that go into a layer, and the positions of these: how they attend to all positions of
# their slot [H, R, T], each row a distribution
Look = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


class Watch(Protocol):
    """Looks at a step between two layers, for one input that overwrites and sees all positions."""

    def before(self, layer: int, x: torch.Tensor, look: Look) -> torch.Tensor | None:
        """x [N, D] goes into a layer, whose entries are as they were before the step.

        Returns None, or what goes into it of all positions of the slot, [T, D]: all are computed from here.
        """
        ...

    def after(self, layer: int, look: Look) -> None:
        """The layer has its new entries."""
        ...


@dataclass(frozen=True, slots=True)
class StepInput:
    """New tokens of one slot.

    Attributes:
        slot: the place of the sequence in the state.
        tokens: N token ids.
        parents: for each token the number of its parent among the staged nodes of the slot (those of
            earlier steps come first), or -1 for the last committed token. None is a chain.
        all_logits: False asks for the logits of the last token only.
        logits_of: numbers of the tokens whose logits are wanted, ascending; None goes by `all_logits`.
        embeddings: [N, D], used instead of the embeddings of the tokens.
        ephemeral: which of the nodes are never committed; None for none of them.
        overwrite: committed positions whose entries the tokens replace at once; they are computed again
            with all entries in place, and nothing is staged.
        causal: False lets tokens that overwrite see later positions too.
        branch: 0 overwrites what the slot holds. Branch n overwrites what branch n - 1 left, in a place of
            its own: the inputs of the branches of a slot follow each other in one step and see alike, and
            `state.keep_branch` says afterwards which of them the slot goes on with.
        blocks: tokens that overwrite see their own block of so many positions, and those before it; None for
            what `causal` says.
        watch: looks at the states of tokens that overwrite, and may have all positions computed.
        judge: how the tree may be judged in the step, if whatever computes it does that; None asks for its
            logits. What was judged is in `StepOutput.judged`, and has no logits.
    """

    slot: int
    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    all_logits: bool = True
    embeddings: torch.Tensor | None = None
    ephemeral: Sequence[bool] | None = None
    overwrite: Sequence[int] | None = None
    causal: bool = True
    logits_of: Sequence[int] | None = None
    branch: int = 0
    blocks: int | None = None
    watch: Watch | None = None
    judge: JudgeBy | None = None

    @property
    def by_layer(self) -> bool:
        """Whether it asks for what a step in one call cannot do, and so goes layer by layer."""
        return self.watch is not None

    @property
    def kind(self) -> int:
        """TREE, CHAIN, OVERWRITING or OVERWRITING_CAUSAL."""
        if self.overwrite is not None:
            return OVERWRITING_CAUSAL if self.causal else OVERWRITING
        return CHAIN if len(self.tokens) > MAX_STAGED else TREE

    @classmethod
    def tree(cls, slot: int, tree: TokenTree, judge: JudgeBy | None = None) -> StepInput:
        """The input that verifies a whole tree."""
        return cls(slot, tree.tokens, tree.parents, judge=judge)


@dataclass(frozen=True, slots=True)
class Want:
    """What a caller needs from a step beside logits.

    Attributes:
        layers: numbers of layers, from 0, whose outputs are needed as hidden states. FINAL, the normalized
            states that the output layer reads, come with every step.
        onward: what a step that judges trees does behind them.
    """

    layers: tuple[int, ...] = ()
    onward: Onward | None = None

    @property
    def inner(self) -> tuple[int, ...]:
        """The layers that a step hands out only when it is asked to."""
        return tuple(layer for layer in self.layers if layer != FINAL)


LOGITS = Want()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step computed for the nodes whose logits were asked for.

    hidden [P, D] are final normalized hidden states, logits [P, vocab]; `slices[i]` says which of the P
    belong to input i. layers: of each layer that was wanted, the states behind it [M, D] of all M new nodes,
    those of input i at `nodes[i]`. judged: what became of the inputs, by number, that the step judged.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    slices: list[slice]
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)
    nodes: list[slice] = field(default_factory=list)
    judged: Mapping[int, Judged] = field(default_factory=dict)
