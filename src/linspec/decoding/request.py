"""What a caller asks for, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from linspec.decoding.sampling import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt of token ids with its sampling parameters; `params.n` sequences answer it.

    embeddings: [T, D] instead of the embeddings of the T tokens of the prompt, for what is no token: an
    image, speech, a trained prompt. The tokens then stand for it in penalties and n-gram drafts alone.
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    embeddings: torch.Tensor | None = None
