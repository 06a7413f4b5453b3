"""What prompts begin with is read once: states of earlier texts, kept by their tokens.

    engine = Engine(model, verifier=..., prefix_cache=PrefixOptions(bytes=512 * 10**6))
    engine.prefix_cache.counters.hit_tokens

A sum over tokens cannot be cut back to an earlier one, so states are kept where others are likely to go on:

- where a sequence ends, so that a chat that only grows never reads its prompt again;
- at every `stride` tokens of a prompt, where an idle engine ends a piece anyway;
- where the last piece of a prompt begins, for who asks the same again;
- where a prompt leaves a text that is known: two prompts share this beginning, and more will.

Caches that grow hold the entries of every position, in pages that texts with a common beginning and the slots
which go on from them share: nothing is copied for a prompt but what is behind its last full page. If a model
has no other state, a prompt goes on from any token of a known text.

What is equal, and how much. A prompt that goes on from a border is read in pieces that begin at a multiple of
PIECE, as prompts are beside other requests. Where the border ends a piece without the cache too, as every
`stride` does in an idle engine, the pieces are the same and so are all bits. The end of a sequence has what
rounds have written, token by token or in trees. In softmax layers, and in sums that are grouped by PIECE, the
kernels make the same bits of that as of a prompt. In smaller groups, and by torch alone, another order of
addition leaves other last bits, as trees that are verified do: tokens are equal as far as they are with
drafts. So what is kept of the end of a sequence is what the sequence itself would have gone on with.

States are looked up as in SGLang (Zheng et al. 2023, arXiv 2312.07104). Where those of sums are worth keeping
is from Marconi (Pan et al. 2024, arXiv 2411.19379).
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from linspec.decoding.sequence import RunningSequence
from linspec.engine.budget import PIECE
from linspec.engine.prefix_file import Kept
from linspec.engine.prefix_store import PrefixStore
from linspec.engine.prefix_tree import (
    Match,
    Node,
    PageUses,
    as_tokens,
    ends_within,
    match,
    pages_until,
    split,
    tensor_bytes,
)
from linspec.errors import ConfigError
from linspec.state.sequence_states import SequenceStates
from linspec.utils.sizes import check_size

_log = logging.getLogger("linspec")
# a store may be so many times larger than the cache in memory
STORE_FACTOR = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """How much is kept, and where.

    Attributes:
        bytes: most memory of what is kept.
        stride: a prompt's state is kept at multiples of it, itself a multiple of PIECE.
        least: a known beginning of fewer tokens is read again: nearly all prompts share their first ones.
        store: a directory for what leaves the memory; None forgets it.
        store_bytes: most bytes of its files; None for STORE_FACTOR times `bytes`.
    """

    bytes: int
    stride: int = 512
    least: int = 16
    store: Path | None = None
    store_bytes: int | None = None

    def __post_init__(self) -> None:
        check_size("stride of a prefix cache", self.stride, least=PIECE)
        check_size("least tokens of a prefix cache", self.least)
        if self.store is not None and not self.store.name:
            raise ConfigError(
                f"prefix_store (--prefix-store) must name a directory of its own, got {str(self.store)!r}; "
                "give one, such as ./prefixes"
            )


@dataclass(slots=True)
class Counters:
    """What was asked of a cache since it was made.

    Attributes:
        queries: prompts that could have had a known beginning.
        hits: those that had.
        queried_tokens: tokens of all these prompts.
        hit_tokens: those that were not read again.
        stored_hits: hits of which the state came from the store.
        evictions: states and edges that had to leave the memory.
    """

    queries: int = 0
    hits: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    stored_hits: int = 0
    evictions: int = 0


class PrefixCache:
    """States of earlier texts for the slots of `states`, by tenant and tokens.

    key: names the model and the form of its caches in a store; None is a cache without a store.
    """

    def __init__(
        self, states: SequenceStates, options: PrefixOptions, key: str | None = None
    ) -> None:
        self.states, self.options = states, options
        self.counters = Counters()
        self.bytes = 0
        self._roots: dict[str, Node] = {}
        self._uses = PageUses()
        # what can leave, the longest unused first: leaves, and nodes with a rest
        self._leaving: OrderedDict[Node, str] = OrderedDict()
        self.store: PrefixStore | None = None
        if options.store is not None and key is not None:
            limit = options.store_bytes or STORE_FACTOR * options.bytes
            self.store = PrefixStore(options.store, key, limit, states)

    # ---- what a sequence begins with

    def begin(self, sequence: RunningSequence) -> None:
        """Give the slot of `sequence`, which is ready for its prompt, the longest beginning that is known."""
        if not served(sequence):
            return
        tokens = as_tokens(sequence.tokens[: sequence.prompt_length])
        # the step of the last token gives the logits of the next one
        known = self._known(sequence.tenant, tokens[:-1])
        self.counters.queries += 1
        self.counters.queried_tokens += len(tokens)
        node, length = self._longest(known)
        kept = self._stored(sequence.tenant, tokens[:-1], length)
        if kept is not None:
            node, length = self._insert(sequence.tenant, kept), kept.length
            self.counters.stored_hits += 1
        if node is not None and self._restore(sequence.slot, node, length):
            self._touch(node)
            sequence.prefilled = sequence.cached_tokens = length
            self.counters.hits += 1
            self.counters.hit_tokens += length
        sequence.stops = self._stops(sequence, known.shared)
        self._shrink()

    def _known(self, tenant: str, tokens: array[int]) -> Match:
        return match(self._roots.get(tenant) or Node(as_tokens(()), None), tokens)

    def _longest(self, known: Match) -> tuple[Node | None, int]:
        """The node, and the length, of the longest known beginning that a slot can be given."""
        if self.states.only_grows:
            node, length = known.beyond or known.node, known.shared
        else:
            held = [each for each in known.node.path() if each.rest is not None]
            node, length = (held[-1], held[-1].end) if held else (known.node, 0)
        return (node, length) if length >= self.options.least else (None, 0)

    def _restore(self, slot: int, node: Node, length: int) -> bool:
        """Make `slot` the first `length` tokens of the text of `node`; False leaves it empty."""
        try:
            self.states.rebuild(slot, pages_until(node, length), length, node.rest or ())
        except Exception:
            # a cache is a help: the prompt is read as without it
            _log.warning("a cached state could not be used; the prompt is read", exc_info=True)
            self.states.reset(slot)
            return False
        return True

    def _stops(self, sequence: RunningSequence, shared: int) -> tuple[int, ...]:
        """Where the rest of a prompt is cut, so that its state can be kept there."""
        if self.states.only_grows:
            return ()
        last, stride = sequence.prompt_length - 1, self.options.stride
        borders = {*range(stride, last + 1, stride), shared - shared % PIECE, last - last % PIECE}
        return tuple(sorted(border for border in borders if border > sequence.prefilled))

    # ---- what is kept

    def passed(self, sequence: RunningSequence) -> None:
        """A piece of the prompt of `sequence` is committed: keep it where others may go on from it."""
        if self.states.only_grows and not sequence.prefilling:
            # who asks the same again begins before the last token
            self.keep(sequence, sequence.prompt_length - 1)
        elif sequence.prefilled in sequence.stops:
            self.keep(sequence)

    def keep(self, sequence: RunningSequence, most: int | None = None) -> None:
        """Keep what the slot of `sequence` has committed; of caches that grow, the first `most` tokens."""
        try:
            self._keep(sequence, most)
        except Exception:
            _log.warning("a state was not kept for later prompts", exc_info=True)

    def _keep(self, sequence: RunningSequence, most: int | None) -> None:
        slot = sequence.slot
        length = self.states.length(slot)
        # a loop may commit more than it hands out
        if not served(sequence) or length > len(sequence.tokens):
            return
        if not self.states.whole(slot, length):
            return
        length = length if most is None else most
        if not length:
            return
        rest = None if self.states.only_grows else self.states.rest(slot)
        tokens = as_tokens(sequence.tokens[:length])
        kept = Kept(tokens, rest, lambda start: self.states.pages(slot, start, length))
        self._insert(sequence.tenant, kept)
        self._shrink()

    def _insert(self, tenant: str, kept: Kept) -> Node:
        """Add a text to the tree; returns the node of its end, or one beyond it where nothing ends."""
        root = self._roots.setdefault(tenant, Node(as_tokens(()), None))
        found = match(root, kept.tokens)
        node = found.node
        if found.beyond is not None:
            if kept.rest is None and found.shared == kept.length:
                self._touch(found.beyond)
                return found.beyond
            node = self._split(found.beyond, found.shared - node.end)
        if node.end < kept.length:
            node = self._grow(node, kept)
        if kept.rest is not None and node.rest is None:
            node.rest = kept.rest
            self.bytes += tensor_bytes(kept.rest)
        if node.rest is not None or not node.children:
            self._leaving[node] = tenant
            self._leaving.move_to_end(node)
        return node

    def _split(self, node: Node, count: int) -> Node:
        both, upper = node.pages, split(node, count)
        self.bytes += self._uses.add(upper.pages) + self._uses.add(node.pages)
        self.bytes -= self._uses.remove(both)
        return upper

    def _grow(self, node: Node, kept: Kept) -> Node:
        """A leaf behind `node`, which may be no leaf any longer."""
        leaf = Node(kept.tokens[node.end :], node, kept.pages(node.end), end=kept.length)
        node.children[leaf.tokens[0]] = leaf
        if node.rest is None:
            self._leaving.pop(node, None)
        self.bytes += leaf.bytes + self._uses.add(leaf.pages)
        for each in ends_within(leaf):
            self.bytes += self._uses.add(leaf.pages[:1]) - self._uses.remove(each.pages[-1:])
            each.pages[-1:] = leaf.pages[:1]
        return leaf

    def _touch(self, node: Node) -> None:
        if node in self._leaving:
            self._leaving.move_to_end(node)

    # ---- what leaves

    def _shrink(self) -> None:
        """Let go of what was not used for longest until the rest is within the budget."""
        while self.bytes > self.options.bytes and self._leaving:
            self._evict(next(iter(self._leaving)))

    def _evict(self, node: Node, *, wait: bool = False) -> None:
        tenant = self._leaving.pop(node)
        self.counters.evictions += 1
        if self.store is not None and (node.rest is not None or self.states.only_grows):
            pages = pages_until(node, node.end)
            self.store.put(tenant, node.text(), pages, node.rest, wait=wait)
        if node.children:
            # those that go on from here need its pages
            self.bytes -= tensor_bytes(node.rest)
            node.rest = None
            return
        self._remove(node, tenant)

    def _remove(self, node: Node, tenant: str) -> None:
        """Remove a leaf, and the nodes above it that led to nothing else."""
        while node.parent is not None:
            parent = node.parent
            self.bytes -= node.bytes + self._uses.remove(node.pages)
            del parent.children[node.tokens[0]]
            useful = parent.rest is not None or self.states.only_grows
            if parent.children or (useful and parent.parent is not None):
                break
            node = parent
        else:
            del self._roots[tenant]
            return
        if not parent.children and parent not in self._leaving:
            # its pages are as old as those that went on from them
            self._leaving[parent] = tenant
            self._leaving.move_to_end(parent, last=False)

    def clear(self) -> None:
        """Forget what is in memory: an interrupt may have left it half changed."""
        self._roots.clear()
        self._leaving.clear()
        self._uses, self.bytes = PageUses(), 0

    # ---- the store

    def _stored(self, tenant: str, tokens: array[int], beyond: int) -> Kept | None:
        if self.store is None:
            return None
        least = max(beyond + 1, self.options.least)
        return self.store.longest(tenant, tokens, least)

    def flush(self) -> None:
        """Move all that is in memory to the store, and wait until it is there: before a process ends."""
        if self.store is None:
            return
        while self._leaving:
            self._evict(next(iter(self._leaving)), wait=True)
        self.store.wait()


def served(sequence: RunningSequence) -> bool:
    """Whether a cache may know the prompt of `sequence`, and keep it.

    Not where embeddings were given, which its tokens do not tell; where it is a source that an encoder has
    read, which no step commits; and where the log-probabilities of the prompt are asked for, which only
    reading it gives.
    """
    return (
        sequence.embeddings is None
        and not sequence.source
        and sequence.params.prompt_logprobs is None
    )
