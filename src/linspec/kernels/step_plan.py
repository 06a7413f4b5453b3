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
F32, BF16, INT8, INT4 = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """x Wᵀ + b with packed weights.

    kind: of the weights. weights and scales: as `kernels/cpu/pack.py` makes them. bias [outputs].
    """

    kind: int
    outputs: int
    inputs: int
    weights: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a node reads from the rows of its slot.

    window: nearest rows that it sees; 0 is all. group, span: rows of a group, and how many groups it
    sees exactly, its own included; group 0 is one group of all rows. squared_relu: weights relu(q·k)²
    of unit features instead of a softmax. alpha: factor on what the sums of older groups give. sinks:
    first rows of the text, seen from everywhere; they lie where others have their sums once they leave.
    """

    window: int = 0
    group: int = 0
    span: int = 1
    squared_relu: bool = False
    alpha: float = 0.0
    sinks: int = 0


@dataclass(frozen=True, slots=True)
class PartPlan:
    """KV heads of a layer that read alike, from a state of their own.

    heads: which of the layer's, in the order of that state. attention: None for a mixer that is not an
    `AttentionPlan`.
    """

    heads: tuple[int, ...]
    attention: AttentionPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """A block: mixer and MLP, each behind its norm.

    mixer: its name. parts: what its KV heads read; each head is in one of them. Linear layers are None
    where the weights are not packed; gate_up has the outputs of both, the gate first. conv_weights:
    [heads, taps] of the convolution over values, None without. q_norm and k_norm [head_width]: None
    without.
    """

    mixer: str
    parts: tuple[PartPlan, ...]
    mixer_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    conv_weights: torch.Tensor | None
    qkv: LinearPlan | None
    out: LinearPlan | None
    gate_up: LinearPlan | None
    down: LinearPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """A whole decoder.

    norm, positions, activation, gated_mlp: as in its configuration. embedding [vocabulary, width];
    final_norm [width]. frequencies [R / 2]: of the rotary positions, which turn R features of a head, None
    without; rotary_scale: factor on their cosines and sines. score_scale: factor on q·k ahead of a softmax;
    logit_scale: on the final hidden states.
    """

    layers: tuple[LayerPlan, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    norm: str
    norm_eps: float
    positions: str
    activation: str
    gated_mlp: bool
    embedding: torch.Tensor
    final_norm: torch.Tensor
    frequencies: torch.Tensor | None
    rotary_scale: float
    score_scale: float
    logit_scale: float
    head: LinearPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class PartBuffers:
    """Where the state of a part of a layer is.

    kind: parts of one kind have equally many rows in a slot. keys [slots, Hkv, C, .], values [slots,
    Hkv, conv_history + C, .]: committed rows, then staged rows; sums [slots, Hkv, K, V] or None, with
    sinks [slots, Hkv, sinks, 2 K + 1]: key, value and a 1 of each row that has left.
    quantized: rows are int8 codes and a scale.
    """

    kind: int
    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None
    conv_history: int
    quantized: bool


@dataclass(slots=True)
class NewNodes:
    """The new nodes of one slot in a step.

    shape: of all that the slot has staged then, the new nodes last. committed: its rows in the state
    of each kind.
    """

    slot: int
    tokens: Sequence[int]
    positions: Sequence[int]
    shape: Shape
    committed: Sequence[int]
