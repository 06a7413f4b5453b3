"""What a model on disk is, read from its configuration: `linspec info MODEL`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linspec.checkpoints.delta import Delta, exact_heads, read_delta
from linspec.checkpoints.gguf.model import plan_gguf, quantized
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.hub import load_any_config, resolve
from linspec.checkpoints.load_tokenizer import tokenizer_place
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.weights import read_dtype, weight_files
from linspec.errors import CheckpointError
from linspec.models.config import DecoderConfig
from linspec.utils.border import read_json

# the first lines of a model card, between two lines of dashes
_LICENCE = re.compile(r"---\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([^\s\"']+)")
_CARD = 10_000


def describe(source: str | Path) -> dict[str, Any]:
    """Family, shape, number formats, licence and notice of the model in `source`; no weight is read."""
    path = resolve(source)
    config = load_any_config(path)
    facts: dict[str, Any] = {
        "model": str(source),
        "path": str(path),
        "family": config.family,
        "layers": config.layers,
        "vocab_size": config.vocab_size,
    }
    facts |= config.facts()
    if is_gguf(path):
        facts |= _of_gguf(path)
    else:
        facts |= _of_directory(path)
    if not is_gguf(path) and (delta := read_delta(path)) is not None:
        facts |= _of_delta(delta, config) if isinstance(config, DecoderConfig) else {}
    if package := next((p for p in PACKAGES.values() if p.path == path), None):
        facts |= {"license": package.license, "notice": package.notice}
    return facts


def _of_directory(folder: Path) -> dict[str, Any]:
    """Number formats, tokenizer, chat template and licence, as far as the files say them."""
    place = folder
    # the tokenizer of a delta is that of its base, which may not be here
    with contextlib.suppress(CheckpointError):
        place = tokenizer_place(folder)
    if is_gguf(place):
        said = _of_gguf(place)
        return {name: said[name] for name in ("tokenizer", "chat_template")}
    facts: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        facts["dtype"] = str(read_dtype(weight_files(folder))).removeprefix("torch.")
    if (file := place / "tokenizer.json").is_file():
        model = read_json(file).get("model", {})
        facts["tokenizer"] = f"{model.get('type')}, {len(model.get('vocab', ()))} pieces"
    config = place / "tokenizer_config.json"
    templates = (place / "chat_template.jinja").is_file() or (
        config.is_file() and bool(read_json(config).get("chat_template"))
    )
    return {**facts, "chat_template": templates, **_licence(folder)}


def _licence(folder: Path) -> dict[str, str]:
    """What the head of the model card says, as on Hugging Face."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        found = _LICENCE.match(file.read(_CARD))
    return {"license": found[1]} if found else {}


def _of_delta(delta: Delta, config: DecoderConfig) -> dict[str, Any]:
    exact, heads = exact_heads(config), config.layers * config.kv_heads
    facts = {"format": f"delta {delta.version} of {delta.base}"}
    if exact < heads:
        facts["exact_kv_heads"] = f"{exact} of {heads}"
    package = PACKAGES.get(delta.base)
    if package is None:
        return facts
    here = "here" if package.path.is_file() else f"not here yet: linspec get {delta.base}"
    notice = f"derived from {package.notice}; changed by linspec: attention and low-rank weights"
    return facts | {"base": here, "license": package.license, "notice": notice}


def _of_gguf(path: Path) -> dict[str, Any]:
    file = read_gguf(path)
    named = ("general.name", "general.license", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    said = {name.rpartition(".")[2]: file.keys[name] for name in named if name in file.keys}
    formats = quantized(file)
    plan = plan_gguf(path, keep_blocks=True)
    kept, others = quantized(file, plan.in_blocks), quantized(file, plan.as_floats)
    return {
        "format": "GGUF",
        **({"license": said["license"]} if "license" in said else {}),
        "name": said.get("name", ""),
        "tokenizer": " ".join(str(said[key]) for key in ("model", "pre") if key in said),
        "chat_template": "tokenizer.chat_template" in file.keys,
        "dtype": ", ".join(dict.fromkeys(info.kind.name for info in file.tensors.values())),
        # scripts read this key, whatever prose spells now
        **({"quantised": formats, "note": _how(kept, others)} if formats else {}),
    }


def _how(kept: Mapping[str, int], others: Mapping[str, int]) -> str:
    """What is computed with: blocks as they are in the file, or floats."""
    said = []
    if kept:
        said.append(f"kept in their blocks for generation: {_counts(kept)}")
    if others:
        said.append(f"dequantized as they are loaded, computed with as floats: {_counts(others)}")
    return "; ".join(said)


def _counts(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in formats.items())
