"""The published samplers as one slow loop over plain torch: what linspec's loop is held against."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass
class View:
    """What the rows of a forward may go by: all texts so far, the newest last, and what is decided next."""

    texts: list[list[int]]
    prompt: int
    start: int
    end: int
    step: int
    shift: int
    following: list[int]

    @property
    def size(self) -> int:
        return len(self.texts[-1])

    def masked(self, back: int = 0) -> set[int]:
        """Positions that were masks before so many forwards."""
        text = self.texts[max(0, len(self.texts) - 1 - back)]
        return {p for p, token in enumerate(text) if token == MASK}


# rows that a forward computes, and whether it computes the logits of all masks of the block
Rows = Callable[[View], tuple[set[int], bool]]


def baseline(cache: str) -> Rows:
    def rows(view: View) -> tuple[set[int], bool]:
        if cache == "none" or view.step == 0:
            return set(range(view.size)), True
        return set(range(view.start, view.end if cache == "dual" else view.size)), True

    return rows


def dkv(
    every: int = 8, delay: int = 1, kind: str = "un", *, frozen: bool = False, across: bool = False
) -> Rows:
    """Rows whose token was no mask before `delay` forwards are not computed."""

    def rows(view: View) -> tuple[set[int], bool]:
        step = len(view.texts) - 1 if across else view.step
        first = view.prompt if frozen and len(view.texts) > 1 else 0
        whole = set(range(first, view.size))
        if step <= 1 or step % every == 0:
            return whole, True
        masked = view.masked(delay)
        own = masked
        behind = {p - view.shift for p in masked} | (masked & {view.size - 1})
        waits = {"un": behind, "right": own, "un_right": own | behind}[kind]
        return waits & whole, True

    return rows


def greedy(every: int = 2, window: int = 4, *, frozen: bool = False) -> Rows:
    """Only what is decided next, what was decided last, and masks beside the former."""

    def rows(view: View) -> tuple[set[int], bool]:
        if view.step % every == 0:
            return set(range(view.prompt if frozen and len(view.texts) > 1 else 0, view.size)), True
        found = set(view.following) | (view.masked(1) - view.masked())
        for p in view.following:
            others = view.masked() - set(view.following)
            left, right = (
                sorted((o for o in others if (o < p) is side), key=lambda o: abs(o - p))
                for side in (True, False)
            )
            near: list[int] = []
            while len(near) < window and (left or right):
                for side in (left, right):
                    if side and len(near) < window:
                        near.append(side.pop(0))
            found |= set(near)
        return found, False

    return rows


def denoise(
    plain: PlainModel,
    prompt: list[int],
    count: int,
    *,
    block: int,
    rule: str,
    number: float = 0,
    cache: str | Rows = "none",
) -> Trace:
    """Every position of the output; rule: 'static' of `number` steps a block (0: one a token), and others."""
    trace, kept = Trace(tokens=[*prompt, *[MASK] * count]), dict[int, Any]()
    rows_of = baseline(cache) if isinstance(cache, str) else cache
    x, texts = trace.tokens, list[list[int]]()
    for start in range(len(prompt), len(x), block):
        end, step = min(start + block, len(x)), 0
        steps = int(number) or end - start
        shares = [(end - start) // steps + (i < (end - start) % steps) for i in range(steps)]
        while MASK in x[start:end]:
            masks = [p for p in range(start, end) if x[p] == MASK]
            share = shares[step] if step < len(shares) else 1
            texts.append(list(x))
            shift = int(plain.shift)
            rows, all_of = rows_of(View(texts, len(prompt), start, end, step, shift, masks[:share]))
            if not all_of:
                masks = masks[:share]
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
            chosen = _chosen(picked, rule, number, share)
            for _, p, token, _ in chosen:
                x[p] = token
            trace.forwards.append(sorted((p, token) for _, p, token, _ in chosen))
            trace.computed += len(rows) * plain.layers
            step += 1
    return trace


def _chosen(picked: list[Any], rule: str, number: float, share: int) -> list[Any]:
    if rule == "static":
        return picked[:share]
    if rule == "left":
        return sorted(picked, key=lambda each: each[1])[:share]
    if rule == "threshold":
        return [each for n, each in enumerate(picked) if n == 0 or each[0] >= number]
    if rule == "factor":
        fits = [n for n, each in enumerate(picked, 1) if (n + 1) * (1 - each[0]) < number]
        return picked[: max(fits, default=1)]
    entropies = [-float((e[3] * e[3].clamp_min(1e-300).log()).sum()) for e in picked]
    least = min(range(len(picked)), key=lambda n: (entropies[n], picked[n][1]))
    return [e for n, e in enumerate(picked) if n == least or entropies[n] <= number]
