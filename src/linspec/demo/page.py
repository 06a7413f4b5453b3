"""From the demo's figures to its table and its report page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.bench.speed import SpeedRow
from linspec.demo.measure import NONE, ContextSpeed
from linspec.demo.real_model import RealAct
from linspec.demo.real_page import act_headline, act_section, act_tiles
from linspec.demo.result import SHIPPED, STUDENT, TEACHER, Decoded, DemoResult
from linspec.demo.showcase import Showcase
from linspec.report.data import Bar, Bars, Chart, Report, Section, Series, Table, Tile
from linspec.report.plots import format_value

PROMPT_LOOKUP = "prompt-lookup"
DRAFTERS = {
    NONE: "plain",
    PROMPT_LOOKUP: "prompt lookup",
    "medusa": "Medusa",
    "student": "student drafts",
}
# tokens per round from which on a drafter is said to have drafted: shown as 1.01
_DRAFTED = 1.005
# deepest draft that the acceptance chart shows
_DEEPEST = 8
# logged batches behind a point of the smooth loss curve
_SMOOTHED = 5
COLOURS = {TEACHER: 1, STUDENT: 3, SHIPPED: 4}
COLUMNS = {TEACHER: "teacher", STUDENT: "this student", SHIPPED: "shipped student"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the page shows beside the result. act: act one, None without. log: (tokens, loss) of the
    student's training.
    """

    act: RealAct | None
    log: Sequence[tuple[float, float]]
    speed: ContextSpeed
    showcase: Showcase
    eval_bytes: int
    prompts: int
    prompt_tokens: int
    new_tokens: int


def make_table(result: DemoResult) -> Table:
    """The demo's one table: a column for each model."""
    models = [m for m in (TEACHER, STUDENT, SHIPPED) if result.bits_per_byte(m) is not None]
    rows = [("bits per byte", *(_bits(result, m) for m in models))]
    for drafter, name in DRAFTERS.items():
        found = [result.find(model, drafter) for model in models]
        if any(found):
            rows.append((f"{name}: tokens/s", *map(_speed, found)))
            if drafter != NONE:
                rows.append((f"{name}: tokens/round", *map(_per_round, found)))
    for context in result.state_bytes[TEACHER]:
        sizes = (result.state_bytes[TEACHER if m == TEACHER else STUDENT][context] for m in models)
        cells = (format_value(size, "bytes") for size in sizes)
        rows.append((f"state at {format_value(context, 'tokens')} tokens", *cells))
    rows.append(("lossless", *(_lossless(result, m) for m in models)))
    return Table(("", *(COLUMNS[m] for m in models)), tuple(rows))


def _bits(result: DemoResult, model: str) -> str:
    value = result.bits_per_byte(model)
    assert value is not None
    if model == TEACHER:
        return f"{value:.3f}"
    return f"{value:.3f} ({value / result.teacher_bits_per_byte - 1:+.1%})"


def _speed(row: Decoded | None) -> str:
    return f"{row.tokens_per_s:,.0f}" if row else "–"


def _per_round(row: Decoded | None) -> str:
    return f"{row.tokens_per_round:.2f}" if row else "–"


def _lossless(result: DemoResult, model: str) -> str:
    drafted = [
        r for r in (*result.rows, *result.comparison) if r.model == model and r.drafter != NONE
    ]
    return "–" if not drafted else "yes" if all(r.lossless for r in drafted) else "NO"


def headline(result: DemoResult) -> str:
    """What happened, in one sentence with its numbers."""
    worse = result.student_bits_per_byte / result.teacher_bits_per_byte - 1
    seconds = result.phases.get("linearize", 0.0)
    took = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    kept = f"{abs(worse):.1%} {'more' if worse >= 0 else 'fewer'} bits per byte"
    far = max(result.state_bytes[TEACHER])
    ratio = result.state_bytes[TEACHER][far] / result.state_bytes[STUDENT][far]
    fast = fastest(result)
    decoding = ""
    if fast is not None:
        speed = speedup(result, STUDENT, fast.drafter)
        decoding = (
            f" With {DRAFTERS[fast.drafter]} it decodes {fast.tokens_per_round:.2f} tokens per round, "
            f"at {speed:.2f} times the speed of plain decoding, "
        )
    if decoding:
        decoding += "and every token is the same." if result.lossless else "but NOT losslessly."
    return (
        f"In {took} of training on this machine a softmax transformer of "
        f"{result.parameters / 1e6:.1f}M parameters became a linear-attention model with {kept} "
        f"than its teacher ({result.student_bits_per_byte:.3f} against "
        f"{result.teacher_bits_per_byte:.3f}) and a state that does not grow: at "
        f"{format_value(far, 'tokens')} tokens it is {ratio:.0f} times smaller than the "
        f"teacher's cache.{decoding}"
    )


