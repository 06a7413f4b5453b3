"""Specifications of attention that reads a part of the past, or a rough form of it: see `reference.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from linspec.mixers.reference_head import Head, softmax_over

# what rows are worth, of their positions, what [G, rows] queries weigh, and what they were worth before
Scores = Callable[[list[int], torch.Tensor, dict[int, float]], list[float]]


def pages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over s within reach of t, and over the best groups before it.

    A group has the greatest of what its pages have for the queries that share the keys: see `_coded` and
    `_bounded`.
    """
    group, options = head.config.group, head.config.options
    budget, page = int(options["budget"] or 0), int(options["page"] or 0)
    judge = _bounded if options.get("judge") == "bounds" else _coded

    def judged(t: int, number: int) -> float:
        starts = range(number * group, (number + 1) * group, page)
        return max(
            judge(each[t].detach(), k[start : start + page].detach())
            for each in head.sharing
            for start in starts
        )

    best = [
        sorted(range(head.first(t) // group), key=lambda number: -judged(t, number))
        for t in range(len(q))
    ]
    chosen = [set(numbers[: budget // group]) for numbers in best]
    return softmax_over(q, k, v, lambda t, s: s >= head.first(t) or s // group in chosen[t])


def _bounded(q: torch.Tensor, rows: torch.Tensor) -> float:
    """The sum of max(q_i k⁺_i, q_i k⁻_i), with the greatest and least keys as bfloat16, rounded outwards."""
    return float(torch.maximum(q * _above(rows.amax(0)), -q * _above(-rows.amin(0))).sum())


def _coded(q: torch.Tensor, rows: torch.Tensor) -> float:
    """The greatest product of q with a key that is k⁻ + code (k⁺ - k⁻) / 3, code 0..3 the nearest one.

    Of what multiplies codes, q_i (k⁺_i - k⁻_i) / 3, there are 127 steps to the largest one.
    """
    greatest, least = _above(rows.amax(0)), -_above(-rows.amin(0))
    third = (greatest - least) / 3
    codes = ((rows - least) / third).nan_to_num(0.0).clamp(0, 3).round()
    step = (q * third).abs().max() / 127
    whole = (q * third / step).nan_to_num(0.0).round()
    return float((codes @ whole).max() * step + q @ least)


def _above(x: torch.Tensor) -> torch.Tensor:
    """The least bfloat16 that is not below x."""
    # as float32 first, as keys are kept
    x = x.detach().float()
    near = x.bfloat16()
    greater = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < x, greater, near).to(torch.float64)


def h2o(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over s within reach of t and over the `budget` rows before it that were weighed most in all."""

    def scores(rows: list[int], weighed: torch.Tensor, old: dict[int, float]) -> list[float]:
        found = weighed.sum(0).tolist()
        return [old.get(s, 0.0) + new for s, new in zip(rows, found, strict=True)]

    return _evicting(q, k, v, head, scores)


def snapkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """As `h2o`; a score is the greatest, among `pool` neighbouring rows, of what the last queries weigh."""
    last, pool = (int(head.config.options[name] or 0) for name in ("last", "pool"))

    def scores(rows: list[int], weighed: torch.Tensor, old: dict[int, float]) -> list[float]:
        found, beside = weighed[-last:].sum(0).tolist(), pool // 2
        return [max(found[max(0, i - beside) : i + beside + 1]) for i in range(len(rows))]

    return _evicting(q, k, v, head, scores)


def _evicting(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, scores: Scores
) -> torch.Tensor:
    """Softmax over s within reach of t and over the rows that stayed when the groups before it closed."""
    group, budget = head.config.group, int(head.config.options["budget"] or 0)
    worth: dict[int, float] = {}
    # what is left before each group
    left: list[list[int]] = [[]]
    for start in range(0, len(q) // group * group, group):
        rows = [*left[-1], *range(start, start + group)]
        weighed = torch.zeros(group, len(rows), dtype=torch.float64)
        for t in range(group):
            seen = rows[: len(left[-1]) + t + 1]
            for each in head.sharing:
                weights = (k[seen] @ each[start + t] / math.sqrt(q.shape[1])).softmax(0)
                weighed[t, : len(seen)] += weights.detach().cpu()
        worth = dict(zip(rows, scores(rows, weighed, worth), strict=True))
        left.append(sorted(sorted(rows, key=lambda s: -worth[s])[:budget]))
    return softmax_over(
        q, k, v, lambda t, s: s >= head.first(t) or s in left[head.first(t) // group]
    )


def shadow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over s within reach of t, over outliers, and over chunks whose mean key is weighed most.

    The rank is that of the keys, so that these are rebuilt as they were.
    """
    group, options = head.config.group, head.config.options
    budget, size, odd = (int(options[name] or 0) for name in ("budget", "chunk", "outliers"))
    chunks = [k[first : first + size].detach() for first in range(0, len(k), size)]
    means = torch.stack([keys.mean(0) for keys in chunks])
    likeness = [
        min(float(torch.cosine_similarity(mean, key, dim=0)) for key in keys)
        for mean, keys in zip(means, chunks, strict=True)
    ]
    outliers = {
        number
        for first in range(0, len(k) // size, group // size)
        for number in sorted(
            range(first, min(first + group // size, len(chunks))), key=lambda i: likeness[i]
        )[:odd]
    }

    def read(t: int) -> set[int]:
        every = range(head.first(t) // size)
        others = [number for number in every if number not in outliers]
        if not others:
            return set(every)
        weights = [
            (means[others] @ each[t].detach() / math.sqrt(q.shape[1])).softmax(0)
            for each in head.sharing
        ]
        share = dict(zip(others, torch.stack(weights).amax(0).tolist(), strict=True))
        best = sorted(others, key=lambda number: -share[number])[: budget // size]
        return {*best, *(outliers & set(every))}

    chosen = [read(t) for t in range(len(q))]
    return softmax_over(q, k, v, lambda t, s: s >= head.first(t) or s // size in chosen[t])


def delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax, of a key before those within reach the components that moved by more than the threshold.

    The others are those of the key before it, as it was rebuilt; the first key of a group is whole.
    """
    threshold = float(head.config.options["threshold"] or 0)
    rough: list[torch.Tensor] = []
    for s in range(len(k)):
        if s % head.config.group == 0:
            rough.append(k[s])
        else:
            still = (k[s] - rough[-1]).abs() <= threshold
            rough.append(torch.where(still, rough[-1], k[s]))
    out = []
    for t in range(len(q)):
        keys = [rough[s] if s < head.first(t) else k[s] for s in range(t + 1)]
        out.append((torch.stack(keys) @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[: t + 1])
    return torch.stack(out)
