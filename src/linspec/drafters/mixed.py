"""Several drafters at once: in each round and for each sequence, the one that promises most.

    llm = LLM("smollm2", drafter="suffix+medusa")

Drafters without a model draft in every round, because that costs next to nothing. If the best of their trees
scores as high as what the others expect less their price, it is verified; otherwise the best of the others
drafts (the hybrid rule of SuffixDecoding, Oliaro et al. 2024, and a price that the policy names). What a
drafter promises is corrected by what it brought; of trees without a model those count too that were not
verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from linspec.decoding.probes import Probes
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import Want
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, root_only
from linspec.drafters.base import DRAFTERS, Drafter, DrafterContext, check_answers, name_of
from linspec.errors import ConfigError, DrafterError
from linspec.policies.ratios import Ratios
from linspec.utils.messages import shown
from linspec.utils.options import option, read_spec

_FORGET = 0.95


@dataclass(frozen=True, slots=True)
class MixedOptions:
    """What is mixed."""

    parts: str = option(
        "two or more drafters with + between them, each with its options", short=True
    )


@dataclass(slots=True, eq=False)
class Part:
    """A drafter of a mix.

    record: what it has brought to each sequence against what it promised. share: how many of the newest trees
    were its own; equal at first.
    """

    drafter: Drafter
    share: float
    record: Ratios = field(default_factory=Ratios)

    def ratio(self, sequence: RunningSequence) -> float:
        """Accepted drafts for each one that it promised this sequence."""
        self.record.began(sequence.number)
        return self.record.ratio(sequence.number)

    def within(self, budget: Budget) -> Budget:
        """Its share of a budget: its trees may be smaller than those of the others."""
        return budget.within(self.drafter.max_nodes, budget.depth)

    def hope(self, sequence: RunningSequence, budget: Budget) -> float:
        """Draft tokens that it will have accepted if it drafts."""
        return self.ratio(sequence) * self.drafter.expected(self.within(budget))

    def trees(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """What it proposes."""
        trees = self.drafter.propose(sequences, [self.within(budget) for budget in budgets])
        check_answers("drafter", self.drafter, trees, len(sequences), "a TokenTree")
        return trees

    def learn(self, sequence: RunningSequence, tree: TokenTree, accepted: int) -> None:
        """Learn what a tree of its own brought."""
        self.record.began(sequence.number)
        self.record.observe(sequence.number, accepted, self.drafter.score(sequence, tree))


@dataclass(slots=True)
class _Choice:
    """The tree of one sequence, whose it is, and what that promises."""

    tree: TokenTree
    part: Part | None = None
    promised: float = 0.0


@DRAFTERS.register(
    "mixed",
    summary="several drafters, the most promising one in each round: suffix+medusa",
    paper="Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975",
    needs="what its parts need",
    options=MixedOptions,
)
class Mixed(Drafter):
    """Asks its parts and hands each of them what became of its own trees.

    A part that keeps a state of its own hears of a sequence when it drafts for it, and catches up then.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        super().__init__()
        self.parts = [Part(drafter, 1 / len(drafters)) for drafter in drafters]
        self.max_nodes = max(drafter.max_nodes for drafter in drafters)
        self.needs = Want(tuple({layer: None for each in drafters for layer in each.needs.layers}))
        self._probing = [part.drafter for part in self.parts if part.drafter.probing]
        self.probing = bool(self._probing)
        if len(self._probing) > 1:
            names = " and ".join(map(name_of, self._probing))
            raise ConfigError(
                f"{names} cannot be mixed: each of them lets probes ride; leave one out"
            )
        self.confident = all(drafter.confident for drafter in drafters)
        self.model_free = all(drafter.model_free for drafter in drafters)
        self.partly_free = any(each.model_free and each.confident for each in drafters)
        self._free = [part for part in self.parts if part.drafter.model_free]
        self._others = [part for part in self.parts if not part.drafter.model_free]
        # who drafted for each sequence
        self._chosen: dict[int, Part] = {}
        # what was drafted without a model and was not verified, when the sequence had so many tokens
        self._passed: dict[int, tuple[int, list[tuple[Part, TokenTree]]]] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: MixedOptions) -> Self:
        """With the drafters of a spec."""
        specs = [spec.strip() for spec in DRAFTERS.parts(options.parts)]
        _check_parts(specs, options.parts)
        return cls([DRAFTERS.build(spec, context) for spec in specs])

    def probes(self, sequence: RunningSequence, tree: TokenTree) -> Probes | None:
        return self._probing[0].probes(sequence, tree) if self._probing else None

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        for sequence in sequences:
            self._look_back(sequence)
        best = [_Choice(root_only(sequence.root)) for sequence in sequences]
        for part in self._free:
            for i, tree in enumerate(part.trees(sequences, budgets)):
                promised = self._promised(part, sequences[i], tree)
                self._passed[sequences[i].number][1].append((part, tree))
                if promised > best[i].promised:
                    best[i] = _Choice(tree, part, promised)
        for part, numbers in self._called(sequences, budgets, best).items():
            trees = part.trees(
                [sequences[i] for i in numbers], [budgets[i].of_models for i in numbers]
            )
            for i, tree in zip(numbers, trees, strict=True):
                # one that cannot draft here leaves what the others found
                if len(tree) > 1:
                    best[i] = _Choice(tree, part)
        for sequence, choice in zip(sequences, best, strict=True):
            if choice.part is not None:
                self._chosen[sequence.number] = choice.part
        return [choice.tree for choice in best]

    def _look_back(self, sequence: RunningSequence) -> None:
        """Learn from the trees that were not verified: what followed says how good they were."""
        length, passed = self._passed.pop(sequence.number, (0, []))
        followed = sequence.tokens[length:]
        for part, tree in passed if followed else ():
            # of the rest of the tree nothing is known
            known = _as_deep(tree, len(followed))
            if len(known) > 1:
                part.learn(sequence, known, _accepted(known, followed))
        self._passed[sequence.number] = len(sequence.tokens), []

    def _promised(self, part: Part, sequence: RunningSequence, tree: TokenTree) -> float:
        """What a tree that was drafted without a model is worth."""
        if tree.proposals:
            # to choose among draws by what was drawn would change the output
            raise DrafterError(
                f"drafter {name_of(part.drafter)!r} is said to be model_free and sampled its drafts; leave "
                "model_free out of its class"
            )
        return part.ratio(sequence) * part.drafter.score(sequence, tree) if len(tree) > 1 else 0.0

    def _called(
        self,
        sequences: Sequence[RunningSequence],
        budgets: Sequence[Budget],
        best: Sequence[_Choice],
    ) -> Mapping[Part, list[int]]:
        """The other drafters that expect more than was found and their price, and for which sequences."""
        called: dict[Part, list[int]] = {}
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            own = budget.of_models
            if not own.nodes:
                continue
            # decided before they draft: what they sample must not be chosen by its tokens
            hopes = [(part.hope(sequence, own), part) for part in self._others]
            hope, part = max(hopes, key=lambda each: each[0], default=(0.0, None))
            promised = best[i].promised
            # where nothing else is found, the policy has decided that a model may draft
            if part is not None and hope > promised + (own.price if promised else 0.0):
                called.setdefault(part, []).append(i)
        return called

    def expected(self, budget: Budget) -> float:
        """The mean over the parts, by how often each of them drafts; of models, where a budget names them.

        The mean is not the best of them: one that drafts seldom may expect much when it does.
        """
        if budget.model_nodes is not None and self._others:
            own = budget.of_models
            return max(part.drafter.expected(part.within(own)) for part in self._others)
        return sum(part.share * part.drafter.expected(part.within(budget)) for part in self.parts)

    def score(self, sequence: RunningSequence, tree: TokenTree) -> float:
        if len(tree) == 1:
            return 0.0
        return self._chosen[sequence.number].drafter.score(sequence, tree)

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        part = self._chosen[sequence.number]
        part.learn(sequence, tree, len(path) - 1)
        length, passed = self._passed[sequence.number]
        self._passed[sequence.number] = length, [each for each in passed if each[0] is not part]
        for each in self.parts:
            each.share = _FORGET * each.share + (1 - _FORGET) * (each is part)
        part.drafter.observe(sequence, tree, path)
        _each([each.drafter.passed for each in self.parts if each is not part], sequence)

    def author(self, sequence: RunningSequence) -> str:
        return self._chosen[sequence.number].drafter.author(sequence)

    def took_model(self, sequence: RunningSequence) -> bool:
        return self._chosen[sequence.number].drafter.took_model(sequence)

    def passed(self, sequence: RunningSequence) -> None:
        _each([part.drafter.passed for part in self.parts], sequence)

    def attached(self, target: Target) -> None:
        for part in self.parts:
            part.drafter.attached(target)

    def started(self, sequence: RunningSequence) -> None:
        _each([part.drafter.started for part in self.parts], sequence)

    def paused(self, sequence: RunningSequence) -> Any:
        self._forget(sequence)
        return [part.drafter.paused(sequence) for part in self.parts]

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        for part, each in zip(self.parts, kept, strict=True):
            part.drafter.resumed(sequence, each)

    def finished(self, sequence: RunningSequence) -> None:
        self._forget(sequence)
        _each([part.drafter.finished for part in self.parts], sequence)

    def _forget(self, sequence: RunningSequence) -> None:
        self._chosen.pop(sequence.number, None)
        self._passed.pop(sequence.number, None)
        for part in self.parts:
            part.record.release(sequence.number)


