"""A masked-diffusion model drafts a block of tokens in one forward (SpecDiff-2, arXiv 2511.00606).

Behind the text stand masks, and one forward says for each of them which token it hides. These are guesses for
each place that do not know each other, so as many drafts as are wanted come from the same forward: they are
verified as one tree, the likeliest combinations of them or draws. The text is read once: the entries of a
token are kept as the forward computed them that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from linspec.checkpoints.dtype import cache_kind
from linspec.checkpoints.hub import load_decoder
from linspec.checkpoints.load_quantized import quantize_model
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.tree import Budget, TokenTree, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, ChainDrafter, DrafterContext
from linspec.drafters.draft_model import check_tokenizer_of
from linspec.drafters.draws import DraftNumbers
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.guesses import GuessTree
from linspec.drafters.medusa import runs_natively
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.specdiff_net import SpecDiffNet, target_logits
from linspec.errors import ConfigError, DrafterError, StateError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import integer_bits
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes

# drafts at once of a diffusion model that was not trained to draft
PLACES = 4
CACHES = ("prefix", "none")
_BUDGETS_KEPT = 64


@dataclass(frozen=True, slots=True)
class SpecDiffOptions:
    """Which model drafts, how far, and how wide."""

    path: Path | None = path_option("the trained drafter", "specdiff")
    model: str | None = option(
        "a diffusion model that was not trained to draft, by directory or name; in place of `path`",
        default=None,
    )
    places: int = option(
        "tokens that are guessed at once; 0 is what the drafter was trained for", default=0
    )
    top: int = option("most guesses for a place that the tree may hold", default=8)
    draws: bool = option(
        "draw drafts where the request samples; false takes the likeliest, and a seed gives what it gives "
        "without drafts",
        default=True,
    )
    cache: str = option(
        "prefix computes each token once; none computes the text again in each round",
        default="prefix",
    )

    def __post_init__(self) -> None:
        check_sizes(self, "top")
        check_sizes(self, "places", least=0)
        if self.cache not in CACHES:
            raise ConfigError(
                f"cache must be one of {', '.join(CACHES)}, got {shown(repr(self.cache))}"
            )
        if self.path is not None and self.model is not None:
            raise ConfigError(
                "a drafter is either a trained one (path) or any diffusion model (model), got both; leave "
                "one of them out"
            )


@dataclass(frozen=True, slots=True)
class Asked:
    """A sequence that gets drafts. first: the first position that the forward computes; depth: of drafts."""

    number: int
    sequence: RunningSequence
    budget: Budget
    first: int
    depth: int


@DRAFTERS.register(
    "specdiff",
    summary="a masked-diffusion model guesses a block at once; combinations of its guesses form a tree",
    paper="Sandler et al. 2025 (SpecDiff-2), arXiv 2511.00606",
    needs="a diffusion model (specdiff:model=DIR), or one trained for the target: linspec train-drafter "
    "--kind specdiff",
    options=SpecDiffOptions,
)
class SpecDiff(ChainDrafter):
    """Trees of the likeliest guesses, or of draws from them when the request samples."""

    files = plain_files(SpecDiffNet)
    confident = True

    def __init__(
        self,
        model: Decoder,
        target: DecoderConfig,
        slots: int,
        options: SpecDiffOptions | None = None,
        accuracies: Sequence[Sequence[float]] = (),
        trained_for: int = 0,
    ) -> None:
        """accuracies, trained_for: of a `SpecDiffNet`, the latter its places; 0 for any diffusion model."""
        super().__init__()
        if not isinstance(model, MaskedDiffusion):
            raise DrafterError(
                "drafter 'specdiff' fills masks, and this model has none; use it as 'draft-model'"
            )
        self.model, self.options = model, options or SpecDiffOptions()
        self.places = self.options.places or trained_for or PLACES
        self.vocab_size = target.vocab_size
        # a diffusion model of its own was never asked about a token for which there is no mask
        shift = model.config.logit_shift
        self.masks_less = shift if trained_for else 0
        self.state = model.new_state(slots, cache_kind("auto", model))
        self._check_state()
        # by slot: tokens that were read before the newest forward, and with it
        self._read: dict[int, tuple[int, int]] = {}
        self._numbers = DraftNumbers()
        rates = [row[: self.options.top] for row in accuracies]
        self._measured = lru_cache(_BUDGETS_KEPT)(
            lambda depth: GuessTree.of(rates[:depth], MAX_NODES).gains if rates else None
        )

    @classmethod
    def build(cls, context: DrafterContext, options: SpecDiffOptions) -> Self:
        """With a model from disk, whose tokenizer has to be the target's."""
        target = context.decoder(cls.name)
        if options.model is not None:
            check_tokenizer_of(options.model, context)
            model = load_decoder(options.model, dtype=target.dtype, device=str(target.device))
            return cls(ready(model, target), target.config, context.slots, options)
        folder = find_drafter(cls.name, options.path, context)
        net = load_drafter(folder, target, SpecDiffNet)
        model, measured = ready(net.model(), target), (net.accuracies, net.places)
        return cls(model, target.config, context.slots, options, *measured)

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def _check_state(self) -> None:
        try:
            self.state.lengthen(0, 1)
            self.state.check_overwrite(0, [0])
        except StateError as error:
            raise DrafterError(
                f"this diffusion model cannot read a text bit by bit: {error}"
            ) from error
        self.state.reset(0)

    # ---- what is worth how much

    def expected(self, budget: Budget) -> float:
        """Measured in training; else the mean of what was accepted, by depth."""
        depth = min(budget.depth, self.places)
        gains = self._measured(depth)
        if gains is None:
            return super().expected(budget.within(budget.nodes, self.places))
        return gains[min(budget.nodes, len(gains) - 1)]

    # ---- drafts

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].slot)
        found = (self._asked(i, sequences[i], budgets[i]) for i in order)
        asked = [each for each in found if each is not None]
        trees = [root_only(sequence.root) for sequence in sequences]
        for each, logits in zip(asked, self._guessed(asked), strict=True):
            trees[each.number] = self._tree(each, logits)
        return trees

    def _asked(self, number: int, sequence: RunningSequence, budget: Budget) -> Asked | None:
        """What a sequence needs computed; None where the drafter has no room, or does not know a token."""
        config, length = self.model.config, len(sequence.tokens)
        depth = min(self.places, budget.depth)
        if config.position_limit is not None:
            depth = min(depth, config.position_limit - length + self.masks_less)
        before, read = self._read.get(sequence.slot, (0, 0))
        # a round that is proposed again is computed again
        first = before if read == length else read
        if self.options.cache == "none":
            first = 0
        unknown = max(sequence.tokens[first:]) >= config.vocab_size
        return None if depth < 1 or unknown else Asked(number, sequence, budget, first, depth)

    def _guessed(self, asked: Sequence[Asked]) -> list[torch.Tensor]:
        """Logits [depth, vocab] of the drafts of each; what was read is kept, and no mask is."""
        if not asked:
            return []
        inputs = [self._given(each) for each in asked]
        for each in asked:
            # what raises half-way is not known, and so read again from the start
            self._read.pop(each.sequence.slot, None)
        output = self.model.step(inputs, self.state)
        for each in asked:
            slot, length = each.sequence.slot, len(each.sequence.tokens)
            self.state.shorten(slot, length)
            self._read[slot] = each.first, length
        mask = self.model.config.mask_id
        return [target_logits(output.logits[part], self.vocab_size, mask) for part in output.slices]

    def _given(self, each: Asked) -> StepInput:
        """The tokens that were not read yet, and masks behind them; all see each other and what was read."""
        sequence, shift = each.sequence, self.model.config.logit_shift
        slot, length = sequence.slot, len(sequence.tokens)
        if not each.first:
            self.state.reset(slot)
        masks = each.depth - self.masks_less
        self.state.lengthen(slot, length + masks)
        tokens = [*sequence.tokens[each.first :], *[self.model.config.mask_id] * masks]
        return StepInput(
            slot,
            tokens,
            overwrite=range(each.first, length + masks),
            causal=False,
            logits_of=range(length - shift - each.first, length - shift - each.first + each.depth),
        )

    def _tree(self, each: Asked, logits: torch.Tensor) -> TokenTree:
        """The likeliest combinations of guesses within the budget; or of draws, with what they come from."""
        sequence, generator = each.sequence, self._numbers.of(each.sequence)
        if sequence.params.grammar is not None or not self.options.draws:
            # what a grammar forbids must be left out, and no draw may be
            generator = None
        guesses, rates = list[list[int]](), list[list[float]]()
        sources = list[torch.Tensor]()
        for depth, row in enumerate(logits):
            try:
                shares = self._shares(sequence, row, depth, sampled=generator is not None)
            except Exception:
                # nothing may follow these drafts; if they come true, the verifier says so
                break
            best = shares.topk(min(self.options.top, len(shares)))
            # the shape of a tree of draws goes by what they come from, never by what was drawn
            rates.append(best.values.clamp(max=1.0).tolist())
            guesses.append(
                best.indices.tolist()
                if generator is None
                else drawn(shares, len(best.values), generator)
            )
            sources.append(shares)
        nodes = each.budget.within(MAX_NODES, each.depth).nodes
        tree = GuessTree.of(rates, nodes).filled(sequence.root, guesses, nodes)
        if generator is None:
            return tree
        parents = {parent: tree.depths[parent] for parent in tree.parents[1:]}
        proposals = {node: sources[depth] for node, depth in parents.items()}
        return TokenTree(tree.tokens, tree.parents, proposals)

    def _shares(
        self, sequence: RunningSequence, row: torch.Tensor, depth: int, *, sampled: bool
    ) -> torch.Tensor:
        """The distribution [vocab] that the drafts of a depth are drawn from, or the likeliest taken of."""
        if sampled:
            return sequence.sampler.probabilities(row).cpu()
        # what the rules say behind drafts that are not known yet, nobody knows
        scores = sequence.sampler.scores(row) if depth == 0 else row
        return scores.softmax(-1)

    # ---- requests

    def paused(self, sequence: RunningSequence) -> Any:
        """Its state and its random numbers, so that the drafts go on as they would have."""
        slot = sequence.slot
        kept = self._read.get(slot), self._numbers.taken(slot), self.state.snapshot(slot)
        self.finished(sequence)
        return kept

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        read, numbers, copy = kept
        self._numbers.put(sequence.slot, numbers)
        # without it, all is read again
        if read is not None:
            self.state.restore(sequence.slot, copy)
            self._read[sequence.slot] = read

    def finished(self, sequence: RunningSequence) -> None:
        self._read.pop(sequence.slot, None)
        self._numbers.forget(sequence.slot)


def drawn(shares: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    """`count` draws without replacement from a distribution [V], in their order; fewer where it has fewer.

    As a race of exponential clocks: the order in which they ring is that of such draws.
    """
    weights = shares.double()
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    best = (weights / clocks).topk(min(count, int((weights > 0).sum())))
    found: list[int] = best.indices.tolist()
    return found


def ready(model: Decoder, target: Decoder) -> Decoder:
    """A diffusion model in the form that suits the target: integer weights where these have kernels.

    A draft is judged by its target, so rounding costs acceptance at most.
    """
    if model.is_inference:
        return model
    bits = integer_bits(target.head) or (8 if runs_natively(target.head) else None)
    return quantize_model(model, bits, {}) if bits else model.to_inference()
