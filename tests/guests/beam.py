"""A guest: beam search. The hypotheses are paths of one staged tree, so no state is ever copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from linspec import (
    LOOPS,
    Batch,
    ConfigError,
    GenerationLoop,
    LoopContext,
    Outcome,
    RunningSequence,
    StepInput,
    option,
)

# nodes that a state can stage in one slot
STAGED = 64


@dataclass(frozen=True)
class BeamOptions:
    """How many hypotheses are kept."""

    width: int = option("hypotheses of each sequence", default=4)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError("width must be 1 or more; 1 is greedy decoding")


@dataclass(frozen=True)
class Hypothesis:
    """score: the sum of log-probabilities. node: the staged node of the last token but one, -1 for none."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    node: int = -1
    ended: bool = False


class BeamVerifier:
    """The rule: of all ways to go on, the likeliest survive."""

    def __init__(self, width: int) -> None:
        self.width = width

    def survivors(
        self, live: Sequence[Hypothesis], nodes: Sequence[int], scores: torch.Tensor
    ) -> list[Hypothesis]:
        """The best of what follows `live`, whose last tokens are `nodes` with log-probabilities [B, V]."""
        found = []
        for each, node, row in zip(live, nodes, scores, strict=True):
            values, tokens = row.topk(min(self.width, len(row)))
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                found.append(Hypothesis((*each.tokens, token), each.score + value, node))
        return sorted(found, key=lambda each: -each.score)[: self.width]


@dataclass
class Beam:
    """What one sequence has: hypotheses that go on, those that have ended, and how much is staged."""

    live: list[Hypothesis]
    ended: list[Hypothesis] = field(default_factory=list)
    staged: int = 0


@LOOPS.register(
    "guest-beam",
    summary="beam search on one token tree",
    paper="Sutskever et al. 2014, arXiv 1409.3215",
    options=BeamOptions,
)
class BeamLoop(GenerationLoop):
    """Each round stages the last token of every hypothesis below the one before it."""

    def __init__(self, context: LoopContext, options: BeamOptions) -> None:
        super().__init__(context, options)
        self.verifier = BeamVerifier(options.width)
        self.beams: dict[int, Beam] = {}

    def started(self, sequence: RunningSequence) -> None:
        if self.verifier.width * sequence.params.max_tokens > STAGED:
            raise ConfigError(
                f"{self.verifier.width} hypotheses of {sequence.params.max_tokens} tokens are more than "
                f"{STAGED} nodes; ask for fewer"
            )
        model, state = self.target.model, self.target.state
        sequence.tokens, _ = model.open(sequence.tokens, sequence.slot, state)

    def finished(self, sequence: RunningSequence) -> None:
        self.beams.pop(sequence.slot, None)

    def round(self, batch: Batch) -> list[Outcome]:
        for sequence, count in batch.prefilling:
            piece = sequence.tokens[sequence.prefilled : sequence.prefilled + count]
            (output,) = self.target.step([StepInput(sequence.slot, piece, all_logits=False)])
            self.target.state.commit(sequence.slot, range(count))
            sequence.prefilled += count
            if not sequence.prefilling:
                beam = self.beams[sequence.slot] = Beam([Hypothesis()])
                self._go_on(sequence, beam, [-1], output.logits[-1:])
        return [done for each in batch.decoding for done in self._widen(each)]

    def _widen(self, sequence: RunningSequence) -> list[Outcome]:
        beam = self.beams[sequence.slot]
        if beam.live and len(beam.live[0].tokens) < sequence.params.max_tokens:
            nodes = list(range(beam.staged, beam.staged + len(beam.live)))
            tokens, parents = [h.tokens[-1] for h in beam.live], [h.node for h in beam.live]
            (output,) = self.target.step([StepInput(sequence.slot, tokens, parents)])
            beam.staged += len(nodes)
            self._go_on(sequence, beam, nodes, output.logits)
            return []
        best = max((*beam.ended, *beam.live), key=lambda each: each.score)
        self.target.state.drop(sequence.slot)
        sequence.tokens += best.tokens
        return [Outcome(sequence, best.tokens, None, "stop" if best.ended else "length")]

    def _go_on(
        self, sequence: RunningSequence, beam: Beam, nodes: Sequence[int], logits: torch.Tensor
    ) -> None:
        scores = logits.double().log_softmax(-1)
        kept = self.verifier.survivors(beam.live, nodes, scores)
        ends = sequence.sampler.ends
        beam.live = [each for each in kept if each.tokens[-1] not in ends]
        beam.ended += [
            Hypothesis(each.tokens, each.score, ended=True)
            for each in kept
            if each.tokens[-1] in ends
        ]
