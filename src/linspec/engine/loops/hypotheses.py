"""What loops share that keep several hypotheses of a sequence and hand out one of them at its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from linspec.decoding.accepted import Accepted, TokenLogprob
from linspec.decoding.outcome import Outcome
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import NodeOutput, Target
from linspec.engine.loops.base import GenerationLoop, LoopContext
from linspec.engine.loops.beam_states import BeamStates
from linspec.engine.loops.prompt import check_causal, keep_piece, open_prompt, prompt_piece
from linspec.engine.scheduler import Batch
from linspec.utils.isolation import isolated

Results = list[Outcome]


class HypothesisLoop(GenerationLoop):
    """Reads prompts in pieces; a subclass says how hypotheses begin and go on.

    The output comes at its end, all at once: until then nobody knows which hypothesis wins. So a stop text
    cuts the output and ends no hypothesis earlier.
    """

    # the prompt alone: hypotheses have slots of their own
    reads_in_order = True

    def __init__(self, context: LoopContext, options: Any, width: int) -> None:
        super().__init__(context, options)
        check_causal(context.target.model, self.name)
        self.clock = context.clock
        state = self.target.state
        own = Target(self.target.model, state.empty(state.slots * width))
        self.beams, self.copies = BeamStates(own, width), width

    @abstractmethod
    def begin(self, sequence: RunningSequence, logits: Tensor) -> Outcome | None:
        """The first tokens, from the logits [V] behind the prompt; an outcome if that is the end."""

    @abstractmethod
    def go_on(self, sequences: Sequence[RunningSequence]) -> Results:
        """The next tokens of sequences that have begun; outcomes of those that end."""

    def started(self, sequence: RunningSequence) -> None:
        open_prompt(self.target, sequence)
        # a round brings no token before the last one does
        self.patience = max(self.patience, sequence.params.max_tokens + 1)

    def round(self, batch: Batch) -> Results:
        began = self.clock()
        outcomes = self.go_on(batch.decoding) if batch.decoding else []
        decoded = self.clock()
        outputs = isolated(batch.prefilling, self._step_prompts)
        for (sequence, count), output in zip(batch.prefilling, outputs, strict=True):
            outcomes += self._read(sequence, count, output)
        ended = self.clock()
        for sequence in batch.decoding:
            sequence.stats.decode_seconds += decoded - began
        for sequence, _ in batch.prefilling:
            sequence.stats.prefill_seconds += ended - decoded
        return outcomes

    def _step_prompts(self, pieces: Sequence[tuple[RunningSequence, int]]) -> list[NodeOutput]:
        return self.target.step([prompt_piece(*each) for each in pieces])

    def _read(
        self, sequence: RunningSequence, count: int, output: NodeOutput | Exception
    ) -> Results:
        try:
            if isinstance(output, Exception):
                raise output
            keep_piece(self.target, sequence, count, output)
            if sequence.prefilling:
                return []
            ended = self.begin(sequence, output.logits[-1])
            return [] if ended is None else [ended]
        except Exception as error:
            return [Outcome.failure(sequence, error)]

    def longest(self, sequence: RunningSequence) -> int:
        """Most tokens of the output: as many as are asked for and the model has positions for."""
        limit = self.target.model.config.position_limit
        most = sequence.params.max_tokens
        # the last token needs no position of its own
        return most if limit is None else min(most, limit + 1 - sequence.prompt_length)

    def ended(
        self,
        sequence: RunningSequence,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
    ) -> Outcome:
        """The end of a sequence whose output is `tokens`."""
        sequence.tokens += tokens
        sequence.sampler.observe(tokens)
        asked = sequence.params.logprobs is not None
        accepted = Accepted((0,), tokens[-1], logprobs) if asked else None
        stopped = tokens[-1] in sequence.sampler.ends
        return Outcome(sequence, tokens, accepted, "stop" if stopped else "length")

    def finished(self, sequence: RunningSequence) -> None:
        self.beams.release(sequence.slot)
