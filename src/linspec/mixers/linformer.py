"""Linformer (Wang et al. 2020), and a causal form of it: closed groups compressed, the open one exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.carry import Carry
from linspec.mixers.closing import ClosingMixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.blocks import causal_window, join, shifted, split, windows
from linspec.mixers.ops.exact import capped, masked_softmax
from linspec.mixers.ops.kept_rows import pack_rows, row_columns, unpack_rows
from linspec.mixers.ops.summed import to_blocks
from linspec.mixers.options import CompressionOptions

DEFAULT_KEEP = 16
# tokens that one compressed row stands for, unless `features` says otherwise
TOKENS_PER_ROW = 8


@MIXERS.register(
    "linformer",
    summary="softmax over the tokens within the span and learned mixtures of each earlier group's rows",
    paper="Wang et al. 2020, arXiv 2006.04768",
    state="M·p·(2·d + 1) + 2·n·G·d per KV head: the last M groups, p rows each",
    cost="2·(n·G + M·p)·d per token; in an encoder 2·(p/G)·T·d",
    options=CompressionOptions,
)
class Linformer(ClosingMixer):
    """Softmax over s within the span and over the rows E K_g, F V_g of the last M closed groups g.

    The published form mixes all positions and cannot be causal; here E and F [p, G] mix the positions
    of one closed group, and start as averages of p parts of it. Older groups are forgotten, which
    bounds the state.

    In an encoder it is the published form, with these E and F on the diagonal of the matrix that
    mixes all positions, so that texts of any length fit: every token sees the rows of all groups.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if mixer.kernel != "own":
            raise ConfigError(
                f"mixer 'linformer' has softmax weights for tokens and for closed groups, under one "
                f"denominator; kernel {mixer.kernel!r} means nothing to it, leave it out"
            )
        if mixer.keep and not config.causal:
            raise ConfigError(
                f"mixer 'linformer' sees every group in an encoder; keep {mixer.keep} means nothing "
                "there, leave it out"
            )
        super().__init__(config, mixer)
        self.rows = mixer.features or max(1, mixer.group // TOKENS_PER_ROW)
        if self.rows > mixer.group:
            raise ConfigError(
                f"mixer 'linformer' makes at most as many rows of a group as it has tokens, "
                f"{mixer.group}, got {self.rows}; choose smaller features or a larger group"
            )
        self.keep = mixer.keep or DEFAULT_KEEP
        self.key_map = nn.Parameter(averages(self.rows, mixer.group))
        self.value_map = nn.Parameter(averages(self.rows, mixer.group))

    def sum_width(self) -> int:
        return self.keep * self.rows

    def sum_columns(self) -> int:
        return row_columns(self.head_width)

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Groups [..., G, K] -> [..., p, 2 K + 1]: key, value, and a 1 that says the row is there."""
        k, v = self.key_map.to(keys.dtype) @ keys, self.value_map.to(values.dtype) @ values
        return pack_rows(k, v)

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums after groups have closed: their rows behind those that were there, the oldest forgotten."""
        groups = (split(rows.to(sums.dtype), self.mixer.group) for rows in (keys, values))
        return torch.cat((sums, self.compress(*groups).flatten(1, 2)), dim=1)[:, -sums.shape[1] :]

    # ---- shards of a sequence

    def carry(self) -> Carry:
        return Carry(self.mixer.group, self.mixer.span, self)

    def summary(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The rows of the newest groups, behind rows that are not there."""
        rows = self.compress(*(split(x, self.mixer.group) for x in (k, v))).flatten(2, 3)
        return F.pad(rows, (0, 0, self.sum_width(), 0))[:, :, rows.shape[2] :]

    def joined(self, sums: torch.Tensor | None, summary: torch.Tensor, tokens: int) -> torch.Tensor:
        if sums is None:
            return summary
        new = min(self.sum_width(), tokens // self.mixer.group * self.rows)
        return torch.cat((sums[:, :, new:], summary[:, :, self.sum_width() - new :]), dim=2)

    # ---- step form

    def attention_plan(self) -> SummedPlan | None:
        if type(self) is not Linformer:
            return None
        return SummedPlan(
            group=self.mixer.group,
            span=self.mixer.span,
            features=0,
            map="same",
            exact="softmax",
            kept=self.keep,
            row_keys=self.key_map.detach().float().contiguous(),
            row_values=self.value_map.detach().float().contiguous(),
        )

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        assert sums is not None
        exact, closed_on_path = self.groups.masks(tree_mask)
        k, v, there = unpack_rows(sums.to(q.dtype))
        products, kept = (self._products(q, rows) for rows in (keys, k))
        nodes = (tree_mask.offsets // self.mixer.group)[:, None, None, :, None]
        # groups count from the base_position: the newest kept one is -1
        age = torch.arange(-self.keep, 0, device=q.device).repeat_interleave(self.rows)
        seen = there.mT.unsqueeze(2) & self._remembered(age, nodes)
        masks = [torch.ones_like(products, dtype=torch.bool) if exact is None else exact, seen]
        if closed_on_path is None:
            rows, old = self._weigh([products, kept], masks)
        else:
            maps, of_group = self._closing(tree_mask)
            closed = products.masked_fill(~closed_on_path, 0.0) @ maps[0]
            masks.append(self._remembered(of_group, nodes))
            rows, old, new = self._weigh([products, kept, closed], masks)
            rows = rows + (new @ maps[1].mT).masked_fill(~closed_on_path, 0.0)
        o = rows.flatten(2, 3) @ values + old.flatten(2, 3) @ v
        return o.unflatten(2, q.shape[2:4])

    def _products(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])

    def _remembered(self, of_group: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Compressed rows of groups before the span of nodes in groups `nodes`, not yet forgotten."""
        newest = nodes - self.mixer.span
        return (of_group <= newest) & (of_group > newest - self.keep)

    def _weigh(self, products: list[torch.Tensor], seen: list[torch.Tensor]) -> list[torch.Tensor]:
        """Softmax weights over the rows of all parts together."""
        masks = [m.expand_as(p) for m, p in zip(seen, products, strict=True)]
        scores = torch.cat(products, dim=-1) * self.config.score_scale
        scores = capped(scores, self.config.score_cap)
        weights = masked_softmax(scores, torch.cat(masks, dim=-1))
        return list(weights.split([p.shape[-1] for p in products], dim=-1))

    def _closing(self, tree_mask: TreeMask) -> tuple[list[torch.Tensor], torch.Tensor]:
        """E and F for groups that close on a path, [R, 1, 1, C, n p] each, and the group of each row.

        A compressed row is linear in the rows of its group: so are its products with a query.
        """
        group, place = tree_mask.columns // self.mixer.group, tree_mask.columns % self.mixer.group
        count = torch.arange(int(group.max()) + 1, device=group.device)
        member = group[:, :, None, None] == count[:, None]
        maps = [
            (member * part.mT[place][:, :, None]).flatten(2)[:, None, None]
            for part in (self.key_map, self.value_map)
        ]
        return maps, count.repeat_interleave(self.rows)

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group, before = self.mixer.group, (self.mixer.span - 1) * self.mixer.group
        blocks = to_blocks(q.unflatten(1, (self.kv_heads, self.repeats)), group)
        keys = windows(k, None, before, group)
        exact = causal_window(keys.shape[2], group, before, k.device).repeat(1, self.repeats, 1)
        old_k, old_v, there = self._kept(k, v, sums)
        products = [blocks @ keys.mT, blocks @ old_k.mT]
        rows, old = self._weigh(products, [exact, there.mT])
        o = rows @ windows(v, None, before, group) + old @ old_v
        return join(o, self.repeats, q.shape[2])

    def _kept(
        self, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Keys, values and presence of the compressed rows that each group sees: [B, Hkv, n, M p, .]."""
        group = self.mixer.group
        new = self.compress(split(k, group), split(v, group))
        ahead = self.mixer.span - 1
        if start is None:
            new = F.pad(new, (0, 0, 0, 0, self.keep + ahead, 0))
        else:
            kept = start.to(new.dtype).unflatten(2, (self.keep, self.rows))
            new = F.pad(torch.cat((kept, new), dim=2), (0, 0, 0, 0, ahead, 0))
        # group i sees the `keep` groups that end just before its span
        return unpack_rows(shifted(new, 2, -(-k.shape[2] // group), self.keep, at=3).flatten(3, 4))

    # ---- encoder form

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        group = self.mixer.group
        rows = self.compress(split(k, group), split(v, group)).flatten(2, 3)
        keys, values, _ = unpack_rows(rows)
        if real is None:
            real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        # a row stands for a share of its group: it is there when the first token of that is
        first = [-(-row * group // self.rows) for row in range(self.rows)]
        there = split(real[..., None].byte(), group)[..., first, 0].flatten(1).bool()
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        (weights,) = self._weigh([self._products(heads, keys)], [there[:, None, None, None]])
        return (weights.flatten(2, 3) @ values).unflatten(2, heads.shape[2:4]).flatten(1, 2)


def averages(rows: int, group: int) -> torch.Tensor:
    """[rows, group]: each row the mean of its share of a group's tokens."""
    share = torch.arange(group) * rows // group == torch.arange(rows)[:, None]
    return share / share.sum(1, keepdim=True)
