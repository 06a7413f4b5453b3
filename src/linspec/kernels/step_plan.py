"""A decoder as kernels see it: numbers and tensors, with no module, mixer or state.

    plan = step_plan(model)       # by models/step_plan.py, which alone knows both sides
    print(why_not(plan))          # by a kernel: None, or what it does not compute

A plan says what a model is, not what a kernel can do, so that every kernel takes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.tree import Shape

# kinds of weights
F32, BF16, INT8, INT4, BLOCKS = range(5)
# kinds of rows: F32, BF16, INT8, INT4, and this one
F16 = 5
# positions of a page of a cache: a block of the rows that attention reads at once
PAGE = 64
# rows that are judged together by bounds, where a node selects what it reads; by codes a PAGE is
JUDGED = 16
# of MLPs: names that a plan has
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# feature maps of queries and keys, weights of single rows, and last touches of `SummedPlan`
MAPS = (
    *("same", "unit", "relu", "elu_plus_1", "softmax", "two_sided", "positive", "phases"),
    "series",
)
WEIGHTS = ("none", "products", "softmax", "relu2", "exponentials", "collisions")
ENDS = ("plain", "quotient", "bounded", "rms", "unit")


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """x Wᵀ + b with packed weights.

    kind: of the weights. weights and scales: as `kernels/cpu/pack.py` makes them. bias [outputs].
    parts: of BLOCKS, the number of the format and the outputs of each matrix, one behind the other in
    `weights`.
    """

    kind: int
    outputs: int
    inputs: int
    weights: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class NormPlan:
    """x · weight / sqrt(mean(x²) + ε) + bias. centred: of x less its mean, as a LayerNorm."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    centred: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What a node reads from the rows of its slot.

    window: nearest rows that it sees; 0 is all. group, span: rows of a group, and how many groups it
    sees exactly, its own included; group 0 is one group of all rows. squared_relu: weights relu(q·k)²
    of unit features instead of a softmax. alpha: factor on what the sums of older groups give. sinks:
    first rows of the text, seen from everywhere; they lie where others have their sums once they leave.
    chosen: groups ahead of the span that a node reads, the best ones by two-bit keys (coded) or by bounds;
    judged: rows that are judged together. budget: rows that stay of the groups that close, which the last
    `asked` queries of each group decide as it closes; the queries lie behind the key of their token. A row is
    worth what they have weighed it, of all groups together, or where pool is not 0 the greatest of what those
    of the newest group weigh it and its neighbours, `pool` rows. threshold: rows ahead of the span are read
    by keys that are rebuilt from their changes above it, as mixers/ops/key_changes.py says; None without.
    positions: rows ahead of the span that a node reads, those that the nearest layer before selected for it;
    selects: it reads all rows and selects so many for later layers, those with the greatest products for the
    best query head of a KV head. chunk: rows of a chunk of the groups ahead of the span, whose keys have this
    `rank`; every node reads `outliers` of the chunks of each group, and of all others `marked`, those whose
    mean key has the greatest share for a query head of a KV head; 0 without. bias [H, D]: joins scores, or
    squares, by distance; the last column is for all greater ones.
    """

    window: int = 0
    group: int = 0
    span: int = 1
    squared_relu: bool = False
    alpha: float = 0.0
    sinks: int = 0
    chosen: int = 0
    judged: int = 0
    coded: bool = False
    budget: int = 0
    asked: int = 0
    pool: int = 0
    threshold: float | None = None
    positions: int = 0
    selects: bool = False
    rank: int = 0
    chunk: int = 0
    outliers: int = 0
    marked: int = 0
    bias: torch.Tensor | None = None

    @property
    def sees_far(self) -> bool:
        """Whether rows ahead of the span are read too, in a way of their own."""
        return self.threshold is not None or self.positions > 0

    @property
    def plain(self) -> bool:
        """Whether what a row weighs is the same wherever the node stands that reads it."""
        return self.bias is None and not (self.window or self.group or self.sinks)

    @property
    def both_ways(self) -> bool:
        """Whether a node can also see rows behind it: those of near groups, and sums of others."""
        limited = self.window or self.sinks or self.chosen or self.budget or self.chunk
        return self.bias is None and not (limited or self.sees_far)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SummedPlan:
    """What a node reads from sums of features φ(k) v, and from rows that are not among them yet.

    group, span: as in `AttentionPlan`. map: φ, one of MAPS, of `features` features; mapped: rows keep φ(k)
    and not k. query_map and key_map [H, M, K], [Hkv, M, K]: what 'two_sided', 'positive' and 'phases' take
    the products with; [1, M, K] where all heads share it. query_factors [H]: on φ(q). exact: how the rows
    within the span weigh, one of WEIGHTS; those before it weigh φ(q)·φ(k). alpha: factor on what these and
    the sums give. together: exact and summed have one end, else the summed part alone has it. end: one of
    ENDS, 'quotient' by the last value column plus `floor`, 'bounded' by that column or `floor` if it is
    less, 'rms' a norm with weights `gain` [V]. ones: values have a column of ones behind them.

    fades: the sums fade by a factor per channel of a key or per head, whose logarithm lies behind the key;
    with exact 'none' every row is read through them. gate_map [Hkv, K, E] or gate_scale [Hkv, K], and
    gate_bias [Hkv, E]: from a key ahead of its rotation to what the factors are made of. delta: a row writes
    what the sums do not return for its key, at the rate of the second gate.

    kept: there are no sums; a closed group becomes P rows [2 K + 1], which the last `kept` groups have where
    others have sums: mixtures of its keys and of its values by row_keys and row_values [P, G], and a 1. They
    join the softmax of the rows within the span. bias: as in `AttentionPlan`, of rows within the span.
    """

    group: int
    span: int
    features: int
    map: str
    mapped: bool = False
    query_map: torch.Tensor | None = None
    key_map: torch.Tensor | None = None
    query_factors: torch.Tensor | None = None
    exact: str = "none"
    alpha: float = 1.0
    together: bool = True
    end: str = "plain"
    floor: float = 0.0
    gain: torch.Tensor | None = None
    ones: bool = False
    fades: bool = False
    gate_map: torch.Tensor | None = None
    gate_scale: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    delta: bool = False
    kept: int = 0
    row_keys: torch.Tensor | None = None
    row_values: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def both_ways(self) -> bool:
        """Whether a node can also see rows behind it: those of near groups, and sums of others."""
        return self.bias is None and not (self.fades or self.kept)


@dataclass(frozen=True, slots=True)
class PartPlan:
    """KV heads of a layer that read alike, from a state of their own.

    heads: which of the layer's, in the order of that state. attention: None for a mixer that has no plan.
    """

    heads: tuple[int, ...]
    attention: AttentionPlan | SummedPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """A block: mixer and MLP with their norms, each of which may be None.

    mixer: its name. parts: what its KV heads read; each head is in one of them. mixer_norm and mlp_norm: of
    what goes in; mixer_out_norm and mlp_out_norm: of what comes out, ahead of the sum. q_norm and k_norm:
    weights [head_width] for all heads alike, [heads, head_width] for each, or [heads · head_width] for one
    norm over all of them. rotary: which of the plan's frequencies turn queries and keys, None for none.
    parallel: the MLP reads what enters the block, as the mixer does, and not the sum behind the mixer.
    conv_weights: [heads, taps] of the convolution over values, None without. Linear layers are None where
    the weights are not packed; up: with a gate it has the outputs of both, the gate first. mixes, feeds:
    whether the mixer and the MLP are computed; what is left out adds nothing, and stages nothing.
    """

    mixer: str
    parts: tuple[PartPlan, ...]
    mixer_norm: NormPlan | None
    mlp_norm: NormPlan | None
    mixer_out_norm: NormPlan | None
    mlp_out_norm: NormPlan | None
    q_norm: NormPlan | None
    k_norm: NormPlan | None
    rotary: int | None
    parallel: bool
    conv_weights: torch.Tensor | None
    qkv: LinearPlan | None
    out: LinearPlan | None
    up: LinearPlan | None
    down: LinearPlan | None
    mixes: bool = True
    feeds: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class RotaryPlan:
    """Rotary positions. frequencies [R / 2]: they turn the first R features of a head. scale: factor on
    cosines and sines."""

    frequencies: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """A whole decoder.

    embedding [vocabulary, width], or a matrix of BLOCKS whose outputs are the tokens; embedding_scale: on
    its rows. position_rows [positions, width]: added to them, None without. rotaries: see `LayerPlan`.
    activation, gated_mlp: as in its configuration. residual_scale: on what mixers and MLPs add.
    score_scale: on q·k ahead of a softmax; score_cap: scores s become cap·tanh(s / cap), 0 for none.
    logit_scale: on the final hidden states; logit_cap: as that of scores. token_norm: nodes have
    states of their own, given in place of embeddings, and mixers read the embedding of the token behind this
    norm, then the normalized state; None where there are only tokens. causal: False where tokens see each
    other both ways; the taps of a convolution are then centred, an odd number of them.
    """

    layers: tuple[LayerPlan, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    norm_eps: float
    activation: str
    gated_mlp: bool
    embedding: torch.Tensor | LinearPlan
    embedding_scale: float
    position_rows: torch.Tensor | None
    rotaries: tuple[RotaryPlan, ...]
    residual_scale: float
    score_scale: float
    score_cap: float
    final_norm: NormPlan
    logit_scale: float
    logit_cap: float
    head: LinearPlan | None
    token_norm: NormPlan | None = None
    causal: bool = True

    @property
    def tokens(self) -> int:
        """How many tokens have an embedding."""
        table = self.embedding
        return table.outputs if isinstance(table, LinearPlan) else len(table)


@dataclass(frozen=True, slots=True)
class PageList:
    """Where the pages are that the rows of each slot begin with, ahead of those in its buffer.

    lists: address of [slots] addresses of lists of pages. positions: address of [slots] int32, how many rows
    these have. keys, values: bytes from the beginning of a page to those of the layer, [Hkv, PAGE, .] each.
    """

    lists: int
    positions: int
    keys: int
    values: int


@dataclass(frozen=True, slots=True)
class PastList:
    """Where the closed segments of each slot are.

    table: address of [slots] pairs of `ls_past` (`kernels/cpu/structs.py`). left_bytes: of a row of left
    factors.
    """

    table: int
    left_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class PartBuffers:
    """Where the state of a part of a layer is.

    kind: parts of one kind have equally many rows in a slot. keys [slots, Hkv, C, .], values [slots,
    Hkv, conv_history + C, .]: committed rows, then staged rows, floats, (int8) codes and a scale, or
    (uint8) blocks of 4-bit codes; sums [slots, Hkv, K, V] or None, with sinks [slots, Hkv, sinks,
    2 K + 1]: the bytes of their keys and of their values once they have left, and a 1 at the end, with a
    budget [slots, Hkv, budget, 2 K + 1]: keys, values, and what these are worth, 0 for none. pages:
    None where all rows are in the buffers.
    judge, judged: what judges pages and their numbers, as state/judged_pages.py has them, where it is kept.
    group_sums, group_rows: those of a canvas, as state/group_sums.py has them, where they are kept.
    past: closed segments, where they are read.
    """

    kind: int
    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None
    conv_history: int
    pages: PageList | None = None
    judge: torch.Tensor | None = None
    judged: torch.Tensor | None = None
    group_sums: torch.Tensor | None = None
    group_rows: torch.Tensor | None = None
    past: PastList | None = None


@dataclass(slots=True)
class NewNodes:
    """The new nodes of one slot in a step.

    shape: of all that the slot has staged then, the new nodes last. committed: its rows in the state
    of each kind. embeddings: float32 [N, D] in place of those of the tokens, None for these. overwrite:
    committed rows that the new nodes replace; nothing is staged then, and each sees all committed rows, or
    those up to the end of its own block of `blocks` rows.
    behind: further slots that look like this one but for what later nodes of the step overwrite there;
    carried: for each new node, in how many of these its row stands too. None where it stands in none.
    """

    slot: int
    tokens: Sequence[int]
    positions: Sequence[int]
    shape: Shape
    committed: Sequence[int]
    embeddings: torch.Tensor | None = None
    overwrite: Sequence[int] | None = None
    blocks: int | None = None
    behind: Sequence[int] = ()
    carried: Sequence[int] | None = None
