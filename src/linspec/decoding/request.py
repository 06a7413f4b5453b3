"""What a caller asks for, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from linspec.decoding.sampling import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt of token ids with its sampling parameters; `params.n` sequences answer it.

    Attributes:
        prompt: T token ids.
        params: what the request asks of generation.
        embeddings: [T, D], used instead of the embeddings of the tokens, for input that is no token: an
            image, speech, a trained prompt. The tokens then matter only for penalties and n-gram drafts.
        priority: requests of a higher number run first, and take the places of those of lower ones.
        tenant: whom the request is for. Nothing that is kept of one tenant's prompts serves another tenant.
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    embeddings: torch.Tensor | None = None
    priority: int = 0
    tenant: str = ""
