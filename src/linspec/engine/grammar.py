"""Outputs of a given language: the rule that bans every token which the grammar of a request forbids.

grammars = Grammars(tokenizer, vocab_size)
Engine(model, grammars=grammars, ...)

The library llguidance reads grammars and says which tokens may come. Verifiers ask the rule at each node of
a tree, behind the drafts before it, so masked scores are verified as any others. Drafts that the grammar
forbids are cut before they are verified (`possible`), where the verifier allows that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linspec.decoding.sampling.grammar import CFG, JSON_FORM, JSON_SCHEMA, Grammar
from linspec.decoding.sampling.rules import Rule
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError, InputError
from linspec.utils.messages import shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# compiled grammars, and masks of one sequence, that are kept
_GRAMMARS_KEPT, _MASKS_KEPT = 64, 64
_LONGEST_REASON = 200


class Grammars:
    """Makes the rules of grammars for one tokenizer; what is costly is made once and when it is needed."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = lru_cache(_GRAMMARS_KEPT)(self._compile)

    def __call__(self, grammar: Grammar, ends: Collection[int]) -> Rule:
        """The rule of one sequence. ends: tokens that end its output.

        Raises:
            ConfigError: the grammar cannot be read, matches nothing, or needs what is not installed.
        """
        if not ends:
            raise ConfigError(
                "this model has no end-of-sequence token, so nothing would end an output that a grammar "
                "completes; give stop_token_ids"
            )
        matcher = self._compiled(grammar).deep_copy()
        return GrammarRule(matcher, self._vocab_size, ends, self._words.eos_tokens)

    def check(self, grammar: Grammar) -> None:
        """Raise the ConfigError that a request with this grammar would end with."""
        self._compiled(grammar)

    @cached_property
    def _words(self) -> LLTokenizer:
        """The vocabulary as llguidance needs it."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ConfigError(
                f"a grammar needs llguidance, and {error.name} is not installed: "
                "pip install 'linspec[serve]'"
            ) from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"a grammar needs a tokenizer of the library tokenizers, got {shown(repr(self._tokenizer))}; "
                "give one with a tokenizer.json, or leave the grammar out"
            )
        # which token ends an output is the request's word: the library only needs to have one
        end = self._tokenizer.eos_token_id
        size = max(self._vocab_size, backend.get_vocab_size())
        try:
            return LLTokenizer(
                _spelled_out(backend), n_vocab=size, eos_token=0 if end is None else end
            )
        except ValueError as error:
            raise ConfigError(
                f"the tokenizer of this model cannot spell a grammar: {error}; byte-level and "
                "byte-fallback tokenizers can"
            ) from error

    def _compile(self, grammar: Grammar) -> LLMatcher:
        words = self._words
        from llguidance import LLMatcher

        try:
            source = _source(grammar)
        # what translates GBNF raises whatever its parser stumbles on
        except Exception as error:
            raise _refused(grammar, str(error)) from error
        matcher = LLMatcher(words, source, log_level=0)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        # asked of a copy: who asks where nothing may follow has spoiled what was asked
        asked = matcher.deep_copy()
        asked.compute_bitmask()
        if _dead(asked):
            raise _refused(grammar, "no text matches it")
        return matcher


def _spelled_out(backend: Any) -> str:
    """A tokenizer as JSON whose decoder llguidance reads; it neither pads nor cuts."""
    told = json.loads(backend.to_str())
    told |= {"padding": None, "truncation": None}
    decoder = told.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    spaces = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
    if spaces:
        # what it does in the middle of a text; how a text begins is nothing that a grammar asks
        space = {"type": "Replace", "pattern": {"String": spaces[0]}, "content": " "}
        steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
        told["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(told)


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own words."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind == JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults=JSON_FORM)  # type: ignore[arg-type]
    return grammar_from("grammar" if grammar.kind == CFG else "regex", grammar.text)


def _refused(grammar: Grammar, why: str) -> ConfigError:
    return ConfigError(
        f"the grammar ({grammar.kind}) {shown(grammar.text)} cannot be used: {_reason(why)}; change it, or "
        "leave the grammar out"
    )


class GrammarRule(Rule):
    """Bans what the grammar forbids; what ends an output may come exactly where the grammar is complete.

    A matcher that finds a dead end is of no more use. So drafts are asked of copies, which are cheap.
    """

    bans = "grammar"

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        ends: Collection[int],
        library_ends: Collection[int],
    ) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._ends, self._library_ends = frozenset(ends), list(library_ends)
        self._ended = False
        # by the drafts before them; the next round's begin anew
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        banned = self._banned(tuple(drafts))
        return scores if banned is None else scores.masked_fill(banned.to(scores.device), -math.inf)

    def observe(self, tokens: Sequence[int]) -> None:
        self._masks.clear()
        if self._ended:
            return
        taken = self._advance(self._matcher, tokens)
        self._ended = taken < len(tokens)
        if self._ended and tokens[taken] not in self._ends:
            raise InputError(
                f"the output left its grammar at token {tokens[taken]}: what decided on it did not ask the "
                "rules of the request; use the verifier 'lossless'"
            )

    def possible(self, tree: TokenTree) -> tuple[int, ...]:
        """The nodes of `tree` whose drafts the grammar allows; 0, the root, is one of them."""
        found = [0]
        if not self._ended:
            self._descend(self._matcher.deep_copy(), tree, 0, found)
        return tuple(sorted(found))

    def forced(self) -> tuple[int, ...]:
        """Tokens of the only way on, as far as there is only one; () where there is a choice."""
        if self._ended:
            return ()
        tokens = self._matcher.deep_copy().compute_ff_tokens()
        return tuple(token for token in tokens if token < self._vocab_size)

    def _descend(self, matcher: LLMatcher, tree: TokenTree, node: int, found: list[int]) -> None:
        for child in tree.children[node]:
            token = tree.tokens[child]
            if token in self._ends:
                # nothing comes behind an end
                if matcher.is_accepting():
                    found.append(child)
            elif matcher.try_consume_tokens([token]):
                found.append(child)
                self._descend(matcher, tree, child, found)
                matcher.rollback(1)

    def _advance(self, matcher: LLMatcher, tokens: Sequence[int]) -> int:
        """Consume tokens up to one that the grammar forbids, or an end; how many those were."""
        count = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        taken = matcher.try_consume_tokens(list(tokens[:count]))
        _check(matcher)
        return taken

    def _banned(self, drafts: tuple[int, ...]) -> Tensor | None:
        """Which tokens [V] may not come behind `drafts`; None where these cannot come themselves."""
        if self._ended:
            return None
        if drafts not in self._masks:
            if len(self._masks) >= _MASKS_KEPT:
                self._masks.clear()
            matcher = self._matcher.deep_copy()
            taken = self._advance(matcher, drafts)
            # a rule for what never comes must not fail: nobody gets there
            self._masks[drafts] = self._mask(matcher) if taken == len(drafts) else None
        return self._masks[drafts]

    def _mask(self, matcher: LLMatcher) -> Tensor:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if _dead(matcher):
            return torch.ones(self._vocab_size, dtype=torch.bool)
        _check(matcher)
        banned = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size] == 0)
        banned[[token for token in self._library_ends if token < self._vocab_size]] = True
        banned[list(self._ends)] = not matcher.is_accepting()
        return banned


def _dead(matcher: LLMatcher) -> bool:
    """Whether nothing may follow, and what is there is not complete."""
    return matcher.get_error().startswith("NoExtension")


def _check(matcher: LLMatcher) -> None:
    """Raise InputError where the library has given up on an output."""
    if matcher.is_error():
        raise InputError(
            f"the grammar of this request cannot go on: {_reason(matcher.get_error())}; make it simpler"
        )


def _reason(message: str) -> str:
    """The one line of the library's message that says what is wrong."""
    said = re.search(r"^error: (.+)$", message, flags=re.MULTILINE)
    line = said[1] if said else message.strip().partition("\n")[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
