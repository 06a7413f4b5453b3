"""Several mixers in one layer, each for KV heads of its own: exact attention for those that recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from linspec.errors import ConfigError
from linspec.kernels.step_plan import PartPlan
from linspec.mixers.base import MIXERS, Features, Mixer, Rope
from linspec.mixers.carry import Carry
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.options import SinkOptions
from linspec.mixers.specs import make_mixer
from linspec.state.contract import Makers
from linspec.state.dense_group import DenseGroup
from linspec.state.sequence_states import MixedState
from linspec.utils.messages import shown
from linspec.utils.options import option

_PROJECTIONS = ("q", "k", "v", "o")
_OTHERS = "streaming"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHeadOptions(SinkOptions):
    """Which mixer the heads get that are not exact, and how much it sees exactly."""

    others: str | None = option("mixer of the other heads; None is streaming", default=None)
    exact: str | None = option("mixer of the exact heads; None is softmax", default=None)


def beside_exact(mixer: MixerConfig, exact: tuple[int, ...]) -> MixerConfig:
    """`mixer` for a layer whose KV heads `exact` see all tokens."""
    options = dict(mixer.options)
    if mixer.name != _OTHERS:
        options["others"] = mixer.name
    return replace(mixer, name="by-head", exact_heads=exact, options=options)


@MIXERS.register(
    "by-head",
    summary="softmax for some KV heads of a layer, `streaming` or another mixer for the others",
    paper="Xiao et al. 2024 (DuoAttention), arXiv 2410.10819",
    state="2·T·d per exact KV head, as `streaming` per other one",
    cost="2·T·d per exact KV head, as `streaming` per other one",
    options=ByHeadOptions,
)
class ByHead(Mixer):
    """KV heads named in `exact_heads`, with the query heads that share them, see all tokens.

    The layer's projections, norms and convolution are its own; its parts have none. Group, span, sinks
    and all other settings are those of the part that is not exact.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        if config.relative is not None:
            raise ConfigError(
                "mixer 'by-head' has no relative position bias; choose another for this model "
                "(linspec list)"
            )
        super().__init__(config, mixer)
        exact = mixer.exact_heads
        if exact and exact[-1] >= config.kv_heads:
            raise ConfigError(
                f"exact_heads {shown(list(exact))} names a KV head that a layer of {config.kv_heads} "
                f"has not; they are 0..{config.kv_heads - 1}"
            )
        others = tuple(head for head in range(config.kv_heads) if head not in exact)
        own = mixer.own_options(ByHeadOptions)
        plain = make_mixer(own.exact or "softmax", taps=mixer.taps)
        given = {k: v for k, v in mixer.options.items() if k not in ("others", "exact")}
        name = own.others or _OTHERS
        rest = replace(mixer, name=name, exact_heads=(), options=given)
        # which KV heads each part has
        self.owned: list[tuple[int, ...]] = []
        self.parts = nn.ModuleList()
        for kind, settings, heads in (
            (_kind_of(plain.name), plain, exact),
            (_kind_of(name), rest, others),
        ):
            if heads:
                self.owned.append(heads)
                self.parts.append(self._part(kind, settings, len(heads)))

    def _part(self, kind: type[Mixer], mixer: MixerConfig, count: int) -> Mixer:
        """A mixer of `count` KV heads without anything of its own that the layer has."""
        config = replace(self.config, heads=count * self.repeats, kv_heads=count, qk_norm=False)
        part = kind(config, mixer)
        for name in (*_PROJECTIONS, *(("taps",) if mixer.taps else ())):
            delattr(part, name)
        return part

    @property
    def shares(self) -> list[tuple[Mixer, tuple[int, ...]]]:
        """Each part with its KV heads, ready to compute."""
        parts = [part for part in self.parts if isinstance(part, Mixer)]
        if self.mixer.taps:
            taps = self.taps.unflatten(0, (self.kv_heads, -1))
            for part, heads in zip(parts, self.owned, strict=True):
                # not one of its parameters: they stay the layer's
                part.__dict__["taps"] = _of(taps, heads, 0).flatten(0, 1)
        return list(zip(parts, self.owned, strict=True))

    def finalize_weights(self) -> None:
        for part, _ in self.shares:
            part.finalize_weights()

    def state_makers(self) -> Makers:
        return tuple(part.state_makers() for part, _ in self.shares)

    def part_plans(self) -> tuple[PartPlan, ...]:
        return tuple(PartPlan(heads, part.attention_plan()) for part, heads in self.shares)

    def has_static_step(self) -> bool:
        return all(part.has_static_step() for part, _ in self.shares)

    def part_carries(self) -> tuple[Carry | None, ...]:
        return tuple(each for part, _ in self.shares for each in part.part_carries())

    # ---- the forms

    def forward(
        self, x: torch.Tensor, rope: Rope, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        outputs = []
        for part, packed in self._shared_out(x, rope):
            q, k, v = (t.transpose(1, 2) for t in packed)
            outputs.append(part.mix_causal(q, k, v).transpose(1, 2))
        return self.o(self._joined(outputs).flatten(2))

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        assert isinstance(state, MixedState)
        outputs = [
            part.step_heads(packed, dense_groups, *place).unflatten(-1, (-1, self.head_width))
            for (part, packed), place in zip(self._shared_out(x, rope), state.parts, strict=True)
        ]
        return self.o(self._joined(outputs).flatten(1))

    def _shared_out(self, x: torch.Tensor, rope: Rope) -> list[tuple[Mixer, Features]]:
        """Each part with its features of x [..., D]: q [..., heads, K'], k and v [..., KV heads, .]."""
        both, v = self.split_heads(x)
        q, k = both.split((self.heads, self.kv_heads), dim=-2)
        q = q.unflatten(-2, (self.kv_heads, self.repeats))
        found = []
        for part, heads in self.shares:
            mine = (_of(q, heads, -3).flatten(-3, -2), _of(k, heads, -2))
            given = part.to_features(torch.cat(mine, dim=-2), _of(v, heads, -2), rope)
            found.append((part, given))
        return found

    def _joined(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Outputs [..., heads, V] of all parts in the order of the layer's heads."""
        pieces = {
            head: piece
            for heads, output in zip(self.owned, outputs, strict=True)
            for head, piece in zip(heads, output.split(self.repeats, dim=-2), strict=True)
        }
        return torch.cat([pieces[head] for head in range(self.kv_heads)], dim=-2)


def _of(x: torch.Tensor, heads: Sequence[int], dim: int) -> torch.Tensor:
    """The entries of some KV heads along `dim`."""
    return torch.cat([x.narrow(dim, head, 1) for head in heads], dim=dim)


def _kind_of(name: str) -> type[Mixer]:
    """The class of a mixer that some heads of a layer may have; raises ConfigError for one that cannot."""
    kind = MIXERS.entry(name).value
    if issubclass(kind, ByHead):
        raise ConfigError("heads of 'by-head' cannot be 'by-head' again; name another mixer")
    return kind
