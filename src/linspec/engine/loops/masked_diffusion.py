"""Masked diffusion: the output begins as masks, and every round is a forward that decides some of them.

    LLM("path/to/llada", loop="masked-diffusion:block=fixed:32,commit=threshold:0.9,cache=dual")

What a block is, what a round decides, when to stop, what a forward computes again and which drafts it judges
along are policies of `linspec.diffusion`. The state of a sequence holds the whole canvas; a forward
overwrites the keys and values of the positions that it computes, and sees those of all; drafts do so in
copies.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.diffusion import (
    BLOCKS,
    CACHES,
    COMMITS,
    STOPS,
    VERIFIES,
    Canvas,
    Predictions,
    StepCost,
)
from linspec.diffusion.base import (
    BlockPolicy,
    CachePolicy,
    CommitPolicy,
    VerifyPolicy,
    build,
)
from linspec.diffusion.caches import BlockCache
from linspec.diffusion.canvas import EDITS
from linspec.drafters.base import Drafter
from linspec.engine.loops.base import LOOPS, GenerationLoop, LoopContext
from linspec.engine.loops.canvas_drafts import drafted, followed
from linspec.engine.loops.canvas_forward import Denoising, Forward, Reading
from linspec.engine.loops.canvas_requests import check_request, room
from linspec.engine.loops.canvas_rounds import CanvasRounds
from linspec.engine.scheduler import Batch
from linspec.errors import ConfigError
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.isolation import isolated
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.sizes import check_size
from linspec.verifiers.base import check_finite

# what `policy="auto"` takes for a diffusion model, and for one of blocks; docs/diffusion.md says why
AUTO = "block=fixed:32,commit=threshold:0.9,cache=dual"
AUTO_OF_BLOCKS = "block=fixed:32,commit=threshold:0.9,cache=blocks"


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
    verify: str = option(
        "which coming rounds a forward computes along, a spec such as freedave:4", default="none"
    )
    masks: int = option(
        "most masks that are laid out at once; a longer output gets more when these are decided",
        default=256,
    )

    def __post_init__(self) -> None:
        check_size("masks", self.masks)


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
        self.verify = build(VERIFIES, options.verify)
        check_fit(self.block, self.commit, self.cache, self.verify)
        for policy in (self.block, self.commit, self.stop, self.cache, self.verify):
            policy.attached(context.target)
        check_sees(self.config, self.cache)
        self.masks = options.masks
        self.copies = self.verify.most_drafts
        self.running: dict[int, Denoising] = {}

    @property
    def rounds(self) -> CanvasRounds:
        """What a round does, by the policies of now."""
        return CanvasRounds(self.block, self.commit, self.stop)

    def check_request(self, request: Request) -> None:
        check_request(request, self.config)

    def started(self, sequence: RunningSequence) -> None:
        count = room(sequence.prompt_length, sequence.params.max_tokens, self.config)
        now = min(count, self.masks)
        config = self.config
        shape = config.mask_id, config.logit_shift, config.block_length
        canvas = Canvas(sequence.tokens, now, *shape)
        canvas.window = self.block.window
        self.target.state.hold(sequence.slot, len(canvas))
        # the prompt is a part of the canvas, which every first forward reads
        sequence.prefilled = sequence.prompt_length
        # rounds in which nothing goes out: at most one for each token and each time that it is replaced
        self.patience = max(self.patience, count * (1 + EDITS) + 1)
        if self.verify.drafts:
            sequence.stats.policy = f"verify={self.verify.name}"
        self.running[sequence.slot] = Denoising(sequence, canvas, count - now)

    def finished(self, sequence: RunningSequence) -> None:
        self.running.pop(sequence.slot, None)

    def round(self, batch: Batch) -> list[Outcome]:
        began = time.perf_counter()
        forwards, outcomes = self._forwards(batch.decoding)
        stepped = time.perf_counter()
        found = isolated(forwards, self._step)
        self._observe(forwards, found, time.perf_counter() - stepped)
        for forward, logits in zip(forwards, found, strict=True):
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
        canvases = (denoising.canvas, *denoising.drafts)
        return Forward(denoising, [self._reading(canvas) for canvas in canvases])

    def _reading(self, canvas: Canvas) -> Reading:
        """What the cache policy wants computed, and what the logits that are asked for stand at."""
        canvas.ahead = self._ahead(canvas)
        rows = self.cache.rows(canvas)
        if not set(rows) <= set(range(len(canvas))):
            raise self._broken(
                rows, f"rows are positions of the canvas, from 0 to {len(canvas) - 1}"
            )
        if canvas.new and not set(range(canvas.reach)) <= set(rows):
            raise self._broken(rows, "a forward computes everything before anything is kept")
        shift, asked = self.config.logit_shift, self._asked(canvas)
        rows = sorted({*rows, *(position - shift for position in asked)})
        wanted = {*asked, *self._known(canvas)}
        read = [row for row in rows if row + shift in wanted]
        return Reading(canvas, rows, read, self.cache.watch(canvas, rows))

    def _known(self, canvas: Canvas) -> Collection[int]:
        """The positions whose logits are computed wherever their rows are: logits cost much of a forward."""
        # the length of a block, and what ends the text, may be found in masks behind the block
        return canvas.undecided if canvas.end is None or self.stop.foresees else canvas.open

    def _ahead(self, canvas: Canvas) -> Sequence[int]:
        ahead = self.commit.ahead(canvas)
        if not set(ahead) <= set(canvas.open):
            raise ConfigError(
                f"diffusion commit policy {self.commit.name!r} will decide {shown(repr(ahead))} next; only "
                "open positions can be decided"
            )
        return ahead

    def _asked(self, canvas: Canvas) -> Sequence[int]:
        """The positions whose tokens the round asks about."""
        if self.commit.whole or self.commit.edits:
            return canvas.block
        return canvas.ahead if self.cache.goes_ahead and canvas.ahead else canvas.open

    def _broken(self, rows: Sequence[int], rule: str) -> ConfigError:
        return ConfigError(
            f"diffusion cache policy {self.cache.name!r} answered {shown(repr(rows))}: {rule}"
        )

    def _step(self, forwards: Sequence[Forward]) -> list[list[Tensor]]:
        """The logits of each reading of each forward."""
        outputs = iter(self.target.step([given for each in forwards for given in each.given]))
        return [
            [each.logits for each in islice(outputs, len(forward.readings))] for forward in forwards
        ]

    def _observe(
        self,
        forwards: Sequence[Forward],
        found: Sequence[list[Tensor] | Exception],
        seconds: float,
    ) -> None:
        """Tell the verify policy what a step cost, if it is one of many of its kind."""
        if not self.verify.observes:
            return
        positions = 0
        for forward, logits in zip(forwards, found, strict=True):
            # blocks begin with forwards that compute more, and a step that failed was repeated in parts
            if forward.of.canvas.step == 0 or isinstance(logits, Exception):
                return
            positions += forward.positions
            seconds += forward.of.drafting
        if forwards:
            self.verify.observe(StepCost(len(forwards), positions, seconds))

    def _judged(self, forward: Forward, logits: list[Tensor] | Exception) -> list[Outcome]:
        """What a forward has brought its sequence: full blocks, nothing yet, or an error."""
        sequence = forward.of.sequence
        try:
            if isinstance(logits, Exception):
                raise logits
            forward.of.canvas.new = False
            decided = self._advance(forward, logits)
            computed, drafts = forward.computed(self.config.layers), len(forward.readings) - 1
            sequence.stats.count_forward(decided, computed, drafts)
            sequence.stats.draft_price = self.verify.price
            return self._emitted(forward.of)
        except Exception as error:
            return [Outcome.failure(sequence, error)]

    def _advance(self, forward: Forward, logits: Sequence[Tensor]) -> int:
        """The rounds that a forward is: that of the canvas, and those of drafts that it goes on to.

        Returns how many tokens they have decided.
        """
        denoising, readings, at = forward.of, forward.readings, 0
        length, before = len(denoising.canvas), denoising.canvas.decided
        while True:
            check_finite(logits[at])
            predictions = self._predictions(readings[at], logits[at])
            candidates = self.rounds.round(denoising, predictions)
            decided = denoising.canvas.decided - before
            self.rounds.cut(denoising, predictions)
            drafts = [each.canvas for each in readings[at + 1 :]]
            more = followed(self.verify, denoising, drafts)
            # what the cache policy goes by may have come out otherwise than the draft had it
            if not more or self._reading(denoising.canvas).rows != readings[at + more].rows:
                break
            at += more
        slot, began = denoising.sequence.slot, time.perf_counter()
        if len(readings) > 1:
            self.target.state.keep_branch(slot, at)
            self.verify.judged(denoising.sures, at)
        if len(denoising.canvas) < length:
            self.target.state.shorten(slot, len(denoising.canvas))
        denoising.drafts, denoising.sures = drafted(
            self.verify, denoising, candidates, self.rounds.chosen, self._rows
        )
        denoising.drafting = time.perf_counter() - began if denoising.drafts else 0.0
        return decided

    def _rows(self, canvas: Canvas) -> int:
        """How many positions of a canvas the next forward computes, but for rows of logits alone."""
        return len(self.cache.rows(canvas))

    def _predictions(self, reading: Reading, logits: Tensor) -> Predictions:
        return Predictions(reading.read, logits, self.config.logit_shift, self.config.mask_id)

    def _emitted(self, denoising: Denoising) -> list[Outcome]:
        """A full block goes out, up to an end in it; what stands behind an end never does."""
        canvas, sequence = denoising.canvas, denoising.sequence
        if canvas.full and self.commit.edits and canvas.changed and canvas.editable:
            return []
        ends, block = sequence.sampler.ends, canvas.leave()
        if not block:
            return []
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


def check_fit(
    block: BlockPolicy, commit: CommitPolicy, cache: CachePolicy, verify: VerifyPolicy
) -> None:
    """Raise ConfigError for policies that one needs to know more of than the other says."""
    if cache.goes_ahead and not commit.knows_ahead:
        raise ConfigError(
            f"cache policy {cache.name!r} computes little beside what the next forward decides, which "
            f"commit policy {commit.name!r} does not know before; use commit=static:order=random or "
            "order=left, or cache=dkv"
        )
    if not verify.drafts:
        return
    watches = type(cache).watch is not CachePolicy.watch
    if watches or cache.goes_ahead or block.window is not None:
        name = "block=" + block.name if block.window is not None else "cache=" + cache.name
        raise ConfigError(
            f"verify={verify.name} computes drafts of whole blocks along, which {name} has no place for; use "
            "block=fixed and one of cache=none, prefix, dual and dkv, or leave verify out"
        )


def check_sees(config: DiffusionConfig, cache: CachePolicy) -> None:
    """Raise ConfigError for a cache policy that goes by what tokens see and the model's do not."""
    if config.block_length is None and isinstance(cache, BlockCache):
        raise ConfigError(
            f"cache policy {cache.name!r} keeps blocks that never see later ones, and this model sees the "
            "whole text; use cache=dual"
        )
    watches = type(cache).watch is not CachePolicy.watch
    linear = sorted({mixer.name for mixer in config.mixers} - {"softmax"})
    if watches and linear:
        raise ConfigError(
            f"cache policy {cache.name!r} looks at the attention of all layers, and mixers "
            f"{', '.join(linear)} have none to look at; use another cache policy, such as dkv"
        )
    if config.block_length is not None and watches:
        raise ConfigError(
            f"cache policy {cache.name!r} looks at the attention of whole texts, and this model sees no "
            "later block; use cache=blocks"
        )


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
