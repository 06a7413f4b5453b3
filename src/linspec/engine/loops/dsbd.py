"""Beam sampling with drafts: a smaller model draws layers of beams, the target judges them in one step.

LLM(model, drafter="draft-model:DIR", loop="dsbd:width=4,depth=3")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from linspec.decoding.accepted import TokenLogprob, token_logprob
from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED
from linspec.drafters.draft_model import DraftModel
from linspec.engine.loops.base import LOOPS, LoopContext
from linspec.engine.loops.beam_drafts import Asked, BeamDrafts, DraftLayer, Tokens, distribution
from linspec.engine.loops.beam_states import Forest
from linspec.engine.loops.hypotheses import HypothesisLoop, Results
from linspec.errors import ConfigError
from linspec.utils.isolation import isolated
from linspec.utils.options import option
from linspec.verifiers.base import check_finite
from linspec.verifiers.beam_layers import accepted_law, joint, judge_layer, layer_width


@dataclass(frozen=True, slots=True)
class DsbdOptions:
    """How wide and how deep."""

    width: int = option("draws of a layer, so the most beams that are kept", default=4)
    depth: int = option("layers that are drafted for one step of the target", default=3)
    least: int = option("fewest beams that a layer is asked to keep", default=1)
    threshold: float = option(
        "a layer is asked for the most beams that are kept with this chance; larger ones make it "
        "narrower and outputs faster; below 0 takes the mean",
        default=0.7,
    )

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError("width and depth must be 1 or more")
        if not 1 <= self.least <= self.width:
            raise ValueError("least must be from 1 to width")
        if not self.threshold <= 1:
            raise ValueError("threshold must be at most 1")
        # tokens that wait ride in front of the drafts
        if (self.width + 1) * self.depth + 1 > MAX_STAGED:
            raise ValueError(f"(width + 1) * depth must be below {MAX_STAGED}, the nodes of a step")


@dataclass(frozen=True, slots=True)
class Member:
    """A beam.

    weight: its share of the layer's joint, from which the next layer is drawn. score: its log-probability
    under the request's distribution, by which outputs are ranked. slot, draft_slot: where its state is, in
    either model.
    """

    tokens: Tokens
    weight: float
    score: float
    slot: int
    draft_slot: int | None
    logprobs: tuple[TokenLogprob, ...] = ()


# the logits [V] of the target behind each of some texts
Rows = Mapping[Tokens, Tensor]


@dataclass(slots=True)
class Search:
    """The beams of a sequence that go on, and those that have ended."""

    live: list[Member]
    ended: list[Member] = field(default_factory=list)
    length: int = 0

    @property
    def best(self) -> Member:
        """The beam with the greatest log-probability for each token."""
        return max((*self.ended, *self.live), key=lambda each: each.score / len(each.tokens))


@LOOPS.register(
    "dsbd",
    summary="beam sampling; with a draft model several layers of beams a step, of the width that pays",
    paper="Qin et al. 2024, arXiv 2409.16560",
    options=DsbdOptions,
)
class Dsbd(HypothesisLoop):
    """Dynamic-width speculative beam decoding; without a drafter it is beam sampling of the target.

    The law of a layer: `width` independent draws from the joint of all pairs (beam, token), equal draws being
    one beam. A beam weighs what its pair weighs in the joint, and ends with an end-of-sequence token. The
    search ends when `width` beams have ended, when none is left, or at the length that was asked for. The
    output is the beam with the greatest log-probability for each token.

    What drafts keep of that law, and what not: the first beams of each layer, as many as the layer is asked
    to keep, are independent draws from the target's joint, taken over both ways in which a layer may end. But
    a layer that is kept has fewer beams than one that is not, and which it is depends on the tokens. So the
    output is that of beam sampling whose width changes, not of one with a fixed width: it is lossless for a
    width of 1 alone, where it is speculative sampling. Deterministic beam search is the loop 'beam'; at
    temperature 0 all draws of a layer are one beam, and this is greedy decoding.
    """

    def __init__(self, context: LoopContext, options: DsbdOptions) -> None:
        drafter = context.drafter
        if drafter is not None and not isinstance(drafter, DraftModel):
            raise ConfigError(
                f"loop 'dsbd' needs the distributions of a draft model, and drafter {drafter.name!r} has "
                "none; use draft-model:DIR or student, or no drafter"
            )
        super().__init__(context, options, options.width)
        self.options = options
        slots = self.target.state.slots
        self.drafts: BeamDrafts | None = None
        if drafter is not None:
            self.drafts = BeamDrafts(drafter.model, slots, options.width)
        self.searches: dict[int, Search] = {}

    def check_request(self, request: Request) -> None:
        self.beams.target.state.check_room(len(request.prompt))

    def begin(self, sequence: RunningSequence, logits: Tensor) -> Outcome | None:
        slot = self.beams.begin(sequence.slot, self.target.state.snapshot(sequence.slot))
        drafting = None if self.drafts is None else self.drafts.begin(sequence)
        search = Search([Member((), 1.0, 0.0, slot, drafting)])
        self.searches[sequence.slot] = search
        check_finite(logits[None])
        return self._judged(sequence, search, [], {(): logits})

    def go_on(self, sequences: Sequence[RunningSequence]) -> Results:
        drafted = self._draft(sequences)
        asked = list(zip(sequences, drafted, strict=True))
        outcomes = []
        for (sequence, layers), rows in zip(asked, isolated(asked, self._step), strict=True):
            try:
                if isinstance(rows, Exception):
                    raise rows
                ended = self._verified(sequence, layers, rows)
            except Exception as error:
                ended = Outcome.failure(sequence, error)
            outcomes += [] if ended is None else [ended]
        return outcomes

    def _draft(self, sequences: Sequence[RunningSequence]) -> list[list[DraftLayer]]:
        if self.drafts is None:
            return [[] for _ in sequences]
        asked = []
        for sequence in sequences:
            search = self.searches[sequence.slot]
            room = min(
                self.longest(sequence) - search.length - 1,
                self.drafts.room(sequence, search.length),
                self.options.depth,
            )
            beams = [
                (each.tokens, each.weight, each.draft_slot)
                for each in search.live
                if each.draft_slot is not None
            ]
            asked.append(Asked(sequence, beams, max(0, room)))
        return self.drafts.draft(asked)

    def _step(
        self, asked: Sequence[tuple[RunningSequence, list[DraftLayer]]]
    ) -> list[dict[Tokens, Tensor]]:
        """The target's logits behind all beams and drafts of every sequence, by one step."""
        forest = Forest(self.beams)
        placed = []
        for sequence, layers in asked:
            places: dict[Tokens, tuple[int, int]] = {}
            for each in self.searches[sequence.slot].live:
                waiting = each.tokens[self.beams.fed[each.slot] :]
                places[each.tokens] = each.slot, forest.add(each.slot, waiting)
            for layer in layers:
                for beam, token in dict.fromkeys(layer.draws):
                    if token not in sequence.sampler.ends:
                        slot, node = places[layer.beams[beam]]
                        text = (*layer.beams[beam], token)
                        places[text] = slot, forest.add(slot, [token], node)
            placed.append(places)
        rows = forest.step()
        return [{text: rows[place] for text, place in places.items()} for places in placed]

    def _verified(
        self, sequence: RunningSequence, layers: list[DraftLayer], rows: Rows
    ) -> Outcome | None:
        search = self.searches[sequence.slot]
        check_finite(torch.stack(list(rows.values())))
        before = search.length
        ended = self._judged(sequence, search, layers, rows)
        stats = sequence.stats
        stats.rounds += 1
        stats.accepted += search.length - before - 1
        stats.drafted += len(layers)
        return ended

    def _judged(
        self, sequence: RunningSequence, search: Search, layers: Sequence[DraftLayer], rows: Rows
    ) -> Outcome | None:
        """Keep what the target keeps of `layers`, and add one layer of its own draws."""
        going = True
        for layer in layers:
            going = self._take(sequence, search, layer, rows)
            if not going or self._over(sequence, search):
                break
        if going and not self._over(sequence, search):
            self._take(sequence, search, None, rows)
        if self._over(sequence, search):
            return self.ended(sequence, search.best.tokens, search.best.logprobs)
        self._settle(sequence, search)
        return None

    def _over(self, sequence: RunningSequence, search: Search) -> bool:
        ended = len(search.ended) >= self.options.width
        return ended or not search.live or search.length >= self.longest(sequence)

    def _take(
        self, sequence: RunningSequence, search: Search, layer: DraftLayer | None, rows: Rows
    ) -> bool:
        """Make the next layer the live one; True if it is a drafted one that was kept whole."""
        sampler, live, most = sequence.sampler, search.live, self.options.width
        each_row = [distribution(sampler, rows[each.tokens], each.tokens) for each in live]
        pairs = joint([each.weight for each in live], torch.stack(each_row))
        flat, vocab = pairs.flatten(), pairs.shape[1]
        if layer is None:
            members, kept = [sampler.draw(flat) for _ in range(most)], False
        else:
            q, drafts = _of_live(layer, live)
            law = accepted_law(flat, q, len(drafts))
            width = layer_width(law, self.options.threshold, self.options.least)
            members, kept = judge_layer(flat, q, drafts, width, most, sampler)
        search.live, search.length = [], search.length + 1
        for pair in dict.fromkeys(members):
            beam, token = divmod(pair, vocab)
            chance = float(each_row[beam][token])
            child = _child(sequence, live[beam], token, chance, rows)
            into = search.ended if token in sampler.ends else search.live
            into.append(replace(child, weight=float(flat[pair])))
        return kept

    def _settle(self, sequence: RunningSequence, search: Search) -> None:
        """Give every live beam slots of its own, in both models."""
        children = [(each.slot, each.tokens) for each in search.live]
        slots: list[int] = self.beams.settle(sequence.slot, children)
        own: list[int | None] = [None] * len(slots)
        if self.drafts is not None:
            drafting = [
                (each.draft_slot, each.tokens)
                for each in search.live
                if each.draft_slot is not None
            ]
            if drafting:
                own = [*self.drafts.states.settle(sequence.slot, drafting)]
        search.live = [
            replace(each, slot=slot, draft_slot=mine)
            for each, slot, mine in zip(search.live, slots, own, strict=True)
        ]

    def finished(self, sequence: RunningSequence) -> None:
        self.searches.pop(sequence.slot, None)
        super().finished(sequence)
        if self.drafts is not None:
            self.drafts.states.release(sequence.slot)


def _of_live(layer: DraftLayer, live: Sequence[Member]) -> tuple[Tensor, list[int | None]]:
    """The drafts' joint [B · V] of the beams that the target holds, and the draws as numbers of its pairs."""
    places = {each.tokens: place for place, each in enumerate(live)}
    numbers = {tokens: number for number, tokens in enumerate(layer.beams)}
    q = layer.joint[[numbers[each.tokens] for each in live]]
    vocab = q.shape[1]
    draws: list[int | None] = []
    for beam, token in layer.draws:
        place = places.get(layer.beams[beam])
        draws.append(None if place is None else place * vocab + token)
    return q.flatten(), draws


def _child(
    sequence: RunningSequence, parent: Member, token: int, chance: float, rows: Rows
) -> Member:
    """A beam that goes on by `token`, which had this chance behind it; its weight is that of its parent."""
    top, logprobs = sequence.params.logprobs, parent.logprobs
    if top is not None:
        row = rows[parent.tokens].float().log_softmax(-1)
        logprobs = (*logprobs, token_logprob(row, token, top))
    score = parent.score + math.log(chance)
    tokens = (*parent.tokens, token)
    return replace(parent, tokens=tokens, score=score, logprobs=logprobs)
