"""Tokenizers from GGUF files: the ids of the originals, the tokens around a text, the chat template."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import byte_words, sentence_words, tiny, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.gguf import kept_tokenizer
from linspec.checkpoints.gguf.pre_tokenizers import ALIKE, NAMES, PATTERNS, pre_tokenizer
from linspec.checkpoints.gguf.reader import read_gguf
from linspec.checkpoints.gguf.tokenizer import load_gguf_tokenizer, read_tokenizer
from linspec.checkpoints.hub import load_config, load_tokenizer
from linspec.checkpoints.tokenizer import PlainTokenizer, load_text_tokenizer
from linspec.errors import CheckpointError
from linspec.llm import LLM

PIECES = [
    *("1", "12", "1234567890123", "٣٤", "１２", "²½", "'S", "'ll", "DON'T", "İ", "ǅ", "Ünï"),
    *(
        "\r\n",
        "\n\n",
        "\t",
        " ",
        "  ",
        " " * 17,
        "a ",
        "🙂",
        "👨‍👩",
        "e\u0301",
        "中文",
        "かな",
        "ﬁ",
    ),
    *(
        "<|end|>",
        "<tool>",
        "<|start|>",
        "_x",
        "-->",
        "a/b\n",
        "$5.00",
        "x+=1;",
        "…",
        "\u00a0",
        "\u2028",
    ),
]
TEXTS = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(PIECES)), max_size=10).map("".join)
# as the tokenizer.json files of Llama 3, Qwen 2 and GPT-4o spell them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll"
    r"|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


ORIGINALS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(LLAMA3.replace("{1,3}", "")),
    "gpt-4o": _split(GPT4O),
}


@pytest.mark.parametrize("name", sorted(ORIGINALS))
@settings(max_examples=settings().max_examples * 15)
@given(text=TEXTS)
def test_texts_are_cut_as_the_original_tokenizers_cut_them(name: str, text: str) -> None:
    ours = pre_tokenizer(name, Path("x"))
    assert ours.pre_tokenize_str(text) == ORIGINALS[name].pre_tokenize_str(text)


@pytest.mark.parametrize("name", sorted(PATTERNS))
@given(text=TEXTS)
def test_no_cut_loses_a_byte(name: str, text: str) -> None:
    cut = "".join(part for part, _ in pre_tokenizer(name, Path("x")).pre_tokenize_str(text))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert cut == "".join(part for part, _ in whole)


def test_numbers_are_cut_by_name() -> None:
    expected = {
        "gpt-2": ["Ġ12345"],
        "smollm": ["Ġ", *"12345"],
        "qwen2": ["Ġ", *"12345"],
        "llama-bpe": ["Ġ", "123", "45"],
        "deepseek-v3": ["Ġ", "123", "45"],
        "deepseek-coder": ["Ġ", *"12345"],
    }
    for name, parts in expected.items():
        found = pre_tokenizer(name, Path("x")).pre_tokenize_str(" 12345")
        assert [part for part, _ in found] == parts, name


def test_every_other_name_means_a_known_cut() -> None:
    assert set(ALIKE) <= set(PATTERNS) and set(NAMES.values()) == set(PATTERNS)


def test_a_file_that_names_no_cut_is_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = byte_words()
    del keys["tokenizer.ggml.pre"]
    read_tokenizer(read_gguf(saved(tmp_path, keys)))
    assert "does not name its pre-tokenizer" in caplog.text


def saved(folder: Path, keys: dict[str, Any]) -> Path:
    """A file with these keys and an embedding for their tokens, and nothing else."""
    size = len(keys["tokenizer.ggml.tokens"])
    rows = np.zeros((size, 32), np.float32)
    tensors = {"token_embd.weight": ("F32", rows.shape, rows.tobytes())}
    return write(folder / "t.gguf", {"general.architecture": "llama", **keys}, tensors)


@settings(max_examples=settings().max_examples * 5)
@given(text=TEXTS)
def test_all_ways_to_read_a_tokenizer_give_the_same_ids(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = saved(
        tmp_path_factory.mktemp("t"), byte_words() | {"tokenizer.ggml.add_bos_token": True}
    )
    plain, whole = load_text_tokenizer(path), load_tokenizer(path)
    assert isinstance(plain, PlainTokenizer)
    whole.save_pretrained(path.parent / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(path.parent / "saved")
    for special in (True, False):
        ids = plain(text, add_special_tokens=special)["input_ids"]
        assert ids == whole(text, add_special_tokens=special)["input_ids"]
        assert ids == again(text, add_special_tokens=special)["input_ids"]
        assert ids[:1] == [1] if special else ids[:1] != [1] or text.startswith("<|start|>")
    for hidden in (True, False):
        shown = plain.decode(ids, skip_special_tokens=hidden)
        assert shown == whole.decode(ids, skip_special_tokens=hidden)
    assert shown == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_special_tokens_are_not_shown_and_others_are(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(saved(tmp_path, byte_words()))
    ids = tokenizer("<|start|>ab<tool><|end|>")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "<|start|>ab<tool><|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")


@pytest.mark.parametrize(
    ("change", "first", "last"),
    [
        ({}, None, None),
        ({"tokenizer.ggml.add_bos_token": True}, 1, None),
        ({"tokenizer.ggml.add_eos_token": True}, None, 0),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, 1, 0),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}, 1, None),
        ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": None}, None, None),
    ],
    ids=str,
)
def test_tokens_around_a_text(
    change: dict[str, Any], first: int | None, last: int | None, tmp_path: Path
) -> None:
    keys = {name: value for name, value in (byte_words() | change).items() if value is not None}
    ids = load_tokenizer(saved(tmp_path, keys))("zz")["input_ids"]
    assert (ids[0] == 1) == (first == 1) and (ids[-1] == 0) == (last == 0)


def test_a_whole_piece_wins_where_merges_are_ignored(tmp_path: Path) -> None:
    keys = byte_words()
    # "the" can be made of no pairs, so only a whole piece gives it
    keys["tokenizer.ggml.tokens"].append("the")
    keys["tokenizer.ggml.token_type"] = np.append(keys["tokenizer.ggml.token_type"], 1)
    number = len(keys["tokenizer.ggml.tokens"]) - 1
    for name, found in (("llama-bpe", True), ("smollm", False)):
        keys["tokenizer.ggml.pre"] = name
        assert (number in load_tokenizer(saved(tmp_path, keys))("the")["input_ids"]) == found


def test_qwen_composes_characters_first(tmp_path: Path) -> None:
    for name, equal in (("qwen2", True), ("llama-bpe", False)):
        tokenizer = load_tokenizer(saved(tmp_path, byte_words() | {"tokenizer.ggml.pre": name}))
        ids = [tokenizer(text)["input_ids"] for text in ("e\u0301", "\u00e9")]
        assert (ids[0] == ids[1]) == equal


def slow_ids(text: str, keys: dict[str, Any], *, prefix: bool = True) -> list[int]:
    """SentencePiece's rule, step by step: join the neighbours whose piece has the highest score."""
    tokens = keys["tokenizer.ggml.tokens"]
    score = {
        piece: float(value)
        for piece, value, kind in zip(
            tokens, keys["tokenizer.ggml.scores"], keys["tokenizer.ggml.token_type"], strict=True
        )
        if kind == 1
    }
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b), -at) for at, (a, b) in enumerate(pairwise(parts))]
        known = [(value, at) for value, at in joined if value is not None]
        if not known:
            break
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [tokens.index(part)] if part in score else [3 + byte for byte in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
@settings(max_examples=settings().max_examples * 15)
@given(text=st.text(alphabet="abcdeghinorst.,é日 ☃\n", max_size=40))
def test_pieces_are_joined_by_score(
    prefix: bool, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changes = {} if prefix else {"tokenizer.ggml.add_space_prefix": False}
    keys = sentence_words(**changes)
    tokenizer = load_tokenizer(saved(tmp_path_factory.mktemp("t"), keys))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == slow_ids(text, keys, prefix=prefix)
    assert tokenizer.decode(ids) == text


def test_sentence_pieces_begin_with_bos_unless_the_file_says_no(tmp_path: Path) -> None:
    assert load_tokenizer(saved(tmp_path, sentence_words()))("a")["input_ids"][0] == 1
    keys = sentence_words() | {"tokenizer.ggml.add_bos_token": False}
    assert load_tokenizer(saved(tmp_path, keys))("a")["input_ids"][0] != 1


def test_a_file_without_tokens_says_so(tmp_path: Path) -> None:
    keys = {"general.architecture": "llama"}
    rows = np.zeros((4, 32), np.float32)
    path = write(tmp_path / "t.gguf", keys, {"token_embd.weight": ("F32", (4, 32), rows.tobytes())})
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens is missing"):
        load_tokenizer(path)


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    _, path = tiny("llama", tmp_path / "m.gguf")
    file = read_gguf(path)
    tensors = {n: (t.kind.name, t.shape, file.raw(n).tobytes()) for n, t in file.tensors.items()}
    tokens = [*file.keys["tokenizer.ggml.tokens"], "<|im_end|>"]
    kinds = np.append(file.keys["tokenizer.ggml.token_type"], np.int32(3))
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    keys = file.keys | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.chat_template": template,
    }
    path = write(tmp_path / "chat.gguf", keys, tensors)
    assert load_config(path).eos_ids == (0, len(tokens) - 1)
    llm = LLM(path)
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "ab<|im_end|>"
    assert llm.encode(text)[-1] == len(tokens) - 1


# ---- kept


def test_a_tokenizer_that_takes_long_is_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_tokenizer, "FEW", 10)
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    file = read_gguf(saved(tmp_path, sentence_words()))
    built = read_tokenizer(file).to_str()
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    assert kept.read_text("utf-8") == built == read_tokenizer(file).to_str()
    kept.write_text("{")
    assert read_tokenizer(file).to_str() == built == kept.read_text("utf-8")
    kept.write_text(built.replace('"unk_token":"<unk>"', '"unk_token":"</s>"'))
    assert read_tokenizer(file).to_str() != built
    monkeypatch.setenv(kept_tokenizer.SWITCH, "1")
    assert read_tokenizer(file).to_str() == built


def test_a_tokenizer_is_built_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_tokenizer, "FEW", 10)
    (tmp_path / "cache").write_text("no directory")
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    assert read_tokenizer(read_gguf(saved(tmp_path, sentence_words()))).encode("a b").ids
