"""A step that is watched between its layers, and may go on with more positions than it began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from linspec.errors import ConfigError
from linspec.mixers.ops.exact import masked_softmax
from linspec.mixers.softmax import Softmax
from linspec.models.layer_path import LayerPath
from linspec.state.dense_group import DenseGroup
from linspec.state.sequence_states import SequenceStates

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


class Part:
    """One input on its way through the layers: x [N, D] of the positions in `group.overwrite`."""

    def __init__(self, group: DenseGroup, packed: torch.Tensor) -> None:
        self.group = group
        self.x = packed[group.first : group.first + self.size]
        # where what the caller asked for stands, once all positions are computed
        self._asked: Sequence[int] | None = None

    @property
    def rows(self) -> Sequence[int]:
        """The positions that are computed."""
        assert self.group.overwrite is not None, "a masked-diffusion model stages nothing"
        return self.group.overwrite

    @property
    def size(self) -> int:
        """How many these are."""
        return self.group.lengths[0]

    def widen(self, x: torch.Tensor) -> None:
        """Go on with all positions."""
        self._asked = self.rows
        self.group = replace(self.group, lengths=[len(x)], overwrite=range(len(x)))
        self.x = x

    def asked(self) -> torch.Tensor:
        """The states of the positions that the step was given."""
        return self.x if self._asked is None else self.x[list(self._asked)]


def run_watched(
    model: Decoder,
    x: torch.Tensor,
    dense_groups: Sequence[DenseGroup],
    state: SequenceStates,
    path: LayerPath,
) -> torch.Tensor:
    """`Decoder.run` for inputs that overwrite, some of which are watched."""
    parts = [Part(group, x) for group in dense_groups]
    for layer in filter(path.takes, range(len(model.layers))):
        for part in parts:
            _before(model, part, state, layer)
        _through(model, parts, state, layer)
        for part in parts:
            if part.group.watch is not None:
                part.group.watch.after(layer, _Look(model, part, state, layer))
        x = torch.cat([part.asked() for part in parts])
        path.passed(layer, x)
    return x


def _before(model: Decoder, part: Part, state: SequenceStates, layer: int) -> None:
    if part.group.watch is None:
        return
    wider = part.group.watch.before(layer, part.x, _Look(model, part, state, layer))
    if wider is not None:
        part.widen(wider)


def _through(model: Decoder, parts: Sequence[Part], state: SequenceStates, layer: int) -> None:
    """All parts through one layer, packed."""
    firsts = accumulate((part.size for part in parts), initial=0)
    groups = [replace(part.group, first=at) for part, at in zip(parts, firsts, strict=False)]
    x = torch.cat([part.x for part in parts])
    rows = torch.tensor([row for part in parts for row in part.rows], device=x.device)
    rope = model.ropes(rows, x.dtype)[layer]
    x = model.layers[layer].step(x, rope, groups, *state.layers[layer])
    for part, mine in zip(parts, x.split([part.size for part in parts]), strict=True):
        part.x = mine


class _Look:
    """The attention of some positions of a part in a layer, by the keys that it has there now."""

    def __init__(self, model: Decoder, part: Part, state: SequenceStates, layer: int) -> None:
        self._model, self._state, self._layer = model, state, layer
        self._slot = part.group.start

    def __call__(self, x: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """[H, R, T] of states [R, D] that go into the layer; float32 or wider."""
        block = self._model.layers[self._layer]
        mixer, (cache, index) = block.mixer, self._state.layers[self._layer]
        if not isinstance(mixer, Softmax):
            raise ConfigError(
                f"layer {self._layer} has mixer {mixer.mixer.name!r}, whose attention cannot be looked at; "
                "use another cache policy, such as dkv"
            )
        rope = self._model.ropes(torch.tensor(positions, device=x.device), x.dtype)[self._layer]
        q, _, _ = mixer.to_features(*mixer.split_heads(block.mixer_norm(x)), rope)
        keys, _ = cache.read(index, slice(self._slot, self._slot + 1), cache.held(self._slot))
        wide = torch.promote_types(x.dtype, torch.float32)
        q = q.unflatten(1, (mixer.kv_heads, mixer.repeats)).to(wide)
        products = torch.einsum("rgjk,gtk->gjrt", q, keys[0].to(wide)).flatten(0, 1)
        return masked_softmax(products * mixer.config.score_scale, None)
