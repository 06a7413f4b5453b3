"""A guest: masked diffusion. The output begins as masks, and every round decides some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from linspec import LOOPS, Batch, GenerationLoop, LoopContext, Outcome, RunningSequence, option


@dataclass(frozen=True)
class DiffusionOptions:
    """Which masks a round decides."""

    tokens: int = option("masks that a round decides", default=1)
    order: str = option("left: the first ones; confidence: the surest ones", default="left")
    mask: int = option("token that stands for what is not decided", default=0)

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.order not in ("left", "confidence"):
            raise ValueError("tokens must be 1 or more, order left or confidence")


@LOOPS.register(
    "guest-diffusion",
    summary="unmask the output, some tokens a round",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
    options=DiffusionOptions,
)
class DiffusionLoop(GenerationLoop):
    """Looks at the whole text in every round; has no use for a state. A causal model stands in."""

    def __init__(self, context: LoopContext, options: DiffusionOptions) -> None:
        super().__init__(context, options)
        self.options = options
        self.canvas: dict[int, list[int | None]] = {}

    def started(self, sequence: RunningSequence) -> None:
        # nothing is read before the first round
        sequence.prefilled = sequence.prompt_length
        self.canvas[sequence.slot] = [None] * sequence.params.max_tokens
        # the first mask may be the last that is decided
        self.patience = max(self.patience, sequence.params.max_tokens)

    def finished(self, sequence: RunningSequence) -> None:
        self.canvas.pop(sequence.slot, None)

    def round(self, batch: Batch) -> list[Outcome]:
        return [self._unmask(sequence) for sequence in batch.decoding]

    @torch.inference_mode()
    def _unmask(self, sequence: RunningSequence) -> Outcome:
        prompt = sequence.tokens[: sequence.prompt_length]
        canvas = self.canvas[sequence.slot]
        filled = [self.options.mask if token is None else token for token in canvas]
        model: Any = self.target.model
        scores = model(torch.tensor([[*prompt, *filled]]))[0, len(prompt) - 1 : -1].softmax(-1)
        sure, likeliest = scores.max(-1)
        masks = [place for place, token in enumerate(canvas) if token is None]
        if self.options.order == "confidence":
            masks.sort(key=lambda place: -float(sure[place]))
        for place in masks[: self.options.tokens]:
            canvas[place] = int(likeliest[place])
        return self._decided(sequence, canvas)

    def _decided(self, sequence: RunningSequence, canvas: list[int | None]) -> Outcome:
        """What stands before the first mask is out; it ends with an end, or with the last mask."""
        done = next((i for i, token in enumerate(canvas) if token is None), len(canvas))
        new = [token for token in canvas[sequence.emitted : done] if token is not None]
        ends = [i for i, token in enumerate(new) if token in sequence.sampler.ends]
        finished = "stop" if ends else "length" if done == len(canvas) else None
        tokens = tuple(new[: ends[0] + 1] if ends else new)
        sequence.tokens += tokens
        return Outcome(sequence, tokens, None, finished)