def _as_deep(tree: TokenTree, depth: int) -> TokenTree:
    """The nodes of a tree down to `depth`."""
    if tree.shape.deepest <= depth:
        return tree
    kept = [node for node, at in enumerate(tree.depths) if at <= depth]
    places = {node: place for place, node in enumerate(kept)} | {-1: -1}
    sure = tree.confidences
    return TokenTree(
        tuple(tree.tokens[node] for node in kept),
        tuple(places[tree.parents[node]] for node in kept),
        confidences=None if sure is None else tuple(sure[node] for node in kept),
    )


def _accepted(tree: TokenTree, followed: Sequence[int]) -> int:
    """How many tokens of a tree are those that followed."""
    node, count = 0, 0
    for token in followed:
        found = [child for child in tree.children[node] if tree.tokens[child] == token]
        if not found:
            break
        node, count = found[0], count + 1
    return count


def _each(hooks: Sequence[Callable[[RunningSequence], Any]], sequence: RunningSequence) -> None:
    """Tell every part, in their order, also where one of them raises."""
    with ExitStack() as stack:
        for hook in reversed(hooks):
            stack.callback(hook, sequence)


def _check_parts(specs: Sequence[str], whole: str) -> None:
    """Raise ConfigError for what cannot be mixed."""
    if len(specs) < 2 or not all(specs):
        raise ConfigError(
            "a mix is two or more drafters with + between them, such as suffix+medusa, got "
            f"{shown(repr(whole))}"
        )
    for spec in specs:
        if read_spec(spec)[0] in ("none", "mixed", "auto"):
            raise ConfigError(f"{shown(repr(spec))} is no part of a mix; name drafters that draft")
        if specs.count(spec) > 1:
            raise ConfigError(f"{shown(repr(spec))} is mixed with itself; leave one out")