def speedup(result: DemoResult, model: str, drafter: str) -> float | None:
    """Speed of a drafter over plain decoding of the same model."""
    fast, plain = result.find(model, drafter), result.find(model, NONE)
    if fast is None or plain is None or not plain.tokens_per_s:
        return None
    return fast.tokens_per_s / plain.tokens_per_s


def fastest(result: DemoResult) -> Decoded | None:
    """The row of the student's quickest drafter that drafted; None without one, or without plain decoding.

    Where the policy left a drafter out, its speed is that of plain decoding, and noise.
    """
    drafted = [
        row
        for row in result.rows
        if row.tokens_per_round >= _DRAFTED and speedup(result, STUDENT, row.drafter)
    ]
    return max(drafted, key=lambda r: r.tokens_per_s, default=None)


def make_report(result: DemoResult, evidence: Evidence, command: str) -> Report:
    """The whole page."""
    return Report(
        title="linspec: checkpoint in, fast model out",
        headline=headline(result) if evidence.act is None else act_headline(evidence.act),
        tiles=_tiles(result) if evidence.act is None else act_tiles(evidence.act),
        sections=() if evidence.act is None else (act_section(evidence.act), _second_act(result)),
        table=make_table(result),
        plots=_plots(result, evidence),
        rounds=evidence.showcase.rounds,
        sample=evidence.showcase.sample,
        notes=_notes(result, evidence),
        facts=tuple((name.replace("_", " "), str(v)) for name, v in result.machine.items()),
        command=command,
    )


def _second_act(result: DemoResult) -> Section:
    return Section(title="Live: a softmax model becomes linear", text=headline(result))


def _tiles(result: DemoResult) -> tuple[Tile, ...]:
    far = max(result.state_bytes[STUDENT])
    fast = fastest(result)
    speed = None if fast is None else speedup(result, STUDENT, fast.drafter)
    quickest = () if fast is None else (
        Tile(
            f"{DRAFTERS[fast.drafter]} against plain",
            f"{speed:.2f}×",
            f"{fast.tokens_per_s:,.0f} tokens/s",
        ),
        Tile("tokens per round", f"{fast.tokens_per_round:.2f}", "plain decoding is 1"),
    )  # fmt: skip
    return (
        Tile(
            "bits per byte",
            f"{result.student_bits_per_byte:.3f}",
            f"teacher {result.teacher_bits_per_byte:.3f}",
        ),
        *quickest,
        Tile(
            f"state at {format_value(far, 'tokens')} tokens",
            format_value(result.state_bytes[STUDENT][far], "bytes"),
            f"teacher {format_value(result.state_bytes[TEACHER][far], 'bytes')}",
        ),
        Tile("lossless", "yes" if result.lossless else "NO", "greedy, token for token"),
    )


def _plots(result: DemoResult, evidence: Evidence) -> tuple[Chart | Bars, ...]:
    speed = [_speed_chart(evidence.speed)] if any(evidence.speed.rows.values()) else []
    loss = [_loss_chart(evidence.log)] if evidence.log else []
    return (
        _bits_bars(result, evidence),
        *loss,
        *speed,
        _state_chart(result),
        _round_bars(result),
        _acceptance_chart(result, evidence.showcase),
    )


def _bits_bars(result: DemoResult, evidence: Evidence) -> Bars:
    bars = [
        Bar("teacher", result.teacher_bits_per_byte, COLOURS[TEACHER]),
        Bar("this run", result.student_bits_per_byte, COLOURS[STUDENT]),
    ]
    if result.shipped_student_bits_per_byte is not None:
        bars.append(Bar("shipped", result.shipped_student_bits_per_byte, COLOURS[SHIPPED]))
    return Bars(
        title="Bits per byte on held-out files",
        x_label="bits per byte, less is better",
        bars=tuple(bars),
        digits=3,
        note=(
            f"{evidence.eval_bytes:,} bytes that no training saw, pieces of many files. The teacher "
            "with its mixers swapped and nothing trained would need "
            f"{result.swapped_bits_per_byte:.3f}."
        ),
    )


def _loss_chart(log: Sequence[tuple[float, float]]) -> Chart:
    tokens, losses = zip(*log, strict=True)
    series: tuple[Series, ...] = (Series("single batches", tokens, losses, dashed=True, colour=2),)
    if len(log) >= 3 * _SMOOTHED:
        mean = Series(f"mean of {_SMOOTHED}", tokens, _smooth(losses), colour=COLOURS[STUDENT])
        series = (*series, mean)
    return Chart(
        title="Training the student",
        x_label="training tokens",
        y_label="loss in nats",
        series=series,
        x_unit="tokens",
        note="Cross-entropy plus the divergence from the teacher.",
    )


