"""The published samplers as one slow loop over plain torch: what linspec's loop is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from plain_diffusion import MASK, PlainModel


@dataclass
class Trace:
    """What was decided by each forward, in which order; what each forward computed; the whole text."""

    forwards: list[list[tuple[int, int]]] = field(default_factory=list)
    computed: int = 0
    tokens: list[int] = field(default_factory=list)


def denoise(
    plain: PlainModel,
    prompt: list[int],
    count: int,
    *,
    block: int,
    rule: str,
    number: float = 0,
    cache: str = "none",
) -> Trace:
    """Every position of the output; rule: 'static' of `number` steps a block (0: one a token), and others."""
    trace, kept = Trace(tokens=[*prompt, *[MASK] * count]), dict[int, Any]()
    x = trace.tokens
    for start in range(len(prompt), len(x), block):
        end, step = min(start + block, len(x)), 0
        steps = int(number) or end - start
        shares = [(end - start) // steps + (i < (end - start) % steps) for i in range(steps)]
        while MASK in x[start:end]:
            rows = set(range(len(x)))
            if cache != "none" and step:
                rows = set(range(start, end if cache == "dual" else len(x)))
            masks = [p for p in range(start, end) if x[p] == MASK]
            # logits that stand one position ahead are computed with the others
            rows |= {p - plain.shift for p in masks}
            logits = plain.rows_of(x, sorted(rows), kept)
            at = {row: place for place, row in enumerate(sorted(rows))}
            picked = []
            for p in masks:
                row = logits[at[p - plain.shift]].double().clone()
                row[MASK] = -torch.inf
                probabilities = row.softmax(-1)
                token = int(row.argmax())
                picked.append((float(probabilities[token]), p, token, probabilities))
            # the surest first, of equal ones the first
            picked.sort(key=lambda each: (-each[0], each[1]))
            chosen = _chosen(picked, rule, number, shares[step] if step < len(shares) else 1)
            for _, p, token, _ in chosen:
                x[p] = token
            trace.forwards.append(sorted((p, token) for _, p, token, _ in chosen))
            trace.computed += len(rows) * plain.layers
            step += 1
    return trace


def _chosen(picked: list[Any], rule: str, number: float, share: int) -> list[Any]:
    if rule == "static":
        return picked[:share]
    if rule == "threshold":
        return [each for n, each in enumerate(picked) if n == 0 or each[0] >= number]
    if rule == "factor":
        fits = [n for n, each in enumerate(picked, 1) if (n + 1) * (1 - each[0]) < number]
        return picked[: max(fits, default=1)]
    entropies = [-float((e[3] * e[3].clamp_min(1e-300).log()).sum()) for e in picked]
    least = min(range(len(picked)), key=lambda n: (entropies[n], picked[n][1]))
    return [e for n, e in enumerate(picked) if n == least or entropies[n] <= number]
