"""Draft what the grammar of a request forces: names of properties, brackets, the rest of a word."""

from __future__ import annotations

from collections.abc import Sequence

from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import DRAFTERS, ChainDrafter


@DRAFTERS.register(
    "grammar",
    summary="drafts what the grammar of a request leaves no choice about; joins others with +",
    paper="Zheng et al. 2024 (SGLang, jump-forward decoding), arXiv 2312.07104",
    needs="nothing; drafts for requests with a grammar",
)
class ForcedTokens(ChainDrafter):
    """The text is certain, its tokens are not: the model may spell it otherwise, so they are verified."""

    confident = True
    model_free = True

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        return [
            list(sequence.sampler.forced()[:length])
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
