"""Tables and plots of a measured folder: OUT/cpu.md, OUT/*.svg and what `--json` prints.

Every number comes from the cells of the folder; ratios are of medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linspec.bench.peers.cells import NODES, Cache, Cell, Plan, Result
from linspec.bench.peers.run import engine_format, source
from linspec.files import replace_text
from linspec.report.data import Chart, Series
from linspec.report.plots import format_value, standalone

OWN = "linspec"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finished cell in the units of the page.

    spread: (slowest - fastest) / median of the medians of the rounds. limit: share of the read
    bandwidth of the same run that the bytes of a step would need. nodes: cost of a pass over so many
    new tokens, that of one being 1. accepted: rate -> best tokens per second over tree sizes.
    """

    shape: str
    context: int
    batch: int
    engine: str
    bits: int
    tokens_per_s: float
    spread: float
    limit: float
    prefill_tokens_per_s: float | None
    peak_mb: float
    bandwidth_gb_s: float
    nodes: dict[int, float]
    accepted: dict[float, float]

    @property
    def own(self) -> bool:
        """Whether it is linspec's."""
        return self.engine.startswith(OWN)


def rows_of(plan: Plan) -> list[Row]:
    """Every cell that was measured, in the order of the tables."""
    found = [
        _row(plan, cell, result)
        for cell, result in Cache(plan.out).all().items()
        if result.error is None and result.step_s
    ]
    return sorted(found, key=lambda r: (r.shape, r.context, r.batch, r.bits, not r.own, r.engine))


def failures(plan: Plan) -> dict[str, str]:
    """Cells that an engine could not do, with what it said."""
    found = Cache(plan.out).all().items()
    return {cell.key: result.error for cell, result in found if result.error is not None}


def _row(plan: Plan, cell: Cell, result: Result) -> Row:
    _, shape = source(plan, cell.shape)
    bits, weight_bytes, cache_bytes = engine_format(cell)
    medians = [statistics.median(each) for each in result.step_s]
    step = statistics.median(medians)
    cached = shape.cache_numbers * cell.context * cell.batch * cache_bytes
    needed = shape.read_parameters * weight_bytes + cached
    passes = {int(n): statistics.median(each) for n, each in result.rows_s.items()}
    prompt = cell.context * cell.batch
    return Row(
        shape=cell.shape,
        context=cell.context,
        batch=cell.batch,
        engine=f"{cell.peer} {cell.form}",
        bits=bits,
        tokens_per_s=cell.batch / step,
        spread=(max(medians) - min(medians)) / step,
        limit=needed / step / 1e9 / result.bandwidth_gb_s,
        prefill_tokens_per_s=prompt / result.prefill_s if result.prefill_s else None,
        peak_mb=result.peak_bytes / 1e6,
        bandwidth_gb_s=result.bandwidth_gb_s,
        nodes={n: seconds / passes[1] for n, seconds in passes.items()} if 1 in passes else {},
        accepted=_best(result.accepted),
    )


def _best(accepted: Sequence[Sequence[float]]) -> dict[float, float]:
    best: dict[float, float] = {}
    for _, rate, tokens, seconds in accepted:
        best[rate] = max(best.get(rate, 0.0), tokens / seconds)
    return best


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each of linspec's rows against the best peer of its bits, model, context and batch."""
    found = []
    for row in rows:
        others = [
            each
            for each in rows
            if not each.own
            and (each.shape, each.context, each.batch, each.bits)
            == (row.shape, row.context, row.batch, row.bits)
        ]
        if not row.own or not others:
            continue
        best = max(others, key=lambda each: each.tokens_per_s)
        reading = max(others, key=lambda each: each.prefill_tokens_per_s or 0)
        found.append(
            {
                "shape": row.shape,
                "context": row.context,
                "batch": row.batch,
                "engine": row.engine,
                "best peer": best.engine,
                "decode ÷ best": row.tokens_per_s / best.tokens_per_s,
                "best peer at prefill": reading.engine,
                "prefill ÷ best": _ratio(row.prefill_tokens_per_s, reading.prefill_tokens_per_s),
            }
        )
    return found


