"""What every drafter does: propose trees, learn from what was accepted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from linspec.decoding.judged import Follow
from linspec.decoding.probes import Probes
from linspec.decoding.protocols import CausalModel
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import LOGITS, MAX_STAGED, Want
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.saved import kind_of
from linspec.drafters.trained import Files
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.messages import shown
from linspec.utils.registry import Registry

# most draft nodes of any tree: its root takes one sequence of the stage
MAX_NODES = MAX_STAGED - 1
# A fresh drafter is assumed to be right this often, as if seen this many times.
PRIOR_RATE = 0.5
PRIOR_COUNT = 4.0
_FORGET = 0.98


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What a drafter is made for.

    Attributes:
        target: the model that verifies.
        tokenizer: of the target; None if the caller gave none.
        source: the directory of the target; None for a model that was given in memory.
        slots: most sequences that run at once.
    """

    target: CausalModel
    tokenizer: Any = None
    source: Path | None = None
    slots: int = 1

    def decoder(self, name: str) -> Decoder:
        """The target as a decoder, for the drafter `name`, which can draft for decoders only.

        Raises:
            DrafterError: the target is no decoder.
        """
        if not isinstance(self.target, Decoder):
            raise DrafterError(
                f"drafter {name!r} drafts for decoders, and this is a {type(self.target).__name__}; use "
                "prompt-lookup"
            )
        return self.target


class Drafter(ABC):
    """Proposes the tokens that the target verifies; knows no model family.

    A round calls `propose`, then `observe` for each sequence that had drafts. The engine calls `attached`
    when it is made, `started` before the first round of a request and `finished` after its last, and
    `paused` and `resumed` between rounds where a sequence leaves its slot to others for a while. What a
    drafter keeps for a sequence goes by `sequence.slot` or `sequence.number`; what it keeps longer is a
    memory across requests. What a method raises ends the request that it was about.

    The registry calls the class with its DrafterContext and, if it has options, with these. A drafter that
    must do more first, such as load a model, has a class method `build` with the same arguments.

    Attributes:
        name: under which it is registered.
        max_nodes: most draft nodes of one of its trees.
        model_free: its drafts cost next to nothing and are not sampled. In a mix it drafts in every round,
            and its tree is verified where `score` says more of it than the other drafters expect.
        partly_free: it asks several drafters, one of which is `model_free` and `confident`. It heeds what a
            budget says of models, and `took_model` tells who drafted.
        confident: its trees say how sure it is of each draft (`TokenTree.confidences`).
        files: what is done with the directories of trained drafters of the kind `name`; None where it needs
            no training.
    """

    name: ClassVar[str]
    files: ClassVar[Files | None] = None
    model_free: bool = False
    partly_free: bool = False
    confident: bool = False
    # most draft nodes of one tree
    max_nodes: int = MAX_NODES
    # the target's hidden states that it reads in `sequence.hidden`
    needs: Want = LOGITS
    # what a step that judges trees computes for it behind each path, see `Onward.follow`; the next `propose`
    # has the numbers in `sequence.follow`, and () after a step that did not judge
    follow: Follow | None = None
    # whether it drafts from what its probes found in the step before: a first round has no drafts then
    probing: bool = False

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        """Keep nothing; a drafter keeps what it needs of them."""

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        """Whether what it needs was trained for this model and is found by its name alone: see `auto`."""
        return False

    @abstractmethod
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """A tree for each sequence, in their order.

        The root of a tree is `sequence.root`, its newest token. Likely nodes come first, because a policy may
        verify only the first nodes. If this raises, the engine asks again for each sequence alone: the same
        round must give the same trees.

        Args:
            sequences: the sequences of this round.
            budgets: the largest tree for each; at least one draft node and a depth of one.
        """

    @abstractmethod
    def expected(self, budget: Budget) -> float:
        """The number of draft tokens that a tree within `budget` will have accepted, in the mean."""

    def score(self, sequence: RunningSequence, tree: TokenTree) -> float:
        """How many draft tokens of `tree`, its own proposal or a part of it, will be accepted, in the mean.

        By the confidences of the tree if it has any, else what the drafter expects of one of that size.
        """
        if tree.confidences is None:
            return self.expected(Budget(len(tree) - 1, tree.shape.deepest))
        reached: list[float] = []
        for parent, confidence in zip(tree.parents, tree.confidences, strict=True):
            reached.append(confidence * reached[parent] if reached else 1.0)
        return sum(reached[1:])

    def probes(self, sequence: RunningSequence, tree: TokenTree) -> Probes | None:
        """What rides in the step that verifies `tree`; asked where `propose` was, only if it is `probing`.

        Their scores are in `sequence.probed` at the next `propose`: those of the node committed last. Budgets
        count them as nodes.

        Args:
            sequence: the sequence.
            tree: what this drafter proposed, or a part of it: the first nodes, or what a grammar allows
                (`tree.cut` says which).
        """
        return None

    def attached(self, target: Target) -> None:
        """An engine has this drafter. target: the model in the form that runs, and its state.

        A drafter may run steps against that state while it proposes. It drops what it staged before it
        answers, also when it raises.
        """

    def started(self, sequence: RunningSequence) -> None:
        """A request has its slot. `sequence.tokens` is its prompt; the target has read nothing of it yet.

        A prefix cache may then give the slot the first `sequence.cached_tokens` tokens: no step reads these,
        so `sequence.hidden` will have states of the later ones only, of one token at least.
        """

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        """Learn from a verified tree with drafts; called before `sequence.tokens` grows.

        Args:
            sequence: the sequence.
            tree: what this drafter proposed, or the first nodes of it.
            path: accepted nodes from the root (node 0) down.
        """

    def author(self, sequence: RunningSequence) -> str:
        """The name of who drafted the newest tree of `sequence`; a drafter that asks others names them."""
        return name_of(self)

    def took_model(self, sequence: RunningSequence) -> bool:
        """Whether a model drafted the newest tree of `sequence`."""
        return not self.model_free

    def passed(self, sequence: RunningSequence) -> None:
        """A round was verified without drafts of this drafter for a sequence.

        Called before `sequence.tokens` grows and while `sequence.hidden` still has what it had when the round
        began: the last chance to take from it what later drafts need.
        """

    def paused(self, sequence: RunningSequence) -> Any:
        """A sequence leaves its slot: forget it; what this returns is kept with it and given to `resumed`.

        A request that is dropped meanwhile is never heard of again. The default says that it has `finished`.
        """
        self.finished(sequence)

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        """A sequence that was `paused` has a slot again, maybe another one, and goes on where it was.

        The default says that it has `started`: `sequence.tokens` then has output already, and
        `sequence.hidden` no more than the newest states.
        """
        self.started(sequence)

    def finished(self, sequence: RunningSequence) -> None:
        """A request has ended: its slot goes to another one. `sequence.tokens` is its prompt and its output.

        The engine calls this for failed requests too, also for one whose `started` raised.
        """


