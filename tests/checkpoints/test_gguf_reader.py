"""Damaged, cut and hostile files: a named error at once, never a traceback, a loop or a large array."""

from __future__ import annotations

import functools
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import scratch
from gguf_files import byte_words, packed, string, tiny, write, written
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.checkpoints.gguf.config import read_config
from linspec.checkpoints.gguf.model import load_gguf
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.gguf.tokenizer import read_tokenizer
from linspec.checkpoints.hub import load_model, resolve
from linspec.errors import CheckpointError

HUGE = (0, 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**42 + 1, 2**63 - 1, 2**63, 2**64 - 1)
SECONDS = 5.0


@functools.cache
def folder() -> Path:
    return scratch("gguf")


def placed(content: bytes, name: str) -> Path:
    """A file that was renamed into its place, so that the reader knows it for another one."""
    aside = folder() / f"{name}.new"
    aside.write_bytes(content)
    return aside.replace(folder() / name)


@functools.cache
def sound() -> bytes:
    return tiny("llama", folder() / "sound.gguf", "Q8_0", num_hidden_layers=1)[1].read_bytes()


@functools.cache
def header_bytes() -> int:
    path = folder() / "sound.gguf"
    sound()
    return min(info.offset for info in read_gguf(path).tensors.values())


def survives(content: bytes) -> bool:
    """Whether the file is read; False for an error that names it. Anything else fails the test."""
    path = placed(content, "damaged.gguf")
    began, error = time.process_time(), None
    try:
        file = read_gguf(path)
        read_config(file)
        read_tokenizer(file)
        load_gguf(path, torch.float32)
    except CheckpointError as found:
        error = str(found)
    assert time.process_time() - began < SECONDS
    assert error is None or str(path) in error
    return error is None


