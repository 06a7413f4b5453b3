"""A measured folder in the units of the page, and what is compared with what.

Every number comes from the cells of the folder; ratios are of medians of cells that took turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.cells import Cache, Cell, Plan, Result
from benchmarks.peers.run import engine_format, source
from benchmarks.peers.shapes import Shape

OWN = "linspec"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finished cell in the units of the page.

    steps: median seconds of a step, one a round. spread: (slowest - fastest) / median of these. limit:
    share of the read bandwidth that the bytes of a step would need. nodes: cost of a pass over so many
    new tokens, that of one being 1. accepted: rate -> times plain decoding,
    with the best number of nodes.
    beside_short: tokens per second as a share of those with a context of 128, in the same rounds.
    """

    shape: str
    context: int
    batch: int
    peer: str
    engine: str
    bits: int
    steps: tuple[float, ...]
    tokens_per_s: float
    spread: float
    limit: float
    prefill_tokens_per_s: float | None
    peak_mb: float
    bandwidth_gb_s: float
    nodes: dict[int, float]
    accepted: dict[float, float]
    beside_short: float | None
    run: str

    @property
    def own(self) -> bool:
        """Whether it is linspec's."""
        return self.engine.startswith(OWN)


def rows_of(plan: Plan) -> list[Row]:
    """Every cell that was measured, in the order of the tables."""
    found = [
        row_of(source(plan, cell.shape)[1], cell, result)
        for cell, result in Cache(plan.out).all().items()
        if result.error is None and result.step_s
    ]
    return sorted(found, key=lambda r: (r.shape, r.context, r.batch, r.bits, not r.own, r.engine))


def failures(plan: Plan) -> dict[str, str]:
    """Cells that an engine could not do, with what it said."""
    found = Cache(plan.out).all().items()
    return {cell.key: result.error for cell, result in found if result.error is not None}


def row_of(shape: Shape, cell: Cell, result: Result) -> Row:
    """A cell in the units of the page."""
    bits, weight_bytes, cache_bytes = engine_format(cell)
    steps = [statistics.median(each) for each in result.step_s]
    step = statistics.median(steps)
    cached = shape.cache_numbers * cell.context * cell.batch * cache_bytes
    needed = (shape.read_parameters * weight_bytes + cached) / 1e9
    reading = [needed / seconds for seconds in steps]
    passes = {int(n): [statistics.median(each) for each in s] for n, s in result.rows_s.items()}
    prompt = cell.context * cell.batch
    return Row(
        shape=cell.shape,
        context=cell.context,
        batch=cell.batch,
        peer=cell.peer,
        engine=f"{cell.peer} {cell.form}",
        bits=bits,
        steps=tuple(steps),
        tokens_per_s=cell.batch / step,
        spread=(max(steps) - min(steps)) / step,
        limit=_share(reading, result.bandwidth_gb_s),
        prefill_tokens_per_s=prompt / statistics.median(result.prefill_s)
        if result.prefill_s
        else None,
        peak_mb=result.peak_bytes / 1e6,
        bandwidth_gb_s=statistics.median(result.bandwidth_gb_s),
        nodes={n: _share(each, passes[1]) for n, each in passes.items()} if 1 in passes else {},
        accepted=_speed_up(result.accepted),
        beside_short=_share([statistics.median(each) for each in result.short_s], steps)
        if result.short_s
        else None,
        run=result.run,
    )


def _share(values: Sequence[float], of: Sequence[float]) -> float:
    """Median over the rounds of one value as a share of another of the same round."""
    return statistics.median(a / b for a, b in zip(values, of, strict=True))


def times_faster(row: Row, other: Row) -> float:
    """Tokens per second of a row ÷ those of another that took turns with it."""
    return _share(other.steps, row.steps)


def _speed_up(accepted: Sequence[Sequence[float]]) -> dict[float, float]:
    """By rate, tokens per second of the best number of nodes ÷ those of one node in the same turn."""
    speeds: dict[float, dict[int, float]] = {}
    for nodes, rate, tokens, seconds in accepted:
        speeds.setdefault(rate, {})[int(nodes)] = tokens / seconds
    return {rate: max(by.values()) / by[1] for rate, by in speeds.items()}


def rivals(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The other engines' rows that took turns with this one: same model, context, batch and bits."""
    what = (row.shape, row.context, row.batch, row.bits, row.run)
    return [
        each
        for each in rows
        if not each.own and (each.shape, each.context, each.batch, each.bits, each.run) == what
    ]


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each of linspec's rows against the best engine beside it."""
    found = []
    for row in rows:
        others = rivals(row, rows)
        if not row.own or not others:
            continue
        best = max(others, key=lambda each: each.tokens_per_s)
        reading = max(others, key=lambda each: each.prefill_tokens_per_s or 0)
        found.append(
            {
                "model": row.shape,
                "context": row.context,
                "batch": row.batch,
                "engine": row.engine,
                "best peer": best.engine,
                "decode ÷ best": times_faster(row, best),
                "best peer at prefill": reading.engine,
                "prefill ÷ best": ratio(row.prefill_tokens_per_s, reading.prefill_tokens_per_s),
            }
        )
    return found


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None where one of them is missing."""
    return a / b if a and b else None
