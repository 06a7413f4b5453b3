"""The bytes of tokens, in vocabularies of every kind."""

from __future__ import annotations

import pytest
from tokenizer_kinds import SPECIAL, tokenizer_of

from linspec.decoding.accepted import TokenLogprob
from linspec.serve.shapes import TextLogprobs, chat_logprobs
from linspec.serve.token_bytes import TokenBytes

TEXT = "the \u00e9nd, \U0001f389\U0001f642 \u65e5\u672c \U0001f389"


def entries(tokens: list[int]) -> list[TokenLogprob]:
    return [TokenLogprob(token, -1.0, ((token, -1.0),)) for token in tokens]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "Unigram with bytes"])
def test_bytes_of_an_emoji_over_several_tokens_join_to_its_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    words = TokenBytes(tokenizer)
    found = chat_logprobs(words, entries(tokens))
    assert found is not None
    joined = b"".join(bytes(each["bytes"]) for each in found["content"])
    # some vocabularies put a space in front of a text
    assert joined.removeprefix(b" ") == TEXT.encode()


def test_a_special_token_has_the_bytes_of_its_name_and_takes_no_place_in_a_text() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    words, end = TokenBytes(tokenizer), tokenizer.convert_tokens_to_ids(SPECIAL[2])
    assert words.read(end) == SPECIAL[2].encode() and end in words.special
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    tokens = [a, end, b, end]
    hidden = TextLogprobs(words).take(entries(tokens), tokens)["text_offset"]
    assert hidden == [0, 1, 1, 2]
    known = TextLogprobs(words).take(entries(tokens), tokens, "ab")["text_offset"]
    assert known == [0, 1, 1, 2]
    shown = TextLogprobs(words, special=True).take(entries(tokens), tokens)["text_offset"]
    assert shown == [0, 1, 5, 6]
    # a stop text took the end
    assert TextLogprobs(words).take(entries([a, b, b]), [a, b, b], "a")["text_offset"] == [0, 1, 1]


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "word ends"])
def test_tokens_of_any_other_vocabulary_have_the_bytes_of_their_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    words, tokens = TokenBytes(tokenizer), tokenizer.encode("ab an", add_special_tokens=False)
    assert tokens
    for token in tokens:
        assert words.read(token).strip() == tokenizer.decode([token]).strip().encode()
    assert words.read(10**6) == b""
