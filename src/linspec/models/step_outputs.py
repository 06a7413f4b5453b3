"""What a step hands out: which of its packed nodes have logits, and one output of several."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from linspec.decoding.judged import Judged
from linspec.decoding.step import StepInput, StepOutput
from linspec.errors import ConfigError
from linspec.utils.messages import shown


@dataclass(frozen=True, slots=True)
class WholeOutput:
    """What a whole step computed: of its P wanted nodes hidden states [P, D] and logits [P, vocab], of all M
    new nodes the states behind L layers [L, M, D], and what became of the inputs, by number, that it judged.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    inner: torch.Tensor
    judged: Mapping[int, Judged] = field(default_factory=dict)


def wanted_nodes(
    inputs: Sequence[StepInput], judged: Collection[int] = ()
) -> tuple[list[slice], list[int]]:
    """Which of the packed nodes have logits, and which of those belong to each input; none where judged."""
    slices: list[slice] = []
    wanted: list[int] = []
    first = 0
    for number, step_input in enumerate(inputs):
        count = len(step_input.tokens)
        keep = [] if number in judged else [first + at for at in _with_logits(step_input)]
        slices.append(slice(len(wanted), len(wanted) + len(keep)))
        wanted += keep
        first += count
    return slices, wanted


def _with_logits(step_input: StepInput) -> Sequence[int]:
    """The numbers of the tokens of an input whose logits are wanted."""
    chosen, count = step_input.logits_of, len(step_input.tokens)
    if chosen is not None:
        if not all(0 <= at < count for at in chosen):
            raise ConfigError(
                f"slot {step_input.slot} was asked for the logits of tokens {shown(repr(list(chosen)))} of "
                f"{count}; they count from 0 to {count - 1}"
            )
        return chosen
    return range(count) if step_input.all_logits else (count - 1,)


def interleaved(parts: Sequence[Sequence[int]], outputs: Sequence[StepOutput]) -> StepOutput:
    """One output of several, with rows in the order of all inputs."""
    order = sorted(range(sum(map(len, parts))), key=[i for part in parts for i in part].__getitem__)
    slices = _shifted([output.slices for output in outputs], [len(o.hidden) for o in outputs])
    states = {n: torch.cat([o.layers[n] for o in outputs]) for n in outputs[0].layers}
    nodes = _shifted(
        [o.nodes for o in outputs], [o.nodes[-1].stop if o.nodes else 0 for o in outputs]
    )
    return StepOutput(
        torch.cat([output.hidden for output in outputs]),
        torch.cat([output.logits for output in outputs]),
        [slices[i] for i in order],
        states,
        [nodes[i] for i in order] if nodes else [],
        {
            part[number]: judged
            for part, output in zip(parts, outputs, strict=True)
            for number, judged in output.judged.items()
        },
    )


def _shifted(slices: Sequence[Sequence[slice]], lengths: Sequence[int]) -> list[slice]:
    """The slices of several outputs in one that holds these behind each other, each of so many rows."""
    starts = accumulate(lengths, initial=0)
    return [
        slice(first + each.start, first + each.stop)
        for first, own in zip(starts, slices, strict=False)
        for each in own
    ]
