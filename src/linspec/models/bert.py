"""BERT (Devlin et al. 2019, arXiv 1810.04805) and its heads, with any bidirectional mixer.

    model = load_encoder("path/to/bert")
    vectors = model.embed_text(ids, mask)

One encoder serves sentence embeddings, classification and masked tokens; which heads there are is
what the checkpoint brought.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import ConfigError
from linspec.mixers.norms import make_norm
from linspec.mixers.projections import LinearFactory
from linspec.models.block import ACTIVATIONS
from linspec.models.config import EncoderConfig
from linspec.models.encoder import Encoder
from linspec.models.linear import fused_linear


class MaskedLM(nn.Module):
    """Hidden states to logits over the vocabulary; the output matrix is the embedding."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config)
        self.out = nn.Linear(config.width, config.vocab_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.activation(self.dense(hidden))))


class Bert(nn.Module):
    """An encoder and the heads that its checkpoint has."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if config.head in ("pooler", "classifier"):
            self.pooler = nn.Linear(config.width, config.width)
        if config.head == "classifier":
            self.classifier = nn.Linear(config.width, len(config.labels))
        if config.head == "masked-lm":
            self.masked_lm = MaskedLM(config)
        self.tie()

    def tie(self) -> None:
        """Make parameters that are one in the checkpoint one in memory."""
        if self.config.head == "masked-lm":
            self.masked_lm.out.weight = self.encoder.embed.weight

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D]; see `Encoder.forward` for the arguments and what is raised."""
        return self.encoder(ids, mask, types)

    def embed_text(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sentence embeddings [B, D]: the mean over real tokens, scaled to length 1.

        Sentence-BERT, Reimers & Gurevych 2019, arXiv 1908.10084.
        """
        return self.pool(self(ids, mask, types), torch.ones_like(ids) if mask is None else mask)

    @staticmethod
    def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sentence embeddings [B, D] of hidden states [B, T, D] whose real tokens `mask` [B, T] names."""
        weight = mask.to(hidden.dtype)[..., None]
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def pooled(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """BERT's own summary [B, D] of a row, from its first token; needs a pooler."""
        self._needs("pooler", "classifier")
        hidden = self(ids, mask, types)
        first = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if mask is not None:
            first = mask.int().argmax(1)
        rows = torch.arange(len(ids), device=ids.device)
        return self.pooler(hidden[rows, first]).tanh()

    def classify(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, labels]; raises ConfigError for a checkpoint without a classifier."""
        self._needs("classifier")
        return self.classifier(self.pooled(ids, mask, types))

    def fill(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, vocab] of what stands at each place; needs a masked-LM head."""
        self._needs("masked-lm")
        return self.masked_lm(self(ids, mask, types))

    def _needs(self, *heads: str) -> None:
        if self.config.head not in heads:
            raise ConfigError(
                f"this checkpoint has head {self.config.head!r}, not {' or '.join(heads)}; load one that "
                "was trained for the task, or use embed_text, which needs none"
            )

    def to_inference(self, linear_factory: LinearFactory = fused_linear) -> Bert:
        """Turn this model into its inference form, in place; returns it.

        `linear_factory` makes the layers of the encoder, by default in the precision of the weights.
        """
        self.eval().requires_grad_(False)
        self.encoder.to_inference(linear_factory)
        return self
