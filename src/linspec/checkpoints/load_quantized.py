"""Models with quantized weights: as they lie on disk, or quantized as they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.checkpoints.fingerprint import fingerprint, weight_fingerprint
from linspec.checkpoints.hub import load_model
from linspec.checkpoints.tensors import check_finite
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.quantization.codes import check_bits


def load_plain(source: str | Path, read: Callable[..., Decoder] = load_model) -> Decoder:
    """The model in `source`, as `read` loads it; raises ConfigError if it is quantized already."""
    model = read(source)
    if model.is_inference:
        raise ConfigError(
            f"{source} is quantized already; quantize the model that it was made from"
        )
    # all weights are read anyway: integers would hide a damaged one for good
    for name, tensor in model.state_dict().items():
        check_finite(name, tensor, source)
    return model


def load_for(
    source: str | Path,
    bits: int | None,
    *,
    read: Callable[..., Decoder] = load_model,
    **options: Any,
) -> Decoder:
    """The model in `source`, with weights of `bits` bits; None leaves them as they are stored.

    read: loads it; `load_decoder` for one that need not predict the next token.
    No text is looked at: `quantize` makes better 4-bit weights. On another device than the CPU such a model
    computes in float32. Raises what `quantize` raises.
    """
    if bits is None:
        return read(source, keep_blocks=True, **options)
    check_bits(bits)
    made = quantize_model(load_plain(source, read), bits, {})
    if torch.device(options.get("device", "cpu")).type != "cpu":
        made.to(options["device"])
        # what was computed of the weights lies with them, and what runs a step is another kernel
        made.finalize_weights()
    return made


def quantize_model(
    model: Decoder, bits: int, calibration: Mapping[nn.Module, torch.Tensor]
) -> Decoder:
    """Turn a plain model into its quantized inference form, in place; returns it."""
    model.identity, model.weight_identity = fingerprint(model), weight_fingerprint(model)
    model.to_inference(Quantizer(bits, calibration))
    tied = model.embed.weight
    model.embed.weight = nn.Parameter(tied.detach().to(torch.bfloat16), requires_grad=False)
    model.finalize_weights()
    return model
