"""The models of the golden file: their description, and directories made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from .weights import Shape, weights

VOCAB = 61
_WIDTH, _HEAD, _MLP, _GROUP, _TAPS = 32, 8, 48, 8, 5
_HEADS = {"width": _WIDTH, "vocab_size": VOCAB, "heads": 3, "blocks": 1, "hidden": 0}
_HEADS |= {"shared_head": True}
_ACCURACIES = [[0.6, 0.2, 0.1], [0.4, 0.15, 0.05], [0.3, 0.1]]

# one model: its kind, its configuration and the shapes of its tensors as they lie on disk
Model = dict[str, Any]
NO_ARRANGEMENT = ("softmax", "window", "global", "linformer", "by-head")
# small enough that something is left out
_OWN = {
    "pages": {"budget": 4, "judge": "bounds"},
    "h2o": {"budget": 4},
    "snapkv": {"budget": 4},
    "delta": {"threshold": 0.7},
    "tidal": {"budget": 4},
    "shadow": {"rank": 6, "budget": 4, "chunk": 4},
}


def write_model(model: Model, name: str, folder: Path, noise: str = "") -> Path:
    """A directory as version 0.1.0 writes it."""
    folder.mkdir(parents=True)
    entry = {"model_type": "linspec", model["kind"]: model["config"]}
    (folder / "config.json").write_text(json.dumps(entry))
    save_file(weights(model["tensors"], name, noise), folder / "model.safetensors")
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def write_heads(model: Model, name: str, folder: Path) -> Path:
    """Medusa heads for that model: each about repeats the target's own guess."""
    folder.mkdir(parents=True)
    data = {"kind": "medusa", **_HEADS, "target": model["fingerprint"], "accuracies": _ACCURACIES}
    (folder / "drafter.json").write_text(json.dumps(data))
    count, width = _HEADS["heads"], _HEADS["width"]
    shapes: dict[str, Shape] = {
        "blocks.0.weight": (count, width, width),
        "blocks.0.bias": (count, width),
    }
    tensors = weights(shapes, f"{name}/medusa")
    save_file({key: 0.5 * each for key, each in tensors.items()}, folder / "drafter.safetensors")
    return folder


def freeze() -> dict[str, Model]:
    """Every model of the catalogue, described by the present code."""
    from linspec.mixers import MIXERS
    from linspec.models.flash_config import VARIANTS

    found: dict[str, Model] = {}
    names = [n for n in MIXERS.names() if not n.startswith(("test", "study-"))]
    for name in names:
        found[name] = _decoder(name)
    for name in (n for n in names if n not in NO_ARRANGEMENT and not MIXERS[n].stands_in):
        found[f"{name}:softmax"] = _decoder(name, kernel="softmax")
    found["relu:relu2"] = _decoder("relu", kernel="relu2")
    found["gpt2"] = _decoder("softmax", positions="learned", norm="layer", activation="gelu")
    found["qwen3"] = _decoder("softmax", qk_norm=True, tied_embeddings=False)
    for variant in VARIANTS:
        found[f"flash-{variant}"] = _flash(variant)
    for name in ("softmax", "aug", "hedgehog"):
        found[f"t5-{name}"] = _t5(name)
    for name in ("softmax", "aug", "linformer", "yoso"):
        found[f"bert-{name}"] = _bert(name)
    return found


def _mixer(name: str, kernel: str = "own", keep: int = 3) -> Any:
    from linspec.mixers.config import MixerConfig

    return MixerConfig(
        name=name,
        group=_GROUP,
        kernel=kernel,
        taps=_TAPS if name == "aug" else 0,
        window=6 if name == "window" else 0,
        **({"features": 2, "keep": keep} if name == "linformer" else {}),
        **({"sinks": 3} if name in ("streaming", "by-head") else {}),
        **({"exact_heads": (0,)} if name == "by-head" else {}),
        **({"options": _OWN[name]} if name in _OWN else {}),
    )


def _stack(**switches: Any) -> dict[str, Any]:
    shape = {"vocab_size": VOCAB, "width": _WIDTH, "layers": 2, "heads": 4, "kv_heads": 2}
    shape |= {"head_width": _HEAD, "mlp_width": _MLP, "max_positions": 512}
    return shape | switches


def _decoder(name: str, kernel: str = "own", **switches: Any) -> Model:
    from linspec.models.config import DecoderConfig

    first = _mixer(name, kernel)
    second = first if name == "global" else replace(first, span=2)
    return _described(DecoderConfig(mixers=(first, second), **_stack(**switches)))


def _flash(variant: str) -> Model:
    from linspec.mixers.config import RelativeConfig
    from linspec.models.flash_config import FlashConfig

    config = FlashConfig(
        **_stack(kv_heads=1, heads=1, head_width=16),
        variant=variant,
        group=_GROUP,
        taps=_TAPS if variant == "aug" else 0,
        turned=4,
        relative=RelativeConfig(buckets=8, max_distance=20),
    )
    return _described(config)


def _t5(name: str) -> Model:
    from linspec.mixers.config import RelativeConfig
    from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig

    shape = _stack(kv_heads=4, mixers=(_mixer(name),) * 2, positions="relative", gated_mlp=False)
    shape |= {"relative": RelativeConfig(buckets=8, max_distance=20), "scaled_scores": False}
    shape |= {"activation": "relu", "family": "t5"}
    sides = EncoderConfig(**shape, post_norm=False), DecoderConfig(**shape)
    return _described(Seq2SeqConfig(encoder=sides[0], decoder=sides[1]))


def _bert(name: str) -> Model:
    from linspec.models.config import EncoderConfig

    mixers = (_mixer(name, keep=0),) * 2
    shape = _stack(kv_heads=4, mixers=mixers, positions="learned", norm="layer")
    shape |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False}
    return _described(
        EncoderConfig(**shape, activation="gelu", family="bert", head="masked-lm", token_types=2)
    )


def _described(config: Any) -> Model:
    from linspec.checkpoints.matching import own_tensors
    from linspec.models.model_types import of_config

    kind = of_config(config)
    built = kind.model(config)
    shapes = {name: list(tensor.shape) for name, tensor in own_tensors(built).items()}
    return {"kind": kind.name, "config": config.to_dict(), "tensors": shapes}


def fingerprints(models: dict[str, Model], folder: Callable[[str], Path]) -> None:
    """Enter what heads know each decoder by."""
    from linspec.checkpoints.fingerprint import fingerprint
    from linspec.checkpoints.hub import load_model

    for name, model in models.items():
        # units of a FLASH model have no MLP to be known by: no heads are made for them
        if model["kind"] == "decoder":
            model["fingerprint"] = fingerprint(load_model(folder(name)))
