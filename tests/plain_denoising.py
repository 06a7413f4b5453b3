"""The published samplers as one slow loop over plain torch: what linspec's loop is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from plain_diffusion import EOS, MASK, PlainModel

# how long the block at a position is, by the logits of the tokens at all positions behind it
Sizes = Callable[[list[int], int, dict[int, torch.Tensor]], int]


@dataclass
class Trace:
    """What each forward decided and what it replaced, in which order; what each computed; the whole text."""

    forwards: list[list[tuple[int, int]]] = field(default_factory=list)
    edits: list[tuple[int, int]] = field(default_factory=list)
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


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
    block: int | Sizes,
    rule: str,
    number: float = 0,
    cache: str | Rows = "none",
    keep: float = 0,
    accepts: Callable[[list[float]], list[bool]] | None = None,
    cut: float | None = None,
    ending: int = EOS,
) -> Trace:
    """Every position of the output; rule: 'static' of `number` steps a block (0: one a token), and others.

    keep: a decided token that is less likely is replaced, at most twice each. accepts: the filter of the rule
    'filter', for the largest probabilities of a block. cut: the probability of an end of text that cuts the
    canvas, `ending` its token; then the text is what stands up to the first end.
    """
    trace, kept = Trace(tokens=[*prompt, *[MASK] * count]), dict[int, Any]()
    rows_of = baseline(cache) if isinstance(cache, str) else cache
    x, texts, start, shift = trace.tokens, list[list[int]](), len(prompt), int(plain.shift)
    while start < len(x):
        end, step, edits, changed, shares = len(x), 0, Counter[int](), True, list[int]()
        while MASK in x[start:end] or (
            keep and changed and any(edits[p] < 2 for p in _of(start, end))
        ):
            masks = [p for p in _of(start, end) if x[p] == MASK]
            share = shares[step] if step < len(shares) else 1
            texts.append(list(x))
            rows, all_of = rows_of(View(texts, len(prompt), start, end, step, shift, masks[:share]))
            if not all_of:
                masks = masks[:share]
            whole = bool(keep) or rule == "filter"
            # logits that stand one position ahead are computed with the others
            rows |= {p - plain.shift for p in (_of(start, end) if whole else masks)}
            computed = plain.rows_of(x, sorted(rows), kept)
            at = {
                row + plain.shift: logits
                for row, logits in zip(sorted(rows), computed, strict=True)
            }
            for logits in at.values():
                logits[MASK] = -torch.inf
            trace.computed += len(rows) * plain.layers
            if step == 0:
                size = block if isinstance(block, int) else block(prompt, start, at)
                end = min(start + size, len(x))
                steps = int(number) or end - start
                shares = [
                    (end - start) // steps + (i < (end - start) % steps) for i in range(steps)
                ]
            probabilities = {p: at[p].double().softmax(-1) for p in _of(start, end) if p in at}
            edited = [
                (p, int(probabilities[p].argmax()))
                for p in _of(start, end)
                if keep and x[p] != MASK and edits[p] < 2 and probabilities[p][x[p]] < keep
            ]
            edited = [(p, token) for p, token in edited if x[p] != token]
            picked = [
                (float(probabilities[p].max()), p, int(probabilities[p].argmax()), probabilities[p])
                for p in masks
                if p < end
            ]
            # the surest first, of equal ones the first
            picked.sort(key=lambda each: (-each[0], each[1]))
            if rule == "filter":
                assert accepts is not None
                sure = accepts([float(probabilities[p].max()) for p in _of(start, end)])
                chosen = [e for n, e in enumerate(picked) if n == 0 or sure[e[1] - start]]
            else:
                chosen = _chosen(picked, rule, number, shares[step] if step < len(shares) else 1)
            for p, token in [*edited, *((p, token) for _, p, token, _ in chosen)]:
                x[p] = token
            edits.update(p for p, _ in edited)
            changed = bool(edited or chosen)
            trace.edits += edited
            trace.forwards.append(sorted((p, token) for _, p, token, _ in chosen))
            step += 1
            if cut is not None:
                length = _cut(x, len(prompt), at, cut, ending)
                del x[length:]
                end = min(end, length)
                kept = {
                    layer: tuple(t[:, :, :length].clone() for t in entries)
                    for layer, entries in kept.items()
                }
        trace.blocks.append(end - start)
        start = end
        if cut is not None and ending in x[len(prompt) : end]:
            del x[x.index(ending, len(prompt)) + 1 :]
            break
        missing = count + len(prompt) - len(x)
        if start == len(x) and missing:
            # it was cut for an end that did not come
            x += [MASK] * missing
            kept = {}
    return trace


def _of(start: int, end: int) -> range:
    return range(start, end)


def _cut(x: list[int], first: int, at: dict[int, torch.Tensor], least: float, ending: int) -> int:
    """How much of a text is kept: up to its first end, or to the likeliest one behind what is decided."""
    if ending in x[first:]:
        return x.index(ending, first) + 1
    decided = [p for p in range(first, len(x)) if x[p] != MASK]
    found = [
        (-float(at[p].double().softmax(-1)[ending]), p)
        for p in range(max(decided, default=first - 1) + 1, len(x))
        if p in at and int(at[p].argmax()) == ending
    ]
    return min(found)[1] + 1 if found and -min(found)[0] >= least else len(x)


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
