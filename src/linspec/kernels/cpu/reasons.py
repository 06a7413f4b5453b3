"""Why a decoder runs layer by layer: what of a plan the one-call step does not compute.

print(why_not(plan))          # None: it computes steps
print(why_not_over(plan))     # None: it computes nodes that overwrite, too
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.structs import MAX_HEAD_WIDTH, MAX_NODES
from linspec.kernels.step_plan import (
    ACTIVATIONS,
    BF16,
    F32,
    JUDGED,
    PAGE,
    AttentionPlan,
    LayerPlan,
    LinearPlan,
    StepPlan,
)

# linear layers of a layer, and what of its plan says whether they are computed
LINEARS = {"qkv": "mixes", "out": "mixes", "up": "feeds", "down": "feeds"}
EMBEDDINGS = {torch.float32: F32, torch.bfloat16: BF16}


def why_not(plan: StepPlan) -> str | None:
    """Why this kernel cannot compute the steps of a decoder, every reason; None if it can."""
    found = load()
    if found.library is None:
        return found.reason
    others = {
        layer.mixer for layer in plan.layers for part in layer.parts if part.attention is None
    }
    reasons = {
        f"activation {plan.activation} is not in the one-call step": (
            plan.activation not in ACTIVATIONS
        ),
        f"heads of {plan.head_width} features are not in the one-call step": (
            plan.head_width > MAX_HEAD_WIDTH or plan.head_width % 2 != 0
        ),
        "the weights are not packed for linspec's kernels": not _packed(plan),
        f"embeddings of {_dtype(plan)} are not in the one-call step": (
            _dtype(plan) not in EMBEDDINGS
        ),
        f"mixers {', '.join(sorted(others))} are not in the one-call step": bool(others),
        f"groups are selected in the one-call step with a span of 2 or more, groups of whole {PAGE}s of "
        f"tokens and pages of {PAGE} by codes or {JUDGED} by bounds, which this model has not": (
            not _selects(plan)
        ),
        f"segments close in the one-call step with a span of 2 or more, groups of {MAX_NODES} tokens or more "
        f"and ranks of at most {MAX_HEAD_WIDTH}, which this model has not": not _closes_apart(plan),
        "positions are read in the one-call step behind a layer that selects as many, by the same groups, "
        "which this model has not": not _hands_on(plan),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def _attentions(plan: StepPlan) -> Iterator[AttentionPlan]:
    found = (part.attention for layer in plan.layers for part in layer.parts)
    return (each for each in found if isinstance(each, AttentionPlan))


def _selects(plan: StepPlan) -> bool:
    """Whether all groups that nodes select are committed, and made of whole blocks of rows."""
    return all(
        each.span > 1 and each.group % PAGE == 0 and each.judged == (PAGE if each.coded else JUDGED)
        for each in _attentions(plan)
        if each.chosen
    )


def _closes_apart(plan: StepPlan) -> bool:
    """Whether segments that close for a node are committed then, one at most ahead of each step."""
    return all(
        each.span > 1 and each.group >= MAX_NODES and each.rank <= MAX_HEAD_WIDTH
        for each in _attentions(plan)
        if each.chunk
    )


def _hands_on(plan: StepPlan) -> bool:
    """Whether each layer that reads positions finds such as it reads, from the nearest layer that selects."""
    selected: dict[int, tuple[int, int, int]] = {}
    parts = (part for layer in plan.layers if layer.mixes for part in layer.parts)
    for part in parts:
        reads = part.attention
        if not isinstance(reads, AttentionPlan) or not reads.positions:
            continue
        like = reads.group, reads.span, reads.positions
        if reads.selects:
            selected |= dict.fromkeys(part.heads, like)
        elif any(selected.get(head) != like for head in part.heads):
            return False
    return True


def why_not_over(plan: StepPlan) -> str | None:
    """Why no nodes of this decoder can overwrite in one call; None if they can."""
    others = {layer.mixer for layer in plan.layers if not _sees_all(layer, causal=plan.causal)}
    if not others:
        return None
    return f"mixers {', '.join(sorted(others))} see no later tokens in the one-call step"


def _sees_all(layer: LayerPlan, *, causal: bool) -> bool:
    """Whether a node sees rows ahead of it and behind it alike, in every part of a layer."""
    found = [part.attention for part in layer.parts]
    if not causal:
        return all(each is not None and each.both_ways for each in found)
    # the weights are those of a form that looks back, unless all rows weigh alike
    plain = all(isinstance(each, AttentionPlan) and each.plain for each in found)
    return layer.conv_weights is None and plain


def _dtype(plan: StepPlan) -> torch.dtype:
    """Of the embeddings; blocks are read as float32."""
    return torch.float32 if isinstance(plan.embedding, LinearPlan) else plan.embedding.dtype


def _packed(plan: StepPlan) -> bool:
    """Whether all its linear layers are packed."""
    linears = (getattr(layer, name) for layer in plan.layers for name in LINEARS)
    return None not in (plan.head, *linears)
