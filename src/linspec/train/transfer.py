"""Transfer: every new mixer learns to give what the teacher's mixer gave for the same input.

The teacher runs once; its mixers' inputs and outputs are all that is needed, so the layers train at
the same time and no gradient passes through the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from linspec.mixers import Mixer
from linspec.mixers.ops.features import same
from linspec.models.block import Block
from linspec.models.model_types import type_of
from linspec.train.objective import Stack, blocks_of

Mean = Callable[[torch.Tensor], torch.Tensor]


class Transfer:
    """The loss of the transfer stage; a context manager, because it puts hooks on the teacher's blocks.

    layers: those whose mixers are trained. Only they get gradients. mean: what becomes of a mean over the
    tokens at hand where other processes have more of the window.
    """

    def __init__(
        self, teacher: Stack, student: Stack, layers: Sequence[int], mean: Mean = same
    ) -> None:
        self.teacher, self.student, self.layers = teacher, student, tuple(layers)
        self.mean = mean
        self._seen: dict[int, tuple[tuple[Any, ...], torch.Tensor]] = {}

    def __enter__(self) -> Self:
        self._hooks = [
            mixer_of(self.teacher, layer).register_forward_hook(self._listener(layer))
            for layer in self.layers
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def _listener(self, layer: int) -> Any:
        def listen(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            self._seen[layer] = (inputs, output)

        return listen

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean over layers of the squared error relative to the teacher's mean square.

        batch [B, T + 1]: windows, see `next_tokens`; [B, T] for an encoder, negative at padding.
        """
        with torch.no_grad():
            self._run_teacher(batch)
        return torch.stack([self._error(layer) for layer in self.layers]).mean()

    def _run_teacher(self, batch: torch.Tensor) -> None:
        type_of(self.teacher).run(self.teacher, batch)

    def _error(self, layer: int) -> torch.Tensor:
        inputs, wanted = self._seen[layer]
        given = mixer_of(self.student, layer)(*inputs)
        real = inputs[2] if len(inputs) > 2 else None
        if real is not None:
            given, wanted = given[real], wanted[real]
        return relative_error(given.float(), wanted.float(), self.mean)

    def parameters(self) -> nn.ModuleDict:
        """The mixers in training, as one module."""
        return nn.ModuleDict({str(i): mixer_of(self.student, i) for i in self.layers})


def mixer_of(model: Stack, layer: int) -> Mixer:
    """The mixer of one layer."""
    return block_of(model, layer).mixer


def block_of(model: Stack, layer: int) -> Block:
    """The block of one layer; an encoder-decoder counts those of its encoder first."""
    return blocks_of(model)[layer]


def relative_error(given: torch.Tensor, wanted: torch.Tensor, mean: Mean = same) -> torch.Tensor:
    """Mean squared error over mean square: 0 is perfect, 1 is no better than silence."""
    return (given - wanted).square().mean() / mean(wanted.square().mean()).clamp_min(1e-12)
