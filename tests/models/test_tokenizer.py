"""Tokenizers that are read without transformers: the same ids and texts, and when they are not read so."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import scratch, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.checkpoints.quantized import save_quantized
from linspec.checkpoints.tokenizer import PlainTokenizer, load_text_tokenizer, plain_tokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.errors import CheckpointError
from linspec.llm import LLM

END = "<|endoftext|>"
# what tokenizers are known to treat in a way of their own
PIECES = [
    "  ",
    "\n\n",
    "\t",
    " \u00a0",
    "\u2028",
    "\r\n",
    "\x00",
    END,
    "<s>",
    "</s>",
    "<|endof",
    "n't",
]
PIECES += [
    "e\u0301",
    "\u00e9",
    "\U0001f468\u200d\U0001f469",
    "\ufffd",
    "中文",
    "ﬁ",
    " .",
    " ,",
    "def f(x):",
]
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES)), max_size=8).map("".join)


def save(backend: Tokenizer, folder: Path, **entries: object) -> Path:
    """A directory as transformers writes it."""
    PreTrainedTokenizerFast(tokenizer_object=backend, **entries).save_pretrained(folder)
    return folder


def edit(folder: Path, **entries: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


def sentence_pieces() -> Tokenizer:
    """In the manner of Llama: bytes for what is unknown, a space in front, a token in front of a text."""
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    symbols += ["▁", *"abcdefinx", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    # settings that the file keeps and that a call does not follow
    backend.enable_truncation(3)
    backend.enable_padding(length=6, pad_id=2, pad_token="</s>")
    return backend


@functools.cache
def folders() -> dict[str, Path]:
    home = scratch("tokenizer")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "f": 2, END: 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = home / "bare"
    bare.mkdir()
    words.save(str(bare / "tokenizer.json"))
    return {
        "embedded-softmax": resolve("embedded-softmax"),
        "tiny": tiny_folder(home / "tiny"),
        "sentence pieces": save(
            sentence_pieces(),
            home / "pieces",
            **named,
            add_prefix_space=True,
            clean_up_tokenization_spaces=True,
        ),
        "words": save(words, home / "words", unk_token="<unk>", eos_token=END, model_max_length=2),
        "no configuration": bare,
    }


def tiny_folder(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def pair(name: str) -> tuple[PlainTokenizer, Any]:
    """Ours and transformers' own."""
    ours = plain_tokenizer(folders()[name])
    assert ours is not None
    return ours, load_tokenizer(folders()[name])


NAMES = ("embedded-softmax", "tiny", "sentence pieces", "words", "no configuration")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(text=TEXTS)
def test_ids_and_texts_are_those_of_transformers(name: str, text: str) -> None:
    ours, theirs = pair(name)
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special, verbose=False)["input_ids"]
        assert ours(text, add_special_tokens=special)["input_ids"] == ids
        for skip in (True, False):
            again = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == again
    assert ours(text)["input_ids"] == theirs(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_texts_of_any_ids(name: str, data: st.DataObject) -> None:
    """Drafts and samples are not what an encoder would write, half characters among them."""
    ours, theirs = pair(name)
    ids = data.draw(st.lists(st.integers(0, len(theirs) - 1), max_size=12))
    for skip in (True, False):
        text = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(tuple(ids), skip_special_tokens=skip) == text


def test_embedded_models_are_plain() -> None:
    assert plain_tokenizer(resolve("embedded-aug")) is not None


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.eos_token_id == theirs.eos_token_id


def test_what_ids_and_texts_do_not_need_transformers_answers() -> None:
    ours, theirs = pair("embedded-softmax")
    assert ours.get_vocab() == theirs.get_vocab()
    both = (ours, theirs)
    one, other = [each(["a b", ""], verbose=False)["input_ids"] for each in both]
    assert one == other
    one, other = [each("a b", return_offsets_mapping=True)["offset_mapping"] for each in both]
    assert one == other
    assert copy.copy(ours).decode(ours("a b")["input_ids"]) == "a b"
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018


def lone_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def old_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def entry(**entries: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder, **entries)


def ordinary_end(folder: Path) -> None:
    """The end of a text is a token like others for tokenizer.json."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    for token in data["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(data), "utf-8")


@pytest.mark.parametrize(
    "change",
    [
        entry(tokenizer_class="LlamaTokenizer"),
        entry(auto_map={"AutoTokenizer": ["code.Own", None]}),
        entry(add_bos_token=True),
        entry(add_eos_token=False),
        entry(split_special_tokens=True),
        entry(fix_mistral_regex=True),
        entry(added_tokens_decoder={"3": {"content": "ab", "special": False}}),
        entry(bos_token="<s>"),
        entry(image_token="<image>"),
        entry(eos_token={"__type": "AddedToken", "content": "<|eos|>", "lstrip": True}),
        entry(extra_special_tokens=["<new>"]),
        entry(extra_special_tokens={"image_token": "<|eos|>"}),
        old_file("special_tokens_map.json", '{"bos_token": "<s>"}'),
        old_file("added_tokens.json", '{"<new>": 300}'),
        ordinary_end,
        lone_json,
        old_file("tokenizer.json", "{"),
        old_file("tokenizer_config.json", "{"),
        old_file("tokenizer_config.json", "[]"),
        old_file("tokenizer_config.json", "\ufeff{}"),
    ],
)
def test_what_transformers_would_change_is_left_to_it(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "m")
    assert plain_tokenizer(folder) is not None
    change(folder)
    assert plain_tokenizer(folder) is None


@pytest.mark.parametrize(
    "entries",
    [
        {"bos_token": None, "pad_token": "<|eos|>"},
        {"extra_special_tokens": ["<|eos|>"]},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": False},
        {"add_prefix_space": True, "model_max_length": 3, "padding_side": "left"},
    ],
)
def test_entries_without_effect(entries: dict[str, object], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit(folder, **entries)
    ours, theirs = plain_tokenizer(folder), load_tokenizer(folder)
    assert ours is not None
    for text in ("ab cd, end .", " ab <|eos|> 's"):
        ids = theirs(text, verbose=False)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_spaces_between_words_are_cleaned_up_by_transformers(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, ".": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = save(words, tmp_path / "m", clean_up_tokenization_spaces=True)
    assert plain_tokenizer(folder) is None
    assert load_text_tokenizer(folder).decode([0, 1]) == "a."
    edit(folder, clean_up_tokenization_spaces=False)
    assert plain_tokenizer(folder) is not None
    assert load_text_tokenizer(folder).decode([0, 1]) == "a ."


def test_added_token_is_not_lost(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit(folder, extra_special_tokens=["<new>"])
    assert len(load_text_tokenizer(folder)("<new>")["input_ids"]) == 1


def test_tokenizer_that_nobody_can_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_text_tokenizer(folder)


@pytest.mark.slow
def test_generating_from_a_quantized_directory_imports_neither_transformers_nor_a_compiler(
    tmp_path: Path,
) -> None:
    small = tmp_path / "small"
    with save_quantized(load_for("embedded-aug", 4), load_tokenizer("embedded-aug"), small, 4, {}):
        pass
    code = (
        "import sys\nfrom linspec.cli import app\n"
        "app(['generate', sys.argv[1], '--prompt', 'def f', '--max-tokens', '4'], standalone_mode=False)\n"
        "found = {'transformers', 'huggingface_hub', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    words = [sys.executable, "-c", code, str(small)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip("\n")
        == LLM(small).generate("def f", SamplingParams(max_tokens=4))[0].text
    )
