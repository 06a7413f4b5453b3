"""Reading the container of a GGUF file, bounded by the file itself.

    file = read_gguf(Path("model.gguf"))
    file.keys["general.architecture"], file.tensors["token_embd.weight"].shape

The reader uses nothing in the file before it is checked: a count against the bytes that are left, a length
against a cap, an offset against the end, so no file makes the reader loop, allocate or jump. Layout: a
header, keys with values, descriptions of tensors, padding, the tensors' bytes.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch

from linspec.checkpoints.gguf.types import TensorType, floats, type_of
from linspec.checkpoints.tensors import check_finite
from linspec.errors import CheckpointError
from linspec.utils.messages import because, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_ENTRIES = 2**16
MOST_ELEMENTS = 2**24
LONGEST_STRING = 2**24
LONGEST_NAME = 63
LARGEST_ALIGNMENT = 2**16
MOST_DIMENSIONS = 4
STRING, ARRAY, BOOL, U32 = 8, 9, 7, 4
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
AGAIN = "copy or download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies; `shape` is [out, in], as in torch."""

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    offset: int

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it takes in the file."""
        return self.values // self.kind.block * self.kind.bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says: keys with values, and its tensors by name (offsets from the file's start).

    A value is a number, a bool, a string, a list of strings or an array of numbers.
    """

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor; raises CheckpointError if they cannot be read or are not finite."""
        info = self.tensors[name]
        tensor = floats(self.raw(name), info.kind, info.shape)
        check_finite(name, tensor, self.path)
        return tensor

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, in memory of their own: a file that shrinks later does no harm."""
        info = self.tensors[name]
        try:
            found = np.fromfile(self.path, np.uint8, info.bytes, offset=info.offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {because(error)}") from error
        if len(found) != info.bytes:
            raise CheckpointError(f"{self.path} became shorter while it was read; {AGAIN}")
        return found


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that is, or is called, a GGUF file."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """The keys and tensors of a file; raises CheckpointError when it is damaged or of another kind."""
    try:
        stat = os.stat(path)
        return _read(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError as error:
        raise CheckpointError(f"cannot read {because(error)}") from error


# loading asks for configuration, weights and tokenizer one after another
@functools.lru_cache(maxsize=1)
def _read(path: Path, size: int, changed: int, number: int) -> GgufFile:
    with path.open("rb") as file:
        return _Reader(file, path, size).whole()


class _Reader:
    """Reads from the front to the end of the descriptions, never past the end of the file."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self._file, self._path = file, path
        self._size = self._left = size

    def whole(self) -> GgufFile:
        tensors, keys = self._header()
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string("the name of a key")
            if not name or name in values:
                self._damaged(f"key {shown(repr(name))} is empty or there twice")
            values[name] = self._value(name)
        infos = [self._info() for _ in range(tensors)]
        placed = self._placed(infos, self._alignment(values))
        return GgufFile(self._path, values, placed)

    def _header(self) -> tuple[int, int]:
        """The counts of tensors and of keys."""
        magic = self._take(4, "the header")
        if magic != MAGIC:
            raise CheckpointError(
                f"{self._path} is no GGUF file: it begins with {shown(magic)}, not {MAGIC!r}; give a "
                "GGUF file of version 2 or 3, or a model directory"
            )
        version = self._number("<u4", "the version")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self._path} is a GGUF file of a big-endian machine, which linspec does not read; "
                "convert it with gguf_convert_endian of the package gguf"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path} is a GGUF file of version {version}, linspec reads versions 2 and 3; "
                "convert the model again with a current llama.cpp"
            )
        return self._count("tensors"), self._count("keys")

    def _count(self, what: str) -> int:
        count = int(self._number("<u8", f"the number of {what}"))
        if count > MOST_ENTRIES:
            self._damaged(f"it claims {count} {what}, and at most {MOST_ENTRIES} are read")
        return count

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left:
            self._damaged(f"{what} needs {count} bytes and {self._left} are left")
        found = self._file.read(count)
        if len(found) != count:
            self._damaged(f"it ends inside {what}")
        self._left -= count
        return found

    def _number(self, kind: str, what: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self._take(dtype.itemsize, what), dtype)[0].item()

    def _string(self, what: str) -> str:
        length = struct.unpack("<Q", self._take(8, what))[0]
        if length > LONGEST_STRING:
            self._damaged(f"{what} claims {length} bytes, and at most {LONGEST_STRING} are read")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self._damaged(f"{what} is not UTF-8")

    def _value(self, name: str) -> Any:
        what = f"the value of {shown(repr(name))}"
        kind = self._number("<u4", what)
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            self._damaged(f"{what} is of the unknown type {kind}")
        number = self._number(SCALARS[kind], what)
        return bool(number) if kind == BOOL else number

    def _array(self, what: str) -> Any:
        kind = self._number("<u4", what)
        count = int(self._number("<u8", what))
        if kind not in SCALARS and kind != STRING:
            self._damaged(f"{what} is an array of the unknown type {kind}")
        least = 8 if kind == STRING else np.dtype(SCALARS[kind]).itemsize
        if count > min(MOST_ELEMENTS, self._left // least):
            self._damaged(f"{what} claims {count} elements and {self._left} bytes are left")
        if kind == STRING:
            return [self._string(what) for _ in range(count)]
        found = np.frombuffer(self._take(count * least, what), SCALARS[kind])
        return found.astype(bool) if kind == BOOL else found

    def _info(self) -> TensorInfo:
        name = self._string("the name of a tensor")
        if not name or len(name.encode()) > LONGEST_NAME:
            self._damaged(f"a tensor is called {shown(repr(name))}; names have 1 to 63 bytes")
        what = f"tensor {name!r}"
        rank = self._number("<u4", what)
        if not 1 <= rank <= MOST_DIMENSIONS:
            self._damaged(f"{what} claims {rank} dimensions; there can be 1 to {MOST_DIMENSIONS}")
        # the fastest dimension comes first in the file
        shape = tuple(int(self._number("<u8", what)) for _ in range(rank))[::-1]
        kind = type_of(self._number("<u4", what), name, self._path)
        info = TensorInfo(name, shape, kind, int(self._number("<u8", what)))
        if min(shape) < 1 or max(shape) >= 2**31 or info.values > 8 * self._size:
            self._damaged(f"{what} claims the shape {list(shape)} in a file of {self._size} bytes")
        if shape[-1] % kind.block:
            self._damaged(f"{what} has rows of {shape[-1]}, {kind.name} blocks are of {kind.block}")
        return info

    def _alignment(self, values: dict[str, Any]) -> int:
        found = values.get("general.alignment", DEFAULT_ALIGNMENT)
        sound = type(found) is int and 1 <= found <= LARGEST_ALIGNMENT and found & (found - 1) == 0
        if not sound:
            self._damaged(
                f"general.alignment is {shown(found)}; it must be a power of two of at most "
                f"{LARGEST_ALIGNMENT}"
            )
        return int(found)

    def _placed(self, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name, with offsets from the start of the file; none overlaps another."""
        begin = -(-(self._size - self._left) // alignment) * alignment
        placed: dict[str, TensorInfo] = {}
        end = begin
        for info in sorted(infos, key=lambda each: each.offset):
            if info.name in placed:
                self._damaged(f"tensor {info.name!r} is there twice")
            start = begin + info.offset
            if info.offset % alignment or start < end or start + info.bytes > self._size:
                self._damaged(
                    f"tensor {info.name!r} claims the bytes {start} to {start + info.bytes} of "
                    f"{self._size}; they must begin at a multiple of {alignment}, lie in the file "
                    "and touch no other tensor"
                )
            placed[info.name] = TensorInfo(info.name, info.shape, info.kind, start)
            end = start + info.bytes
        return placed

    def _damaged(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is damaged or cut short: {reason}; {AGAIN}")
