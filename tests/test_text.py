from __future__ import annotations

import pytest
from checkpoints import tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, SPECIAL, tokenizer_of

from linspec.engine.detokenizer import Detokenizer

# what tokenizers of these kinds write in bytes, in pieces, as unknown, or with spaces of their own
PIECES = [
    "日本語のテキスト",
    "日éЖ🙂ह",
    "the end",
    " ab",
    "  ",
    "\n",
    "n't .",
    "👩‍👩‍👧",
    "\u00e9",
    "e\u0301",
    "\ufffd",
]
TEXTS = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(PIECES)), max_size=6).map("".join)


def streamed(kind: str, prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each token, and at the end; Generation.text is the whole of it."""
    detokenizer = Detokenizer(tokenizer_of(kind), prompt, stop)
    shown = []
    for token in ids:
        done = detokenizer.push(token)
        shown.append(detokenizer.release(last=done))
        if done:
            break
    else:
        detokenizer.finish()
        shown.append(detokenizer.release(last=True))
    assert "".join(shown) == detokenizer.full
    return shown


def decode(kind: str, ids: list[int]) -> str:
    return tokenizer_of(kind).decode(ids, skip_special_tokens=True)


def ids_of(kind: str, text: str) -> list[int]:
    return tokenizer_of(kind)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples * 150 // 20)
@given(text=TEXTS)
@example(text="日本語のテキスト")
@example(text="日éЖ🙂ह")
def test_streamed_text_is_the_whole_decode(kind: str, text: str) -> None:
    ids = ids_of(kind, text)
    assert "".join(streamed(kind, [], ids)) == decode(kind, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples * 150 // 20)
@given(prompt=TEXTS, text=TEXTS, cut=st.integers(0, 40))
@example(prompt="日本語", text="のテキスト", cut=40)
def test_text_streamed_behind_a_prompt_is_the_rest_of_the_whole_decode(
    kind: str, prompt: str, text: str, cut: int
) -> None:
    """The border between prompt and output stands at any token, inside characters too."""
    ids = ids_of(kind, prompt + text)
    cut = min(cut, len(ids))
    before, after = ids[:cut], ids[cut:]
    whole, shown = decode(kind, ids), "".join(streamed(kind, before, after))
    assert whole.endswith(shown)
    ahead = whole[: len(whole) - len(shown)]
    said = decode(kind, before)
    if not said.endswith("\ufffd"):
        assert ahead == said
        return
    # the incomplete last character of the prompt belongs to the output, what is ahead of it does not
    complete = max(n for n in range(cut) if not decode(kind, ids[:n]).endswith("\ufffd"))
    assert ahead == decode(kind, ids[:complete]) or said.startswith(ahead)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples * 5)
@given(data=st.data())
def test_any_tokens_are_shown_without_an_error(kind: str, data: st.DataObject) -> None:
    """A random model writes bytes that are no character, and special tokens between them."""
    ids = st.lists(st.integers(0, len(tokenizer_of(kind)) - 1), max_size=30)
    shown = streamed(kind, data.draw(ids), data.draw(ids))
    assert not any(name in piece for piece in shown for name in SPECIAL[1:])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "Unigram with bytes"])
def test_characters_spelled_in_bytes_come_out_whole(kind: str) -> None:
    text = "日éЖ🙂ह"
    ids = ids_of(kind, text)
    assert len(ids) > len(text)
    shown = streamed(kind, ids_of(kind, "ab"), ids)
    assert "".join(shown).strip() == text
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(streamed(kind, [], ids[:-1])).startswith("日éЖ🙂".lstrip())


def test_bytes_that_become_no_character_are_shown_in_time() -> None:
    kind = "byte-fallback"
    (byte,) = tokenizer_of(kind).convert_tokens_to_ids(["<0xFF>"])
    shown = streamed(kind, ids_of(kind, "ab"), [byte] * 200)
    assert len("".join(shown)) == 200
    assert "".join(shown[:100])


def test_long_runs_of_special_tokens_lose_no_space() -> None:
    kind = "byte-fallback"
    tokenizer = tokenizer_of(kind)
    ids = [tokenizer.eos_token_id] * 200 + tokenizer.convert_tokens_to_ids(["▁a", "▁ab"])
    assert "".join(streamed(kind, ids_of(kind, "ab"), ids)) == " a ab"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", "d<|im_end|>", "<|im_end|></s>", "</s>..."])
def test_a_stop_string_with_special_tokens_ends_the_text(kind: str, stop: str) -> None:
    tokenizer = tokenizer_of(kind)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    prompt, words, more = ids_of(kind, "ab"), ids_of(kind, "ab end"), ids_of(kind, "ab end")
    expected = decode(kind, [*prompt, *words])[len(decode(kind, prompt)) :]
    behind = decode(kind, [*prompt, *words, *more])[len(decode(kind, [*prompt, *words])) :]
    stop = stop.replace("...", behind[:3])
    shown = streamed(kind, prompt, [*words, *ends, *more], (stop,))
    assert "".join(shown) == (expected[:-1] if stop.startswith("d") else expected)
    assert len(shown) < len([*words, *ends, *more])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples * 3)
@given(text=TEXTS, data=st.data())
def test_a_stop_string_across_any_tokens_ends_the_text(
    kind: str, text: str, data: st.DataObject
) -> None:
    ids = ids_of(kind, text)
    whole = decode(kind, ids)
    first = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[first : first + data.draw(st.integers(1, 6))] or "never"
    shown = "".join(streamed(kind, [], ids, (stop,)))
    assert shown == (whole[: whole.index(stop)] if stop in whole else whole)


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


def test_a_stop_string_inside_the_name_of_a_special_token_does_not_match() -> None:
    kind = "byte-fallback"
    end = tokenizer_of(kind).convert_tokens_to_ids("<|im_end|>")
    ids = [*ids_of(kind, "ab"), end, *ids_of(kind, "the end")]
    assert "".join(streamed(kind, [], ids, ("im", "d|>", "b<|im"))) == "ab the end"
