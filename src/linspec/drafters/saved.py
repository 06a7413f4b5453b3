"""Medusa heads on disk: a directory with `drafter.json` and `drafter.safetensors`.

drafter.json holds the shape, the fingerprint of the target and the accuracies on held-out text. Packed
heads have an entry `quantization` there, as quantized models have, and their weights are mapped.

    heads = load_heads("model/medusa", model)
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linspec.checkpoints.checksums import write_checksums
from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.quantized import ENTRY, check_entry, entry_of, map_tensors, write_aligned
from linspec.checkpoints.tensors import aligned, check_tensors
from linspec.drafters.heads import Heads, HeadsConfig, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.errors import CheckpointError, ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Blank
from linspec.models.memory import check_memory
from linspec.models.skeleton import without_memory
from linspec.utils.border import parse, read_json
from linspec.utils.format_version import CURRENT, KEY, check_format
from linspec.utils.messages import shown
from linspec.utils.places import Place, as_path

CONFIG_FILE, WEIGHTS_FILE = "drafter.json", "drafter.safetensors"


def save_heads(
    heads: MedusaHeads,
    model: Decoder,
    out: str | Path | Place,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write these heads to the drafter directory `out`; returns it.

    `dtype` converts the weights, None keeps them; `facts` are added to drafter.json. `out`,
    `overwrite`: see `save_model`. Raises ConfigError when `out` may not be written, CheckpointError
    when the disk refuses; `out` then stays as it was.
    """
    if not isinstance(out, Place):
        place = Place(as_path(out), "save_heads", overwrite=overwrite)
        with place.held():
            return save_heads(heads, model, place, dtype=dtype, facts=facts)
    tensors = {
        name: tensor.detach().cpu().to(_kept(tensor, dtype)).contiguous()
        for name, tensor in heads.state_dict().items()
    }
    with out.replaced() as aside:
        save_file(tensors, aside / WEIGHTS_FILE)
        write_checksums(aside)
        _write_config(aside, heads, model, facts or {})
    return out.path


def _kept(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written as: token ids stay whole numbers."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def save_packed(
    heads: PackedHeads, model: Decoder, out: Path, bits: int, facts: Mapping[str, Any]
) -> Path:
    """The same for packed heads, with weights of `bits` bits; `out` must be new."""
    place = Place(out, "quantize")
    place.check()
    with place.replaced() as aside:
        write_aligned(heads.state_dict(), aside / WEIGHTS_FILE)
        write_checksums(aside)
        _write_config(aside, heads, model, {**facts, ENTRY: entry_of(bits)})
    return out


