"""One file of a prefix store: a text, and what a slot remembers of it.

    content = pack(seed, tokens, pages, rest)
    kept = unpack(read(path), seed, tokens, states)

Files are read, never mapped: one that another process cuts would end this one, and one that it changes would
change what a slot was given.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import load, save

from linspec.engine.prefix_tree import as_tokens, common
from linspec.kernels.step_plan import PAGE
from linspec.state.pages import Page
from linspec.state.sequence_states import Pages, SequenceStates

_FORMAT = "3"
# of the header, in front of it
_LENGTH = 8
_ABOUT, _TOKENS = "__metadata__", "tokens"


class Kept(NamedTuple):
    """The state of a text: its tokens, what is held beside pages, and its pages from a position on."""

    tokens: array[int]
    rest: list[Any] | None
    pages: Callable[[int], list[Pages]]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.tokens)


def pack(seed: str, tokens: array[int], pages: Sequence[Pages], rest: list[Any] | None) -> bytes:
    """The content of a file; seed: of the model and the tenant that it is for."""
    tensors = {_TOKENS: torch.tensor(tokens.tolist())}
    for part, each in enumerate(zip(*pages, strict=True)):
        for name in ("keys", "values"):
            rows = torch.cat([getattr(page, name) for page in each], dim=2)
            # the last page may go on behind the text
            tensors[f"rows.{part}.{name}"] = rows[:, :, : len(tokens)]
    places = []
    for part, copy in enumerate(rest or ()):
        places.append([copy.length, copy.base_position])
        for name in ("keys", "values", "sums"):
            if getattr(copy, name) is not None:
                tensors[f"rest.{part}.{name}"] = getattr(copy, name)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {"format": _FORMAT, "seed": seed, "places": json.dumps(places)}
    return save(kept, about | {"sum": _checksum(kept, about)})


def _checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> str:
    """Of all that a slot would be given: a disk that forgets a bit must not change an answer."""
    shapes = {name: (str(each.dtype), list(each.shape)) for name, each in sorted(tensors.items())}
    found = zlib.crc32(json.dumps([about["seed"], about["places"], shapes]).encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file to read, and how many bytes it has.

    Raises OSError for a link, and ValueError for a pipe, which would be waited for.
    """
    held = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        about = os.fstat(held)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no file")
        with open(held, "rb", closefd=False) as file:
            yield file, about.st_size
    finally:
        os.close(held)


def read(path: Path) -> bytes:
    """The content of a file; raises OSError or ValueError where there is none."""
    with _opened(path) as (file, size):
        return file.read(size)


def read_beginning(path: Path) -> tuple[str, array[int]]:
    """The seed and the tokens of a file, and no more is read; raises whatever a damaged one brings about."""
    with _opened(path) as (file, size):
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(min(length, size)))
        start, stop = header[_TOKENS]["data_offsets"]
        if header[_TOKENS]["dtype"] != "I64" or not 0 <= start <= stop <= size:
            raise ValueError("it is cut short")
        file.seek(_LENGTH + length + start)
        tokens = array("q", file.read(stop - start))
    if len(tokens) * tokens.itemsize < stop - start:
        raise ValueError("it is cut short")
    return str(header[_ABOUT]["seed"]), tokens


def unpack(content: bytes, seed: str, tokens: array[int], states: SequenceStates) -> Kept:
    """What a file holds of the beginning of `tokens`; raises ValueError for one that it has not begun."""
    found = load(content)
    size = int.from_bytes(content[:_LENGTH], "little")
    about = json.loads(content[_LENGTH : _LENGTH + size])[_ABOUT]
    mine = as_tokens(found[_TOKENS].tolist())
    shared = common(mine, tokens, 0)
    whole = shared == len(mine) or (states.only_grows and shared)
    if about.get("format") != _FORMAT or about["seed"] != seed or not whole:
        raise ValueError("it holds another text, or is of another model or version")
    if about["sum"] != _checksum(found, about):
        raise ValueError("it is not what was written: its checksum differs")
    growing = [part for part in states.parts if part.grows]
    rows = tuple(
        (found[f"rows.{part}.keys"], found[f"rows.{part}.values"]) for part in range(len(growing))
    )
    for (keys, values), state in zip(rows, growing, strict=True):
        if keys.shape[2] != len(mine) or values.shape[2] != len(mine):
            raise ValueError(f"it has rows of {keys.shape[2]} tokens, not of {len(mine)}")
        if keys.dtype != state.keys.dtype or values.dtype != state.values.dtype:
            raise ValueError(f"its rows are {keys.dtype}, not {state.keys.dtype}")
    rest = _rest(found, json.loads(about["places"]), states)
    return Kept(mine[:shared], rest or None, lambda start: _pages_of(rows, start, shared))


def _rest(
    found: Mapping[str, torch.Tensor], places: Sequence[Sequence[int]], states: SequenceStates
) -> list[Any]:
    """What a slot holds beside its pages; raises StateError for that of another model."""
    others = [part for part in states.parts if not part.grows]
    rest = []
    for part, (state, place, like) in enumerate(
        zip(others, places, states.empty(1).rest(0), strict=True)
    ):
        tensors = {name: found.get(f"rest.{part}.{name}") for name in ("keys", "values", "sums")}
        copy = replace(like, length=place[0], base_position=place[1], **tensors)
        state.check(copy)
        rest.append(copy)
    return rest


def _pages_of(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, stop: int
) -> list[Pages]:
    """Rows of whole texts as pages, from the one with position `start` on to the one ahead of `stop`."""
    numbers = range(start // PAGE, -(-stop // PAGE))
    places = [slice(PAGE * number, min(PAGE * (number + 1), stop)) for number in numbers]
    return [tuple(Page(k[:, :, at], v[:, :, at]) for k, v in rows) for at in places if rows]
