"""A smaller model drafts (Leviathan et al. 2023; Chen et al. 2023), also the linearized student.

The draft model keeps its own state of every running sequence. It stages one draft after another and,
once the target has judged them, commits the accepted ones. When its state is linear, drafting costs
the same at any context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from linspec.checkpoints.delta import exact_heads
from linspec.checkpoints.dtype import cache_kind
from linspec.checkpoints.hub import load_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.checkpoints.resolve import resolve
from linspec.checkpoints.same_tokenizer import check_same_tokenizer
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.likeliest import likeliest_token
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.base import DRAFTERS, ChainDrafter, DrafterContext
from linspec.drafters.draws import DraftNumbers
from linspec.errors import CheckpointError, DrafterError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import integer_bits
from linspec.utils.options import option

# students that come with linspec, by their teachers
_STUDENTS = {"embedded-softmax": "embedded-aug", "smollm2": "smollm2-aug"}


@dataclass(frozen=True, slots=True)
class DraftModelOptions:
    """Which model drafts."""

    path: str | None = option(
        "directory or name of the smaller model; it has to be given", default=None, short=True
    )


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """Which student drafts."""

    path: str | None = option(
        "the student's directory or name; none is the one that comes with linspec, for its teacher",
        default=None,
        short=True,
    )


@DRAFTERS.register(
    "draft-model",
    summary="a smaller model with the same tokenizer drafts a chain",
    paper="Leviathan et al. 2023, arXiv 2211.17192",
    needs="a model directory: draft-model:DIR",
    options=DraftModelOptions,
)
class DraftModel(ChainDrafter):
    """Chains from a second decoder: its likeliest tokens, or samples when the request samples.

    At its own last position it stops drafting. Raises DrafterError when the vocabularies differ.
    """

    def __init__(self, model: Decoder, target: DecoderConfig, slots: int) -> None:
        super().__init__()
        if model.config.vocab_size != target.vocab_size:
            raise DrafterError(
                f"the draft model has {model.config.vocab_size} tokens, the target "
                f"{target.vocab_size}: both must share one tokenizer"
            )
        self.model = model
        self.state = model.new_state(slots, cache_kind("auto", model))
        self._fed: dict[int, int] = {}
        self._numbers = DraftNumbers()

    @classmethod
    def build(cls, context: DrafterContext, options: DraftModelOptions | StudentOptions) -> Self:
        """With a model from disk, whose tokenizer has to be the target's."""
        target = context.decoder(cls.name)
        model = matching_model(options.path or cls._without_path(context), context, cls.name)
        return cls(model, target.config, context.slots)

    @classmethod
    def _without_path(cls, context: DrafterContext) -> str:
        """The model that drafts where none is named."""
        raise DrafterError(
            f"drafter {cls.name!r} needs a model directory: --drafter {cls.name}:DIR"
        )

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].slot)
        # behind this model's own last position there is nothing that it could read or draft
        order = [i for i in order if self._has_room(sequences[i], 0)]
        self._catch_up([sequences[i] for i in order])
        generators = {i: self._numbers.of(sequences[i]) for i in order}
        drafts: list[list[int]] = [[sequence.root] for sequence in sequences]
        distributions: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
        lengths = [budget.chain for budget in budgets]
        for depth in range(max(lengths)):
            live = [i for i in order if depth < lengths[i] and self._has_room(sequences[i], depth)]
            if not live:
                break
            inputs = [StepInput(sequences[i].slot, [drafts[i][-1]], [depth - 1]) for i in live]
            output = self.model.step(inputs, self.state)
            for i, scores in zip(live, output.logits, strict=True):
                try:
                    token, distribution = self._pick(
                        sequences[i], scores, drafts[i][1:], generators[i]
                    )
                except Exception:
                    # nothing may follow these drafts; if they come true, the verifier says so
                    order.remove(i)
                    continue
                drafts[i].append(token)
                if distribution is not None:
                    distributions[i][depth] = distribution
            for i in self.ended(live, drafts, output.hidden):
                if i in order:
                    order.remove(i)
        return [
            chain(tokens, distribution)
            for tokens, distribution in zip(drafts, distributions, strict=True)
        ]

    def ended(
        self, live: Sequence[int], drafts: Sequence[Sequence[int]], hidden: torch.Tensor
    ) -> Sequence[int]:
        """Which of the `live` sequences get no further draft, by the states that the newest came from.

        Args:
            live: numbers of sequences in this round.
            drafts: by such a number, the root and its drafts, one more than were fed.
            hidden: [P, D] final states at the tokens fed last, in the order of `live`.
        """
        return ()

    def _catch_up(self, sequences: Sequence[RunningSequence]) -> None:
        """Commit what the target has decided since the last draft, all but the root."""
        inputs = []
        for sequence in sequences:
            slot, known = sequence.slot, self._fed.get(sequence.slot, 0)
            if known == 0:
                self.state.reset(slot)
            self.state.drop(slot)
            missing = sequence.tokens[known:-1]
            if missing:
                inputs.append(StepInput(slot, missing, all_logits=False))
        if inputs:
            self.model.step(inputs, self.state)
            for step_input in inputs:
                self._commit(step_input.slot, range(len(step_input.tokens)))

    def _commit(self, slot: int, path: Sequence[int]) -> None:
        # what raises half-way is not known, and so read again from the start
        known = self._fed.pop(slot, 0)
        self.state.commit(slot, path)
        self._fed[slot] = known + len(path)

    def _has_room(self, sequence: RunningSequence, depth: int) -> bool:
        limit = self.model.config.position_limit
        return limit is None or len(sequence.tokens) + depth <= limit

    def _pick(
        self,
        sequence: RunningSequence,
        scores: torch.Tensor,
        drafted: list[int],
        generator: torch.Generator | None,
    ) -> tuple[int, torch.Tensor | None]:
        """The next draft and, when it was sampled, the distribution it came from."""
        if generator is None:
            return likeliest_token(sequence.sampler.scores(scores, drafted)), None
        distribution = sequence.sampler.probabilities(scores, drafted)
        return int(torch.multinomial(distribution.cpu(), 1, generator=generator)), distribution

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        super().observe(sequence, tree, path)
        staged = len(self.state.staged(sequence.slot))
        self._commit(sequence.slot, path[: min(len(path), staged)])

    def paused(self, sequence: RunningSequence) -> Any:
        """Its state and its random numbers, so that the drafts go on as they would have."""
        slot = sequence.slot
        kept = self._fed.get(slot), self._numbers.taken(slot), self.state.snapshot(slot)
        self.finished(sequence)
        return kept

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        fed, numbers, copy = kept
        self._numbers.put(sequence.slot, numbers)
        # without it, all is read again
        if fed:
            self.state.restore(sequence.slot, copy)
            self._fed[sequence.slot] = fed

    def finished(self, sequence: RunningSequence) -> None:
        self._fed.pop(sequence.slot, None)
        self._numbers.forget(sequence.slot)


