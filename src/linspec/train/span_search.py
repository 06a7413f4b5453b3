"""What the search for spans may cost, and its progress on disk.

Measuring one layer at one span is a pass of text through the layers from there on. The search must not
cost more than a quarter of the run that it serves, so it measures less text, or fewer spans, until it
fits; where nothing fits, every layer gets the same span and is told so. The cost is counted in
operations, not in seconds: the same run searches the same on every machine and in every process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linspec.errors import ConfigError, TrainingError
from linspec.mixers.config import MixerConfig
from linspec.models.model_types import type_of
from linspec.train.data import Windows
from linspec.train.objective import Predictor, blocks_of
from linspec.train.span_losses import SpanLosses, measure_span_losses, tried_spans
from linspec.utils.border import parse
from linspec.utils.files import replace_text

log = logging.getLogger(__name__)

# the layers are measured on the tokens of so many windows ...
WINDOWS = 8
# ... in texts of so many times the training context, where the teacher has the positions
BEYOND = 4
# of the run, what a search may cost
SHARE = 0.25
# passes of a training token that the run is taken to cost: a forward and twice that backward, the
# teacher's forward, and compiled steps that are 1.4 times as fast
PASSES = 2.8


@dataclass(frozen=True, slots=True)
class Search:
    """One search: `windows` texts of `context` tokens, every layer at each of `spans`.

    cost: in operations. losses: by layer, those that are measured so far.
    """

    windows: int
    context: int
    spans: tuple[int, ...]
    cost: float
    losses: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Search:
        """The search that was saved in `file`; linspec 0.1 saved finished ones only.

        Raises TrainingError for a damaged one.
        """
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(data, list):
                spans, losses = parse(tuple[tuple[int, ...], list[list[float]]], data, file)
                return cls(0, 0, spans, 0.0, dict(enumerate(losses)))
            return parse(cls, data, file)
        except (ConfigError, OSError, ValueError, RecursionError) as error:
            raise TrainingError(
                f"the search for spans in {file} is damaged: {error}; remove the file, and it is made again"
            ) from error

    def save(self, file: Path) -> None:
        """Keep what is measured so far."""
        data = {
            "windows": self.windows,
            "context": self.context,
            "spans": self.spans,
            "cost": self.cost,
            "losses": self.losses,
        }
        replace_text(file, json.dumps(data))


@dataclass(frozen=True, slots=True)
class Costs:
    """Operations of passes through `teacher`, in multiply-adds of its weights and its attention."""

    teacher: Predictor
    mixer: MixerConfig
    layers: Sequence[int]

    def forward(self, tokens: int, context: int) -> float:
        """A pass of `tokens` tokens in texts of `context`."""
        return tokens * (self._layers(len(blocks_of(self.teacher)), context) + self._head())

    def search(self, windows: int, context: int, spans: Sequence[int]) -> float:
        """Every layer at every span; of a decoder, what is below the layer is not computed again."""
        total, count = 0.0, len(blocks_of(self.teacher))
        for layer in self.layers:
            above = count - layer if type_of(self.teacher).parts == 1 else count
            total += len(spans) * (self._layers(above, context) + self._head())
        exact = sum(min(span * self.mixer.group, context) for span in spans)
        return windows * context * (total + len(self.layers) * self._attention(exact))

    def _layers(self, count: int, context: int) -> float:
        block = blocks_of(self.teacher)[0]
        weights = sum(weight.numel() for weight in block.parameters())
        # whole rows of the attention matrix are computed, the masked half too
        return count * (weights + self._attention(context))

    def _attention(self, keys: int) -> float:
        shape = blocks_of(self.teacher)[0].mixer.config
        return 2.0 * keys * shape.heads * shape.head_width

    def _head(self) -> float:
        return float(self.teacher.embed.weight.numel())


def choose(
    costs: Costs, trained: int, run_tokens: int, *, longest: int, groups: int
) -> tuple[Search | None, Search]:
    """The best search that fits into its share of a run of `run_tokens`, None if none does; the least.

    trained: tokens of a training window. longest: positions that the teacher can read. groups: that a
    layer gets in the mean; a search that tries no more than that is worth less than none.
    """
    budget = SHARE * PASSES * costs.forward(run_tokens, trained)
    found: list[Search] = []
    for count, context, spans in _options(trained, costs.mixer.group, longest):
        if found and spans[-1] <= groups and spans[-1] < found[0].spans[-1]:
            break
        search = Search(count, context, spans, costs.search(count, context, spans))
        found.append(search)
        if search.cost <= budget:
            return search, search
    return None, min(found, key=lambda search: search.cost)


def _options(trained: int, group: int, longest: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(windows, context, spans) of searches, each cheaper than the one before."""
    context = min(BEYOND * trained, longest)
    windows = max(1, WINDOWS * trained // context)
    spans = tried_spans(context, group)
    while True:
        yield windows, context, spans
        if windows > 1:
            windows //= 2
        elif len(spans) > 4 and spans[1] == 2:
            spans = spans[::2]
        elif context // 2 >= max(trained // 2, 2 * group):
            context //= 2
            spans = tuple(span for span in spans if span * group <= context)
        else:
            return


def search_spans(
    teacher: Predictor,
    mixer: MixerConfig,
    layers: Sequence[int],
    windows: Windows,
    run_tokens: int,
    file: Path,
    *,
    groups: int,
    needed: bool,
) -> SpanLosses | None:
    """What each of `layers` loses at each span, from `file` as far as it was measured before.

    None where no search fits the run and it is not `needed`. run_tokens: of the run that it serves;
    groups: see `choose`.
    """
    if file.exists():
        search: Search | None = Search.read(file)
        assert search is not None
        if not search.windows and search.losses:
            kept = dict(zip(layers, search.losses.values(), strict=True))
            return SpanLosses(list(search.spans), kept)
    else:
        search = _plan(teacher, mixer, layers, windows, run_tokens, groups=groups, needed=needed)
        (search or Search(0, 0, (), 0.0)).save(file)
    if search is None or not search.windows:
        return None
    batch = windows.batch(0, search.windows, search.context).to(teacher.embed.weight.device)

    def keep(losses: Mapping[int, list[float]]) -> None:
        replace(search, losses=dict(losses)).save(file)

    return measure_span_losses(
        teacher, mixer, layers, batch, spans=search.spans, known=search.losses, keep=keep
    )


def _plan(
    teacher: Predictor,
    mixer: MixerConfig,
    layers: Sequence[int],
    windows: Windows,
    run_tokens: int,
    *,
    groups: int,
    needed: bool,
) -> Search | None:
    costs = Costs(teacher, mixer, layers)
    # a T5 has no positions of its own: nobody says that it can read more than it trained on
    longest = getattr(teacher.config, "max_positions", windows.context)
    fitting, least = choose(costs, windows.context, run_tokens, longest=longest, groups=groups)
    run = PASSES * costs.forward(run_tokens, windows.context)
    if fitting is None and not needed:
        log.warning(
            "spans are not searched: that would cost %.0f%% of this short run at least; every layer "
            "gets the same. A longer run (--tokens) searches, --span sets them",
            100 * least.cost / run,
        )
        return None
    search = fitting or least
    log.warning(
        "measuring which of %d layers need to see far: %d texts of %d tokens, spans %s, about %.0f%% "
        "of the run; --span (or --keep-softmax for --softmax-layers) leaves it out",
        len(layers),
        search.windows,
        search.context,
        ", ".join(map(str, search.spans)),
        100 * search.cost / run,
    )
    return search
