"""How well a masked-diffusion model predicts text: an upper bound of its bits per byte, by random masks.

    print(masked_bound(load_diffusion("llada"), tokenizer, documents, samples=8))

Such a model has no probability of a text in closed form. LLaDA's estimate (Nie et al. 2025, arXiv 2502.09992)
bounds the negative logarithm from above: of L tokens, k are masked, any k from 1 to L equally often, and
the cross entropy of the masked ones counts L / k times. Its mean over masks is the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError, NotFinite
from linspec.evaluate.windows import Window, cut, pick_context
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

SAMPLES = 4
# tokens of one batch, and logits that exist at once: what bounds the memory
_BATCH_TOKENS = 8192
_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class Bound:
    """What text costs a masked-diffusion model at most.

    bits_per_byte and perplexity (per token) are upper bounds, to be compared with other models' values from
    one side only. standard_error: of bits_per_byte, by the choice of masks alone. tokens and bytes: how many
    were predicted. samples: masks drawn for each window.
    """

    bits_per_byte: float
    standard_error: float
    perplexity: float
    tokens: int
    bytes: int
    samples: int
    seed: int
    is_upper_bound: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.inference_mode()
def masked_bound(
    model: MaskedDiffusion,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    context: int | None = None,
    limit_bytes: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    bf16: bool = False,
    rows: int | None = None,
) -> Bound:
    """The bound of `model` on `documents`.

    Every token of a document is predicted once, from half a window before it, as `perplexity.evaluate` does
    for other models: what a window was given is never masked. samples: masks drawn for each window, 2 or
    more. rows: windows of a batch; the result does not depend on it. Raises what `evaluate` raises.
    """
    check_size("samples", samples, least=2)
    check_size("seed", seed, least=0)
    # a window is read with all its targets
    context = pick_context(model.config, context, least=2)
    stride = max(1, context // 2)
    text = cut(
        tokenizer,
        model.config,
        documents,
        context=context - 1,
        stride=stride,
        limit_bytes=limit_bytes,
    )
    generator = torch.Generator().manual_seed(seed)
    windows = text.windows
    if model.config.block_length is not None:
        windows = [part for each in windows for part in _blocks(each, model.config.block_length)]
    masked = [(each, _mask(each, generator)) for each in windows for _ in range(samples)]
    rows = rows or max(1, min(_BATCH_TOKENS, _LOGITS // model.config.vocab_size) // context)
    nats = _nats(model, masked, rows, bf16).view(-1, samples)
    total, variance = float(nats.mean(1).sum()), float((nats.var(1) / samples).sum())
    bits = 1 / math.log(2) / text.bytes
    per_token = total / text.tokens
    return Bound(
        bits_per_byte=bits * total,
        standard_error=bits * math.sqrt(variance),
        perplexity=math.exp(per_token) if per_token < 700 else math.inf,
        tokens=text.tokens,
        bytes=text.bytes,
        samples=samples,
        seed=seed,
    )


def _blocks(window: Window, length: int) -> Iterator[Window]:
    """The scored tokens of a window block by block, as a block-diffusion model fills them."""
    at = len(window.ids) - window.scored
    while at < len(window.ids):
        end = min((at // length + 1) * length, len(window.ids))
        yield Window(window.ids[:end], end - at)
        at = end


def _mask(window: Window, generator: torch.Generator) -> list[int]:
    """Which places of a window are masked: as many as is drawn, among those that are scored."""
    count = int(torch.randint(1, window.scored + 1, (), generator=generator))
    order = torch.randperm(window.scored, generator=generator)[:count]
    return (len(window.ids) - window.scored + order).tolist()


def _nats(
    model: MaskedDiffusion, masked: Sequence[tuple[Window, list[int]]], rows: int, bf16: bool
) -> torch.Tensor:
    """[N] of each masked window: the weighted cross entropy of what is masked."""
    found = list[torch.Tensor]()
    kind = model.device.type
    with Progress("eval", len(masked)) as progress:
        for begin in range(0, len(masked), rows):
            batch = masked[begin : begin + rows]
            with torch.autocast(kind, torch.bfloat16, enabled=bf16):
                found += _batch_nats(model, batch)
            if not all(map(torch.isfinite, found[begin:])):
                raise NotFinite("the losses of the held-out text")
            progress.update(begin + len(batch), f"{len(batch)} windows at a time")
    return torch.stack(found)


def _batch_nats(
    model: MaskedDiffusion, batch: Sequence[tuple[Window, list[int]]]
) -> list[torch.Tensor]:
    longest = max(len(window.ids) for window, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (window, places) in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        ids[row, places] = model.config.mask_id
        real[row, : len(window.ids)] = True
    padded = None if real.all() else real.to(model.device)
    logits = model.predicted(ids.to(model.device), padded)
    found = []
    for row, (window, places) in enumerate(batch):
        wanted = torch.tensor([window.ids[place] for place in places], device=model.device)
        losses = F.cross_entropy(logits[row, places].float(), wanted, reduction="none")
        found.append(losses.double().sum().cpu() * (window.scored / len(places)))
    return found


def check_samples(samples: int | None, name: str) -> None:
    """Raise ConfigError where masks were asked for, of a model that has none."""
    if samples is not None:
        raise ConfigError(
            f"samples are masks of a masked-diffusion model; {name} predicts the next token exactly. Leave "
            "them out"
        )


def check_no_cache(kv: str) -> None:
    """Raise ConfigError for a kind of cache: every window is read at once."""
    if kv != "auto":
        raise ConfigError(
            f"the bound of a masked-diffusion model is computed without a cache; leave out {kv!r}"
        )
