"""How close an encoder's sentence embeddings are to those of the encoder it was made from.

    report = compare_sources("minilm", "student", ["corpus.txt"])
    print(report.cosine, report.spearman)

Two figures. The cosine between both embeddings of the same text says how far they moved; Spearman's
rank correlation between all pairwise similarities says whether the same texts are still each other's
neighbours, which is what embeddings are used for (Sentence-BERT, Reimers & Gurevych 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.hub import load_encoder, load_tokenizer
from linspec.checkpoints.same_tokenizer import check_same_text
from linspec.errors import ConfigError, InputError, NotFinite
from linspec.models.bert import Bert
from linspec.models.linear import Quantizer, fused_linear
from linspec.quantization.codes import check_bits
from linspec.train.data import Sources, check_sources, train_and_heldout
from linspec.train.encoder import paragraphs
from linspec.utils.messages import now_called


@dataclass(frozen=True, slots=True)
class EmbeddingReport:
    """texts, and their mean tokens; cosine: mean and least; spearman: of all pairwise similarities."""

    texts: int
    tokens: float
    cosine: float
    least_cosine: float
    spearman: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def compare_sources(
    teacher: str | Path,
    student: str | Path,
    data: Sources = ("stdlib",),
    *,
    field: str = "text",
    count: int = 300,
    context: int = 256,
    quantize: int | None = None,
) -> EmbeddingReport:
    """Two encoders' directories on up to `count` paragraphs of what is held out of `data`.

    quantize: turn the student's weights into 8 or 4 bits first. See `compare_encoders`.
    """
    if quantize is not None:
        check_bits(quantize)
    data = check_sources(data)
    tokenizer = load_tokenizer(teacher)
    check_same_text(load_tokenizer(student), tokenizer, str(teacher))
    original, changed = load_encoder(teacher), load_encoder(student)
    changed.to_inference(fused_linear if quantize is None else Quantizer(quantize, {}))
    held_out = paragraphs(train_and_heldout(data, field)[1])[:count]
    return compare_encoders(original, changed, tokenizer, held_out, context=context)


def compare_encoders(
    teacher: Bert,
    student: Bert,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int = 256,
    rows: int = 16,
) -> EmbeddingReport:
    """Embed every text with both.

    Raises InputError for fewer than three texts, ConfigError for encoders of different widths.

    context: tokens after which a text is cut off. rows: texts of a batch.
    """
    if len(texts) < 3:
        raise InputError(f"{len(texts)} texts have too few pairs to compare; give three or more")
    widths = teacher.config.width, student.config.width
    if widths[0] != widths[1]:
        raise ConfigError(
            f"embeddings of {widths[0]} and of {widths[1]} numbers cannot be compared; give a student "
            "that was made of this teacher"
        )
    ids = [tokenizer(text, truncation=True, max_length=context)["input_ids"] for text in texts]
    ours, theirs = (embed_all(model, ids, rows) for model in (student, teacher))
    cosines = (ours * theirs).sum(-1)
    return EmbeddingReport(
        texts=len(texts),
        tokens=sum(map(len, ids)) / len(ids),
        cosine=float(cosines.mean()),
        least_cosine=float(cosines.min()),
        spearman=spearman(_similarities(ours), _similarities(theirs)),
    )


@torch.inference_mode()
def embed_all(model: Bert, ids: Sequence[Sequence[int]], rows: int) -> torch.Tensor:
    """Embeddings [len(ids), D] in their order; batches hold texts of similar length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.empty(len(ids), model.config.width)
    for start in range(0, len(order), rows):
        picked = order[start : start + rows]
        batch = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids[i]) for i in picked], batch_first=True, padding_value=-1
        )
        found[torch.tensor(picked)] = model.embed_text(batch.clamp_min(0), batch >= 0).float()
    if not bool(torch.isfinite(found).all()):
        raise NotFinite("the embeddings")
    return found


def _similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs, each once."""
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[first, second]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two series [N], equal values sharing their mean rank; 0 for a constant one."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    centred = ranks - ranks.mean(1, keepdim=True)
    size = torch.linalg.vector_norm(centred, dim=1).prod()
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else 0.0


def _ranks(x: torch.Tensor) -> torch.Tensor:
    _, places, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


if __name__ == "__main__":
    now_called("linspec eval embeddings")
