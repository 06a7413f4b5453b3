"""Bits per byte and perplexity of a model on documents.

    model, tokenizer = load_model("embedded-aug"), load_tokenizer("embedded-aug")
    score = evaluate(model, tokenizer, held_out_documents(["stdlib"]))
    print(score.bits_per_byte)

Softmax and linear models are measured by the same protocol, so that their figures compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.checkpoints.attention import attending
from linspec.checkpoints.dtype import cache_kind
from linspec.checkpoints.hub import (
    check_tokenizer,
    load_any_config,
    load_decoder,
    load_tokenizer,
)
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, NotFinite
from linspec.evaluate.masked_bound import (
    SAMPLES,
    Bound,
    check_no_cache,
    check_samples,
    masked_bound,
)
from linspec.evaluate.windows import Window, cut, pick_context
from linspec.models.decoder import Decoder
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import ModelType, of_config
from linspec.models.rope_scaling import with_rope_scaling
from linspec.train.data import Sources, Split, check_sources, load_documents
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

# Tokens of one batch of windows, and logits that exist at once: what bounds the memory.
_BATCH_TOKENS = 8192
_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts text.

    bits_per_byte: bits that all tokens cost, per byte of UTF-8 text; it compares over tokenizers.
    perplexity: per token. tokens and bytes: how many were predicted.
    """

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


# of the models whose perplexity is measured here
MEASURE = "linspec eval perplexity"


def held_out_documents(data: Sources, field: str = "text") -> list[str]:
    """What `linspec eval` measures on: held-out files of 'stdlib', all of other sources."""
    documents: list[str] = []
    for source in check_sources(data):
        split: Split = "heldout" if str(source) == "stdlib" else "all"
        documents += load_documents([source], split, field)
    return documents


def evaluate_source(
    model: str | Path,
    data: Sources = ("stdlib",),
    *,
    field: str = "text",
    limit_bytes: int | None = None,
    context: int | None = None,
    bf16: bool = False,
    samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    quantize: int | None = None,
    kv: str = "auto",
    attention: str | None = None,
    rope_scaling: str | None = None,
) -> Score | Bound:
    """The score of a model directory on `data`; see `evaluate`, `load_for`, `load_documents`.

    Of a masked-diffusion model it is a bound, by `samples` masks of each window; see `masked_bound`. The
    attention and rope_scaling are as of LLM. Raises ConfigError for a model that predicts no text of its own.
    """
    data = check_sources(data)
    kind = _kind_of(model)
    if kind.model is MaskedDiffusion:
        check_no_cache(kv)
    else:
        check_samples(samples, str(model))
    loaded = load_for(model, quantize, read=load_decoder, device=device)
    decoder = attending(with_rope_scaling(loaded, rope_scaling), attention, model)
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer, decoder.config)
    documents = held_out_documents(data, field)
    sizes: dict[str, Any] = {"context": context, "limit_bytes": limit_bytes, "bf16": bf16}
    if isinstance(decoder, MaskedDiffusion):
        draws = SAMPLES if samples is None else samples
        return masked_bound(decoder, tokenizer, documents, samples=draws, seed=seed, **sizes)
    # the full form in bfloat16 has no cache
    kv = "float" if bf16 and kv == "auto" else cache_kind(kv, decoder)
    return evaluate(decoder, tokenizer, documents, kv=kv, **sizes)


def _kind_of(model: str | Path) -> ModelType:
    kind = of_config(load_any_config(model))
    if kind.measure != MEASURE:
        way = f"`{kind.measure}` measures it" if kind.measure else "ask it by `linspec generate`"
        raise ConfigError(
            f"{model} is a model of type {kind.name!r}, which has no perplexity; {way}"
        )
    return kind


@torch.inference_mode()
def evaluate(
    model: Decoder,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    limit_bytes: int | None = None,
    rows: int | None = None,
    bf16: bool = False,
    kv: str = "float",
    label: str = "eval",
) -> Score:
    """The score of `model` on `documents`.

    Every token of a document is predicted once. A document is cut into windows of `context` tokens
    (default: the model's `max_positions`) that start `stride` apart (default: half a window), so
    that a token sees at least context - stride tokens before it where the document has them; the
    first token is predicted from the end-of-text token. limit_bytes takes documents in order and
    cuts the last one between characters. rows: windows of a batch. bf16: compute in bfloat16,
    float32 if False. kv: 'int8' measures what a state with coded rows computes, window by window in
    the step form. label: what progress is called. Raises ConfigError for impossible sizes and
    InputError when there is nothing to predict.
    """
    if isinstance(model, MaskedDiffusion):
        raise ConfigError(
            "a masked-diffusion model predicts no next token; `masked_bound` bounds its bits per byte"
        )
    context = pick_context(model.config, context)
    stride = max(1, context // 2) if stride is None else stride
    check_size("stride", stride)
    if stride > context:
        raise ConfigError(f"stride must be from 1 to the context of {context}, got {stride}")
    text = cut(
        tokenizer,
        model.config,
        documents,
        context=context,
        stride=stride,
        limit_bytes=limit_bytes,
    )
    rows = rows or max(1, _BATCH_TOKENS // context)
    nats = _nats(model, text.windows, rows, bf16, kv, label)
    per_token = nats / text.tokens
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    return Score(nats / math.log(2) / text.bytes, perplexity, text.tokens, text.bytes)


def _nats(
    model: Decoder, windows: Sequence[Window], rows: int, bf16: bool, kv: str, label: str
) -> float:
    """Negative log-likelihood of all scored tokens."""
    total, done, tokens = 0.0, 0, sum(window.scored for window in windows)
    device = model.device
    with Progress(label, tokens) as progress:
        for begin in range(0, len(windows), rows):
            batch = windows[begin : begin + rows]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                total += _batch_nats(model, batch, device, kv)
            done += sum(window.scored for window in batch)
            if not math.isfinite(total):
                raise NotFinite("the losses of the held-out text")
            progress.update(done, f"{total / done / math.log(2):.3f} bits per token")
    return total


def _batch_nats(model: Decoder, batch: Sequence[Window], device: torch.device, kv: str) -> float:
    longest = max(len(window.ids) for window in batch) - 1
    # causal: what stands behind a window cannot change its logits
    ids = torch.tensor(
        [[*w.ids[:-1], *[0] * (longest + 1 - len(w.ids))] for w in batch], device=device
    )
    hidden = model.hidden(ids) if kv == "float" else _step_hidden(model, ids, kv)
    picked = [hidden[i, len(w.ids) - 1 - w.scored : len(w.ids) - 1] for i, w in enumerate(batch)]
    states = torch.cat(picked)
    targets = torch.tensor([t for w in batch for t in w.ids[-w.scored :]], device=device)
    size = max(1, _LOGITS // model.config.vocab_size)
    nats = 0.0
    for part, wanted in zip(states.split(size), targets.split(size), strict=True):
        losses = F.cross_entropy(model.head(part).float(), wanted, reduction="none")
        nats += float(losses.double().sum())
    return nats


def _step_hidden(model: Decoder, ids: torch.Tensor, kv: str) -> torch.Tensor:
    """As `model.hidden`, each row as one step on a state of its own."""
    state = model.new_state(1, kv)
    found = []
    for row in ids.tolist():
        found.append(model.step([StepInput(0, row)], state).hidden)
        state.drop(0)
    return torch.stack(found)
