"""What is measured: cells, the file that keeps each finished one, and what of them is a result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from linspec.bench.peers.base import MODULES, peer
from linspec.bench.peers.shapes import EMBEDDED, SHAPES
from linspec.errors import ConfigError
from linspec.files import replace_text

NODES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compare, and how.

    formats: those of every peer to measure, empty for all. tokens: decoded in a round. rounds: of
    which every engine has one in turn. again: measure finished cells too. pythons: interpreters of
    peers that are not in this one. guard: a command that keeps the machine quiet while what it is
    given runs. seed: of the prompts.
    """

    out: Path
    peers: tuple[str, ...] = tuple(MODULES)
    shapes: tuple[str, ...] = ("110m", "1b")
    contexts: tuple[int, ...] = (128, 2048, 8192, 32768)
    batches: tuple[int, ...] = (1,)
    formats: tuple[str, ...] = ()
    accept: tuple[float, ...] = ()
    tokens: int = 16
    rounds: int = 3
    threads: int = 1
    again: bool = False
    pythons: Mapping[str, str] = field(default_factory=dict)
    guard: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        _known("peer", self.peers, MODULES)
        _known("shape", self.shapes, (*SHAPES, EMBEDDED))
        if any(not 0 <= rate <= 1 for rate in self.accept):
            raise ConfigError(f"--accept takes rates in 0..1, got {list(self.accept)}")
        numbers = (*self.contexts, *self.batches, self.rounds, self.threads)
        if min(numbers) < 1 or self.tokens < 2:
            raise ConfigError("contexts, batches, rounds and threads must be 1 or more, tokens 2")

    def quick(self) -> Plan:
        """The same, in the shortest form that still says something."""
        return replace(self, contexts=self.contexts[:1], tokens=8, rounds=1)

    def groups(self) -> list[list[Cell]]:
        """Cells that take turns: the same model, context, batch and bits in every engine.

        All engines of a group are in memory at once, so other bits are other groups.
        """
        forms = [
            (name, form)
            for name in self.peers
            for form in peer(name).formats
            if not self.formats or form.name in self.formats
        ]
        return [
            [
                Cell(shape=shape, context=context, batch=batch, peer=name, form=form.name)
                for name, form in forms
                if form.bits == bits
            ]
            for shape in self.shapes
            for context in self.contexts
            for batch in self.batches
            for bits in sorted({form.bits for _, form in forms})
        ]


def _known(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    strange = [name for name in given if name not in known]
    if strange:
        raise ConfigError(f"unknown {what} {', '.join(strange)}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One engine and format on one model, context and batch."""

    shape: str
    context: int
    batch: int
    peer: str
    form: str

    @property
    def key(self) -> str:
        """Its file name."""
        return f"{self.shape}-c{self.context}-b{self.batch}-{self.peer}-{self.form}"


@dataclass(slots=True)
class Result:
    """What was measured of a cell.

    prefill_s: seconds to the first new token, of every time. step_s: seconds of every step of all
    rows of the batch, a list a round. short_s: the same for a second sequence with a short context,
    empty if the engine cannot hold one beside. rows_s: by the number of new tokens, seconds of passes,
    a list a round. bandwidth_gb_s: of reading memory, before the turn of every round. accepted:
    [nodes, rate, tokens, seconds] of synthetic speculation.
    version: of the engine. run: when its group began; cells with the same one took turns and may be compared.
    """

    prefill_s: list[float] = field(default_factory=list)
    step_s: list[list[float]] = field(default_factory=list)
    rows_s: dict[str, list[list[float]]] = field(default_factory=dict)
    short_s: list[list[float]] = field(default_factory=list)
    accepted: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0
    bandwidth_gb_s: list[float] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    version: str = ""
    error: str | None = None


class Cache:
    """OUT/cells: one JSON file for each finished cell."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, cell: Cell) -> bool:
        """Whether it was measured before; one that failed is tried again."""
        found = self._read(self.folder / f"{cell.key}.json")
        return found is not None and found[1].error is None

    def put(self, cell: Cell, result: Result) -> None:
        """Keep a finished cell."""
        record = {"cell": asdict(cell), "result": asdict(result)}
        replace_text(self.folder / f"{cell.key}.json", json.dumps(record, indent=1) + "\n")

    def all(self) -> dict[Cell, Result]:
        """Every finished cell."""
        found = (self._read(path) for path in sorted(self.folder.glob("*.json")))
        return dict(each for each in found if each is not None)

    def _read(self, path: Path) -> tuple[Cell, Result] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return Cell(**record["cell"]), Result(**record["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
