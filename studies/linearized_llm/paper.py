"""The paper's numbers beside ours: not the figures, which are of other sizes, but their directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from studies.linearized_llm.attentions import ALPHA, AUG, BOTH, CONV, PLAIN
from studies.linearized_llm.flash import COLUMN
from studies.linearized_llm.table import Results

Pair = tuple[float, float]
# a figure of every seed
Pairs = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Claim:
    """Two figures of the paper, first against second, and where ours are.

    source: table of the paper and what it measures. ours: the same two here, one or both empty until
    they are measured. caveat: why the ratios need not be equal.
    """

    what: str
    source: str
    paper: Pair
    ours: Callable[[Results], Pairs]
    caveat: str = ""


def _place(
    table: str, name: str, first: tuple[str, str], second: tuple[str, str]
) -> Callable[[Results], Pairs]:
    """One figure at two places of a table."""
    return lambda results: results.pairs(table, first, second, name)


def _in_one_cell(
    table: str, row: str, column: str, first: str, second: str
) -> Callable[[Results], Pairs]:
    """Two figures at one place of a table."""

    def find(results: Results) -> Pairs:
        return results.figures(table, row, column, first), results.figures(
            table, row, column, second
        )

    return find


def _medusa(row: str) -> Callable[[Results], Pairs]:
    names = ("medusa_tokens_per_s", "plain_tokens_per_s")
    return _in_one_cell("speculation", row, "all", *names)


def _models(context: int, figure: str) -> Callable[[Results], Pairs]:
    """A figure of aug and of softmax at one context."""

    def find(results: Results) -> Pairs:
        found = results.of("latency", str(context), "both")
        return [one["aug"][figure] for one in found], [one["softmax"][figure] for one in found]

    return find


def _local(first: str, second: str) -> Callable[[Results], Pairs]:
    return _place("quality", "perplexity", ("local", first), ("local", second))


def _against(row: str) -> Callable[[Results], Pairs]:
    return _place("quality", "perplexity", (row, AUG), (row, PLAIN))


CLAIMS = (
    Claim(
        "local + conv / local",
        "T12, GPT-2, WikiText-2 perplexity",
        (51.09, 56.80),
        _local(CONV, PLAIN),
    ),
    Claim(
        "local + grouped / local",
        "T12, GPT-2, WikiText-2 perplexity",
        (42.81, 56.80),
        _local(BOTH, PLAIN),
        "the paper finetunes far longer; α fixed at 1 starts badly (its figure 6b)",
    ),
    Claim(
        "aug / local",
        "T12, GPT-2, WikiText-2 perplexity",
        (39.26, 56.80),
        _local(AUG, PLAIN),
    ),
    Claim(
        "aug / local",
        "T15, LLaMA-2-7B, PG-19 perplexity",
        (13.47, 21.61),
        _local(AUG, PLAIN),
        "a longer context loses more to groups of 64",
    ),
    Claim(
        "local + α·grouped / local + grouped",
        "T14, GPT-2, GLUE error (100 − accuracy)",
        (29.56, 30.32),
        _local(ALPHA, BOTH),
        "classification error there, perplexity here",
    ),
    Claim(
        "performer aug / plain",
        "T16, GPT-2, GLUE error (100 − accuracy)",
        (28.45, 34.31),
        _against("performer"),
        "classification error there, perplexity here",
    ),
    Claim(
        "rfa aug / plain",
        "T16, GPT-2, GLUE error (100 − accuracy)",
        (25.51, 30.58),
        _against("rfa"),
        "classification error there, perplexity here",
    ),
    Claim(
        # exact within a group from the start: aug adds the convolution alone
        "linformer aug / plain (here +conv / plain)",
        "T16, GPT-2, GLUE error (100 − accuracy)",
        (31.36, 39.41),
        _place("quality", "perplexity", ("linformer", CONV), ("linformer", PLAIN)),
        "classification error there; the paper's decoder Linformer may see the future",
    ),
    *(
        Claim(
            f"T5, {row} {part} / {other}",
            f"{source}, T5, GLUE error (100 − accuracy)",
            paper,
            _place("t5", "perplexity", (row, part), (other, PLAIN)),
            "classification error of a pretrained T5 there; perplexity of a tiny one here",
        )
        for row, part, other, source, paper in (
            ("local", PLAIN, "softmax", "T3", (37.25, 23.09)),
            ("relu", PLAIN, "local", "T3", (30.48, 37.25)),
            ("local", AUG, "local", "T14", (35.49, 37.25)),
        )
    ),
    *(
        Claim(
            f"FLASH from nothing, {variant} / quadratic",
            "T15, FLASH-110M, Wiki40B perplexity",
            (paper, 15.40),
            _place("flash", "perplexity", (variant, COLUMN), ("quadratic", COLUMN)),
            "the paper trains 125K steps, and its groups and contexts are larger",
        )
        for variant, paper in (("aug", 15.16), ("grouped", 16.14), ("local", 16.65))
    ),
    Claim(
        "α from 0 / α from 1",
        "figure 6b, LLaMA-2-7B, training loss after 1K steps",
        (2.4, 6.7),
        _place("design", "train_loss", ("α from 0", AUG), ("α from 1", AUG)),
        "α stays fixed at 1 there, it is learned here",
    ),
    *(
        Claim(
            f"prefill of {context:,} tokens, aug / softmax",
            "T4, LLaMA-2-7B, ms on a GPU",
            paper,
            _models(context, "prefill_ms"),
            "another model, another machine",
        )
        for context, paper in (
            (2048, (275.2, 302.3)),
            (4096, (529.8, 812.6)),
            (8192, (1029.7, 2355.0)),
        )
    ),
    *(
        Claim(
            f"tokens/s with Medusa / plain, {row}",
            "T8, LLaMA-2-7B, MT-Bench",
            paper,
            _medusa(row),
            "the paper recomputes its state at every step of plain decoding, which makes it slow",
        )
        for row, paper in (("local, plain", (63.3, 32.3)), ("local, aug", (50.7, 25.9)))
    ),
    Claim(
        "one tree step / its candidates one by one, aug",
        "T9, LLaMA-2-7B, FLASH, ms",
        (49.7, 137.2),
        _in_one_cell("speculation", "local, aug", "all", "tree_ms", "candidates_ms"),
    ),
)


def speaks(results: Results) -> bool:
    """Whether the results say anything about a claim of the paper."""
    return any(all(claim.ours(results)) for claim in CLAIMS)


def comparison(results: Results) -> str:
    """Every claim as a row of means, and below it those whose direction is not the paper's."""
    lines = [
        "Means over the seeds that both sides have; a direction is that of every seed unless it says "
        "otherwise.\n",
        "| what | paper | ratio | here | ratio | direction |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    differing = []
    for claim in CLAIMS:
        pairs = claim.ours(results)
        ours = (mean(pairs[0]), mean(pairs[1])) if all(pairs) else None
        direction = _direction(claim.paper, pairs)
        lines.append(
            f"| {claim.what} | {_pair(claim.paper)}, {claim.source} | {_ratio(claim.paper)} | "
            f"{_pair(ours)} | {_ratio(ours)} | {direction} |"
        )
        if direction.startswith("differs"):
            differing.append(
                f"- {claim.what} ({claim.source}): {claim.caveat or 'no reason known'}"
            )
    told = "\n".join(differing) or "None of the measured ones."
    return "\n".join(lines) + f"\n\nDirections that differ from the paper:\n\n{told}\n"


def _direction(paper: Pair, ours: Pairs) -> str:
    if not all(ours):
        return "not measured yet"
    falls = paper[0] < paper[1]
    same = [(first < second) == falls for first, second in zip(*ours, strict=True)]
    direction = "same" if (mean(ours[0]) < mean(ours[1])) == falls else "differs"
    return direction if all(same) or not any(same) else f"{direction}, not in every seed"


def _pair(pair: Pair | None) -> str:
    return "–" if pair is None else f"{pair[0]:.4g} / {pair[1]:.4g}"


def _ratio(pair: Pair | None) -> str:
    return "–" if pair is None or not pair[1] else f"{pair[0] / pair[1]:.3f}"
