"""Probes: nodes that ride in the step that verifies a tree, and draft the next one.

A probe is fed an embedding that stands for no token. It sees the text up to a node of the tree, so its scores
are guesses of what comes further on; verified tokens never see it, and it is never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.decoding.tree import TokenTree
from linspec.errors import DrafterError
from linspec.utils.messages import shown


@dataclass(frozen=True)
class Probes:
    """P probes beside a tree of N nodes.

    Attributes:
        parents: of each probe: a node of the tree, or N + i for the probe number i before it.
        embeddings: [P, D], what goes into the target in place of the embedding of a token.
    """

    parents: tuple[int, ...]
    embeddings: torch.Tensor

    def beside(
        self, tree: TokenTree, slot: int, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> StepInput:
        """The input that verifies `tree` and carries these probes; embed: from token ids to embeddings."""
        count, given = len(self.parents), self.embeddings
        tokens = embed(torch.tensor(tree.tokens, device=given.device))
        return StepInput(
            slot,
            (*tree.tokens, *(0,) * count),
            (*tree.parents, *self.parents),
            embeddings=torch.cat((tokens.to(given.dtype), given)),
            ephemeral=(False,) * len(tree) + (True,) * count,
        )

    def below(self, node: int, tree: TokenTree) -> list[int]:
        """Which nodes of that input are the probes below `node`, in their order."""
        nodes, found = len(tree), {node}
        for index, parent in enumerate(self.parents, nodes):
            # a chain of probes hangs on one node of the tree
            if parent in found and (parent == node or parent >= nodes):
                found.add(index)
        return sorted(found - {node})


def check_probes(name: str, probes: object, tree: TokenTree, width: int) -> None:
    """Raise DrafterError for probes that would harm the step that their tree shares with others."""
    if not isinstance(probes, Probes):
        raise DrafterError(f"drafter {name!r} gave {shown(repr(probes))}; what rides are Probes")
    count, nodes = len(probes.parents), len(tree)
    if list(probes.embeddings.shape) != [count, width]:
        raise DrafterError(
            f"drafter {name!r} gave embeddings {list(probes.embeddings.shape)} for {count} probes of a "
            f"model of width {width}; they are [{count}, {width}]"
        )
    if nodes + count > MAX_STAGED:
        raise DrafterError(
            f"drafter {name!r} gave {count} probes beside a tree of {nodes} nodes; both together have at "
            f"most {MAX_STAGED}"
        )
    _check_parents(name, probes.parents, nodes)


def _check_parents(name: str, parents: Sequence[int], nodes: int) -> None:
    for index, parent in enumerate(parents, nodes):
        if type(parent) is not int or not 0 <= parent < index:
            raise DrafterError(
                f"drafter {name!r} gave a probe the parent {shown(repr(parent))}; it is a node of the tree "
                f"or a probe before it: 0 to {index - 1}"
            )
