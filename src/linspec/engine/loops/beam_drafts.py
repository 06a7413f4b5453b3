"""Layers of beams that a smaller model draws, for a loop that has the target judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.target import Target
from linspec.engine.loops.beam_states import BeamStates, Forest
from linspec.models.decoder import Decoder
from linspec.verifiers.beam_layers import joint
from linspec.verifiers.lossless import normalized, on_cpu

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """Beams that the smaller model held, the joint [B, V] of its pairs, and its draws (beam, token)."""

    beams: tuple[Tokens, ...]
    joint: Tensor
    draws: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be drafted for: the beams with their weights and slots, and how many layers."""

    sequence: RunningSequence
    beams: Sequence[tuple[Tokens, float, int]]
    depth: int


@dataclass(slots=True)
class _Frontier:
    """Beams of the newest layer: tokens, weight, slot and staged node."""

    asked: Asked
    beams: list[tuple[Tokens, float, int, int]]
    layers: list[DraftLayer]


def distribution(sampler: Sampler, logits: Tensor, tokens: Tokens) -> Tensor:
    """What the next token of a beam is drawn from, [V] in float64: temperature, top-k and the like act here.

    They act once, on the row of each beam, for both models; the joint of beams and tokens is not cut again.
    """
    return normalized(on_cpu(sampler.probabilities(logits, tokens)))


class BeamDrafts:
    """A smaller model with states of its own for up to `width` beams of each of `slots` sequences."""

    def __init__(self, model: Decoder, slots: int, width: int) -> None:
        self.model, self.width = model, width
        self.prompts = model.new_state(slots)
        self.states = BeamStates(Target(model, model.new_state(slots * width)), width)

    def begin(self, sequence: RunningSequence) -> int | None:
        """Read the prompt; the slot of the first beam, None if the model has not the positions for it."""
        if self.room(sequence, 0) < 1:
            return None
        slot, prompt = sequence.slot, sequence.tokens[: sequence.prompt_length]
        self.prompts.reset(slot)
        self.model.step([StepInput(slot, prompt, all_logits=False)], self.prompts)
        self.prompts.commit(slot, range(len(prompt)))
        return self.states.begin(slot, self.prompts.snapshot(slot))

    def room(self, sequence: RunningSequence, length: int) -> int:
        """How many layers behind `length` output tokens this model has positions for."""
        limit = self.model.config.position_limit
        wide = 2**30 if limit is None else limit
        return wide - sequence.prompt_length - length

    def draft(self, asked: Sequence[Asked]) -> list[list[DraftLayer]]:
        """The layers of each; fewer than asked where every beam has ended or nothing can be drawn."""
        forest = Forest(self.states)
        fronts = []
        for each in asked:
            beams = []
            for tokens, weight, slot in each.beams if each.depth else ():
                node = forest.add(slot, tokens[self.states.fed[slot] :])
                beams.append((tokens, weight, slot, node))
            fronts.append(_Frontier(each, beams, []))
        while any(front.beams for front in fronts):
            rows = forest.step()
            forest = Forest(self.states)
            for front in fronts:
                if front.beams:
                    self._next_layer(front, rows, forest)
        return [front.layers for front in fronts]

    def _next_layer(
        self, front: _Frontier, rows: Mapping[tuple[int, int], Tensor], forest: Forest
    ) -> None:
        """Draw the next layer of a sequence and add its beams to `forest`, unless it is the last one."""
        sampler, beams = front.asked.sequence.sampler, front.beams
        front.beams = []
        try:
            p = [distribution(sampler, rows[slot, node], tokens) for tokens, _, slot, node in beams]
        except Exception:
            # nothing may follow these beams; if they come true, the target's own rows say so
            return
        pairs = joint([weight for _, weight, _, _ in beams], torch.stack(p))
        vocab, flat = pairs.shape[1], pairs.flatten()
        draws = [divmod(sampler.draw(flat), vocab) for _ in range(self.width)]
        held = tuple(tokens for tokens, *_ in beams)
        front.layers.append(DraftLayer(held, pairs, tuple(draws)))
        if len(front.layers) == front.asked.depth:
            return
        for beam, token in dict.fromkeys(draws):
            tokens, _, slot, node = beams[beam]
            if token not in sampler.ends:
                below = forest.add(slot, [token], node)
                front.beams.append(((*tokens, token), float(pairs[beam, token]), slot, below))
