"""Data: every kind of source, the split, and a clear error for every kind of broken source."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from linspec.errors import InputError
from linspec.models.decoder import Decoder
from linspec.train import data
from linspec.train.data import (
    Windows,
    end_of_text,
    is_held_out,
    load_documents,
    tokenize,
    train_and_heldout,
)


def _saved(numbers: np.ndarray) -> bytes:
    """As numpy writes it."""
    file = io.BytesIO()
    np.save(file, numbers)
    return file.getvalue()


def test_file_folder_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("second")
    (tmp_path / "texts" / "a.txt").write_text("first")
    (tmp_path / "texts" / "deep" / "c.txt").write_text("third")
    (tmp_path / "texts" / ".hidden").write_text("never")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert load_documents([tmp_path / "texts"]) == ["first", "second", "third"]
    assert load_documents([lines], field="body") == ["one", "two"]
    assert load_documents([lines, tmp_path / "texts" / "a.txt"], field="body")[-1] == "first"


def test_datasets_directory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "set"))
    assert load_documents([tmp_path / "set"]) == ["one", "two"]
    with pytest.raises(InputError, match="no column 'body'"):
        load_documents([tmp_path / "set"], field="body")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_documents([tmp_path / "nowhere"])


def test_empty_file_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    for source in ("empty.txt", "folder"):
        with pytest.raises(InputError, match=f"{source}: no text found"):
            load_documents([tmp_path / source])


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text \(byte 2\)"):
        load_documents([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad\.jsonl:2 is not JSON"),
        ('{"other": "x"}', r"bad\.jsonl:2 has no text under 'text'; it has: other\. Use --field"),
        ('{"text": 3}', r"bad\.jsonl:2 has no text under 'text'"),
        ('["x"]', r"bad\.jsonl:2 has no text under 'text'; it has: list"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        load_documents([path])


def test_split_is_complete_and_disjoint(corpus: Path) -> None:
    both = load_documents([corpus])
    train, held = (load_documents([corpus], split) for split in ("train", "heldout"))
    assert sorted(train + held) == sorted(both) and not set(train) & set(held)
    assert all(is_held_out(text.encode()) for text in held)
    assert train_and_heldout([corpus]) == (train, held)


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    texts = [t for t in map(str, range(100)) if not is_held_out(t.encode())]
    (tmp_path / "one.txt").write_text(texts[0])
    with pytest.raises(InputError, match="no document falls into the 'heldout' split"):
        load_documents([tmp_path / "one.txt"], "heldout")


def test_single_file_is_cut_into_both_splits(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    train, held = train_and_heldout([tmp_path / "one.txt"])
    assert train[0] + held[0] == text and len(held[0]) == len(text) // 20


def test_what_is_held_out_of_a_source_does_not_depend_on_the_others(
    corpus: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "one.txt").write_text(text)
    alone = [train_and_heldout([source]) for source in (corpus, tmp_path / "one.txt")]
    train, held = train_and_heldout([corpus, tmp_path / "one.txt"])
    assert train == alone[0][0] + alone[1][0] and held == alone[0][1] + alone[1][1]
    assert text.startswith(train[-1]) and text.endswith(held[-1])


def test_tokens_are_closed_documents_and_cached(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    texts = ["the old fox", "a red dog"]
    stream = tokenize(texts, tokenizer, 0)
    ends = np.flatnonzero(np.asarray(stream) == 0)
    assert len(ends) == 2 and ends[-1] == len(stream) - 1
    assert tokenizer.decode(stream[: ends[0]]) == texts[0]
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert np.array_equal(tokenize(texts, tokenizer, 0), stream)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        _saved(np.array([1, 2, 3], np.int32))[:-1],
        _saved(np.array([1, 2, 99999], np.int32)),
        _saved(np.array([1.0, 2.0])),
        _saved(np.zeros((2, 2), np.int32)),
    ],
)
@pytest.mark.parametrize("slices", [1, 2])
def test_damaged_kept_tokens_were_an_unexpected_error(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    slices: int,
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "_SLICE", 20 // slices)
    texts = ["the old fox", "a red dog"]
    expected = np.array(tokenize(texts, tokenizer, 0))
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(content)
    if slices > 1:
        # of a run that was killed
        path.rename(path.with_name(f"{path.stem}-0.npy"))
    assert np.array_equal(tokenize(texts, tokenizer, 0), expected)


def test_unwritable_cache_is_no_reason_to_stop(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "file"))
    assert len(tokenize(["the old fox"], tokenizer, 0)) > 1


def test_end_of_text_comes_from_tokenizer_or_model(
    tokenizer: PreTrainedTokenizerFast, tiny_teacher: Callable[..., Decoder]
) -> None:
    config = tiny_teacher().config
    assert end_of_text(tokenizer, config) == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert end_of_text(bare, config) == 0


def test_windows_depend_on_seed_step_and_process_only() -> None:
    stream = np.arange(1000)
    first, again = Windows(stream, 16, 3), Windows(stream, 16, 3)
    assert first.batch(5, 4).equal(again.batch(5, 4))
    assert first.batch(5, 4).shape == (4, 17)
    assert not first.batch(6, 4).equal(again.batch(5, 4))
    assert not Windows(stream, 16, 3, process=1).batch(5, 4).equal(first.batch(5, 4))
    assert not Windows(stream, 16, 4).batch(5, 4).equal(first.batch(5, 4))


def test_windows_of_a_short_stream() -> None:
    assert Windows(np.arange(9), 16, 0).batch(0, 2).shape == (2, 9)
    with pytest.raises(InputError, match="too few"):
        Windows(np.arange(1), 16, 0)