def name_of(plug_in: object) -> str:
    """What messages call a plug-in: its registered name, or that of its class."""
    return str(getattr(plug_in, "name", type(plug_in).__name__))


def check_answers(kind: str, plug_in: object, given: object, count: int, rule: str) -> None:
    """Raise DrafterError unless a plug-in answered with a list of `count` entries."""
    if isinstance(given, list | tuple) and len(given) == count:
        return
    who = f"{kind} {name_of(plug_in)!r}"
    if not isinstance(given, list | tuple):
        raise DrafterError(
            f"{who} answered {shown(repr(given))}; the answer is a list with {rule} for each request"
        )
    raise DrafterError(
        f"{who} answered {len(given)} times for {count} requests; the answer is a list with {rule} for each"
    )


def check_tree(drafter: Drafter, tree: object) -> None:
    """Raise DrafterError for a proposal that is no tree or contradicts what `Drafter` says of it."""
    who = f"drafter {name_of(drafter)!r}"
    if not isinstance(tree, TokenTree):
        raise DrafterError(f"{who} proposed {shown(repr(tree))}; a proposal is a TokenTree")
    for sure in tree.confidences or ():
        if not isinstance(sure, int | float) or not 0 <= sure <= 1:
            raise DrafterError(
                f"{who} proposed a tree with the confidence {shown(repr(sure))}; a confidence is a number in "
                "0..1, how likely its node is accepted once the parent is"
            )
    if tree.proposals and drafter.model_free:
        # to choose among draws by what was drawn would change the output
        raise DrafterError(
            f"{who} is said to be model_free and sampled its drafts; leave model_free out of its class"
        )


