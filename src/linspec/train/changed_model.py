"""A model with low-rank changes, as the directory that a training leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.delta import write_delta
from linspec.checkpoints.hub import save_model
from linspec.checkpoints.packages import PACKAGES
from linspec.models.decoder import Decoder
from linspec.train.linearize import stored_dtype
from linspec.train.low_rank import factors, merge_low_rank
from linspec.utils.places import Place


def save_changed(
    model: Decoder,
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    *,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """A delta with `facts` where `source` is a package's file, else the whole model; `files` beside it."""
    if str(source) not in PACKAGES:
        whole = merge_low_rank(model)
        save_model(whole, tokenizer, place, stored_dtype(source), extra_files=files)
        return
    with place.replaced() as aside:
        write_delta(model.config, factors(model), aside, base=str(source), facts=facts)
        write_checksums(aside)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
