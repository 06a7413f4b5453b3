"""What is measured: cells, the file that keeps each finished one, and what of them is a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.base import MODULES, peer
from benchmarks.peers.shapes import EMBEDDED, SHAPES
from studies.lib.cells import Cells, Record
from studies.lib.plan import check_counts, check_known, check_share

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
        check_known("peer", (*self.peers, *self.pythons), MODULES)
        check_known("shape", self.shapes, (*SHAPES, EMBEDDED))
        formats = dict.fromkeys(form.name for name in self.peers for form in peer(name).formats)
        check_known("format", self.formats, formats)
        for rate in self.accept:
            check_share("--accept", rate)
        check_counts(contexts=self.contexts, batches=self.batches)
        check_counts(rounds=self.rounds, threads=self.threads)
        check_counts(2, tokens=self.tokens)

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
    """The finished cells of a folder."""

    def __init__(self, out: Path) -> None:
        self._cells = Cells(out)

    def has(self, cell: Cell) -> bool:
        """Whether it was measured before; one that failed is tried again."""
        record = self._cells.read(cell.key)
        found = None if record is None else _known(record)
        return found is not None and found[1].error is None

    def put(self, cell: Cell, result: Result) -> None:
        """Keep a finished cell."""
        self._cells.write(cell.key, {"cell": asdict(cell), "result": asdict(result)})

    def all(self) -> dict[Cell, Result]:
        """Every finished cell."""
        return dict(found for found in map(_known, self._cells.all()) if found is not None)


def _known(record: Record) -> tuple[Cell, Result] | None:
    try:
        return Cell(**record["cell"]), Result(**record["result"])
    except (KeyError, TypeError):
        return None
