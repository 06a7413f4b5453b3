"""The exact part of a mixer: weights of single tokens, those of the groups within the span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import TreeMask
from linspec.mixers.ops.blocks import causal_window, windows
from linspec.mixers.ops.features import same

Map = Callable[[torch.Tensor], torch.Tensor]
# weights of products, where they are seen (None: everywhere), with a bias by distance (or None)
Weights = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def masked_softmax(scores: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension where `seen` is true (everywhere if None), float32 or wider inside."""
    wide = scores.float() if scores.dtype.itemsize < 4 else scores
    if seen is not None:
        wide = wide.masked_fill(~seen, float("-inf"))
    return wide.softmax(-1).to(scores.dtype)


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap·tanh(x / cap), which leaves small numbers nearly as they are (Gemma 2); x where cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def softmax_weights(
    products: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> torch.Tensor:
    """Softmax of scaled and capped products; the bias joins the scores."""
    scores = capped(products * scale, cap)
    return masked_softmax(scores if bias is None else scores + bias, seen)


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cap: float = 0.0,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Softmax attention of q [B, H, N, K] over k [B, Hkv, T, K] and v [B, Hkv, T, V]: [B, H, N, V].

    mask: as in torch, true where a key is seen, or a bias on the scores. causal: N = T and there is none.
    """
    repeats = q.shape[1] // k.shape[1]
    if not cap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=repeats > 1
        )
    k, v = (rows.repeat_interleave(repeats, dim=1) for rows in (k, v))
    bias = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    elif mask is not None and mask.is_floating_point():
        mask, bias = None, mask
    return softmax_weights(q @ k.mT, mask, bias, scale=scale, cap=cap) @ v


def plain_weights(
    products: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    of: Map,
) -> torch.Tensor:
    """Weights `of` products; the bias joins the weights, as in You et al. 2024."""
    weights = of(products)
    if bias is not None:
        weights = weights + bias
    return weights if seen is None else weights.masked_fill(~seen, 0.0)


def relu_squared(products: torch.Tensor) -> torch.Tensor:
    """relu(x)²."""
    return products.relu().square()


@dataclass(frozen=True)
class Exact:
    """Maps of queries [.., Hkv, rep, N, K'] and keys [.., Hkv, C, K'], and the weights of their products."""

    weights: Weights
    queries: Map = same
    keys: Map = same

    def nodes(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the nodes of a step read from positions: [R, Hkv, rep * N, V']."""
        nodes = self.queries(q).flatten(2, 3)
        products = (nodes @ self.keys(keys).mT).unflatten(2, q.shape[2:4])
        return self.weights(products, seen, bias).flatten(2, 3) @ values

    def blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        groups: Groups,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each block of a sequence reads within the span: [B, Hkv, n, rep * G, V'].

        q [B, Hkv, n, rep * G, K] and k [B, Hkv, T, K] are mapped already.
        """
        group = groups.size
        before = groups.before(q.shape[2])
        keys = windows(k, None, before, group)
        seen = causal_window(keys.shape[2], group, before, k.device)
        weights = self.weights(q @ keys.mT, seen.repeat(1, q.shape[3] // group, 1), bias)
        return weights @ windows(v, None, before, group)

    def blocks_both(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        real: torch.Tensor,
        groups: Groups,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `blocks` for encoders, with as many groups behind a block as ahead of it."""
        group, reach = groups.size, (groups.span - 1) * groups.size
        keys = windows(k, None, reach, group, reach)
        seen = windows(real[:, None, :, None].byte(), None, reach, group, reach).mT.bool()
        # a group of padding sees padding: a softmax over nothing is NaN, also in its gradient
        seen = seen | ~seen.any(-1, keepdim=True)
        weights = self.weights(q @ keys.mT, seen, bias)
        return weights @ windows(v, None, reach, group, reach)


@dataclass(frozen=True)
class Groups:
    """Groups of `size` tokens from position 0 on; a token sees `span` of them exactly, its own included."""

    size: int
    span: int = 1

    def before(self, blocks: int) -> int:
        """Tokens ahead of a block that it sees exactly, among `blocks` blocks of a sequence."""
        # before the first block there is nothing
        return (min(self.span, blocks) - 1) * self.size

    def ends(self, positions: torch.Tensor) -> torch.Tensor:
        """How many tokens lie before the span of those at these positions."""
        return (positions // self.size - (self.span - 1)).clamp(min=0) * self.size

    def masks(self, tree_mask: TreeMask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Positions within each node's span, and those of groups that close on its path.

        [R, 1, 1, N, C] each; None instead of a mask that is known to be all true, or all false. Computed once
        per mask.
        """
        found: tuple[torch.Tensor | None, torch.Tensor | None] = tree_mask.memo(
            ("group", self.size, self.span), lambda: self._masks(tree_mask)
        )
        return found

    def _masks(self, tree_mask: TreeMask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not tree_mask.static and tree_mask.deepest // self.size < self.span:
            return None if tree_mask.plain else tree_mask.visible[:, None, None], None
        oldest = (tree_mask.offsets // self.size)[:, :, None] - (self.span - 1)
        group = (tree_mask.columns // self.size)[:, None, :]
        exact = tree_mask.visible & (group >= oldest)
        closed = tree_mask.visible & (group < oldest)
        if tree_mask.static:
            return exact[:, None, None], closed[:, None, None]
        return (
            None if bool(exact.all()) else exact[:, None, None],
            closed[:, None, None] if bool(closed.any()) else None,
        )
