"""What a model is known by: to its drafters, and to what was found out about its weights.

Drafts of another model's drafter are verified like any others, so `fingerprint` looks at the last weights
only, and a drafter need not be trained again for a change elsewhere. What is used unverified, such as heads
that a calibration found or answers that were kept, goes by `weight_fingerprint` too, for which every layer
counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from linspec.errors import ConfigError
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.linear import integer_bits
from linspec.models.native_linear import NativeLinear

# rows of a matrix that count, evenly spread: to unpack them all takes as long as to load the model
_ROWS = 4
# products that the inference form computes as one
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


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
        digest.update(_bytes_of(weight))
    found = digest.hexdigest()[:16]
    if model.is_inference:
        # its weights no longer change, and to unpack and hash them takes as long as to load them
        model.identity = found
    return found


def weight_fingerprint(model: Decoder) -> str | None:
    """A short hash of rotary positions, norms and some rows of every linear layer, beside `fingerprint`.

    The same in every dtype and place, before `to_inference` and after. None for weights that were turned into
    integers before this was kept: what they were is not known.
    """
    if model.weight_identity is not None:
        return model.weight_identity
    if any(integer_bits(each) for each in model.modules()):
        return None
    rope = model.config.rope
    turns = [float(np.float32(x)) for x in (rope.theta, rope.partial_rotary_factor)]
    digest = hashlib.sha256(json.dumps(turns).encode())
    for block in model.layers:
        for weight in _weights_of(block):
            digest.update(_bytes_of(weight))
    found = digest.hexdigest()[:16]
    if model.is_inference:
        model.weight_identity = found
    return found


def full_fingerprint(model: Decoder) -> str:
    """Both, for what is kept of a model and asked for again: answers, runs that are resumed."""
    return f"{fingerprint(model)}-{weight_fingerprint(model)}"


def source_fingerprint(model: nn.Module) -> str:
    """A short hash of some rows of every weight of a model of any kind, as it was loaded.

    For runs that are resumed: whoever trained on another model before would go on with this one.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        rows = weight if weight.ndim < 2 else weight[_spread(len(weight))]
        digest.update(name.encode())
        digest.update(_bytes_of(rows))
    return digest.hexdigest()[:16]


def _spread(rows: int) -> torch.Tensor:
    """Numbers of `_ROWS` rows of a matrix that has so many."""
    return torch.linspace(0, rows - 1, _ROWS).round().long()


def _weights_of(block: Block) -> Iterator[torch.Tensor]:
    """Norms, and some rows of every matrix of a block, in an order that both its forms have."""
    found: dict[str, list[nn.Module]] = {}
    for name, part in block.named_modules():
        if isinstance(getattr(part, "weight", None), torch.Tensor):
            place, _, own = name.rpartition(".")
            found.setdefault(f"{place}.{_FUSED.get(own, own)}", []).append(part)
    for name in sorted(found):
        yield from _some_rows(found[name])


def _some_rows(parts: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    """Rows of matrices, one below the other, that are evenly spread over all of them; vectors as they are."""
    sizes = [_outputs(part) for part in parts]
    if not all(sizes):
        yield from (part.weight for part in parts)  # type: ignore[misc]  # tensors, as was asked
        return
    total, first = sum(sizes), 0
    places = _spread(total)
    for part, size in zip(parts, sizes, strict=True):
        mine = places[(places >= first) & (places < first + size)] - first
        yield part.rows(mine) if isinstance(part, NativeLinear) else part.weight[mine]  # type: ignore[index]
        first += size


def _outputs(part: nn.Module) -> int:
    """Rows of its matrix; 0 for a vector."""
    if isinstance(part, NativeLinear):
        return part.out_features
    weight = part.weight
    assert isinstance(weight, torch.Tensor)
    return len(weight) if weight.ndim > 1 else 0


def _bytes_of(weight: torch.Tensor) -> bytes:
    rounded = weight.detach().to("cpu", torch.bfloat16).reshape(-1)
    return rounded.view(torch.uint8).numpy().tobytes()
