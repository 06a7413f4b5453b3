"""What one round does to a canvas, by what a forward says of it: blocks, decisions, edits, cuts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linspec.diffusion import BlockPolicy, Candidates, Canvas, CommitPolicy, Predictions, StopPolicy
from linspec.engine.loops.canvas_candidates import candidates_of, token_of
from linspec.engine.loops.canvas_forward import Denoising
from linspec.errors import ConfigError
from linspec.utils.messages import shown


@dataclass(frozen=True, slots=True)
class CanvasRounds:
    """The policies that a round asks, and that what they answer is sound."""

    block: BlockPolicy
    commit: CommitPolicy
    stop: StopPolicy

    def round(self, denoising: Denoising, predictions: Predictions) -> Candidates | None:
        """Decide some of the canvas; returns what could be decided, None for a block without masks."""
        canvas = denoising.canvas
        if canvas.end is None:
            canvas.end = self._end(canvas, self.block.length(canvas, predictions))
        editable = canvas.editable if self.commit.edits else []
        canvas.changed = False
        candidates = self._decide(denoising, predictions) if canvas.undecided else None
        if editable:
            self._edit(denoising, editable, predictions)
        canvas.step += 1
        return candidates

    def cut(self, denoising: Denoising, predictions: Predictions) -> None:
        """Leave out what stands behind the end of the text, where the stop policy foresees one."""
        canvas, sampler = denoising.canvas, denoising.sequence.sampler
        length = self.stop.cuts(canvas, predictions, sampler.ends)
        if type(length) is not int or not canvas.start < length <= len(canvas):
            raise ConfigError(
                f"diffusion stop policy {self.stop.name!r} keeps {shown(repr(length))} positions; it must "
                f"keep more than {canvas.start}, and there are {len(canvas)}"
            )
        # nothing ends a text before these
        least = canvas.prompt_length + sampler.params.min_tokens + 1
        length = min(max(length, least), len(canvas))
        if length < len(canvas):
            denoising.later += canvas.cut(length)

    def chosen(self, candidates: Candidates) -> Tensor:
        """[M] booleans, true for what a round decides: one at least."""
        chosen = self._sound(self.commit.commit(candidates), candidates)
        if not chosen.any():
            raise self._no_answer(candidates)
        return chosen

    def _decide(self, denoising: Denoising, predictions: Predictions) -> Candidates | None:
        """Put tokens in the place of some masks; of a full block none are left."""
        canvas, sequence = denoising.canvas, denoising.sequence
        fills = self.stop.fills(canvas, predictions)
        if fills:
            canvas.end = len(canvas)
        if canvas.full:
            return None
        # all that is open, unless the cache policy computes less than that
        asked = canvas.open if fills else predictions.among(canvas.open)
        candidates = candidates_of(canvas, sequence, sequence.sampler, predictions, asked)
        every = torch.ones_like(candidates.positions).bool()
        for position, token in candidates.where(
            every if fills else self.chosen(candidates)
        ).items():
            canvas.decide(position, token)
        return candidates

    def _edit(self, denoising: Denoising, positions: list[int], predictions: Predictions) -> None:
        """Replace decided tokens of the block, where the policy wants it and the model has another one."""
        canvas, sequence = denoising.canvas, denoising.sequence
        sampler = sequence.sampler
        now = [canvas.tokens[position] for position in positions]
        decided = candidates_of(canvas, sequence, sampler, predictions, positions, now)
        chosen = self._sound(self.commit.edit(decided), decided)
        for place in chosen.nonzero()[:, 0].tolist():
            at = positions[place]
            token = token_of(
                sampler, canvas.tokens[len(sequence.tokens) : at], decided.logits[place]
            )
            if token != now[place]:
                canvas.replace(at, token)

    def _end(self, canvas: Canvas, length: int) -> int:
        if type(length) is not int or length < 1:
            raise ConfigError(
                f"diffusion block policy {self.block.name!r} answered {length!r}; a block has 1 position "
                "or more"
            )
        return min(canvas.start + length, canvas.reach)

    def _sound(self, chosen: object, candidates: Candidates) -> Tensor:
        """An answer of the commit policy, if it is one."""
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
            raise self._no_answer(candidates)
        if chosen.shape != candidates.positions.shape:
            raise self._no_answer(candidates)
        return chosen

    def _no_answer(self, candidates: Candidates) -> ConfigError:
        return ConfigError(
            f"diffusion commit policy {self.commit.name!r} must answer with a boolean for each of "
            f"{len(candidates.positions)} candidates, one of them true where something is to be decided"
        )
