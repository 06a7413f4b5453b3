"""Softmax with far keys as they are rebuilt from the changes between tokens (DeltaLLM, Qi et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.exact import Groups
from linspec.mixers.ops.key_changes import moved, rebuilt
from linspec.mixers.options import SpanOptions
from linspec.mixers.softmax import Softmax
from linspec.utils.options import option
from linspec.utils.sizes import check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaOptions(SpanOptions):
    """How much a component may differ."""

    threshold: float = option(
        "change of a component of a key, from token to token, that is not kept", default=0.1
    )

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold, zero=True)


@MIXERS.register(
    "delta",
    summary="softmax over all tokens, far keys as rebuilt from their changes above a threshold",
    paper="Qi et al. 2025 (DeltaLLM), arXiv 2507.19608",
    state="2·T·d per KV head",
    cost="2·T·d per token, of which the changes need fewer products",
    options=DeltaOptions,
)
class Delta(Softmax):
    """Keys of the last groups and all values are exact; far keys are within the threshold in each component.

    So a score is wrong by at most threshold · ‖q‖₁ · scale, and with threshold 0 nothing is. A group is
    rebuilt from its own keys alone, the first of which is whole.

    This is the approximation, by which its quality is measured: the cache has whole keys, and dense products
    read them. What changes alone would take is counted by `ops/key_changes.py`.
    """

    biased = False
    stands_in = True

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.groups = Groups(mixer.group, mixer.span)
        self.threshold = mixer.own_options(DeltaOptions).threshold
        self.ends_alone = not mixer.taps

    def attention_plan(self) -> AttentionPlan | None:
        return AttentionPlan(
            group=self.groups.size, span=self.groups.span, threshold=self.threshold
        )

    # ---- step form

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        far = self.groups.masks(tree_mask)[1]
        if far is None:
            return super().attend(q, keys, values, tree_mask, sums)
        rough = self._rough(keys, tree_mask)
        return self._weigh(q, (keys, rough), values, far, tree_mask.visible[:, None, None])

    def _rough(self, keys: torch.Tensor, tree_mask: TreeMask) -> torch.Tensor:
        """The keys that far groups are read by, in their columns; what is in others is not read."""
        width = int(self.groups.ends(tree_mask.offsets).max())
        if width <= tree_mask.committed:
            return torch.cat((self._rebuilt(keys[:, :, :width]), keys[:, :, width:]), dim=2)
        # groups that close in the tree itself: a node's key is rebuilt behind that of its parent
        rough = keys.clone()
        for slot, (base, shape, _) in enumerate(tree_mask.rows):
            rough[slot, :, :base] = self._rebuilt(keys[slot, :, :base])
            for node, (parent, depth) in enumerate(zip(shape.parents, shape.depths, strict=True)):
                if (base + depth) % self.groups.size:
                    last = rough[slot, :, base + parent]
                    key = keys[slot, :, base + node]
                    rough[slot, :, base + node] = moved(last, key, self.threshold)
        return rough

    def _rebuilt(self, keys: torch.Tensor) -> torch.Tensor:
        return rebuilt(keys, self.threshold, self.groups.size)

    def _weigh(
        self,
        q: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: torch.Tensor,
        far: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """Softmax over whole and rough keys, the latter where `far`: q [R, Hkv, rep, N, K]."""
        whole, rough = ((q.flatten(2, 3) @ each.mT).unflatten(2, q.shape[2:4]) for each in keys)
        weights = self.exact.weights(torch.where(far, rough, whole), seen, None)
        return (weights.flatten(2, 3) @ values).unflatten(2, q.shape[2:4])

    # ---- full form

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.mix_end(q, k, v)

    def over(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert mask is not None, "queries come with what they may see"
        count, time = mask.shape
        ends = self.groups.ends(torch.arange(time - count, time, device=q.device))
        width = int(ends[-1])
        if not width:
            return super().over(q, k, v, mask)
        far = torch.arange(time, device=q.device) < ends[:, None]
        rough = torch.cat((self._rebuilt(k[:, :, :width]), k[:, :, width:]), dim=2)
        nodes = q.unflatten(1, (self.kv_heads, self.repeats))
        return self._weigh(nodes, (k, rough), v, far, mask).flatten(1, 2)
