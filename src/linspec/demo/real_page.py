"""Act one as a table, and as the first section of the page."""

from __future__ import annotations

from collections.abc import Mapping

from linspec.demo.real_model import RealAct
from linspec.report.data import Chart, Sample, Section, Series, Table, Tile
from linspec.report.plots import format_value

_COLOURS = (1, 3)
_SHOWN = 28


def answers_table(act: RealAct) -> Table:
    """A line for each question."""
    columns = ("question", "tokens/s", "with drafts", "speed-up", "per round", "same")
    rows = [
        (
            _short(each.question.text),
            f"{each.plain:,.0f}",
            f"{each.fast:,.0f}",
            f"{each.times:.2f}×",
            f"{each.tokens_per_round:.2f}",
            "yes" if each.same else "NO",
        )
        for each in act.answers
    ]
    return Table(columns, tuple(rows))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def act_headline(act: RealAct) -> str:
    """What act one showed, in one sentence with its numbers."""
    far, before, after = _kept(act)
    same = "the text is the same" if all(each.same for each in act.answers) else "the text DIFFERS"
    return (
        f"{act.shown.model} answers {act.times:.2f} times as fast with drafts, and {same}. With few exact "
        f"heads ({act.shown.linear}) it keeps {after} of a text of {far} tokens instead of {before}."
    )


def _kept(act: RealAct) -> tuple[str, str, str]:
    """The longest context, and what the model and its linearized form keep of it."""
    far = max(act.state_bytes[act.shown.model])
    before, after = (act.state_bytes[name][far] for name in (act.shown.model, act.shown.linear))
    return format_value(far, "tokens"), format_value(before, "bytes"), format_value(after, "bytes")


def act_tiles(act: RealAct) -> tuple[Tile, ...]:
    """The figures to see first."""
    best = max(act.answers, key=lambda each: each.times)
    far, before, after = _kept(act)
    return (
        Tile("speed-up, all questions", f"{act.times:.2f}×", "plain beside speculative"),
        Tile("best question", f"{best.times:.2f}×", f"{best.fast:,.0f} tokens/s"),
        Tile("same text", "yes" if all(a.same for a in act.answers) else "NO", "token for token"),
        Tile(
            f"cache at {far} tokens",
            after,
            f"{act.shown.model}: {before}",
        ),
    )


def act_section(act: RealAct) -> Section:
    """Answers in colours, their speeds, and what both models keep."""
    samples = [
        Sample("", each.spans, f"{each.question.text} ({each.times:.2f}×)") for each in act.answers
    ]
    return Section(
        title=f"A real chat model: {act.shown.model}",
        text=(
            "The same weights with and without drafts: what was drafted and accepted is coloured. The two "
            "took turns, each with a clock of its own, and the time of reading the question is not "
            f"counted. {act.shown.linear} is this model with few exact heads, in 8 bits: "
            f"it answered the first question at {act.linear_speed:,.0f} tokens/s: {act.linear_text.strip()}"
        ),
        table=answers_table(act),
        samples=tuple(samples),
        plots=(_speed_chart(act), _state_chart(act)),
    )


def _series(figures: Mapping[str, Mapping[int, float]]) -> tuple[Series, ...]:
    return tuple(
        Series(name, tuple(map(float, found)), tuple(map(float, found.values())), colour=colour)
        for (name, found), colour in zip(figures.items(), _COLOURS, strict=False)
    )


def _speed_chart(act: RealAct) -> Chart:
    return Chart(
        title="Tokens per second against context",
        x_label="tokens of context",
        y_label="tokens/s, plain",
        series=_series(act.tokens_per_s),
        x_unit="tokens",
        log_x=True,
        y_from_zero=True,
        note="Batch 1, greedy, plain decoding; as far as the demo's time allowed.",
    )


def _state_chart(act: RealAct) -> Chart:
    return Chart(
        title="What is kept of a text",
        x_label="tokens of context",
        y_label="bytes",
        series=_series(act.state_bytes),
        x_unit="tokens",
        y_unit="bytes",
        log_x=True,
        log_y=True,
        note="The original was trained for 8k tokens.",
    )
