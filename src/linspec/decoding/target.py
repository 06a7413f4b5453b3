"""A model with its state: what drafters, policies, loops and servers see of the model that is decoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from linspec.decoding.judged import Judged
from linspec.decoding.protocols import CausalModel
from linspec.decoding.step import FINAL, LOGITS, StepInput, Want


@dataclass(frozen=True, slots=True)
class NodeOutput:
    """What a step computed for one input: logits [P, vocab], and hidden states by layer.

    hidden[FINAL] [P, D] belongs to the nodes that have logits, `hidden[layer]` [N, D] to all new nodes.
    judged: what the step made of a tree that it judged, which has no logits.
    """

    logits: torch.Tensor
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)
    judged: Judged | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is decoded, with the state of all running sequences.

    Attributes:
        model: the model in its inference form.
        state: the state of all slots.
        tokenizer: of the model; None if the caller gave none.
        source: the directory of the model; None for a model that was given in memory.
    """

    model: CausalModel
    state: Any
    tokenizer: Any = None
    source: Path | None = None

    def step(
        self,
        inputs: Sequence[StepInput],
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> list[NodeOutput]:
        """Run new tokens of several slots and stage them; outputs in the order of `inputs`.

        If a step raises, nothing is staged.

        Args:
            inputs: new tokens of different slots, in any order; branches of a slot from 0 on.
            layers: compute only these layers; None computes all.
            want: hidden states that are needed beside the logits.
        """
        order = sorted(range(len(inputs)), key=lambda i: inputs[i].slot)
        special: dict[str, Any] = {}
        if layers is not None:
            special["layers"] = layers
        if want is not LOGITS and (want.inner or want.onward):
            special["want"] = want
        try:
            output = self.model.step([inputs[i] for i in order], self.state, **special)
        except Exception:
            for each in inputs:
                self.state.drop(each.slot)
            raise
        if len(inputs) == 1:
            hidden = {FINAL: output.hidden, **output.layers}
            return [NodeOutput(output.logits, hidden, output.judged.get(0))]
        found: dict[int, NodeOutput] = {}
        for place, i in enumerate(order):
            part = output.slices[place]
            hidden = {FINAL: output.hidden[part]}
            hidden |= {n: states[output.nodes[place]] for n, states in output.layers.items()}
            found[i] = NodeOutput(output.logits[part], hidden, output.judged.get(place))
        return [found[i] for i in range(len(inputs))]
