"""What a model on disk is, read from its configuration: `linspec info MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linspec.checkpoints.delta import Delta, exact_heads, read_delta
from linspec.checkpoints.gguf.model import quantized
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.hub import load_any_config, resolve
from linspec.checkpoints.packages import PACKAGES
from linspec.models.config import DecoderConfig
from linspec.models.step_plan import untold


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
    if type(config) is DecoderConfig and (names := untold(config)):
        facts["steps"] = f"layer by layer: the one-call step has no {', '.join(names)}"
    if is_gguf(path):
        facts |= _of_gguf(path)
    elif (delta := read_delta(path)) is not None and isinstance(config, DecoderConfig):
        facts |= _of_delta(delta, config)
    if package := next((p for p in PACKAGES.values() if p.path == path), None):
        facts |= {"license": package.license, "notice": package.notice}
    return facts


def _of_delta(delta: Delta, config: DecoderConfig) -> dict[str, Any]:
    exact, heads = exact_heads(config), config.layers * config.kv_heads
    facts = {
        "format": f"delta {delta.version} of {delta.base}",
        "exact_kv_heads": f"{exact} of {heads}",
    }
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
    how = "quantized tensors are dequantized as they are loaded and computed with as floats"
    return {
        "format": "GGUF",
        **({"license": said["license"]} if "license" in said else {}),
        "name": said.get("name", ""),
        "tokenizer": " ".join(str(said[key]) for key in ("model", "pre") if key in said),
        "chat_template": "tokenizer.chat_template" in file.keys,
        # scripts read this key, whatever prose spells now
        **({"quantised": formats, "note": how} if formats else {}),
    }
