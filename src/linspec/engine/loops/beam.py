"""Beam search: of all ways to go on, the likeliest few hypotheses survive each round.

LLM(model, loop="beam:width=4,length_penalty=1.0,early_stopping=never")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linspec.decoding.accepted import token_logprob
from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.engine.loops.base import LOOPS, LoopContext
from linspec.engine.loops.beam_search import BeamOptions, BeamSearch, Hypothesis
from linspec.engine.loops.beam_states import NewNodes
from linspec.engine.loops.hypotheses import HypothesisLoop, Results
from linspec.errors import ConfigError
from linspec.utils.isolation import isolated
from linspec.verifiers.base import check_finite


@LOOPS.register(
    "beam",
    summary="beam search, token for token that of transformers; no drafts, nothing random",
    paper="Sutskever et al. 2014, arXiv 1409.3215",
    options=BeamOptions,
)
class Beam(HypothesisLoop):
    """Hypotheses have slots of their own and share the steps of all sequences.

    Penalties, bias and bans act on the logits, as they do without beams; the sum that the softmax divides by
    stays that of the model. So a width of 1 is greedy decoding with every setting, and bias and bans do what
    they do in transformers. A repetition penalty does not: there it scales log-probabilities.
    """

    def __init__(self, context: LoopContext, options: BeamOptions) -> None:
        if context.drafter is not None:
            raise ConfigError(
                "loop 'beam' takes no drafter: verified drafts are those of one path. Leave the drafter "
                "out, or sample beams with the loop 'dsbd'"
            )
        super().__init__(context, options, options.width)
        self.options = options
        self.searches: dict[int, BeamSearch] = {}

    def check_request(self, request: Request) -> None:
        if not request.params.greedy:
            raise ConfigError(
                f"loop 'beam' draws nothing, got temperature {request.params.temperature}; set it to 0, or "
                "sample with the loop 'autoregressive' or 'dsbd'"
            )
        self.beams.target.state.check_room(len(request.prompt))

    def begin(self, sequence: RunningSequence, logits: Tensor) -> Outcome | None:
        slot = self.beams.begin(sequence.slot, self.target.state.snapshot(sequence.slot))
        longest, ends = self.longest(sequence), sequence.sampler.ends
        search = BeamSearch(self.options, longest, ends, Hypothesis((), slot))
        self.searches[sequence.slot] = search
        return self._advance(sequence, logits[None])

    def go_on(self, sequences: Sequence[RunningSequence]) -> Results:
        outcomes = []
        for sequence, logits in zip(sequences, isolated(sequences, self._step), strict=True):
            sequence.stats.rounds += 1
            try:
                if isinstance(logits, Exception):
                    raise logits
                ended = self._advance(sequence, logits)
            except Exception as error:
                ended = Outcome.failure(sequence, error)
            outcomes += [] if ended is None else [ended]
        return outcomes

    def _step(self, sequences: Sequence[RunningSequence]) -> list[Tensor]:
        """The logits [live, V] of every sequence, all by one step."""
        live = [self.searches[sequence.slot].live for sequence in sequences]
        new = [NewNodes(each.slot, each.tokens[-1:], (-1,)) for beams in live for each in beams]
        outputs = iter(self.beams.step(new))
        return [torch.cat([next(outputs).logits for _ in beams]) for beams in live]

    def _advance(self, sequence: RunningSequence, logits: Tensor) -> Outcome | None:
        search, sampler = self.searches[sequence.slot], sequence.sampler
        live, top = search.live, sequence.params.logprobs
        check_finite(logits)
        logprobs = logits.float().log_softmax(-1)

        def extend(place: int, token: int) -> Hypothesis:
            before = live[place]
            entry = () if top is None else (token_logprob(logprobs[place], token, top),)
            return Hypothesis((*before.tokens, token), before.slot, (*before.logprobs, *entry))

        if sampler.plain:
            scores = logprobs
        else:
            rows = zip(logits, live, strict=True)
            scored = torch.stack([sampler.scores(row, each.tokens) for row, each in rows])
            scores = scored - logits.float().logsumexp(-1, keepdim=True)
        search.advance(scores, extend)
        if search.done:
            return self.ended(sequence, search.best.tokens, search.best.logprobs)
        children = [(each.slot, each.tokens) for each in search.live]
        slots = self.beams.settle(sequence.slot, children)
        search.live = [
            Hypothesis(each.tokens, slot, each.logprobs)
            for each, slot in zip(search.live, slots, strict=True)
        ]
        return None

    def finished(self, sequence: RunningSequence) -> None:
        self.searches.pop(sequence.slot, None)
        super().finished(sequence)