def damaged(rng: random.Random) -> bytes:
    """The sound file with a cut, other bytes, or a huge number somewhere in its header."""
    content, end = bytearray(sound()), header_bytes()
    how, at = rng.randrange(5), rng.randrange(end)
    if how == 0:
        return bytes(content[:at])
    if how == 1:
        content[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
    elif how == 2:
        content[at : at + 4] = struct.pack("<I", rng.choice(HUGE) & 0xFFFFFFFF)
    elif how == 3:
        del content[at : at + rng.randrange(1, 64)]
    else:
        for _ in range(rng.choice((1, 1, 4, 16))):
            content[rng.randrange(end)] = rng.randrange(256)
    return bytes(content)


def test_the_sound_file_survives() -> None:
    assert survives(sound())


@settings(max_examples=settings().max_examples * 20)
@given(st.integers(0, 2**48))
def test_a_damaged_header_gives_a_model_or_a_named_error(seed: int) -> None:
    survives(damaged(random.Random(seed)))


@pytest.mark.slow
@settings(max_examples=6000)
@given(st.integers(2**48, 2**56))
def test_thousands_of_damaged_headers_give_a_model_or_a_named_error(seed: int) -> None:
    survives(damaged(random.Random(seed)))


def test_a_file_cut_anywhere_is_named() -> None:
    step = 97
    for end in [*range(200), *range(200, header_bytes(), step), len(sound()) - 33]:
        assert not survives(sound()[:end])


@pytest.mark.slow
def test_every_byte_of_a_header_turned_over_is_survived() -> None:
    for at in range(header_bytes()):
        content = bytearray(sound())
        content[at] ^= 0xFF
        survives(bytes(content))


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return string("a") + struct.pack("<IIQ", 9, kind, count) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs 4 bytes and 0 are left"),
        (b"GGML" + bytes(60), "is no GGUF file"),
        (b"FUGG" + bytes(60), "is no GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
        (b"GGUF" + struct.pack("<III", 1, 1, 1), "version 1, linspec reads versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 4, 1, 1), "version 4"),
        (header(2**63, 0), "9223372036854775808 tensors"),
        (header(0, 2**64 - 1), "18446744073709551615 keys"),
        (header(0, 1, string("")), "is empty or there twice"),
        (header(0, 2, 2 * (string("a") + packed(5))), "is empty or there twice"),
        (header(0, 1, struct.pack("<Q", 2**63)), "claims 9223372036854775808 bytes"),
        (header(0, 1, string("a") + struct.pack("<I", 13)), "unknown type 13"),
        (header(0, 1, array(9, 1)), "array of the unknown type 9"),
        (header(0, 1, array(4, 2**40)), "claims 1099511627776 elements"),
        (header(0, 1, array(8, 2**20, bytes(4096))), "claims 1048576 elements"),
        (header(0, 1, struct.pack("<Q", 1) + b"\xff"), "is not UTF-8"),
        (header(1, 0, info("x" * 64, (1,))), "names have 1 to 63 bytes"),
        (header(1, 0, info("", (1,))), "names have 1 to 63 bytes"),
        (header(1, 0, info("x", ()) + bytes(64)), "claims 0 dimensions"),
        (header(1, 0, info("x", (1,) * 5) + bytes(64)), "claims 5 dimensions"),
        (header(1, 0, info("x", (0, 4)) + bytes(64)), "claims the shape"),
        (header(1, 0, info("x", (2**42 + 1, 2)) + bytes(64)), "claims the shape"),
        (header(1, 0, info("x", (2**63 - 1, 2)) + bytes(64)), "claims the shape"),
        (header(1, 0, info("x", (32,), kind=99) + bytes(64)), "ik_llama.cpp"),
        (header(1, 0, info("x", (32,), kind=31) + bytes(64)), "type 31, which linspec cannot read"),
        (header(1, 0, info("x", (33,), kind=8) + bytes(99)), "rows of 33, Q8_0 blocks are of 32"),
        (header(1, 0, info("x", (8,), offset=8) + bytes(99)), "multiple of 32"),
        (header(1, 0, info("x", (8,), offset=2**64 - 32) + bytes(99)), "lie in the file"),
        (header(2, 0, 2 * info("x", (8,)) + bytes(128)), "is there twice"),
        (header(2, 0, info("x", (8,)) + info("y", (8,)) + bytes(128)), "touch no other tensor"),
        *(
            (header(0, 1, string("general.alignment") + packed(number)), "power of two")
            for number in (0, 3, 2**31, "32", True)
        ),
    ],
)
def test_hostile_files_are_refused_by_name(content: bytes, message: str) -> None:
    path = placed(content, "hostile.gguf")
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.model": "rwkv"}, "tokenizers of the kind 'rwkv'"),
    ({"tokenizer.ggml.pre": "llama-bpa"}, "did you mean 'llama-bpe'"),
    ({"tokenizer.ggml.merges": ["a"]}, "describes no sound tokenizer"),
    ({"tokenizer.ggml.merges": ["a q", ""]}, "describes no sound tokenizer"),
    ({"tokenizer.ggml.merges": 5}, "must be a list of texts"),
    ({"tokenizer.ggml.eos_token_id": 10_000}, "eos_token_id is 10000"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, 1 of them different"),
    ({"tokenizer.ggml.token_type": np.array([1], np.int32)}, "1 kinds of tokens"),
    ({"tokenizer.ggml.token_type": np.array([1.5], np.float32)}, "list of integer numbers"),
    ({"tokenizer.ggml.add_bos_token": 1}, "must be true or false"),
    ({"tokenizer.ggml.model": "llama"}, "scores"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=str)
def test_tokenizers_that_contradict_themselves_are_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    keys = byte_words() | {"general.architecture": "llama"} | change
    rows = np.zeros((288, 32), np.float32)
    embedding = {"token_embd.weight": ("F32", rows.shape, rows.tobytes())}
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(read_gguf(write(tmp_path / "t.gguf", keys, embedding)))


def test_a_long_piece_does_not_hold_the_reader(tmp_path: Path) -> None:
    tokens = ["<unk>", "x" * 2**20]
    keys = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(2, np.float32),
    }
    rows = np.zeros((2, 32), np.float32)
    path = write(tmp_path / "t.gguf", keys, {"token_embd.weight": ("F32", (2, 32), rows.tobytes())})
    with pytest.raises(CheckpointError, match="a token of 1048576 characters"):
        read_tokenizer(read_gguf(path))


def test_a_file_is_known_by_its_name_or_its_beginning(tmp_path: Path) -> None:
    cases: list[tuple[str, bytes, bool]] = [
        ("model", written({}, {}), True),
        ("model.gguf", b"", True),
        ("model.bin", b"PK", False),
    ]
    for name, content, expected in cases:
        (tmp_path / name).write_bytes(content)
        assert is_gguf(tmp_path / name) == expected
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("load", [resolve, load_model])
def test_what_is_no_model_is_refused_with_what_would_be(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK")
    for name in ("x.bin", "none.gguf"):
        with pytest.raises(CheckpointError, match="of a GGUF file"):
            load(tmp_path / name)
