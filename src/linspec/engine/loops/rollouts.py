"""Windows of drafts that are rolled out ahead, one behind each likely correction of the window before."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linspec.decoding.likeliest import likeliest_token
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, chain, root_only
from linspec.drafters.base import ChainDrafter
from linspec.engine.loops.beam_states import BeamStates, Forest
from linspec.engine.loops.mirror_clock import Verdict
from linspec.models.decoder import Decoder

# verdicts that are remembered, for whoever asks how often a window was ready
_VERDICTS = 10_000
# the random numbers of drafts are not those of the verifier that judges them
_DRAFTS = 0x5EED


@dataclass(slots=True)
class Window:
    """Draft tokens, the distribution that each was sampled from (None: certain), and the node of the last."""

    node: int
    tokens: list[int] = field(default_factory=list)
    proposals: list[Tensor | None] = field(default_factory=list)

    def tree(self, root: int, most: int) -> TokenTree:
        """The chain of the first `most` tokens behind `root`."""
        tokens = self.tokens[:most]
        sampled = {node: row for node, row in enumerate(self.proposals[:most]) if row is not None}
        return chain((root, *tokens), sampled)


@dataclass(frozen=True, slots=True)
class RolledOut:
    """What was rolled out when the sequence had `length` tokens and `drafts` were verified.

    ready: the windows, by the depth and the token of the guess.
    """

    length: int
    drafts: tuple[int, ...]
    ready: Mapping[tuple[int, int], Window]

    def found(self, tokens: Sequence[int]) -> Verdict:
        """What the target decided, now that the sequence has these tokens."""
        new = tuple(tokens[self.length :])
        same = bool(new) and new[:-1] == self.drafts[: len(new) - 1]
        return Verdict(len(new) - 1, same and (len(new) - 1, new[-1]) in self.ready)


@dataclass(slots=True)
class Branch:
    """A window that is being rolled out: for which sequence, behind which tokens, with what numbers."""

    sequence: RunningSequence
    before: tuple[int, ...]
    window: Window
    most: int
    generator: np.random.Generator | None


class Rollouts(ChainDrafter):
    """Proposes the window that is ready for what the target decided, or drafts one.

    Not a plug-in: the loop 'mirror' makes it of its drafter's model. verdicts: what the newest rounds
    decided, and whether a window was ready.
    """

    name = "rollouts"

    def __init__(self, model: Decoder, slots: int, window: int) -> None:
        super().__init__()
        self.model, self.window, self.max_nodes = model, window, window
        self.states = BeamStates(Target(model, model.new_state(slots)), 1)
        self.verdicts: deque[Verdict] = deque(maxlen=_VERDICTS)
        self._rolled: dict[int, RolledOut] = {}
        self._seeds: dict[int, int] = {}

    def started(self, sequence: RunningSequence) -> None:
        slot, seed = sequence.slot, sequence.params.seed
        self.states.target.state.reset(slot)
        self.states.fed[slot] = 0
        self._rolled.pop(slot, None)
        self._seeds[slot] = secrets.randbits(64) if seed is None else seed

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """A ready window for each sequence, a new one where none is ready."""
        self._settle(sequences)
        found: dict[int, Window] = {}
        branches = []
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            window = self._ready(sequence)
            if window is not None:
                found[i] = window
            elif self._room(sequence) > budget.chain:
                generator = self._generator(sequence, 0)
                found[i] = Window(-1)
                branches.append(Branch(sequence, (), found[i], budget.chain, generator))
        forest = Forest(self.states)
        for branch in branches:
            waiting = branch.sequence.tokens[self.states.fed[branch.sequence.slot] :]
            branch.window.node = forest.add(branch.sequence.slot, waiting)
        self._grow(branches, forest)
        return [
            found[i].tree(sequence.root, budget.chain) if i in found else root_only(sequence.root)
            for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True))
        ]

    def _settle(self, sequences: Sequence[RunningSequence]) -> None:
        """Commit what is staged and was accepted, and read what is missing, all but the root."""
        missing = []
        for sequence in sequences:
            slot = sequence.slot
            self.states.settle(slot, [(slot, sequence.tokens)])
            # a little waits for the next step; a prompt does not
            behind = sequence.tokens[self.states.fed[slot] : -1]
            if len(behind) > self.window + 1 and self._room(sequence) > 0:
                missing.append((slot, behind))
        self.states.catch_up(missing)

    def _room(self, sequence: RunningSequence) -> int:
        """Positions that the draft model has behind the tokens of a sequence."""
        limit = self.model.config.position_limit
        return 2**30 if limit is None else limit - len(sequence.tokens)

    def _ready(self, sequence: RunningSequence) -> Window | None:
        rolled = self._rolled.get(sequence.slot)
        if rolled is None:
            return None
        found = rolled.found(sequence.tokens)
        new = sequence.tokens[rolled.length :]
        return rolled.ready[len(new) - 1, new[-1]] if found.ready else None

    def _generator(self, sequence: RunningSequence, *place: int) -> np.random.Generator | None:
        """Random numbers of one window; a round that is proposed again samples the same."""
        if sequence.sampler.greedy:
            return None
        return np.random.default_rng(
            (_DRAFTS, self._seeds[sequence.slot], len(sequence.tokens), *place)
        )

    def judged(self, sequence: RunningSequence) -> None:
        """The round of a sequence has ended; note whether a window is ready for it."""
        rolled = self._rolled.get(sequence.slot)
        if rolled is not None:
            self.verdicts.append(rolled.found(sequence.tokens))

    def roll_out(
        self, asked: Sequence[tuple[RunningSequence, TokenTree, Sequence[Sequence[int]]]]
    ) -> None:
        """Roll out a window behind every guess at what follows each node of a tree that is being verified.

        asked: the sequence, its chain, and for each node guesses at the token that the target puts there.
        """
        forest, branches = Forest(self.states), []
        for sequence, tree, guesses in asked:
            slot, drafts = sequence.slot, tree.tokens[1:]
            ready: dict[tuple[int, int], Window] = {}
            self._rolled[slot] = RolledOut(len(sequence.tokens), drafts, ready)
            if self._room(sequence) <= len(drafts) + self.window:
                continue
            nodes = self._staged(forest, sequence, drafts)
            for depth, tokens in enumerate(guesses):
                for token in tokens:
                    if token in sequence.sampler.ends:
                        continue
                    window = Window(forest.add(slot, [token], nodes[depth]))
                    ready[depth, token] = window
                    before = (*drafts[:depth], token)
                    generator = self._generator(sequence, 1, depth, token)
                    branches.append(Branch(sequence, before, window, self.window, generator))
        self._grow(branches, forest)

    def _staged(
        self, forest: Forest, sequence: RunningSequence, drafts: Sequence[int]
    ) -> list[int]:
        """The nodes of the root and of each of `drafts`; those that are not staged join `forest`."""
        slot = sequence.slot
        text = (*sequence.tokens[self.states.fed[slot] :], *drafts)
        nodes = self.states.follow(slot, text)
        for token in text[len(nodes) :]:
            nodes.append(forest.add(slot, [token], nodes[-1] if nodes else -1))
        return nodes[len(nodes) - len(drafts) - 1 :]

    def _grow(self, branches: Sequence[Branch], forest: Forest) -> None:
        """Draft the windows of all branches token by token, each step for all of them."""
        growing = [branch for branch in branches if branch.most > 0]
        while growing:
            rows = forest.step()
            forest = Forest(self.states)
            growing = [each for each in growing if self._next(each, rows, forest)]

    def _next(self, branch: Branch, rows: Mapping[tuple[int, int], Tensor], forest: Forest) -> bool:
        """Draft the next token of a branch; whether it goes on."""
        window, sampler = branch.window, branch.sequence.sampler
        slot = branch.sequence.slot
        try:
            token, proposal = self._pick(branch, rows[slot, window.node])
        except Exception:
            # nothing may follow these drafts; if they come true, the verifier says so
            return False
        window.tokens.append(token)
        window.proposals.append(proposal)
        if len(window.tokens) >= branch.most or token in sampler.ends:
            return False
        window.node = forest.add(slot, [token], window.node)
        return True

    def _pick(self, branch: Branch, row: Tensor) -> tuple[int, Tensor | None]:
        sampler, before = branch.sequence.sampler, (*branch.before, *branch.window.tokens)
        if branch.generator is None:
            return likeliest_token(sampler.scores(row, before)), None
        proposal = sampler.probabilities(row, before)
        mass = proposal.to("cpu", torch.float64).cumsum(0)
        point = branch.generator.random() * float(mass[-1])
        return int(torch.searchsorted(mass, point, right=True)), proposal

    def forget(self, sequence: RunningSequence) -> None:
        """No window is ready for what the target decides in this round."""
        self._rolled.pop(sequence.slot, None)

    def paused(self, sequence: RunningSequence) -> Any:
        """The windows that are ready and the seed, so that the drafts go on as they would have."""
        kept = self._rolled.get(sequence.slot), self._seeds.get(sequence.slot)
        self.finished(sequence)
        return kept

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        self.started(sequence)
        rolled, seed = kept
        if rolled is not None:
            self._rolled[sequence.slot] = rolled
        if seed is not None:
            self._seeds[sequence.slot] = seed

    def finished(self, sequence: RunningSequence) -> None:
        self._rolled.pop(sequence.slot, None)
        self._seeds.pop(sequence.slot, None)
        self.states.release(sequence.slot)