@DRAFTERS.register(
    "student",
    summary="the linearized student drafts for its softmax teacher, lossless for the teacher",
    paper="You et al. 2024, arXiv 2406.07368; Leviathan et al. 2023, arXiv 2211.17192",
    needs="a linearized copy of the target: student:DIR",
    options=StudentOptions,
)
class Student(DraftModel):
    """A draft model whose drafting cost does not grow with the context."""

    def __init__(self, model: Decoder, target: DecoderConfig, slots: int) -> None:
        left, all_heads = exact_heads(model.config), exact_heads(target)
        if left and left >= all_heads:
            raise DrafterError(
                f"{left} heads of the student see all tokens, and {all_heads} of its teacher, so its drafts "
                "cost as much more with the context; linearize it, or use it as 'draft-model'"
            )
        super().__init__(model, target, slots)

    @classmethod
    def _without_path(cls, context: DrafterContext) -> str:
        for teacher, student in _STUDENTS.items():
            # not every teacher is on this machine
            with contextlib.suppress(CheckpointError):
                if context.source == resolve(teacher):
                    return student
        return super()._without_path(context)


def matching_model(folder: str, context: DrafterContext, name: str) -> Decoder:
    """The model in `folder`, ready to draft for the target, whose tokenizer it has to have."""
    check_tokenizer_of(folder, context)
    return ready_model(folder, context.decoder(name))


def check_tokenizer_of(folder: str, context: DrafterContext) -> None:
    """Raise DrafterError unless the model in `folder` has the tokenizer of the target."""
    tokenizer = context.tokenizer
    if tokenizer is None and context.source is not None:
        tokenizer = load_text_tokenizer(context.source)
    if tokenizer is not None:
        check_same_tokenizer(tokenizer, load_text_tokenizer(folder), folder)


def ready_model(folder: str, target: Decoder) -> Decoder:
    """The model in `folder` in its inference form, on the target's device and in its dtype."""
    bits = integer_bits(target.head)
    options: Any = {"dtype": target.dtype, "device": str(target.device)}
    small = load_model(folder, keep_blocks=bits is None, **options)
    if bits and not small.is_inference:
        # a target that was quantized at load wants a draft model that was
        quantize_model(small, bits, {})
    return small.to_inference()
