"""Elastic-Cache over plain torch; queries, keys, values and inputs of all layers are kept as published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from plain_denoising import Trace
from plain_diffusion import MASK, PlainModel


@dataclass
class Elastic(Trace):
    """boundaries: of each forward the first layer that computed all positions."""

    boundaries: list[int] = field(default_factory=list)


def attention(plain: PlainModel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[H, R, T] of q [1, H, R, K] and k [1, Hkv, T, K]."""
    k = k.repeat_interleave(plain.heads // plain.kv_heads, 1)
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)[0]


def forward(
    plain: PlainModel, ids: list[int], view: dict[str, Any], gamma: float, over: str
) -> Any:
    """Logits [R, vocab] of `view['rows']`, the boundary, and what is tracked next."""
    rows, tracked, kept = view["rows"], view["tracked"], view["kept"]
    every = list(range(len(ids)))
    masked = [p for p in every if ids[p] == MASK]
    first = not kept
    boundary, found = (0 if rows == every else plain.layers), set[int]()
    x = F.embedding(torch.tensor([[ids[row] for row in rows]]), plain.tensor("embed"))
    now = rows
    for layer in range(plain.layers):
        if first:
            kept[layer] = {"x": x.clone()}
        kept[layer]["x"][:, now] = x
        if layer == boundary:
            x, now = kept[layer]["x"].clone(), every
        old = None
        if layer < boundary:
            old = attention(plain, kept[layer]["q"][:, :, tracked], kept[layer]["k"])
        y = plain.normed(x, "mixer_norm", layer)
        fresh = {
            "q": plain.turned(plain.heads_of(y, "q", layer, plain.heads), now),
            "k": plain.turned(plain.heads_of(y, "k", layer, plain.kv_heads), now),
            "v": plain.heads_of(y, "v", layer, plain.kv_heads),
        }
        for name, value in fresh.items():
            kept[layer].setdefault(name, value.clone())[:, :, now] = value
        k = kept[layer]["k"]
        if old is not None and tracked:
            new = attention(plain, kept[layer]["q"][:, :, tracked], k)
            same = torch.cosine_similarity(old, new, dim=-1 if over == "keys" else 0).mean()
            if float(same) < gamma:
                boundary = layer + 1
        received = attention(plain, kept[layer]["q"][:, :, view["asking"]], k).sum((0, 1))
        received[masked] = -1
        count = min(view["count"], len(ids) - len(masked))
        found |= set(received.topk(count).indices.tolist())
        weights = attention(plain, fresh["q"], k)[None]
        v = kept[layer]["v"].repeat_interleave(plain.heads // plain.kv_heads, 1)
        x = x + plain.linear((weights @ v).transpose(1, 2).flatten(2), "o", layer)
        y = plain.normed(x, "mlp_norm", layer)
        gated = F.silu(plain.linear(y, "gate", layer)) * plain.linear(y, "up", layer)
        x = x + plain.linear(gated, "down", layer)
    head = plain.tensor("head")
    out = F.linear(plain.normed(x, "norm"), plain.tensor("embed") if head is None else head)[0]
    return out[[now.index(row) for row in rows]], boundary, found


def denoise(
    plain: PlainModel,
    prompt: list[int],
    count: int,
    *,
    window: int,
    least: float,
    gamma: float,
    tracked: int = 1,
    over: str = "keys",
    masks: str = "open",
) -> Elastic:
    """What is decided among the first `window` masks, by a threshold, until none is left."""
    trace = Elastic(tokens=[*prompt, *[MASK] * count])
    x, kept, watched, last = trace.tokens, dict[int, Any](), set[int](), list[int]()
    while MASK in x:
        left = [p for p, token in enumerate(x) if token == MASK]
        opened = left[:window]
        asking = [p - plain.shift for p in opened]
        queried = asking if masks == "open" else [p - plain.shift for p in left]
        rows = sorted({*watched, *last, *queried}) if kept else list(range(len(x)))
        view = {"rows": rows, "tracked": sorted(watched), "kept": kept, "asking": asking}
        view["count"] = tracked
        logits, boundary, watched = forward(plain, x, view, gamma, over)
        picked = []
        for p in opened:
            row = logits[rows.index(p - plain.shift)].double().clone()
            row[MASK] = -torch.inf
            picked.append((float(row.softmax(-1).max()), p, int(row.argmax())))
        best = max(sure for sure, _, _ in picked)
        chosen = [(p, token) for sure, p, token in picked if sure >= min(least, best)]
        for p, token in chosen:
            x[p] = token
        last = [p for p, _ in chosen]
        trace.forwards.append(chosen)
        trace.boundaries.append(boundary)
        trace.computed += boundary * len(rows) + (plain.layers - boundary) * len(x)
    return trace
