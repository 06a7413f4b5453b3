"""A model's weights as 8- or 4-bit integers, with what that costs in quality.

    report = quantize("embedded-softmax", "small", bits=4)
    print(report.increase)          # of the bits per byte, as a share

All linear layers and the output layer are quantized; norms, convolutions and scalars stay float32,
embeddings become bfloat16. Activations are quantized to 8 bits as they come, a scale for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.checkpoints.hub import check_tokenizer, load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_plain, quantize_model
from linspec.checkpoints.quantized import save_quantized
from linspec.evaluate.drafters import find_companions, save_companion
from linspec.evaluate.perplexity import evaluate, held_out_documents
from linspec.evaluate.windows import limited
from linspec.models.decoder import Decoder
from linspec.quantization.calibration import input_statistics
from linspec.quantization.codes import check_bits
from linspec.train.data import Sources, check_sources, end_of_text, load_documents, tokenize
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantization did to the quality and the size of a model.

    Attributes:
        bits: of each weight.
        bits_per_byte_before: on held-out text.
        bits_per_byte_after: on the same text.
        increase: of the bits per byte, as a share; 0.01 is one per cent.
        megabytes_before: of weights, 10⁶ bytes each.
        megabytes_after: of weights.
        drafters: for each folder, its kind, and how often the likeliest guess of each head was right, before
            and after.
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
    data: Sources = ("stdlib",),
    field: str = "text",
    calibration_bytes: int = 200_000,
    limit_bytes: int = 100_000,
    overwrite: bool = False,
) -> Quantized:
    """Write a model and its drafters with quantized weights; returns sizes and quality.

    Args:
        source: a model directory or the name of a model.
        out: a directory that is new or empty.
        bits: 8 or 4 bits for each weight.
        data: text; its training part calibrates 4-bit weights, its held-out part measures the quality.
        field: the entry of a `.jsonl` line that holds the text.
        calibration_bytes: bytes of text that calibrate; 0 does without.
        limit_bytes: bytes of text that measure the quality.
        overwrite: replace a model that this function wrote to `out` before.

    Raises:
        ConfigError: the model is quantized already, `bits` is neither 8 nor 4, or `out` may not be
            written.
        CheckpointError: a file of the model is missing or damaged, or the disk refuses.
        InputError: the data cannot be read.
        NotFinite: a weight is NaN or infinite.
    """
    check_bits(bits)
    data = check_sources(data)
    check_size("calibration_bytes", calibration_bytes, least=0)
    check_size("limit_bytes", limit_bytes)
    folder = resolve(source)
    place = Place(as_path(out), "quantize", inputs=(folder,), holders=data, overwrite=overwrite)
    with place.held():
        model, tokenizer = load_plain(folder), load_tokenizer(folder)
        check_tokenizer(tokenizer, model.config)
        # before the long work: whatever is wrong with the drafters or the data
        companions = find_companions(folder, model)
        documents = held_out_documents(data, field)
        calibrating = bits == 4 and calibration_bytes > 0
        texts = load_documents(data, "train", field) if calibrating else []
        score = partial(evaluate, model, tokenizer, documents, limit_bytes=limit_bytes)
        before = score(label="quality before").bits_per_byte
        eos = end_of_text(tokenizer, model.config)
        stream = tokenize(limited(documents, limit_bytes), tokenizer, eos)
        for companion in companions:
            companion.measure(model, stream)
        size = sum(tensor.nbytes for tensor in model.parameters())
        quantize_model(model, bits, _calibration(model, tokenizer, texts, calibration_bytes))
        after = score(label="quality after").bits_per_byte
        now = sum(tensor.nbytes for tensor in model.state_dict().values())
        facts = _facts(before, after, size, now)
        with save_quantized(model, tokenizer, place, bits, facts) as aside:
            for companion in companions:
                save_companion(companion, model, aside, bits, stream)
    drafters = {companion.folder.name: companion.to_json() for companion in companions}
    return Quantized(bits=bits, **facts, drafters=drafters)


def _facts(before: float, after: float, bytes_before: int, bytes_after: int) -> dict[str, float]:
    """Bits per byte of text and sizes of the weights, as `Quantized` has them."""
    return {
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "increase": after / before - 1,
        "megabytes_before": bytes_before / 1e6,
        "megabytes_after": bytes_after / 1e6,
    }


def _calibration(
    model: Decoder, tokenizer: Any, documents: Sequence[str], limit_bytes: int
) -> dict[nn.Module, torch.Tensor]:
    """Statistics of the inputs of linear layers on `documents`; none without any."""
    if not documents:
        return {}
    with input_statistics(model) as calibration:
        evaluate(model, tokenizer, documents, limit_bytes=limit_bytes, label="calibration")
    return calibration
