"""SWIFT (Xia et al. 2024): the target drafts without some of its sub-layers, which it finds while it serves.

After a few rounds another set of mixers and MLPs is tried on tokens that the target has written already: one
parallel step in the form of a draft says how many of them the set would have got right. The best set so far
drafts. Nothing is trained and no weight is copied.

A set belongs to a model object, not to the process: each form of the target has its own. Sets are tried on a
state apart, a copy of the target's at the start of one answer, so the search changes no cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.checkpoints.fingerprint import fingerprint
from linspec.decoding.likeliest import likeliest
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.self_bits import check_drafting
from linspec.drafters.self_draft import SelfDraft
from linspec.drafters.skip_search import SkipSearch, SkipSet
from linspec.errors import CheckpointError, ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.own_forms import skipping
from linspec.utils.files import cache_dir
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True)
class SwiftOptions:
    """How much is skipped, how it is searched, and how much is drafted."""

    ratio: float = option("share of the sub-layers that a draft does without", default=0.25)
    tokens: int = option("most draft tokens of a chain", default=16)
    least: float = option("drafting ends behind a token that is held less likely", default=0.8)
    window: int = option("tokens that a set is tried on", default=32)
    interval: int = option("rounds from one trial to the next", default=4)
    trials: int = option("trials after which the search ends; 0 searches nothing", default=1000)
    patience: int = option("trials in a row without a better set that end it", default=300)
    goal: float = option("share of right tokens that ends it", default=0.95)
    file: Path | None = option(
        "where the search is kept; none is by the model in linspec's cache directory",
        default=None,
        short=True,
    )

    def __post_init__(self) -> None:
        check_drafting(self.tokens, self.least)
        check_sizes(self, "window interval patience")
        check_sizes(self, "trials", least=0)
        for name in ("ratio", "goal"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.window >= MAX_STAGED:
            raise ConfigError(f"window must be less than {MAX_STAGED}, got {self.window}")


@DRAFTERS.register(
    "swift",
    summary="the target drafts a tree without some of its mixers and MLPs, which it finds while it serves",
    paper="Xia et al. 2024 (SWIFT), arXiv 2410.06916",
    needs="a model of 3 layers or more",
    options=SwiftOptions,
)
class Swift(SelfDraft):
    """Sub-layer 2·(l - 1) is the mixer of layer l, the next number its MLP; ends of the stack are kept."""

    def __init__(self, context: DrafterContext, options: SwiftOptions) -> None:
        super().__init__(context, tokens=options.tokens, least=options.least)
        model = context.decoder(self.name)
        if any(not hasattr(block, "mlp") for block in model.layers):
            raise DrafterError(
                f"drafter {self.name!r} leaves out mixers and MLPs, and the blocks of this model are not "
                "made of the two; use self-bits"
            )
        units = 2 * (len(model.layers) - 2)
        size = int(units * options.ratio) if units > 0 else 0
        if not size:
            raise DrafterError(
                f"drafter {self.name!r} keeps the first and the last layer, and {options.ratio:g} of the "
                f"{max(0, units)} sub-layers between them is none; use a larger ratio or self-bits"
            )
        self.options = options
        self.search = SkipSearch(
            units,
            size,
            goal=options.goal,
            patience=options.patience,
            trials=options.trials,
        )
        self._file = options.file
        if self._file is not None and self._file.exists():
            self.search.load(self._file)
        self._sample: _Sample | None = None
        self._rounds = 0

    def attached(self, target: Target) -> None:
        assert isinstance(target.model, Decoder), "checked when this was made"
        if self._file is None:
            self._file = self._by_model(target.model)
            if self._file is not None:
                self.search.resume(self._file)
        self._sample = None
        super().attached(target)

    def _by_model(self, model: Decoder) -> Path | None:
        """Where the search of this model is kept; None for one that nothing knows by its weights."""
        with contextlib.suppress(ConfigError):
            dtype = str(model.dtype).removeprefix("torch.")
            name = f"{fingerprint(model)}-{dtype}-{self.search.size}.json"
            return cache_dir() / "swift" / name
        return None

    def make(self, model: Decoder) -> Decoder:
        return _without(model, self.search.best)

    # ---- the search

    @property
    def searching(self) -> bool:
        """Whether other sets are still tried."""
        return self.options.trials > 0 and not self.search.over

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        if self.searching and self.target is not None and self._sample is None:
            # a sequence that will be long enough to try sets on
            long = [each for each in sequences if each.remaining > self.options.window]
            if long:
                self._sample = _Sample(self.target, long[0], self.options.window)
        return super().propose(sequences, budgets)

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        super().observe(sequence, tree, path)
        self._rounds += 1
        due = self.searching and self._rounds >= self.options.interval
        if due and self._sample is not None and self._sample.ready:
            self._rounds = 0
            self.try_one(self._sample)

    def try_one(self, sample: _Sample) -> None:
        """One trial: the set that is suggested next becomes the draft's if it is better."""
        assert self.target is not None and isinstance(self.target.model, Decoder)
        candidate = self.search.suggest()
        form = _without(self.target.model, candidate)
        if self.search.told(candidate, sample.matchness(form)):
            self.form = form
            self._keep()
        elif self.search.over:
            self._keep()
        if self.search.over:
            # nothing is tried on it any more
            self._sample = None

    def _keep(self) -> None:
        # a read-only home only means searching again next time
        if self._file is not None:
            with contextlib.suppress(CheckpointError):
                self.search.save(self._file)

    def finished(self, sequence: RunningSequence) -> None:
        sample = self._sample
        if sample is not None and sample.sequence is sequence:
            # the next answer has its turn: a set is to suit all of them
            self._sample = None
            if self.search.progress.trials:
                self._keep()


def _without(model: Decoder, skipped: SkipSet) -> Decoder:
    layers: tuple[list[int], list[int]] = [], []
    for unit in skipped:
        layers[unit % 2].append(unit // 2 + 1)
    return skipping(model, *layers)


class _Sample:
    """The first tokens of an answer, behind a copy of the state that the target had before them."""

    def __init__(self, target: Target, sequence: RunningSequence, window: int) -> None:
        self.sequence, self.window = sequence, window
        self._first = len(sequence.tokens) - 1
        self._state: Any = target.state.empty(1)
        self._state.restore(0, target.state.snapshot(sequence.slot))

    @property
    def ready(self) -> bool:
        """Whether the answer is long enough."""
        return len(self.sequence.tokens) > self._first + self.window

    def matchness(self, form: Decoder) -> float:
        """Share of the tokens that `form` finds likeliest after those before them."""
        first, last = self._first, self._first + self.window
        tokens = self.sequence.tokens
        try:
            scores = form.step([StepInput(0, tokens[first:last])], self._state).logits
        finally:
            self._state.drop(0)
        right = zip(likeliest(scores)[0], tokens[first + 1 : last + 1], strict=True)
        return sum(ours == theirs for ours, theirs in right) / self.window
