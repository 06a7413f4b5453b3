from __future__ import annotations

import pytest
from checkpoints import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from linspec.text import Detokenizer


def encode(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def pieces(text: str, stop: tuple[str, ...] = (), prompt: str = "ab") -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tiny_tokenizer(), encode(prompt), stop)
    shown = []
    for token in encode(text):
        done = detokenizer.push(token)
        shown.append(detokenizer.release(last=done))
        if done:
            return shown, True
    detokenizer.finish()
    shown.append(detokenizer.release(last=True))
    return shown, detokenizer.stopped


@given(st.text(max_size=30), st.text(max_size=10))
def test_pieces_add_up_to_the_text(text: str, prompt: str) -> None:
    assert "".join(pieces(text, prompt=prompt)[0]) == text


@given(st.text(max_size=30))
def test_a_character_is_shown_only_when_whole(text: str) -> None:
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces(text)[0])


@given(st.text("abcden t", max_size=30), st.lists(st.text("abcden t", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    shown, stopped = pieces(text, tuple(stops))
    found = [s for s in stops if s in text]
    assert stopped == bool(found)
    if not stopped:
        assert "".join(shown) == text
        return
    full = "".join(shown)
    assert text.startswith(full)
    assert not any(stop in full for stop in stops)
    assert any(text.startswith(stop, len(full)) for stop in found)


@given(st.text("abcden t", max_size=30), st.text("abcden t", min_size=1, max_size=4))
def test_what_could_become_a_stop_string_is_held_back(text: str, stop: str) -> None:
    shown, stopped = pieces(text, (stop,))
    if stopped:
        so_far = ""
        for piece in shown:
            so_far += piece
            assert text[: text.find(stop)].startswith(so_far)


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(tiny_tokenizer(), encode("ab"), ())
    assert not detokenizer.push(encode("€")[0])
    assert detokenizer.release() == ""
    detokenizer.finish()
    assert detokenizer.release(last=True) == "\ufffd"


def test_stop_string_before_an_unfinished_character_is_found_at_the_end() -> None:
    detokenizer = Detokenizer(_Glued(), [], ("ab",))
    assert not detokenizer.push(7)
    detokenizer.finish()
    assert detokenizer.stopped
    assert detokenizer.release(last=True) == "x"


class _Glued:
    """A tokenizer with a token that ends inside a character."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return "xab\ufffd" if tokens else ""


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    euro = encode("€")
    detokenizer = Detokenizer(tiny_tokenizer(), [*encode("ab"), *euro[:2]], ())
    detokenizer.push(euro[2])
    detokenizer.push(encode("d")[0])
    assert detokenizer.release(last=True).endswith("d")


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_are_not_shown(special: bool) -> None:
    detokenizer = Detokenizer(tiny_tokenizer(), encode("ab"), ())
    detokenizer.push(0 if special else encode("c")[0])
    assert detokenizer.release(last=True) == ("" if special else "c")
