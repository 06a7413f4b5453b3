"""A mixer's step by kernels, over buffers that stay where they are.

exact, summed = reader.parts(q, rows, read)      # what nodes read; None for a part that is not there
o = o + reader.convolution(rows, padded_taps, o)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from linspec.decoding.tree_paths import TreePaths
from linspec.kernels.gpu.choice import DeviceKernels
from linspec.kernels.gpu.reads import DeviceRead, ExactRead

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """What one layer remembers: keys [S, Hkv, C, .], values [S, Hkv, history + C, .] and sums [S, Hkv, ...].

    Those of the step are `slots` [R] of these S. sums: None where nothing is summed. sinks [S, Hkv, 2, s, K]:
    keys and values of the first rows, once these have left; None where none are kept.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None
    slots: torch.Tensor
    history: int
    sinks: torch.Tensor | None = None


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

    def parts(self, q: torch.Tensor, rows: DeviceRows, read: DeviceRead) -> Pair:
        """What nodes with queries q [R, Hkv, rep, N, K] read: [R, Hkv, rep, N, V'] each."""
        values, exact, summed = rows.values[:, :, rows.history :], None, None
        tables = rows.slots, self.held, self.paths
        if read.exact is not None:
            keys = rows.keys[..., : q.shape[-1]]
            settings = self._settings(read.exact)
            exact = self.kernels.tree_attention(
                q, keys, values, *tables, **settings, bases=self.bases, kept=rows.sinks
            )
        if read.summed is not None and rows.sums is not None:
            buffers = rows.sums, rows.keys, values
            summed = self.kernels.read_states(q, *buffers, *tables, read.summed)
        return exact, summed

    def _settings(self, exact: ExactRead) -> dict[str, Any]:
        softmax = exact.weights == "softmax"
        scale, cap = (self.scale, self.cap) if softmax else (1.0, 0.0)
        named = {"weights": exact.weights, "unit": exact.unit, "reach": exact.reach}
        return {"scale": scale, "cap": cap, "sinks": exact.sinks, **named}

    def convolution(self, rows: DeviceRows, padded: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The causal convolution over values, by padded taps [Hkv, rep, W + 1], in the form of q."""
        return self.kernels.convolve_paths(
            *(rows.values[..., : q.shape[-1]], padded[..., :-1]),
            *(rows.slots, self.held, self.paths, rows.history, q.dtype),
        )
