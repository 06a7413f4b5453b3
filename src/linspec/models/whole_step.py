"""A decoder's step as a whole: what computes it depends on where the weights are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from linspec.decoding.judged import Onward
from linspec.decoding.step import StepInput
from linspec.decoding.tree import Shape
from linspec.kernels.gpu.choice import DeviceKernels, kernels_for
from linspec.kernels.gpu.graphs import recorder_for
from linspec.kernels.gpu.switches import switch
from linspec.kernels.gpu.triton.available import chosen
from linspec.models.judged_rounds import SWITCH, SWITCHES
from linspec.models.one_call import one_call
from linspec.models.static_step import StaticStep, why_not_static
from linspec.models.step_outputs import WholeOutput
from linspec.state.sequence_states import SequenceStates

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


_log = logging.getLogger("linspec")


class WholeStep(Protocol):
    """All layers of a step at once, for inputs of one kind.

    judging: whether there are any that it judges.
    """

    judging: bool

    def takes(self, inputs: Sequence[StepInput]) -> bool:
        """Whether it computes inputs such as these; the others go layer by layer."""
        ...

    def judges(self, inputs: Sequence[StepInput], shapes: Sequence[Shape]) -> frozenset[int]:
        """The numbers of the inputs that it judges itself, of those that let it: see `StepInput.judge`.

        shapes: of all that each slot has staged then.
        """
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
        onward: Onward | None = None,
    ) -> WholeOutput:
        """Hidden states and logits of `outputs`, and the states behind `layers`; see `OneCall.run`."""
        ...


def whole_step(model: Decoder) -> WholeStep | None:
    """How a model in its inference form computes a step as a whole; None where it goes layer by layer.

    On a CPU one call of linspec's kernels, elsewhere a recorded step of static shape. Raises ConfigError for
    switches of the environment that cannot be followed here.
    """
    recorder = recorder_for(model.device)
    chosen(model.device)
    runs_ahead = switch(SWITCH, SWITCHES) == "auto"
    if model.device.type == "cpu":
        return one_call(model)
    if why_not_static(model):
        return None
    kernels = kernels_for(model.device, model.dtype, model.config.head_width)
    made = StaticStep(model, recorder, kernels, runs_ahead=runs_ahead)
    if kernels is not None:
        _log.info("steps read %s", made.named())
    return made


def kernels_of(step: WholeStep | None) -> DeviceKernels | None:
    """What a step reads by, and states fold by; None for torch, and on a CPU."""
    return step.kernels if isinstance(step, StaticStep) else None
