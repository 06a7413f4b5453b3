"""FiRST (Jain et al. 2024) as it was meant: decode without the layers that routers find a prompt not to need.

LLM(model, loop="first:DIR")            # DIR: linspec train-drafter --kind first

Lossy: nothing verifies what is left. The prompt goes through all layers, and so gives the first token. From
then on every token of the sequence goes through the same others, and nothing reads what a skipped layer has
of it. A prompt that needs every layer is decoded by the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import NodeOutput, Target
from linspec.drafters.base import name_of
from linspec.drafters.routed_forms import RoutedForms
from linspec.drafters.routers import Routers
from linspec.drafters.saved import load_drafter
from linspec.engine.loops.autoregressive import Autoregressive, Part
from linspec.engine.loops.base import LOOPS, LoopContext
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class FirstLoopOptions:
    """Where the routers are, and how many layers they leave out."""

    path: Path | None = option(
        "directory of the routers; it has to be given", default=None, short=True
    )
    skip: int | None = option(
        "layers that are left out; none is those that are needed less than by half", default=None
    )

    def __post_init__(self) -> None:
        if self.skip is not None:
            check_size("skip", self.skip)


@LOOPS.register(
    "first",
    summary="decodes without the layers that routers find a prompt not to need; changes the output",
    paper="Jain et al. 2024 (FiRST), arXiv 2410.12513",
    lossless="no",
    options=FirstLoopOptions,
)
class First(Autoregressive):
    """Plain decoding by a form of the model for each sequence."""

    lossless = False
    # a prefix cache would give others states in which layers are missing
    reads_in_order = False

    def __init__(
        self, context: LoopContext, options: FirstLoopOptions, routers: Routers | None = None
    ) -> None:
        super().__init__(context, options)
        model = self.target.model
        if not isinstance(model, Decoder):
            raise ConfigError(
                f"loop 'first' leaves out layers of decoders, and this is a {type(model).__name__}; use "
                "loop 'auto'"
            )
        if self.drafter is not None:
            raise ConfigError(
                f"loop 'first' verifies nothing, so drafter {name_of(self.drafter)!r} has no place in it; "
                "use --drafter first for drafts that are verified"
            )
        if routers is None:
            if options.path is None:
                raise ConfigError(
                    "loop 'first' needs trained routers: first:DIR, of linspec train-drafter --kind first"
                )
            routers = load_drafter(options.path, model, Routers)
        self.forms = RoutedForms(model, routers, options.skip, "loop 'first'")

    def _step(self, parts: Sequence[Part]) -> list[NodeOutput]:
        """Those whose form is the same step together."""
        groups: dict[int, tuple[Target, list[int]]] = {}
        for place, part in enumerate(parts):
            form = self._form(part)
            target = Target(form, self.target.state, self.target.tokenizer)
            groups.setdefault(id(form), (target, []))[1].append(place)
        found: dict[int, NodeOutput] = {}
        try:
            for target, places in groups.values():
                outputs = target.step([parts[place].given for place in places])
                found.update(zip(places, outputs, strict=True))
        except Exception:
            # one that stepped before would be staged twice when all are asked again
            for part in parts:
                self.target.state.drop(part.sequence.slot)
            raise
        return [found[place] for place in range(len(parts))]

    def _form(self, part: Part) -> Any:
        # a part without a tree is a piece of a prompt
        return self.target.model if part.tree is None else self.forms.of(part.sequence)

    def started(self, sequence: RunningSequence) -> None:
        self.forms.forget(sequence)
        super().started(sequence)

    def finished(self, sequence: RunningSequence) -> None:
        self.forms.forget(sequence)
        super().finished(sequence)