def check_drafter(drafter: Drafter, layers: int) -> None:
    """Raise ConfigError for a drafter without `draft`, DrafterError for what a target of `layers` has not."""
    own = [getattr(getattr(drafter, name, None), "__func__", None) for name in ("propose", "draft")]
    if own == [ChainDrafter.propose, ChainDrafter.draft]:
        raise ConfigError(
            f"drafter {name_of(drafter)!r} lacks draft; write it in its class {type(drafter).__name__}, or "
            "propose instead"
        )
    _check_needs(drafter, layers)


def _check_needs(drafter: Drafter, layers: int) -> None:
    """Raise DrafterError if a drafter reads hidden states that a target of `layers` layers has not."""
    name, needs = name_of(drafter), drafter.needs
    if not isinstance(needs, Want) or not isinstance(needs.layers, tuple):
        raise DrafterError(
            f"drafter {name!r}: needs must be a Want such as Want(layers=(0,)), got {shown(repr(needs))}"
        )
    for layer in needs.inner:
        if type(layer) is not int or not 0 <= layer < layers:
            raise DrafterError(
                f"drafter {name!r} needs the hidden states of layer {shown(repr(layer))}, and this model has "
                f"{layers} layers, numbered from 0 to {layers - 1}; name one of them in its `needs`"
            )


class ChainDrafter(Drafter):
    """A drafter of chains, which needs only `draft`; counts how often each depth is accepted."""

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        super().__init__(context, options)
        self._tried: list[float] = []
        self._hits: list[float] = []

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """A chain for each sequence, from `draft`."""
        drafts = self.draft(sequences, [budget.chain for budget in budgets])
        check_answers("drafter", self, drafts, len(sequences), "a list of token ids")
        for draft in drafts:
            self._check_draft(draft)
        return [
            self._sure_chain(sequence.root, draft)
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]

    def _sure_chain(self, root: int, draft: Sequence[int]) -> TokenTree:
        """A chain; where the drafter is `confident`, as sure of each depth as that was accepted before."""
        tree = chain((root, *draft))
        return replace(tree, confidences=(1.0, *self.rates(len(draft)))) if self.confident else tree

    def _check_draft(self, draft: object) -> None:
        """Raise DrafterError for what is no list; what it lists is checked where trees are."""
        if isinstance(draft, str | bytes) or not isinstance(draft, Sequence):
            raise DrafterError(
                f"drafter {name_of(self)!r} drafted {shown(repr(draft))}; a draft is a list of token ids, "
                "empty for none"
            )

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        """Draft tokens for each sequence, at most `lengths` of them; may be none."""
        raise NotImplementedError

    def expected(self, budget: Budget) -> float:
        """The mean number of accepted draft tokens, from decayed counts for each depth."""
        total, reach = 0.0, 1.0
        for rate in self.rates(budget.chain):
            reach *= rate
            total += reach
        return total

    def rates(self, depths: int) -> list[float]:
        """By depth, how often a draft was accepted once its parent was."""
        rate, found = PRIOR_RATE, []
        for depth in range(depths):
            known = depth < len(self._tried)
            tried, hits = (self._tried[depth], self._hits[depth]) if known else (0.0, 0.0)
            # what is known little of is like the depth above it
            rate = (hits + rate * PRIOR_COUNT) / (tried + PRIOR_COUNT)
            found.append(rate)
        return found

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        """Count the depths that were tried and accepted."""
        drafted, accepted = tree.shape.deepest, len(path) - 1
        while len(self._tried) < drafted:
            self._tried.append(0.0)
            self._hits.append(0.0)
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = _FORGET * self._tried[depth] + 1
            self._hits[depth] = _FORGET * self._hits[depth] + (depth < accepted)


DRAFTERS: Registry[Drafter] = Registry(
    "drafter", "linspec.drafters", beside=("none",), base=Drafter, joined="mixed"
)
"""The registry of drafters. Packages add to it by entry points of the group `linspec.drafters`."""


def files_of(folder: Path) -> Files:
    """What is done with a directory of a trained drafter; raises DrafterError where nobody knows its kind."""
    kind = kind_of(folder)
    files = DRAFTERS[kind].files if isinstance(kind, str) and kind in DRAFTERS else None
    if files is None:
        raise DrafterError(
            f"{folder} describes a drafter of kind {shown(repr(kind))}, which is none of the trained ones of "
            "`linspec list`; install the package that it comes from, or remove the directory"
        )
    return files
