"""What every engine of the comparison can do: say why not, convert, load, read, decode.

A peer is described by a `Peer`; `load` gives a `Session`, which lives in a process of its own.
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

Prompts = Sequence[Sequence[int]]
# in the folder of an engine that reads such files
GGUF_FILE = "model.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Weights as an engine keeps them.

    bits: the class it competes in, 32, 8 or 4. weight_bytes: of one weight, scales included.
    cache_bytes: of one number of the cache; 0 where there is none that grows.
    """

    name: str
    bits: int
    weight_bytes: float
    cache_bytes: float


class Session(ABC):
    """A loaded model. `open` reads prompts; the other calls go on from there."""

    @abstractmethod
    def open(self, prompts: Prompts) -> float:
        """Read prompts of equal length, one a row; returns the seconds until the first new token."""

    @abstractmethod
    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` greedy steps of all rows."""

    def decode_short(self, tokens: int) -> list[float] | None:
        """The same for a second sequence whose context is short; None if it cannot be held beside."""
        return None

    def rows(self, count: int, repeats: int) -> list[float] | None:
        """Seconds of passes over `count` new tokens of one sequence, not kept; None if it cannot."""
        return None

    def accept(self, nodes: int, rate: float, rounds: int) -> tuple[int, float] | None:
        """Tokens and seconds of `rounds` of speculation whose drafts are accepted at `rate`."""
        return None


class Peer(ABC):
    """One engine. `packages`: what has to be importable to run it and to convert for it."""

    name: str
    packages: tuple[str, ...]
    converters: tuple[str, ...] = ()
    formats: tuple[Format, ...]
    # of a GGUF file that is taken as it is; not part of the comparison by shapes
    of_files: tuple[Format, ...] = ()

    def why_not(self, *, convert: bool) -> str | None:
        """The reason why this engine cannot be used here, None if it can."""
        wanted = self.packages + (self.converters if convert else ())
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed (linspec[peers])" if missing else None

    def version(self) -> str:
        """Of the package that runs it; empty for linspec itself."""
        names = metadata.packages_distributions().get(self.packages[0], []) if self.packages else []
        own = self.name.startswith("linspec") or not names
        return "" if own else f"{names[0]} {metadata.version(names[0])}"

    def format(self, name: str) -> Format:
        """The format of this name."""
        return next(each for each in (*self.formats, *self.of_files) if each.name == name)

    @abstractmethod
    def convert(self, source: Path, target: Path, form: Format) -> None:
        """Write the model directory `source` into the empty directory `target`, in this engine's form."""

    @abstractmethod
    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        """The model in `folder`, with room for `rows` sequences of `context` tokens."""


# modules of this package that define PEER
MODULES = {
    "linspec": "own",
    "linspec-aug": "own_aug",
    "linspec-drafted": "own_drafted",
    "llama.cpp": "llama_cpp",
    "ctranslate2": "ctranslate2",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "transformers": "transformers",
}


def peer(name: str) -> Peer:
    """The engine of this name."""
    found = import_module(f"benchmarks.peers.{MODULES[name]}").PEER
    assert isinstance(found, Peer)
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds that `call` takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