def _write_config(folder: Path, heads: Heads, model: Decoder, facts: Mapping[str, Any]) -> None:
    config = {
        KEY: CURRENT,
        "kind": "medusa",
        **asdict(heads.config),
        "target": fingerprint(model),
        "accuracies": heads.accuracies,
    }
    text = json.dumps(config | {k: v for k, v in facts.items() if k not in config}, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_heads(source: str | Path, model: Decoder) -> Heads:
    """The heads in `source`, bound to `model`: in its dtype and on its device, or packed.

    Raises DrafterError when they were made for another model or are damaged.
    """
    folder = Path(source)
    data = read_drafter(folder)
    config = _heads_config(data, folder)
    _check_target(config, data, model, folder)
    accuracies = _accuracies(data.get("accuracies", []), config, folder)
    _check_weights(folder)
    with without_memory():
        plain = MedusaHeads(config, model, accuracies)
    if ENTRY in data:
        return _load_packed(plain, data[ENTRY], model, folder)
    with _named(folder):
        read = load_file(folder / WEIGHTS_FILE)
        tensors = {name: aligned(tensor) for name, tensor in read.items()}
    check_tensors(
        tensors, plain.state_dict(), folder / WEIGHTS_FILE, exact=False, error=DrafterError
    )
    plain.load_state_dict(tensors, assign=True)
    _check_drafted(plain, folder)
    return plain.to(model.device, model.dtype).eval()


def _load_packed(plain: MedusaHeads, entry: Any, model: Decoder, folder: Path) -> PackedHeads:
    """Packed heads of the shape of `plain`, mapped."""
    if model.device.type != "cpu":
        raise DrafterError(
            f"the drafter in {folder} is quantized, which is for the CPU; use the one it was made from"
        )
    try:
        bits = check_entry(entry, folder)
    except CheckpointError as error:
        raise DrafterError(str(error)) from error
    with without_memory():
        heads = PackedHeads.of(plain, Blank(bits))
    with _named(folder):
        tensors = map_tensors(folder / WEIGHTS_FILE)
    check_tensors(tensors, heads.state_dict(), folder / WEIGHTS_FILE, error=DrafterError)
    heads.load_state_dict(tensors, assign=True)
    _check_drafted(heads, folder)
    return heads.requires_grad_(False).eval()


def _check_drafted(heads: Heads, folder: Path) -> None:
    """Raise DrafterError where what is drafted are no tokens of the target."""
    ids, size = heads.drafted, heads.config.vocab_size
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise DrafterError(
            f"{folder / WEIGHTS_FILE}: the drafted tokens are not all in 0..{size - 1}; copy the drafter "
            "again"
        )


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Inside, whatever is wrong with the weights is wrong with this drafter."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointError) as error:
        raise DrafterError(
            f"{folder / WEIGHTS_FILE} is missing or damaged: {error}; train the drafter again: "
            "linspec train-drafter"
        ) from error


def _check_weights(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DrafterError(f"{path} is missing or damaged; copy the drafter again")
    check_memory(path.stat().st_size, folder)


def _accuracies(given: Any, config: HeadsConfig, folder: Path) -> list[list[float]]:
    """The accuracies of drafter.json, each a share of the guesses."""
    try:
        accuracies = parse(list[list[float]], given, f"{folder / CONFIG_FILE}: accuracies")
    except ConfigError as error:
        raise DrafterError(f"{error}; calibrate it again with linspec train-drafter") from error
    wrong = [share for share in itertools.chain(*accuracies) if not 0 <= share <= 1]
    if wrong:
        raise DrafterError(
            f"{folder / CONFIG_FILE}: accuracies must be shares in 0..1, got {wrong[0]}; calibrate it "
            "again with linspec train-drafter"
        )
    _check_depth(accuracies, config, folder)
    return accuracies


def _check_depth(accuracies: list[list[float]], config: HeadsConfig, folder: Path) -> None:
    if len(accuracies) > config.heads:
        raise DrafterError(
            f"{folder} is calibrated for drafts {len(accuracies)} tokens deep but has only "
            f"{config.heads} heads; calibrate it again with linspec train-drafter"
        )
    ranks = max(map(len, accuracies), default=0)
    if ranks > config.vocab_size:
        raise DrafterError(
            f"{folder} is calibrated for {ranks} guesses but has only {config.vocab_size} tokens; "
            "calibrate it again with linspec train-drafter"
        )


def read_drafter(folder: Path) -> dict[str, Any]:
    """What drafter.json says; raises DrafterError when there is none or it is not of Medusa heads."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise DrafterError(
            f"no drafter in {folder}: {CONFIG_FILE} is missing; train one: linspec train-drafter"
        )
    data = read_json(path, DrafterError)
    check_format(data, path, DrafterError)
    if data.get("kind") != "medusa":
        raise DrafterError(
            f"{path} describes a drafter of kind {shown(repr(data.get('kind')))}, expected 'medusa'"
        )
    return data


def _heads_config(data: Mapping[str, Any], folder: Path) -> HeadsConfig:
    known = {field.name for field in fields(HeadsConfig)}
    shape = {key: value for key, value in data.items() if key in known}
    try:
        return parse(HeadsConfig, shape, f"{folder / CONFIG_FILE} is not a sound drafter")
    except ConfigError as error:
        raise DrafterError(str(error)) from error


def _check_target(
    config: HeadsConfig, data: Mapping[str, Any], model: Decoder, folder: Path
) -> None:
    made, given = (config.width, config.vocab_size), (model.config.width, model.config.vocab_size)
    if made != given:
        raise DrafterError(
            f"the drafter in {folder} was trained for another model: width {made[0]} and "
            f"vocabulary {made[1]}, this model has width {given[0]} and vocabulary {given[1]}"
        )
    ours = fingerprint(model)
    if ours not in targets_of(data):
        raise DrafterError(
            f"the drafter in {folder} was trained for another model: fingerprint "
            f"{shown(data.get('target'))}, this model has {ours}; train its own: linspec train-drafter"
        )


def targets_of(data: Mapping[str, Any]) -> list[Any]:
    """The fingerprints of the models that drafter.json says it drafts for: one, or a list."""
    target = data.get("target")
    return target if isinstance(target, list) else [target]