def _smooth(values: Sequence[float]) -> tuple[float, ...]:
    """The mean of every value and those before it, _SMOOTHED in all."""
    windows = (values[max(0, end - _SMOOTHED) : end] for end in range(1, len(values) + 1))
    return tuple(sum(window) / len(window) for window in windows)


def _speed_chart(speed: ContextSpeed) -> Chart:
    series = []
    for model, name in ((TEACHER, "softmax"), (STUDENT, "linear")):
        modes = list(dict.fromkeys(row.mode for row in speed.rows[model]))
        for mode in modes:
            how = DRAFTERS.get(mode.partition(":")[0], mode)
            rows = [row for row in speed.rows[model] if row.mode == mode]
            series.append(_context_line(f"{name}, {how}", rows, mode != "plain", COLOURS[model]))
    return Chart(
        title="Milliseconds per token against context",
        x_label="tokens of context",
        y_label="ms per token",
        series=tuple(series),
        x_unit="tokens",
        log_x=True,
        y_from_zero=True,
        note=(
            "Batch 1, greedy. Beyond the teacher's own positions its speed is real, its text is "
            f"not. {speed.note}"
        ),
    )


def _context_line(label: str, rows: Sequence[SpeedRow], dashed: bool, colour: int) -> Series:
    contexts = tuple(float(row.context) for row in rows)
    return Series(label, contexts, tuple(row.ms_per_token for row in rows), dashed, colour)


def _state_chart(result: DemoResult) -> Chart:
    def line(label: str, model: str) -> Series:
        sizes = result.state_bytes[model]
        contexts, found = tuple(map(float, sizes)), tuple(map(float, sizes.values()))
        return Series(label, contexts, found, colour=COLOURS[model])

    return Chart(
        title="State of one sequence",
        x_label="tokens of context",
        y_label="bytes",
        series=(
            line("teacher: keys and values", TEACHER),
            line("student", STUDENT),
        ),
        x_unit="tokens",
        y_unit="bytes",
        log_x=True,
        log_y=True,
        note="What has to be kept to go on with a sequence, in float32.",
    )


def _drafted(result: DemoResult) -> list[Decoded]:
    return [row for row in (*result.comparison, *result.rows) if row.drafter != NONE]


def _round_bars(result: DemoResult) -> Bars:
    bars = [Bar("plain", 1.0, 5)]
    bars += [
        Bar(f"{row.model}: {DRAFTERS[row.drafter]}", row.tokens_per_round, COLOURS[row.model])
        for row in sorted(_drafted(result), key=lambda r: list(COLUMNS).index(r.model))
    ]
    return Bars(
        title="Tokens per round",
        x_label="accepted drafts + the bonus token",
        bars=tuple(bars),
        note=(
            "How many tokens one step of the model decides. The policy measures what steps cost "
            "and may draft less, or not at all, where that is quicker."
        ),
    )


def _acceptance_chart(result: DemoResult, showcase: Showcase) -> Chart:
    rows = [row for row in _drafted(result) if row.model == STUDENT or row.drafter != PROMPT_LOOKUP]
    lines = {(row.model, row.drafter): row.acceptance for row in rows if row.acceptance}
    # where the policy did not draft, the showcase did: its trees have a fixed size
    lines.setdefault((STUDENT, "medusa"), showcase.acceptance)
    series = [_depth_line(*key, rates) for key, rates in lines.items() if rates]
    return Chart(
        title="Acceptance by depth",
        x_label="depth of the draft",
        x_unit="count",
        y_label="share accepted",
        series=tuple(series),
        y_from_zero=True,
        note="Of the rounds whose draft at the depth before was accepted.",
    )


def _depth_line(model: str, drafter: str, rates: Sequence[float]) -> Series:
    rates = tuple(rates[:_DEEPEST])
    depths = tuple(float(depth) for depth in range(1, len(rates) + 1))
    label = f"{model}: {DRAFTERS[drafter]}"
    return Series(label, depths, rates, drafter != "medusa", COLOURS[model])


def _notes(result: DemoResult, evidence: Evidence) -> tuple[str, ...]:
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.phases.items())
    ties = sum(row.near_ties for row in (*result.rows, *result.comparison))
    notes = [
        f"Linearized on {result.linearize_tokens:,} tokens, heads trained on "
        f"{result.heads_tokens:,}; the time decides how many. Time: {phases}.",
        f"Speed: up to {evidence.prompts} held-out prompts of up to {evidence.prompt_tokens} tokens, "
        f"{evidence.new_tokens} new tokens each, batch 1, greedy, float32; the seconds of "
        "reading the prompt are not counted. The drafters took turns on each prompt.",
        "Lossless: the output with drafts is that of plain decoding, token for token.",
        "Tokens per round: accepted drafts and the bonus token, averaged over rounds.",
    ]
    if ties:
        notes.append(
            f"On {ties} prompts float32 rounding decided between two tokens of equal score."
        )
    return tuple(notes)