def summary(plan: Plan, skipped: dict[str, str]) -> dict[str, Any]:
    """Everything of the page in plain JSON types."""
    rows = rows_of(plan)
    return {
        "rows": [asdict(row) for row in rows],
        "ratios": ratios(rows),
        "skipped": skipped,
        "failed": failures(plan),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def write_page(plan: Plan, skipped: dict[str, str], page: Path | None = None) -> Path:
    """Write the page and its plots; returns the page. `page`: another place for it."""
    rows = rows_of(plan)
    page = page or plan.out / "cpu.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD.format(machine=_machine(plan)), _speed_table(rows)]
    for chart in _charts(rows):
        name = f"cpu-{chart.title.lower().replace(' ', '-').replace(',', '')}.svg"
        replace_text(page.parent / name, standalone(chart))
        parts.append(f"![{chart.title}]({name})")
    parts += [_node_table(rows), _ratio_table(rows), _left_out(skipped, failures(plan))]
    replace_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


_HEAD = """# CPU: linspec beside other engines

Generated by `linspec bench peers`; no number is typed by hand. Random weights (speed needs no
training), the same prompts and threads for all, argmax only, engines taking turns. tokens/s: of all
rows of the batch, from the median of the rounds' median steps. spread: of the rounds,
(slowest - fastest) / median. limit: bytes of the weights and the cache in the engine's own format,
over the time of a step, as a share of the read bandwidth that the same run measured. prefill: the
prompt's tokens over the seconds to the first new token. A pass over k tokens is the model's step alone;
choosing tokens from its logits is part of the decoding and of the curves by acceptance.

{machine}"""


def _machine(plan: Plan) -> str:
    found = [result.machine for result in Cache(plan.out).all().values() if result.machine]
    facts = found[-1] if found else {}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def table(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(head + ["| " + " | ".join(map(_cell, line)) + " |" for line in lines])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else _whole(value)


def _whole(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _speed_table(rows: Sequence[Row]) -> str:
    columns = (
        "model", "context", "batch", "bits", "engine", "tokens/s", "spread", "limit", "prefill/s",
        "peak MB", "GB/s",
    )  # fmt: skip
    lines = [
        (
            row.shape, format_value(row.context, "tokens"), row.batch, row.bits, row.engine,
            row.tokens_per_s, row.spread, row.limit, row.prefill_tokens_per_s, row.peak_mb,
            row.bandwidth_gb_s,
        )
        for row in rows
    ]  # fmt: skip
    return "## Decoding and reading\n\n" + table(columns, lines)


def _node_table(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.nodes]
    lines = [
        (row.shape, row.context, row.engine, *(row.nodes.get(n) for n in NODES)) for row in measured
    ]
    title = "## Cost of a pass over k new tokens, that over one being 1\n\n"
    return title + table(("model", "context", "engine", *map(str, NODES)), lines) if lines else ""


def _ratio_table(rows: Sequence[Row]) -> str:
    found = ratios(rows)
    if not found:
        return ""
    return "## Against the best peer of the same bits\n\n" + table(
        list(found[0]), [list(each.values()) for each in found]
    )


def _left_out(skipped: dict[str, str], failed: dict[str, str]) -> str:
    lines = [f"- {name}: {reason}" for name, reason in {**skipped, **failed}.items()]
    return "## Left out\n\n" + "\n".join(lines) if lines else ""


def _charts(rows: Sequence[Row]) -> list[Chart]:
    found = []
    for shape in dict.fromkeys(row.shape for row in rows):
        mine = [row for row in rows if row.shape == shape and row.batch == 1]
        found += [_by_context(shape, mine, bits) for bits in (8, 4)]
        found.append(_by_acceptance(shape, mine))
    return [chart for chart in found if chart.series]


def _by_context(shape: str, rows: Sequence[Row], bits: int) -> Chart:
    series = []
    for engine in dict.fromkeys(row.engine for row in rows if row.bits == bits):
        line = [row for row in rows if row.engine == engine]
        x, y = [float(row.context) for row in line], [row.tokens_per_s for row in line]
        series.append(Series(engine, tuple(x), tuple(y), dashed=not line[0].own))
    return Chart(
        title=f"{shape} at {bits} bits",
        x_label="context",
        y_label="tokens per second",
        series=tuple(series),
        x_unit="tokens",
        log_x=True,
        log_y=True,
    )


def _by_acceptance(shape: str, rows: Sequence[Row]) -> Chart:
    series = [
        Series(
            f"{row.engine}, {format_value(row.context, 'tokens')}",
            tuple(row.accepted),
            tuple(speed / row.tokens_per_s for speed in row.accepted.values()),
        )
        for row in rows
        if row.accepted
    ]
    return Chart(
        title=f"{shape} speculation by acceptance",
        x_label="share of drafts accepted",
        y_label="times plain decoding",
        series=tuple(series),
        y_from_zero=True,
    )
