"""The gated attention unit of FLASH (Hua et al. 2022, arXiv 2202.10447): attention and MLP in one.

One head with narrow queries and keys and wide values. Four scaled and shifted copies of one
projection serve as queries and keys of two branches: a quadratic one inside a group, whose weights
are not normalized, and a linear one over the groups before. A gate multiplies their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.base import Features, Rope
from linspec.mixers.forms import full
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.convolution import tap_distances
from linspec.mixers.ops.exact import Exact, Groups
from linspec.mixers.ops.parts import Parts
from linspec.mixers.ops.summed import Summed
from linspec.mixers.projections import LinearFactory
from linspec.mixers.relative import RelativeBias
from linspec.mixers.rope import rotate
from linspec.models.flash_config import FlashConfig
from linspec.state.contract import EntryState, LayerState, StateOptions
from linspec.state.dense_group import DenseGroup
from linspec.state.entries import EntrySpec
from linspec.state.grouped import GroupedSpec, GroupedState, add_products
from linspec.state.registry import new_cache


def laplace(x: torch.Tensor) -> torch.Tensor:
    """A bounded stand-in for relu(x)² (Ma et al. 2022, Mega, arXiv 2209.10655)."""
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1 + torch.erf((x - mean) / (deviation * math.sqrt(2))))


def laplace_weights(
    products: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    group: int,
    width: int,
) -> torch.Tensor:
    """Weights of the quadratic branch, which are not normalized."""
    scores = products / group
    if bias is not None:
        scores = scores + bias * width**0.5
    weights = laplace(scores)
    return weights if seen is None else weights.masked_fill(~seen, 0.0)


class GatedAttentionUnit(LinearMixer):
    """out = gate ⊙ (inside a group + groups before + convolution), projected.

    Entries keep both branches' keys side by side: [quadratic | linear]; sums take the linear half. With
    variant 'quadratic' there is one group without end.
    """

    def __init__(self, config: FlashConfig) -> None:
        # its projections are not those of a mixer of heads, so theirs are never made
        nn.Module.__init__(self)
        self.config, self.mixer = config, config.mixers[0]
        self.heads = self.kv_heads = self.repeats = 1
        self.head_width, self.qk_width = config.mlp_width, config.head_width
        self.variant = config.variant
        self.keeps_cache = config.variant == "quadratic"
        self.groups, self.arranged = Groups(self.mixer.group), False
        weights = partial(laplace_weights, group=self.mixer.group, width=self.qk_width)
        self.exact = Exact(weights, self.quadratic_half, self.quadratic_half)
        self.summed = None
        if config.variant in ("grouped", "aug"):
            self.summed = Summed(self.groups, self.linear_half, self.linear_half)
        self.parts = Parts(self.groups, self.exact, self.summed)
        self.broad = nn.Linear(config.width, 2 * config.mlp_width)
        self.narrow = nn.Linear(config.width, config.head_width)
        self.inner: nn.Module | None = None
        self.padded_taps: torch.Tensor | None = None
        self.gamma = nn.Parameter(0.02 * torch.randn(4, config.head_width))
        self.beta = nn.Parameter(torch.zeros(4, config.head_width))
        assert config.relative is not None, "checked by the configuration"
        self.relative = RelativeBias(config.relative, 1, causal=True)
        self.o: nn.Module = nn.Linear(config.mlp_width, config.width)
        if self.mixer.taps:
            bound = self.mixer.taps**-0.5
            self.taps = nn.Parameter(torch.empty(1, self.mixer.taps).uniform_(-bound, bound))

    # ---- what tells it from the other grouped mixers

    def state_spec(self) -> Any:
        sizes = {
            "kv_heads": 1,
            "key_width": 2 * self.qk_width,
            "value_width": self.head_width,
            "conv_history": max(0, self.mixer.taps - 1),
        }
        if self.keeps_cache:
            return EntrySpec(**sizes)
        sums = self.qk_width if self.summed is not None else 0
        return GroupedSpec(**sizes, group=self.mixer.group, sum_width=sums)

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        if self.keeps_cache:
            return new_cache(self.state_spec(), len(layers), slots, options)
        return super().new_state(layers, slots, options)

    def quadratic_half(self, x: torch.Tensor) -> torch.Tensor:
        """The half of queries or keys that single tokens are weighed by."""
        return x[..., : self.qk_width]

    def linear_half(self, x: torch.Tensor) -> torch.Tensor:
        """The half of queries or keys that reads or enters the sums."""
        return x[..., self.qk_width :]

    def sum_scale(self) -> float:
        return 1 / self.mixer.group

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.variant != "quadratic":
            return super().mix(q, k, v, sums)
        assert self.relative is not None
        time = q.shape[2]
        seen = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
        bias = self.relative.between(time, time)
        products = self.quadratic_half(q) @ self.quadratic_half(k).mT
        return self.exact.weights(products, seen, bias) @ v

    # ---- projections

    def gated(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, Features]:
        """x [..., D] -> the gate [..., V], and q, k [..., 1, 2K] and v [..., 1, V]."""
        v, gate, shared = F.silu(self._projections(x)).split(
            (self.head_width, self.head_width, self.qk_width), dim=-1
        )
        four = shared[..., None, :] * self.gamma + self.beta  # [..., 4, K]
        if rope is not None:
            turned, plain = four.split(
                (rope[0].shape[-1], self.qk_width - rope[0].shape[-1]), dim=-1
            )
            four = torch.cat((rotate(turned, *rope), plain), dim=-1)
        q, k = four[..., :2, :].flatten(-2), four[..., 2:, :].flatten(-2)
        return gate, (q[..., None, :], k[..., None, :], v[..., None, :])

    def _projections(self, x: torch.Tensor) -> torch.Tensor:
        if self.inner is not None:
            return self.inner(x)
        return torch.cat((self.broad(x), self.narrow(x)), dim=-1)

    def to_inference(self, linear_factory: LinearFactory) -> None:
        self.inner = linear_factory(self.broad, self.narrow)
        self.o = linear_factory(self.o)
        del self.broad, self.narrow

    def forward(
        self, x: torch.Tensor, rope: Rope, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        gate, heads = self.gated(x, rope)
        q, k, v = (t.transpose(1, 2) for t in heads)
        return self.o(gate * full(self, q, k, v)[:, 0])

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        gate, heads = self.gated(x, rope)
        return self.o(gate * self.step_heads(heads, dense_groups, state, layer))


class TokenShift(nn.Module):
    """The first half of the channels comes from the token before (Peng 2021, RWKV).

    A convolution whose one tap lies one token back: its state is one row, the last committed token's,
    and in a tree a node's predecessor is its parent.
    """

    keeps_cache = False
    offloads = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width // 2

    def state_spec(self) -> GroupedSpec:
        """Groups of one: an entry leaves as soon as it is committed, and stays as the conv_history."""
        return GroupedSpec(
            kv_heads=1, key_width=0, value_width=self.channels, conv_history=1, group=1
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return GroupedState(self.state_spec(), [add_products] * len(layers), slots, options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]; nothing comes before the first token."""
        before = F.pad(x[..., : self.channels], (0, 0, 1, 0))[:, :-1]
        return torch.cat((before, x[..., self.channels :]), dim=-1)

    def step(
        self, x: torch.Tensor, dense_groups: list[DenseGroup], state: EntryState, layer: int
    ) -> torch.Tensor:
        """Packed nodes [M, D] -> [M, D]."""
        rows = x[:, None, : self.channels]
        before = [
            self._step_segment(rows, dense_group, state, layer) for dense_group in dense_groups
        ]
        return torch.cat((torch.cat(before), x[:, self.channels :]), dim=-1)

    def _step_segment(
        self, rows: torch.Tensor, dense_group: DenseGroup, state: EntryState, layer: int
    ) -> torch.Tensor:
        v = dense_group.unpack(rows).transpose(1, 2)
        at = (layer, dense_group.start, dense_group.lengths, v[..., :0], v)
        if dense_group.long:
            before = state.stage_long(*at)[1][:, :, : v.shape[2]]
        else:
            state.stage(*at)
            tree_mask = dense_group.tree_mask(state)
            _, values = state.read(layer, dense_group.slots, tree_mask.width)
            parent = tree_mask.memo("parent", lambda: _parents(tree_mask))
            before = parent[:, None].to(values.dtype) @ values
        return dense_group.pack(before.transpose(1, 2)).flatten(1)


def _parents(tree_mask: TreeMask) -> torch.Tensor:
    """Which row, conv_history included, is the token before each node: [R, N, 1 + C]."""
    return tap_distances(tree_mask.offsets, tree_mask.columns, tree_mask.visible, 2, 1) == 1
