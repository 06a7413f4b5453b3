"""Model directories with one damaged file, for the fuzz tests.

    folder = workshop("int8")              # a sound directory of a kind, made once
    with damaged(folder, damage): ...      # inside, one of its files is not what it was

A damage is drawn by hypothesis: `damages(kind)` is a strategy of (file, new content).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import scratch, text_model, tiny_tokenizer
from hypothesis import strategies as st

from linspec.checkpoints.hub import load_model, save_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.checkpoints.quantized import save_quantized
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import HEADS
from linspec.models.linear import Quantizer

KINDS = ("llama", "aug", "int8", "int4")
# what stands where a number, a word, a list or an object should be
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        16.5,
        -0.5,
        1e-300,
        1e300,
        2**15,
        2**31,
        2**63,
        10**400,
    ),
    *("", "abc", "float99", "float32", "\ud800", "x" * 300, "../x", "5", "\0"),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3], [0.5], [[0.5, "abc"]], [2.0], [-1] * 5),
    *(float("nan"), float("inf"), float("-inf")),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "X9", 5, None)


@functools.cache
def workshop(kind: str) -> Path:
    """A sound directory of this kind, with Medusa heads in it."""
    folder = scratch("fuzz") / kind
    model = text_model("softmax" if kind == "llama" else "aug")
    if kind == "llama":
        # as it comes back: what the ordinary format cannot say is gone, and a drafter would notice
        model = load_model(save_model(model, tiny_tokenizer(), folder))
    config = HeadsConfig(width=model.config.width, vocab_size=model.config.vocab_size, heads=2)
    heads = MedusaHeads(config, model, [[0.5, 0.2], [0.3, 0.1]])
    heads.initialize(torch.Generator().manual_seed(0))
    if kind == "aug":
        save_model(model, tiny_tokenizer(), folder)
    if kind in ("llama", "aug"):
        save_drafter(heads, model, folder / "medusa")
        return folder
    bits = int(kind[-1])
    quantize_model(model, bits, {})
    heads.bind(model)
    with save_quantized(model, tiny_tokenizer(), folder, bits, {}) as aside:
        packed = PackedHeads.of(heads, Quantizer(bits, {}))
        HEADS.save(packed, model, aside / "medusa", bits, {})
    return folder


@functools.cache
def contents(kind: str) -> dict[str, bytes]:
    """What the files of a sound directory hold."""
    folder = workshop(kind)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def damaged(kind: str, file: str, content: bytes) -> Iterator[Path]:
    """The directory of this kind while one of its files holds `content`."""
    folder, sound = workshop(kind), contents(kind)[file]
    try:
        _put(folder / file, content)
        yield folder
    finally:
        _put(folder / file, sound)


def _put(path: Path, content: bytes) -> None:
    # a new file each time: the old one may still be mapped
    path.unlink()
    path.write_bytes(content)


@st.composite
def damages(draw: st.DrawFn, kind: str, ending: str) -> tuple[str, bytes]:
    """A file whose name ends with `ending`, and what to put there."""
    names = [name for name in contents(kind) if name.endswith(ending)]
    file = draw(st.sampled_from(names))
    rng = random.Random(draw(st.integers(0, 2**48)))
    content = contents(kind)[file]
    if rng.random() < 0.2:
        return file, _other_bytes(content, rng)
    if file.endswith(".safetensors"):
        return file, _other_tensors(content, rng)
    return file, _other_json(content, rng)


def _other_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, doubled, or with some bytes changed: those of a header more often than others."""
    how, at = rng.randrange(4), rng.randrange(len(content))
    if how == 0:
        return content[:at]
    if how == 1:
        return content + content[:at]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8))):
        changed[rng.randrange(min(len(content), 2000) if how == 2 else len(content))] = (
            rng.randrange(256)
        )
    return bytes(changed)


def _other_json(content: bytes, rng: random.Random) -> bytes:
    data = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = _changed(data, rng)
    return json.dumps(data).encode()


def _changed(data: Any, rng: random.Random) -> Any:
    """One value anywhere in `data` replaced, removed or added."""
    if not isinstance(data, dict | list) or not data or rng.random() < 0.05:
        return _value(rng)
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = rng.choice(keys)
    deeper = isinstance(data[key], dict | list) and data[key]
    if deeper and rng.random() < 0.85:
        data[key] = _changed(data[key], rng)
    elif rng.random() < 0.1:
        del data[key]
    elif rng.random() < 0.1 and isinstance(data, dict):
        data[rng.choice(("extra", "layers", "mixers", "group"))] = _value(rng)
    else:
        data[key] = _value(rng)
    return data


def _value(rng: random.Random) -> Any:
    """One of VALUES, as a copy: the next change may go into it."""
    return copy.deepcopy(rng.choice(VALUES))


def _other_tensors(content: bytes, rng: random.Random) -> bytes:
    """Another header before the same data, or other data behind the same header."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    how = rng.randrange(7)
    if how == 0:
        return _retyped(header, name, data, rng)
    if how == 1:
        header[name]["shape"] = rng.choice(([], [0], [-1], [2**62, 4], [1] * 70, ["a"], None, 3))
    elif how == 2:
        header[name]["data_offsets"] = rng.choice(([0, 0], [-8, 8], [0, 2**63], [8, 0], [0], None))
    elif how == 3:
        header[rng.choice(("other", "", "\ud800", "embed.weight"))] = header.pop(name)
    elif how == 4:
        header[name] = _value(rng)
    elif how == 5:
        _poison(header[name], data, rng)
    else:
        return struct.pack("<Q", rng.choice((0, 1, length + 1, 2**40, 2**64 - 1))) + content[8:]
    return _file(header, data)


def _retyped(header: dict[str, Any], name: str, data: bytearray, rng: random.Random) -> bytes:
    """A tensor said to be of another dtype; sometimes all tensors are laid out to fit."""
    entry, dtype = header[name], rng.choice(DTYPES)
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    if rng.random() < 0.3:
        entry["dtype"] = dtype
        return _file(header, data)
    laid, out = {}, bytearray()
    for each, old in header.items():
        if each == "__metadata__":
            continue
        begin, end = old["data_offsets"]
        part = bytes(data[begin:end])
        if each == name:
            count = 1
            for size in old["shape"]:
                count *= size
            width = sizes.get(dtype, 1) if isinstance(dtype, str) else 1
            part = (part * 8)[: count * width]
            old = old | {"dtype": dtype}
        laid[each] = old | {"data_offsets": [len(out), len(out) + len(part)]}
        out += part
    return _file(laid, out)


def _poison(entry: dict[str, Any], data: bytearray, rng: random.Random) -> None:
    """NaN, infinity or a huge number somewhere in a tensor of floats, noise in one of bytes."""
    begin, end = entry["data_offsets"]
    sizes = {"F32": 4, "BF16": 2}
    if entry["dtype"] not in sizes or begin == end:
        for _ in range(8 if begin < end else 0):
            data[rng.randrange(begin, end)] = rng.randrange(256)
        return
    size = sizes[entry["dtype"]]
    at = begin + rng.randrange((end - begin) // size) * size
    value = rng.choice((float("nan"), float("inf"), float("-inf"), 3e38))
    word = struct.pack("<f", value)
    data[at : at + size] = word if size == 4 else word[2:]


def _file(header: dict[str, Any], data: bytes | bytearray) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)
