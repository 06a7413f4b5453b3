"""A smaller model drafts (Leviathan et al. 2023; Chen et al. 2023), also the linearized student.

The draft model keeps its own state of every running sequence. It stages one draft after another and,
once the target has judged them, commits the accepted ones. When its state is linear, drafting costs
the same at any context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from linspec.checkpoints.hub import EMBEDDED, load_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.checkpoints.same_tokenizer import check_same_tokenizer
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.sequence import Row
from linspec.decoding.step import Feed
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.base import DRAFTERS, ChainDrafter, DrafterContext
from linspec.errors import DrafterError
from linspec.kernels.linear import integer_bits
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.options import option


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
        "the student's directory or name; none is the embedded student, for its teacher",
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
        self.state = model.new_state(slots)
        self._fed: dict[int, int] = {}
        # of each slot: its generator, and what that was when the sequence had so many tokens
        self._generators: dict[int, tuple[torch.Generator, int, torch.Tensor]] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: DraftModelOptions | StudentOptions) -> Self:
        """With a model from disk, whose tokenizer has to be the target's."""
        target = context.decoder(cls.name)
        folder = options.path or cls._without_path(context)
        tokenizer = context.tokenizer
        if tokenizer is None and context.source is not None:
            tokenizer = load_text_tokenizer(context.source)
        if tokenizer is not None:
            check_same_tokenizer(tokenizer, load_text_tokenizer(folder), folder)
        return cls(_ready_model(folder, target), target.config, context.slots)

    @classmethod
    def _without_path(cls, context: DrafterContext) -> str:
        """The model that drafts where none is named."""
        raise DrafterError(
            f"drafter {cls.name!r} needs a model directory: --drafter {cls.name}:DIR"
        )

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[TokenTree]:
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        # behind this model's own last position there is nothing that it could read or draft
        order = [i for i in order if self._has_room(rows[i], 0)]
        self._catch_up([rows[i] for i in order])
        generators = {i: self._generator(rows[i]) for i in order}
        drafts: list[list[int]] = [[row.root] for row in rows]
        laws: list[dict[int, torch.Tensor]] = [{} for _ in rows]
        lengths = [budget.chain for budget in budgets]
        for depth in range(max(lengths)):
            live = [i for i in order if depth < lengths[i] and self._has_room(rows[i], depth)]
            if not live:
                break
            feeds = [Feed(rows[i].slot, [drafts[i][-1]], [depth - 1]) for i in live]
            logits = self.model.step(feeds, self.state).logits
            for i, scores in zip(live, logits, strict=True):
                try:
                    token, law = self._pick(rows[i], scores, drafts[i][1:], generators[i])
                except Exception:
                    # nothing may follow these drafts; if they come true, the verifier says so
                    order.remove(i)
                    continue
                drafts[i].append(token)
                if law is not None:
                    laws[i][depth] = law
        return [chain(tokens, law) for tokens, law in zip(drafts, laws, strict=True)]

    def _catch_up(self, rows: Sequence[Row]) -> None:
        """Commit what the target has decided since the last draft, all but the root."""
        feeds = []
        for row in rows:
            slot, known = row.slot, self._fed.get(row.slot, 0)
            if known == 0:
                self.state.reset(slot)
            self.state.drop(slot)
            missing = row.tokens[known:-1]
            if missing:
                feeds.append(Feed(slot, missing, all_logits=False))
        if feeds:
            self.model.step(feeds, self.state)
            for feed in feeds:
                self._commit(feed.slot, range(len(feed.tokens)))

    def _commit(self, slot: int, path: Sequence[int]) -> None:
        # what raises half-way is not known, and so read again from the start
        known = self._fed.pop(slot, 0)
        self.state.commit(slot, path)
        self._fed[slot] = known + len(path)

    def _has_room(self, row: Row, depth: int) -> bool:
        limit = self.model.config.position_limit
        return limit is None or len(row.tokens) + depth <= limit

    def _generator(self, row: Row) -> torch.Generator | None:
        """What samples the drafts of a row; a round that is proposed again samples the same."""
        if row.sampler.greedy:
            return None
        found = self._generators.get(row.slot)
        if found is None:
            # drafts must not share random numbers with the verifier that judges them
            seed, generator = row.params.seed, torch.Generator()
            generator.manual_seed(seed ^ 0x5EED) if seed is not None else generator.seed()
            found = generator, -1, generator.get_state()
        generator, length, state = found
        if length != len(row.tokens):
            state = generator.get_state()
            self._generators[row.slot] = generator, len(row.tokens), state
        return generator.set_state(state)

    def _pick(
        self,
        row: Row,
        scores: torch.Tensor,
        drafted: list[int],
        generator: torch.Generator | None,
    ) -> tuple[int, torch.Tensor | None]:
        """The next draft and, when it was sampled, the distribution it came from."""
        if generator is None:
            return int(row.sampler.scores(scores, drafted).argmax()), None
        law = row.sampler.probabilities(scores, drafted)
        return int(torch.multinomial(law.cpu(), 1, generator=generator)), law

    def observe(self, row: Row, tree: TokenTree, path: Sequence[int]) -> None:
        super().observe(row, tree, path)
        staged = len(self.state.staged(row.slot))
        self._commit(row.slot, path[: min(len(path), staged)])

    def finished(self, row: Row) -> None:
        self._fed.pop(row.slot, None)
        self._generators.pop(row.slot, None)


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
        if not model.config.linear:
            raise DrafterError(
                "the student still has softmax layers; linearize it, or use it as 'draft-model'"
            )
        super().__init__(model, target, slots)

    @classmethod
    def _without_path(cls, context: DrafterContext) -> str:
        if context.source is not None and context.source.name == EMBEDDED["embedded-softmax"]:
            return "embedded-aug"
        return super()._without_path(context)


def _ready_model(folder: str, target: Decoder) -> Decoder:
    """The model in `folder` in its inference form, on the target's device and in its dtype."""
    small = load_model(folder, dtype=target.dtype, device=str(target.embed.weight.device))
    bits = integer_bits(target.head)
    if bits and not small.prepared:
        # a target that was quantised at load wants a draft model that was
        quantize_model(small, bits, {})
    return small.prepare()
