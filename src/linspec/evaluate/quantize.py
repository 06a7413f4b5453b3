"""A model's weights as 8- or 4-bit integers, with what that costs in quality.

    report = quantize("embedded-softmax", "small", bits=4)
    print(report.increase)          # of the bits per byte, as a share

All linear layers and the output layer are quantised; norms, convolutions and scalars stay float32,
embeddings become bfloat16. Activations are quantised to 8 bits as they come, a scale for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.compress.load import load_plain, quantize_model
from linspec.compress.moments import input_moments
from linspec.evaluate.drafters import find_companions, save_companion
from linspec.evaluate.perplexity import evaluate, held_out_documents, limited
from linspec.kernels.linear import check_bits
from linspec.models.hub import check_tokenizer, load_tokenizer, resolve
from linspec.models.quantized import save_quantized
from linspec.train.data import end_of_text, load_documents, tokenize


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantisation did: bits per byte on held-out text before and after, megabytes of weights.

    increase: of the bits per byte, 0.01 being one per cent. drafters: by folder, how often the
    likeliest guess of each head was right on that text, before and after.
    """

    bits: int
    bits_per_byte_before: float
    bits_per_byte_after: float
    increase: float
    megabytes_before: float
    megabytes_after: float
    drafters: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    bits: int = 8,
    data: Sequence[str | Path] = ("stdlib",),
    field: str = "text",
    calibration_bytes: int = 200_000,
    limit_bytes: int = 100_000,
) -> Quantized:
    """Write the model in `source` to `out` with weights of `bits` bits, its drafters too.

    data: text whose training part calibrates 4-bit weights (`calibration_bytes` of it; 0 leaves that
    out) and whose held-out part measures the quality (`limit_bytes` of it). Raises ConfigError when
    the model is quantised already or `bits` is neither 8 nor 4, and CheckpointError for bad files.
    """
    check_bits(bits)
    folder = resolve(source)
    model, tokenizer = load_plain(folder), load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config)
    documents = held_out_documents(data, field)
    before = evaluate(model, tokenizer, documents, limit_bytes=limit_bytes).bits_per_byte
    stream = tokenize(
        limited(documents, limit_bytes), tokenizer, end_of_text(tokenizer, model.config)
    )
    companions = find_companions(folder, model, stream)
    size = sum(tensor.nbytes for tensor in model.parameters())
    moments: Mapping[nn.Module, torch.Tensor] = {}
    if bits == 4 and calibration_bytes:
        text = load_documents(data, "train", field)
        with input_moments(model) as moments:
            evaluate(model, tokenizer, text, limit_bytes=calibration_bytes)
    quantize_model(model, bits, moments)
    after = evaluate(model, tokenizer, documents, limit_bytes=limit_bytes).bits_per_byte
    tensors = model.state_dict().values()
    facts = {
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "increase": after / before - 1,
        "megabytes_before": size / 1e6,
        "megabytes_after": sum(tensor.nbytes for tensor in tensors) / 1e6,
    }
    with save_quantized(model, tokenizer, Path(out), bits, facts) as aside:
        for companion in companions:
            save_companion(companion, model, aside, bits, stream)
    drafters = {companion.folder.name: companion.to_json() for companion in companions}
    return Quantized(bits=bits, **facts, drafters=drafters)
