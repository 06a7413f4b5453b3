"""A served encoder: texts to vectors, one call after the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_encoder
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.engine.encoding import TextEncoder
from linspec.errors import ContextOverflow
from linspec.evaluate.embeddings import embed_all

_ROWS = 16


class Embedder:
    """Sentence embeddings of a BERT directory; any thread may ask."""

    def __init__(self, source: str | Path, *, longest: int | None = None) -> None:
        self.model = load_encoder(source).to_inference()
        self.encoder = TextEncoder(load_text_tokenizer(source), self.model.config.vocab_size)
        limit = self.model.config.max_positions
        self.longest = limit if longest is None else min(limit, longest)
        self._turn = threading.Lock()

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.model.config.width

    def tokens(self, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of each text; raises ContextOverflow for one that is too long."""
        found = [self.encoder.encode(text) for text in texts]
        for at, ids in enumerate(found):
            if len(ids) > self.longest:
                raise ContextOverflow(
                    f"input {at} has {len(ids)} tokens, this model takes {self.longest}; shorten it"
                )
        return found

    def embed(self, ids: Sequence[Sequence[int]]) -> Any:
        """Vectors [len(ids), width] of unit length."""
        with self._turn:
            return embed_all(self.model, ids, _ROWS)
