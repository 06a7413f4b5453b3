"""When a sequence has ended: with its last block, or with the block that holds an end."""

from __future__ import annotations

from collections.abc import Sequence

from linspec.diffusion.base import STOPS, StopPolicy


@STOPS.register(
    "never",
    summary="compute every block, also behind the end of the text",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
    lossless="yes",
)
class NeverStop(StopPolicy):
    """The published sampler: the same output as `end-of-text`, for more forwards."""


@STOPS.register(
    "end-of-text",
    summary="end with the block in which the text ends",
    paper="Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618",
    lossless="yes",
)
class EndOfText(StopPolicy):
    """Later blocks cannot change what is decided, so nothing of the output is lost."""

    def ends(self, block: Sequence[int], ends: frozenset[int]) -> bool:
        return not ends.isdisjoint(block)
