"""A smaller model with another tokenizer drafts: the two agree on text (Timor et al. 2025).

What the target has written is text, which the draft model reads in its own tokens; what it adds is text too,
which the target's tokenizer spells behind the tokens that are decided. A draft that is spelled in another way
than the target would write it costs acceptance, never correctness.

The end of a text may be spelled anew once more follows it. So the draft model commits all but the last few of
its tokens, in which a tokenizer may still change its mind, and stages these again in each round with its
drafts. What comes true as it was staged is committed, the rest is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Self

from linspec.checkpoints.dtype import cache_kind
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.likeliest import likeliest
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.drafters.base import DRAFTERS, ChainDrafter, DrafterContext
from linspec.drafters.draft_model import ready_model
from linspec.drafters.spelling import (
    PARTIAL,
    Said,
    addition,
    backend_of,
    special_tokens,
    spelled,
)
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True)
class UniversalOptions:
    """Which model drafts, and how."""

    path: str | None = option(
        "directory or name of the smaller model; it has to be given", default=None, short=True
    )
    tokens: int = option("most tokens that it drafts in a round, in its own", default=16)
    realign: int = option("newest tokens that are spelled anew in each round", default=8)

    def __post_init__(self) -> None:
        check_sizes(self, "tokens realign")
        if self.tokens + 2 * self.realign > MAX_STAGED:
            raise ConfigError(
                f"tokens and twice realign must be at most {MAX_STAGED} together, got tokens={self.tokens} "
                f"and realign={self.realign}"
            )


@dataclass(slots=True)
class _Reader:
    """How far the draft model is with one sequence.

    said: the text. length, chars: of what is committed. staged: tokens that were staged behind it in the last
    round. tail: tokens of the text that are not committed. drafts: behind these. end: the target's token that
    ends the draft, if the draft model has ended it.
    """

    said: Said
    length: int = 0
    chars: int = 0
    staged: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    end: int | None = None


@DRAFTERS.register(
    "universal",
    summary="a smaller model with another tokenizer drafts a chain, as text",
    paper="Timor et al. 2025, arXiv 2502.05202",
    needs="a model directory: universal:DIR",
    options=UniversalOptions,
)
class Universal(ChainDrafter):
    """Chains of certain drafts: the likeliest tokens of a model whose tokens are not the target's."""

    def __init__(
        self, model: Decoder, tokenizer: Any, context: DrafterContext, options: UniversalOptions
    ) -> None:
        super().__init__(context, options)
        self.model, self.tokenizer = model, tokenizer
        self.options = options
        self.state = model.new_state(context.slots, cache_kind("auto", model))
        self._target_tokenizer = context.tokenizer
        self._ours = backend_of(context.tokenizer, "the target")
        self._theirs = backend_of(tokenizer, "the draft model")
        self._our_specials = special_tokens(self._ours)
        self._their_specials = special_tokens(self._theirs)
        # marks that the draft model has never seen would be so many letters to it
        known = set(self._their_specials.values())
        self._hidden = {n for n, text in self._our_specials.items() if text not in known}
        first = self._theirs.encode("a", add_special_tokens=True).ids[:1]
        self._start = [token for token in first if token == model.config.bos_id]
        # what the ends and marks of the draft model are to the target
        ours = {text: number for number, text in self._our_specials.items()}
        eos = context.target.config.eos_ids
        self._means = dict.fromkeys(model.config.eos_ids, eos[0]) if eos else {}
        self._means |= {n: ours[text] for n, text in self._their_specials.items() if text in ours}
        self._readers: dict[int, _Reader] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: UniversalOptions) -> Self:
        """With a model from disk and its tokenizer."""
        target = context.decoder(cls.name)
        if options.path is None:
            raise DrafterError(
                f"drafter {cls.name!r} needs a model directory: --drafter {cls.name}:DIR"
            )
        if context.tokenizer is None:
            raise DrafterError(
                f"drafter {cls.name!r} needs the target's tokenizer: LLM(model, tokenizer=...)"
            )
        tokenizer = load_text_tokenizer(options.path)
        return cls(ready_model(options.path, target), tokenizer, context, options)

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        # places in a state go upwards
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].slot)
        readers = {i: self._read(sequences[i]) for i in order}
        self._write([(sequences[i].slot, readers[i], lengths[i]) for i in order])
        return [self._respelled(readers[i])[:length] for i, length in enumerate(lengths)]

    # ---- reading

    def _read(self, sequence: RunningSequence) -> _Reader:
        """What is known of a sequence, once what is decided has been read, but for the tail."""
        slot = sequence.slot
        # what raises half-way is not known, and so read again from the start
        reader = self._readers.pop(slot, None)
        if reader is None:
            reader = _Reader(Said(self._target_tokenizer, self._hidden))
            self.state.reset(slot)
        reader.said.read(sequence.tokens)
        reader.tail, reader.drafts, reader.end = [], [], None
        # behind half a character nothing can be read
        if reader.said.whole:
            self._catch_up(slot, reader)
        self._readers[slot] = reader
        return reader

    def _catch_up(self, slot: int, reader: _Reader) -> None:
        """Commit what has come true as it was staged, and the rest of a long text; find the tail."""
        text, chars = reader.said.text, reader.chars
        found = spelled(self._theirs, text[:chars], text[chars:])
        if not reader.length:
            found = found.behind(self._start)
        count, limit = len(found.tokens), self.model.config.position_limit
        sure = found.cut(max(0, count - self.options.realign))
        kept = found.cut(min(sure, _alike(found.tokens, reader.staged)))
        self.state.commit(slot, range(kept))
        reader.staged, room = [], MAX_STAGED - self.options.tokens
        before = reader.length
        # behind its own last position there is nothing that the draft model could read
        fits = limit is None or before + count <= limit
        if fits and count - kept > room and sure > kept:
            missing = found.tokens[kept:sure]
            self.model.step([StepInput(slot, missing, all_logits=False)], self.state)
            self.state.commit(slot, range(len(missing)))
            kept = sure
        if kept:
            reader.length, reader.chars = before + kept, chars + found.ends[kept - 1]
        if fits and count - kept <= room:
            reader.tail = found.tokens[kept:]

    # ---- writing

    def _write(self, asked: Sequence[tuple[int, _Reader, int]]) -> None:
        """Draft behind the tails, all in one step for each depth."""
        live = [each for each in asked if each[1].tail]
        while live:
            inputs = []
            for slot, reader, _ in live:
                new = reader.drafts[-1:] or reader.tail
                staged = len(reader.staged)
                parents = range(staged - 1, staged - 1 + len(new))
                inputs.append(StepInput(slot, new, parents, all_logits=False))
                reader.staged = [*reader.staged, *new]
            logits = self.model.step(inputs, self.state).logits
            guesses, _ = likeliest(logits)
            live = [
                each
                for each, token in zip(live, guesses, strict=True)
                if self._takes(each[1], token, each[2])
            ]

    def _takes(self, reader: _Reader, token: int, wanted: int) -> bool:
        """Add a draft; whether to go on behind it."""
        if token in self._their_specials:
            reader.end = self._means.get(token)
            return False
        reader.drafts.append(token)
        limit = self.model.config.position_limit
        there = reader.length + len(reader.tail) + len(reader.drafts)
        has_room = limit is None or there <= limit
        return has_room and len(reader.drafts) < min(wanted, self.options.tokens)

    def _respelled(self, reader: _Reader) -> list[int]:
        """The drafts in the target's tokens."""
        text = addition(self.tokenizer, reader.tail, reader.drafts) if reader.drafts else ""
        sound = text.partition(PARTIAL)[0]
        tokens = spelled(self._ours, reader.said.text, sound).tokens if sound else []
        plain = list(takewhile(lambda token: token not in self._our_specials, tokens))
        ends = reader.end is not None and sound == text and plain == tokens
        return [*plain, reader.end] if ends and reader.end is not None else plain

    def started(self, sequence: RunningSequence) -> None:
        # another engine may have left the slot without a word
        self._readers.pop(sequence.slot, None)

    def finished(self, sequence: RunningSequence) -> None:
        self._readers.pop(sequence.slot, None)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two lists share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
