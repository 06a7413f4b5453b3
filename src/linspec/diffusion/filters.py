"""The filter of Learn2PD: from the confidences of a block to which of its predictions are final already.

A directory holds `filter.json` (block length, width, the fingerprint of the model) and `filter.safetensors`.

    save_filter(CommitFilter(32), model, "model/learn2pd")
    found = load_filter("model/learn2pd", model)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.fingerprint import fingerprint, weight_fingerprint
from linspec.checkpoints.tensors import check_tensors
from linspec.errors import CheckpointError, ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.border import read_json
from linspec.utils.format_version import check_format, stamped
from linspec.utils.messages import shown
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_size

# what writes it, and where in the directory of a model
PLACE, FOLDER = "train_filter", "learn2pd"
_CONFIG, _WEIGHTS = "filter.json", "filter.safetensors"
_TRAIN = "train one: linspec.train.commit_filter.train_filter"
# far more than the blocks of any model: the weights are its square
_LONGEST = 2048
# weights of a layer of the published filter, which knows blocks of 32
_WEIGHTS_OF_32 = 32 * 32


class CommitFilter(nn.Module):
    """Two layers (Bao et al. 2025, arXiv 2509.25188): confidences [..., block] to logits [..., block].

    As wide inside as a block, as published; but a shorter one than theirs gets no fewer weights.
    """

    def __init__(self, block: int, width: int | None = None) -> None:
        """width: None for the usual one."""
        super().__init__()
        _check("block", block)
        self.block = block
        self.width = max(block, _WEIGHTS_OF_32 // block) if width is None else width
        _check("width", self.width)
        self.inner, self.outer = nn.Linear(block, self.width), nn.Linear(self.width, block)

    def forward(self, confidences: Tensor) -> Tensor:
        """Logits of how likely each prediction is final."""
        logits: Tensor = self.outer(self.inner(confidences).relu())
        return logits

    def accepted(self, confidences: Tensor, least: float) -> Tensor:
        """[n] booleans for the first n positions of a block, n at most `block`: what is surely final."""
        with torch.inference_mode():
            return self(self.padded(confidences)).sigmoid()[: len(confidences)] > least

    def padded(self, confidences: Tensor) -> Tensor:
        """Confidences [n] as [block]: what a shorter block lacks counts as settled."""
        return nn.functional.pad(confidences.float(), (0, self.block - len(confidences)), value=1.0)


def _check(name: str, size: int) -> None:
    check_size(name, size)
    if size > _LONGEST:
        raise ConfigError(f"{name} must be at most {_LONGEST}, got {size}")


def save_filter(
    trained: CommitFilter,
    model: Decoder,
    out: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a filter of `model` to the directory `out`, which may lie in that of the model; returns it.

    facts: what filter.json says beside. Raises ConfigError when `out` may not be written.
    """
    place = Place(as_path(out), PLACE, overwrite=overwrite)
    sizes = {"block": trained.block, "width": trained.width}
    known = {"target": fingerprint(model), "weights": weight_fingerprint(model)}
    config = {**(facts or {}), **sizes, **known}
    with place.held(), place.replaced() as aside:
        save_file(dict(trained.state_dict()), aside / _WEIGHTS)
        write_checksums(aside)
        text = json.dumps(stamped(config), indent=2) + "\n"
        (aside / _CONFIG).write_text(text, encoding="utf-8")
    return place.path


def load_filter(source: str | Path, model: Decoder) -> CommitFilter:
    """The filter in `source`; raises CheckpointError if it is damaged or of another model."""
    folder = Path(source)
    path = folder / _CONFIG
    if not path.exists():
        raise CheckpointError(f"no filter in {folder}: {_CONFIG} is missing; {_TRAIN}")
    data = read_json(path)
    check_format(data, path)
    ours, weights = fingerprint(model), weight_fingerprint(model)
    # filters of older versions do not say the second
    changed = weights is not None and data.get("weights") not in (None, weights)
    if data.get("target") != ours or changed:
        raise CheckpointError(
            f"the filter in {folder} was trained for another model, or before this one was trained on: "
            f"fingerprint {shown(data.get('target'))}, this model has {ours}; {_TRAIN}"
        )
    try:
        # filters were as wide as their block once, and said nothing of it
        found = CommitFilter(data.get("block"), data.get("width", data.get("block")))  # type: ignore[arg-type]  # checked there
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; copy the filter again") from error
    found.load_state_dict(_tensors(folder / _WEIGHTS, found))
    return found.eval().requires_grad_(False)


def _tensors(path: Path, wanted: CommitFilter) -> dict[str, Tensor]:
    try:
        read = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; {_TRAIN}") from error
    check_tensors(read, wanted.state_dict(), path)
    return read
