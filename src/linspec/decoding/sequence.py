"""One running sequence: its tokens, its place in the state, its record of rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from linspec.decoding.accepted import TokenLogprob
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.step import FINAL
from linspec.decoding.tree import TokenTree


@dataclass(slots=True)
class Stats:
    """What a request's rounds cost and brought.

    tokens_per_round counts accepted drafts plus the bonus token, averaged over rounds; plain decoding
    is 1.0. `tried[d]` rounds had a draft at depth d + 1 whose parent was accepted, `hits[d]` of them
    accepted one. `policy` decided about drafts, `draft_rounds` had some, and the latest of these cost
    `draft_price` plain rounds, as far as the policy knows. A round of masked diffusion is one forward, and
    `computed` counts positions times layers of these.
    """

    rounds: int = 0
    accepted: int = 0
    drafted: int = 0
    tried: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    policy: str = ""
    draft_rounds: int = 0
    draft_price: float | None = None
    computed: int = 0

    @property
    def decision(self) -> str:
        """What the policy made of the drafter, in one sentence; empty without a drafter."""
        if not self.policy:
            return ""
        said = f"{self.policy}: no drafts in {self.rounds} rounds"
        if self.draft_rounds:
            mean = self.drafted / self.draft_rounds
            said = (
                f"{self.policy}: drafts in {self.draft_rounds} of {self.rounds} rounds (mean {mean:.1f}), "
                f"{self.tokens_per_round:.2f} tokens a round"
            )
        if self.draft_price is None:
            return said
        return f"{said}; one with drafts costs {self.draft_price:.2f} plain ones"

    @property
    def tokens_per_round(self) -> float:
        """Accepted tokens and the bonus token, averaged over rounds."""
        return 1.0 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def acceptance(self) -> list[float]:
        """Share of tried drafts that were accepted, by depth."""
        return [hit / tried for hit, tried in zip(self.hits, self.tried, strict=True)]

    def count_forward(self, decided: int, computed: int, drafts: int = 0) -> None:
        """Enter one forward of masked diffusion.

        decided: tokens. computed: positions × layers. drafts: canvases that it computed along.
        """
        self.rounds += 1
        self.drafted += drafts
        self.draft_rounds += drafts > 0
        self.accepted += decided - 1
        self.computed += computed

    def count(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Enter one round."""
        self.rounds += 1
        self.accepted += len(path) - 1
        self.drafted += len(tree) - 1
        self.draft_rounds += len(tree) > 1
        deepest = path[-1]
        reached = len(path) - 1 + bool(tree.children[deepest])
        while len(self.tried) < reached:
            self.tried.append(0)
            self.hits.append(0)
        for depth in range(reached):
            self.tried[depth] += 1
            self.hits[depth] += depth < len(path) - 1


# the slot of a request that waits for one
UNPLACED = -1


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One of the sequences that answer a request; it waits or has a slot.

    Attributes:
        number: the number that the engine gave this sequence.
        sampler: random numbers and rules of the request.
        tokens: prompt and output. Once the prompt is read, the last token is the root of the next tree: it
            is decided, but the state does not hold it yet.
        prompt_length: tokens of the prompt in `tokens`.
        slot: its place in the state; UNPLACED while it waits.
        prefilled: prompt tokens that the state holds.
        source: tokens that an encoder has read; () for a decoder alone.
        request: the number of the request, which its sequences share.
        index: which of the sequences of the request it is.
        embeddings: [T, D] of the prompt, where they are not those of its tokens.
        hidden: by layer, states [P, D] of the target at the tokens committed last, the newest last; see
            `Drafter.needs`.
        probed: scores [P, vocab] of the probes that hung on the token committed last; see `Drafter.probes`.
        follow: what the last step computed behind the newest token for its drafter, see `Drafter.follow`; ()
            where it did not.
        stats: rounds, drafts and seconds so far.
        prompt_logprobs: of the prompt tokens that were read, if the request asks for them.
        priority: of the request.
        preempted: how often it had to leave its slot to others before its end.
        parked: what it takes along while it has left its slot; None while it runs or has not begun.
        tenant: whom the request is for, see `Request`.
        cached_tokens: tokens of the prompt that a prefix cache had, or another sequence of the request: no
            step read them for this one.
        stops: where pieces of the prompt have to end, ascending: a prefix cache keeps the states there.
        shared: the prompt that the first sequence of the request reads for all; None where each has its own.
    """

    number: int
    sampler: Sampler
    tokens: list[int]
    prompt_length: int
    slot: int = UNPLACED
    prefilled: int = 0
    source: tuple[int, ...] = ()
    request: int = 0
    index: int = 0
    embeddings: torch.Tensor | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    probed: torch.Tensor | None = None
    follow: tuple[int, ...] = ()
    stats: Stats = field(default_factory=Stats)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    priority: int = 0
    preempted: int = 0
    parked: Any = None
    tenant: str = ""
    cached_tokens: int = 0
    stops: tuple[int, ...] = ()
    shared: Any = None

    def append_hidden(self, states: Mapping[int, torch.Tensor]) -> None:
        """Add the states [P, D] of a further piece of the prompt, by layer."""
        for layer, new in states.items():
            before = self.hidden.get(layer)
            # the output layer's are those of the last token, the others of every token
            join = before is not None and layer != FINAL
            self.hidden[layer] = torch.cat((before, new)) if join and before is not None else new

    @property
    def params(self) -> SamplingParams:
        """What the request asked for."""
        return self.sampler.params

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, those of an encoder's source included."""
        return len(self.source) or self.prompt_length

    @property
    def root(self) -> int:
        """The newest token."""
        return self.tokens[-1]

    @property
    def held_back(self) -> bool:
        """True while another sequence reads the prompt of this one."""
        return self.shared is not None and self.shared.reader is not self and not self.shared.read

    @property
    def prefilling(self) -> bool:
        """True until the whole prompt is committed."""
        return self.prefilled < self.prompt_length

    @property
    def unread(self) -> int:
        """Prompt tokens that one step may read: up to the next of `stops`, or all that are left."""
        ahead = (stop for stop in self.stops if stop > self.prefilled)
        return min(next(ahead, self.prompt_length), self.prompt_length) - self.prefilled

    @property
    def emitted(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.params.max_tokens - self.emitted
