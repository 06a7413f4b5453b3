"""A mixer's step by kernels, over buffers that stay where they are.

exact, summed = reader.parts(q, rows, read)      # what nodes read; None for a part that is not there
o = o + reader.convolution(rows, padded_taps, width)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from linspec.decoding.tree_paths import STAGED, TreePaths
from linspec.kernels.gpu.choice import DeviceKernels
from linspec.kernels.gpu.reads import DeviceRead, ExactRead

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """What one layer remembers: keys [S, Hkv, C, .], values [S, Hkv, history + C, .] and sums [S, Hkv, ...].

    Those of the step are `slots` [R] of these S. sums: None where nothing is summed.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None
    slots: torch.Tensor
    history: int


@dataclass(frozen=True, slots=True, eq=False)
class StepReader:
    """Kernels with the tables of one step: of its slots, committed rows `held` [R] and their first positions
    `bases` [R].

    reads: of each mixer that they compute, what it reads. scale, cap: on the scores of softmax weights.
    """

    kernels: DeviceKernels
    reads: Mapping[Any, DeviceRead]
    scale: float
    cap: float
    held: torch.Tensor
    bases: torch.Tensor
    paths: TreePaths
    # of each number of taps, where the rows lie that nodes convolve: the same in every layer
    _taps: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def parts(self, q: torch.Tensor, rows: DeviceRows, read: DeviceRead) -> Pair:
        """What nodes with queries q [R, Hkv, rep, N, K] read: [R, Hkv, rep, N, V'] each."""
        values, exact, summed = rows.values[:, :, rows.history :], None, None
        tables = rows.slots, self.held, self.paths
        if read.exact is not None:
            keys = rows.keys[..., : q.shape[-1]]
            settings = self._settings(read.exact)
            exact = self.kernels.tree_attention(
                q, keys, values, *tables, **settings, bases=self.bases
            )
        if read.summed is not None and rows.sums is not None:
            buffers = rows.sums, rows.keys, values
            summed = self.kernels.read_states(q, *buffers, *tables, read.summed)
        return exact, summed

    def _settings(self, exact: ExactRead) -> dict[str, Any]:
        softmax = exact.weights == "softmax"
        scale, cap = (self.scale, self.cap) if softmax else (1.0, 0.0)
        named = {"weights": exact.weights, "unit": exact.unit, "reach": exact.reach}
        return {"scale": scale, "cap": cap, **named}

    def convolution(self, rows: DeviceRows, padded: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The causal convolution over values, by padded taps [Hkv, rep, W + 1], in the form of q.

        Of each node only the W nearest values on its path are read: [R, Hkv, rep, N, K].
        """
        taps, width = padded[..., :-1], q.shape[-1]
        near = self._near(taps.shape[-1], rows.history)
        # [R, N, W, Hkv, K]
        found = rows.values[..., :width][rows.slots[:, None, None], :, near].to(q.dtype)
        return torch.einsum("rnwgv,gbw->rgbnv", found, taps.to(q.dtype))

    def _near(self, taps: int, history: int) -> torch.Tensor:
        """[R, N, W]: where the values lie that are 0, 1, ... tokens ahead of each node."""
        if (taps, history) not in self._taps:
            back = self.paths.depths[..., None] - torch.arange(taps, device=self.held.device)
            staged = self.paths.nodes.gather(2, back.clamp(0, STAGED - 1))
            lies = torch.where(back >= 0, staged, back)
            self._taps[taps, history] = history + self.held[:, None, None] + lies
        return self._taps[taps, history]
