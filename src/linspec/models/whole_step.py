"""A decoder's step as a whole: what computes it depends on where the weights are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from linspec.decoding.step import StepInput
from linspec.decoding.tree import Shape
from linspec.kernels.gpu.choice import DeviceKernels, kernels_for
from linspec.kernels.gpu.graphs import recorder_for
from linspec.kernels.gpu.triton.available import chosen
from linspec.models.one_call import one_call
from linspec.models.static_step import StaticStep, why_not_static
from linspec.state.sequence_states import SequenceStates

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


_log = logging.getLogger("linspec")


class WholeStep(Protocol):
    """All layers of a step at once, for inputs of one kind."""

    def takes(self, inputs: Sequence[StepInput]) -> bool:
        """Whether it computes inputs such as these; the others go layer by layer."""
        ...

    def run(
        self,
        inputs: Sequence[StepInput],
        shapes: Sequence[Shape],
        positions: Sequence[Sequence[int]],
        outputs: Sequence[int],
        state: SequenceStates,
        places: Mapping[int, Sequence[int]],
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [P, D], logits [P, vocab], and the states behind `layers`; see `OneCall.run`."""
        ...


def whole_step(model: Decoder) -> WholeStep | None:
    """How a model in its inference form computes a step as a whole; None where it goes layer by layer.

    On a CPU one call of linspec's kernels, elsewhere a recorded step of static shape. Raises ConfigError for
    switches of the environment that cannot be followed here.
    """
    recorder = recorder_for(model.device)
    chosen(model.device)
    if model.device.type == "cpu":
        return one_call(model)
    if why_not_static(model):
        return None
    kernels = kernels_for(model.device, model.dtype, model.config.head_width)
    made = StaticStep(model, recorder, kernels)
    if kernels is not None:
        _log.info("steps read %s", made.named())
    return made


def kernels_of(step: WholeStep | None) -> DeviceKernels | None:
    """What a step reads by, and states fold by; None for torch, and on a CPU."""
    return step.kernels if isinstance(step, StaticStep) else None
