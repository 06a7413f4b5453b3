"""Mirror speculative decoding: the next window is drafted before the target has judged this one.

LLM(model, drafter="draft-model:DIR", loop="mirror:window=3,guesses=4")
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linspec.decoding.outcome import Outcome
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import FINAL, MAX_STAGED, Want
from linspec.decoding.target import NodeOutput
from linspec.decoding.tree import TokenTree
from linspec.drafters.draft_model import DraftModel
from linspec.engine.loops.autoregressive import Autoregressive, Part
from linspec.engine.loops.base import LOOPS, LoopContext
from linspec.engine.loops.rollouts import Rollouts
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_size

_log = logging.getLogger("linspec")

_LAST = 1e-6


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """How much is rolled out, and from where."""

    window: int = option("draft tokens of a round", default=3)
    guesses: int = option("likely corrections at each depth, each with a window", default=4)
    exit: int | None = option(
        "layers of the target behind which it guesses; none is half of them", default=None
    )

    def __post_init__(self) -> None:
        if self.window < 1 or self.guesses < 0:
            raise ValueError("window must be 1 or more, guesses 0 or more")
        # the tokens that wait, the window, and a window behind each guess
        nodes = 2 * (self.window + 1) + (self.window + 1) * self.guesses * self.window
        if nodes > MAX_STAGED:
            raise ValueError(
                f"window {self.window} with {self.guesses} guesses takes {nodes} draft nodes, at most "
                f"{MAX_STAGED} fit; lower one of them"
            )


@LOOPS.register(
    "mirror",
    summary="drafts the next window for every likely correction while the target verifies this one",
    paper="Bhendawade et al. 2025, arXiv 2510.13161",
    options=MirrorOptions,
)
class Mirror(Autoregressive):
    """Speculation with windows that are ready when the verdict comes; the verifier decides as ever.

    A layer in the middle of the target guesses, through the model's own norm and output layer, what follows
    each node of the window. The drafter rolls out a window behind each guess. If the target's decision is
    among them, the next round has its window at no further cost; otherwise it is drafted then.

    So the output is exactly that of the verifier: guesses only decide which proposal is ready. On
    one device nothing runs beside the target, so rollouts add to every round and this is slower than plain
    speculation: use it to learn how often a window would be ready (`rollouts.verdicts`) and, with measured
    times, what two devices would gain (`linspec.engine.loops.mirror_clock`).
    """

    # guesses are made of the states of all nodes
    judged_in_step = False

    def __init__(self, context: LoopContext, options: MirrorOptions) -> None:
        drafter, model = context.drafter, context.target.model
        if not isinstance(drafter, DraftModel) or not isinstance(model, Decoder):
            name = "none" if drafter is None else drafter.name
            raise ConfigError(
                f"loop 'mirror' rolls out a draft model for a decoder, got drafter {name!r} for a "
                f"{type(model).__name__}; use draft-model:DIR or student"
            )
        self.model, self.options = model, options
        layers = model.config.layers
        after = layers // 2 if options.exit is None else options.exit
        check_size("exit of loop 'mirror'", after)
        if after > layers:
            raise ConfigError(
                f"loop 'mirror' guesses behind layer {after}, and this model has {layers}; lower exit"
            )
        self.exit = after - 1
        rollouts = Rollouts(drafter.model, context.target.state.slots, options.window)
        rollouts.needs = Want(layers=(self.exit,))
        super().__init__(replace(context, drafter=rollouts), options)
        self.rollouts = rollouts
        # the guesses are made at once, and nobody reads the states later
        self.kept = (FINAL,)

    def _step(self, parts: Sequence[Part]) -> list[NodeOutput]:
        outputs = super()._step(parts)
        if self.options.guesses:
            self._roll_out(parts, outputs)
        return outputs

    def _roll_out(self, parts: Sequence[Part], outputs: Sequence[NodeOutput]) -> None:
        asked = []
        for part, output in zip(parts, outputs, strict=True):
            if part.tree is not None and len(part.tree) > 1:
                guesses = self._guesses(part.sequence, part.tree, output.hidden[self.exit])
                asked.append((part.sequence, part.tree, guesses))
        try:
            self.rollouts.roll_out(asked)
        except Exception:
            # windows are a help: without them the next ones are drafted when they are due
            _log.warning("no windows were rolled out in a round", exc_info=True)
            for sequence, _, _ in asked:
                self.rollouts.forget(sequence)

    @torch.inference_mode()
    def _guesses(
        self, sequence: RunningSequence, tree: TokenTree, hidden: Tensor
    ) -> list[list[int]]:
        """The likeliest tokens behind each node, by the states [N, D] of the layer that guesses."""
        logits = self.model.head(self.model.leave(hidden.to(self.model.dtype)))
        found = []
        for node, row in enumerate(logits):
            try:
                found.append(self._likeliest(sequence, tree, node, row))
            except Exception:
                # a rule of the request that fails here fails in the verifier too
                found.append([])
        return found

    def _likeliest(
        self, sequence: RunningSequence, tree: TokenTree, node: int, row: Tensor
    ) -> list[int]:
        sampler, drafts = sequence.sampler, tree.tokens[1:]
        if sampler.greedy:
            likely = sampler.scores(row, drafts[:node]).softmax(-1)
        else:
            likely = sampler.probabilities(row, drafts[:node])
            proposal = tree.proposals.get(node)
            if proposal is not None:
                # a correction comes from what the proposal leaves of the target; the rest comes last, because
                # this layer only guesses what the target is
                left = (likely - proposal.to(likely)).clamp_(min=0)
                likely = left + _LAST * likely
        if node < len(drafts):
            # if this draft is right, the correction lies deeper
            likely[drafts[node]] = 0
        best = likely.topk(min(self.options.guesses, len(likely)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [token for value, token in pairs if value > 0]

    def _verified(self, sequence: RunningSequence, tree: TokenTree, output: NodeOutput) -> Outcome:
        outcome = super()._verified(sequence, tree, output)
        if len(tree) > 1 and outcome.finished is None:
            self.rollouts.judged(sequence)
        return outcome
