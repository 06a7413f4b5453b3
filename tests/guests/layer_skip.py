"""A guest: the target itself drafts, with some of its layers left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec import (
    DRAFTERS,
    ChainDrafter,
    DrafterContext,
    RunningSequence,
    StepInput,
    Target,
    option,
)


@dataclass(frozen=True)
class SkipOptions:
    """Which layers draft."""

    every: int = option("of so many neighbouring layers the first one drafts", default=2)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError("every must be 1 or more; 1 leaves no layer out")


@DRAFTERS.register(
    "guest-layer-skip",
    summary="the target without some of its layers drafts a chain",
    paper="Zhang et al. 2024 (Self-speculative decoding), arXiv 2309.08168",
    needs="nothing",
    options=SkipOptions,
)
class LayerSkip(ChainDrafter):
    """Drafts greedily on a state of its own, which has the drafting layers alone."""

    def __init__(self, context: DrafterContext, options: SkipOptions) -> None:
        super().__init__(context, options)
        model = context.decoder("guest-layer-skip")
        self.layers = frozenset(range(0, model.config.layers, options.every))
        self.own = Target(model, model.new_state(context.slots, layers=self.layers))
        self.read: dict[int, int] = {}

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        return [self._chain(each, length) for each, length in zip(sequences, lengths, strict=True)]

    def finished(self, sequence: RunningSequence) -> None:
        self.read.pop(sequence.slot, None)

    def _chain(self, sequence: RunningSequence, length: int) -> list[int]:
        self._catch_up(sequence)
        drafts = [sequence.root]
        for depth in range(length):
            given = StepInput(sequence.slot, [drafts[-1]], [depth - 1])
            (output,) = self.own.step([given], layers=self.layers)
            drafts.append(int(output.logits[-1].argmax()))
        return drafts[1:]

    def _catch_up(self, sequence: RunningSequence) -> None:
        """Read what was decided since the last draft, all but the root."""
        slot, known = sequence.slot, self.read.get(sequence.slot, 0)
        if known == 0:
            self.own.state.reset(slot)
        self.own.state.drop(slot)
        missing = sequence.tokens[known:-1]
        if missing:
            self.own.step([StepInput(slot, missing, all_logits=False)], layers=self.layers)
            self.own.state.commit(slot, range(len(missing)))
            self.read[slot] = known + len(missing)
