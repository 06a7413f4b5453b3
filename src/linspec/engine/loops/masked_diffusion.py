"""Masked diffusion: the output begins as masks, and every round is a forward that decides some of them.

    LLM("path/to/llada", loop="masked-diffusion:block=fixed:32,commit=threshold:0.9,cache=dual")

What a block is, what a round decides, when to stop and what a forward computes again are policies of
`linspec.diffusion`. The state of a sequence holds the whole canvas; a forward overwrites the keys and values
of the positions that it computes, and sees those of all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.diffusion import BLOCKS, CACHES, COMMITS, STOPS, Candidates, Canvas, Predictions
from linspec.diffusion.base import build
from linspec.diffusion.canvas import EDITS
from linspec.drafters.base import Drafter
from linspec.engine.loops.base import LOOPS, GenerationLoop, LoopContext
from linspec.engine.loops.canvas_requests import check_request, room
from linspec.engine.scheduler import Batch
from linspec.errors import ConfigError
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.isolation import isolated
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.sizes import check_size
from linspec.verifiers.base import check_finite

# what `policy="auto"` takes for a diffusion model; docs/diffusion.md says why
AUTO = "block=fixed:32,commit=threshold:0.9,cache=dual"


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """A policy of each kind; their own options are joined by plus signs."""

    block: str = option("how long blocks are, a spec such as fixed:32", default="fixed")
    commit: str = option(
        "what a round decides, a spec such as threshold:0.9 or local-leap:sure=0.9+near=0.75",
        default="threshold",
    )
    stop: str = option("when to end before the last block, a spec", default="end-of-text")
    cache: str = option("which positions are computed again, a spec such as dual", default="none")
    masks: int = option(
        "most masks that are laid out at once; a longer output gets more when these are decided",
        default=256,
    )

    def __post_init__(self) -> None:
        check_size("masks", self.masks)


@dataclass(slots=True)
class Denoising:
    """A sequence on its way.

    later: masks that are not laid out yet. held: tokens up to an end that was reached, while later blocks are
    computed.
    """

    sequence: RunningSequence
    canvas: Canvas
    later: int
    held: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """What one sequence has in a step: the positions that are computed, and those that have logits."""

    of: Denoising
    rows: list[int]
    read: list[int]

    @property
    def given(self) -> StepInput:
        """Tokens and masks, which see all positions."""
        tokens = [self.of.canvas.tokens[row] for row in self.rows]
        first = len(self.rows) - len(self.read)
        return StepInput(
            self.of.sequence.slot,
            tokens,
            overwrite=self.rows,
            causal=False,
            logits_of=range(first, len(self.rows)),
        )


@LOOPS.register(
    "masked-diffusion",
    summary="fill the masks of a diffusion model, block by block",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992; Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618",
    options=DiffusionOptions,
)
class MaskedDiffusionLoop(GenerationLoop):
    """One forward a round for each sequence, on a canvas of its own; blocks go out when they are full."""

    takes_pieces = False

    def __init__(self, context: LoopContext, options: DiffusionOptions) -> None:
        super().__init__(context, options)
        model = context.target.model
        if not isinstance(model, MaskedDiffusion):
            raise ConfigError(
                f"loop 'masked-diffusion' fills the masks of a diffusion model, such as LLaDA or Dream; a "
                f"{type(model).__name__} has none. Use the loop 'auto'"
            )
        check_drafter_fits(model, context.drafter)
        self.config = model.config
        self.block = build(BLOCKS, options.block)
        self.commit = build(COMMITS, options.commit)
        self.stop = build(STOPS, options.stop)
        self.cache = build(CACHES, options.cache)
        for policy in (self.block, self.commit, self.stop, self.cache):
            policy.attached(context.target)
        self.masks = options.masks
        self.running: dict[int, Denoising] = {}

    def check_request(self, request: Request) -> None:
        check_request(request, self.config)

    def started(self, sequence: RunningSequence) -> None:
        count = room(sequence.prompt_length, sequence.params.max_tokens, self.config)
        now = min(count, self.masks)
        canvas = Canvas(sequence.tokens, now, self.config.mask_id)
        self.target.state.hold(sequence.slot, len(canvas))
        # the prompt is a part of the canvas, which every first forward reads
        sequence.prefilled = sequence.prompt_length
        # rounds in which nothing goes out: at most one for each token and each time that it is replaced
        self.patience = max(self.patience, count * (1 + EDITS) + 1)
        self.running[sequence.slot] = Denoising(sequence, canvas, count - now)

    def finished(self, sequence: RunningSequence) -> None:
        self.running.pop(sequence.slot, None)

    def round(self, batch: Batch) -> list[Outcome]:
        began = time.perf_counter()
        forwards, outcomes = self._forwards(batch.decoding)
        for forward, logits in zip(forwards, isolated(forwards, self._step), strict=True):
            outcomes += self._judged(forward, logits)
        for sequence in batch.decoding:
            sequence.stats.decode_seconds += time.perf_counter() - began
        return outcomes

    def _forwards(
        self, sequences: Sequence[RunningSequence]
    ) -> tuple[list[Forward], list[Outcome]]:
        """What the sequences have in the step, and the failures of those that have nothing."""
        forwards, failures = [], []
        for sequence in sequences:
            try:
                forwards.append(self._forward(self.running[sequence.slot]))
            except Exception as error:
                failures.append(Outcome.failure(sequence, error))
        return forwards, failures

    def _forward(self, denoising: Denoising) -> Forward:
        """What the cache policy wants computed, and what the logits of open positions stand at."""
        canvas, rows = denoising.canvas, self.cache.rows(denoising.canvas)
        if not set(rows) <= set(range(len(canvas))):
            raise self._broken(
                rows, f"rows are positions of the canvas, from 0 to {len(canvas) - 1}"
            )
        if canvas.new and len(set(rows)) < len(canvas):
            raise self._broken(rows, "a forward computes everything before anything is kept")
        shift = self.config.logit_shift
        asked = canvas.block if self.commit.whole or self.commit.edits else canvas.open
        rows = sorted({*rows, *(position - shift for position in asked)})
        # what stands before the block is decided
        return Forward(denoising, rows, [row for row in rows if row >= canvas.start - shift])

    def _broken(self, rows: Sequence[int], rule: str) -> ConfigError:
        return ConfigError(
            f"diffusion cache policy {self.cache.name!r} answered {shown(repr(rows))}: {rule}"
        )

    def _step(self, forwards: Sequence[Forward]) -> list[Tensor]:
        return [each.logits for each in self.target.step([each.given for each in forwards])]

    def _judged(self, forward: Forward, logits: Tensor | Exception) -> list[Outcome]:
        """What a forward has brought its sequence: full blocks, nothing yet, or an error."""
        sequence = forward.of.sequence
        try:
            if isinstance(logits, Exception):
                raise logits
            check_finite(logits)
            before = forward.of.canvas.decided
            forward.of.canvas.new = False
            predictions = self._predictions(forward, logits)
            self._denoise(forward.of, predictions)
            decided = forward.of.canvas.decided - before
            sequence.stats.count_forward(decided, len(forward.rows) * self.config.layers)
            self._cut(forward.of, predictions)
            return self._emitted(forward.of)
        except Exception as error:
            return [Outcome.failure(sequence, error)]

    def _predictions(self, forward: Forward, logits: Tensor) -> Predictions:
        return Predictions(forward.read, logits, self.config.logit_shift, self.config.mask_id)

    def _denoise(self, denoising: Denoising, predictions: Predictions) -> None:
        """Decide some of the canvas by what a forward has said of it."""
        canvas = denoising.canvas
        if canvas.end is None:
            canvas.end = self._end(canvas, self.block.length(canvas, predictions))
        editable = canvas.editable if self.commit.edits else []
        canvas.changed = False
        if canvas.undecided:
            self._decide(denoising, predictions)
        if editable:
            self._edit(denoising, editable, predictions)
        canvas.step += 1

    def _decide(self, denoising: Denoising, predictions: Predictions) -> None:
        """Put tokens in the place of some masks; of a full block none are left."""
        canvas = denoising.canvas
        fills = self.stop.fills(canvas, predictions)
        if fills:
            canvas.end = len(canvas)
        if canvas.full:
            return
        candidates = self._candidates(denoising, canvas.open, predictions)
        chosen = torch.ones_like(candidates.positions).bool() if fills else self._chosen(candidates)
        decided = zip(candidates.positions[chosen], candidates.tokens[chosen], strict=True)
        for position, token in decided:
            canvas.decide(int(position), int(token))

    def _edit(self, denoising: Denoising, positions: list[int], predictions: Predictions) -> None:
        """Replace decided tokens of the block, where the policy wants it and the model has another one."""
        canvas = denoising.canvas
        now = [canvas.tokens[position] for position in positions]
        decided = self._candidates(denoising, positions, predictions, now)
        chosen = self._sound(self.commit.edit(decided), decided)
        for place in chosen.nonzero()[:, 0].tolist():
            token = self._token(denoising, positions[place], decided.logits[place])
            if token != now[place]:
                canvas.replace(positions[place], token)

    def _cut(self, denoising: Denoising, predictions: Predictions) -> None:
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
            self.target.state.shorten(denoising.sequence.slot, length)

    def _end(self, canvas: Canvas, length: int) -> int:
        if type(length) is not int or length < 1:
            raise ConfigError(
                f"diffusion block policy {self.block.name!r} answered {length!r}; a block has 1 position "
                "or more"
            )
        return min(canvas.start + length, len(canvas))

    def _candidates(
        self,
        denoising: Denoising,
        positions: list[int],
        predictions: Predictions,
        given: list[int] | None = None,
    ) -> Candidates:
        """A token for each position, with the clean logits: temperature changes no confidence.

        given: the tokens; None takes what this forward proposes.
        """
        sampler = denoising.sequence.sampler
        logits = predictions.logits(positions)
        if given is not None:
            tokens = torch.tensor(given)
        elif sampler.plain:
            tokens = logits.argmax(-1)
        else:
            pairs = zip(positions, logits, strict=True)
            tokens = torch.tensor([self._token(denoising, *pair) for pair in pairs])

        def uniforms(count: int) -> Tensor:
            return torch.tensor([sampler.uniform() for _ in range(count)], dtype=torch.float64)

        at = torch.tensor(positions)
        return Candidates(at, tokens, logits, uniforms, denoising.canvas, predictions)

    def _token(self, denoising: Denoising, position: int, logits: Tensor) -> int:
        """A token by the rules of the request, drawn by one number.

        The published samplers take the argmax of the logits and T times Gumbel noise: the same distribution,
        softmax(logits / T), for a number a token of the vocabulary.
        """
        sequence = denoising.sequence
        before = denoising.canvas.tokens[len(sequence.tokens) : position]
        if sequence.sampler.greedy:
            return int(sequence.sampler.scores(logits, before).argmax())
        return sequence.sampler.draw(sequence.sampler.probabilities(logits, before))

    def _chosen(self, candidates: Candidates) -> Tensor:
        chosen = self._sound(self.commit.commit(candidates), candidates)
        if not chosen.any():
            raise self._no_answer(candidates)
        return chosen

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

    def _emitted(self, denoising: Denoising) -> list[Outcome]:
        """A full block goes out, up to an end in it; what stands behind an end never does."""
        canvas, sequence = denoising.canvas, denoising.sequence
        if not canvas.full or (self.commit.edits and canvas.changed and canvas.editable):
            return []
        ends, block = sequence.sampler.ends, canvas.next_block()
        if denoising.held is None and not ends.isdisjoint(block):
            first = next(i for i, token in enumerate(block) if token in ends)
            denoising.held = tuple(block[: first + 1])
        if denoising.held is not None and self.stop.ends(block, ends):
            return [_extended(sequence, denoising.held, "stop")]
        last = canvas.start == len(canvas) and not self._grown(denoising)
        if denoising.held is None:
            return [_extended(sequence, tuple(block), "length" if last else None)]
        return [_extended(sequence, denoising.held, "stop")] if last else []

    def _grown(self, denoising: Denoising) -> bool:
        """Lay out more masks behind a canvas that is decided; False if there are none to come."""
        count = min(denoising.later, self.masks)
        if count == 0:
            return False
        denoising.later -= count
        denoising.canvas.grow(count)
        self.target.state.hold(denoising.sequence.slot, len(denoising.canvas))
        return True


def check_drafter_fits(model: object, drafter: Drafter | None) -> None:
    """Raise ConfigError for a drafter beside a masked-diffusion model."""
    if drafter is not None and isinstance(model, MaskedDiffusion):
        raise ConfigError(
            "loop 'masked-diffusion' takes no drafter: it decides several tokens a round by itself. Leave "
            "the drafter out"
        )


def _extended(sequence: RunningSequence, tokens: tuple[int, ...], finished: str | None) -> Outcome:
    sequence.tokens += tokens
    sequence.sampler.observe(tokens)
    return Outcome(sequence, tokens, None, finished)
