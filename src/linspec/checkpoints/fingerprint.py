"""What a drafter knows its target by."""

from __future__ import annotations

import hashlib
import json

import torch

from linspec.errors import ConfigError
from linspec.models.decoder import Decoder


def fingerprint(model: Decoder) -> str:
    """A short hash of the model's shape and last weights, the same in every dtype and place."""
    if model.identity is not None:
        return model.identity
    config = model.config
    shape = [config.vocab_size, config.width, config.layers, config.heads, config.kv_heads]
    mixers = [mixer.chosen() for mixer in config.mixers]
    digest = hashlib.sha256(json.dumps([shape, mixers]).encode())
    last = model.layers[-1]
    # blocks of FLASH are one unit, without an MLP
    closing = last.mlp.down if hasattr(last, "mlp") else last.mixer.o
    for part in (model.head, model.norm, closing):
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise ConfigError(
                "a prepared model keeps no plain weights to know it by; make its drafter first"
            )
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    found = digest.hexdigest()[:16]
    if model.is_inference:
        # its weights no longer change, and to unpack and hash them takes as long as to load them
        model.identity = found
    return found
