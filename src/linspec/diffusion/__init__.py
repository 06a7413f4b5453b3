"""The policies of masked diffusion: what a block is, what is committed, when to stop, what is computed again,
which drafts are judged along.

One registry for each of these kinds; `engine/loops/masked_diffusion.py` asks them in every round.
"""

from __future__ import annotations

from linspec.diffusion import (
    ada_block,
    auto_drafts,
    blocks,
    caches,
    dkv,
    elastic,
    freedave,
    prophet,
    stops,
)
from linspec.diffusion.base import (
    BLOCKS,
    CACHES,
    COMMITS,
    STOPS,
    VERIFIES,
    BlockPolicy,
    CachePolicy,
    CommitPolicy,
    StepCost,
    StopPolicy,
    VerifyPolicy,
)
from linspec.diffusion.candidates import Candidates
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.commits import (
    draft_and_edit,
    entropy,
    factor,
    learn2pd,
    local_leap,
    static,
    threshold,
)
from linspec.diffusion.predictions import Predictions

__all__ = [
    "BLOCKS",
    "CACHES",
    "COMMITS",
    "STOPS",
    "VERIFIES",
    "BlockPolicy",
    "CachePolicy",
    "Candidates",
    "Canvas",
    "CommitPolicy",
    "Predictions",
    "StepCost",
    "StopPolicy",
    "VerifyPolicy",
    "ada_block",
    "auto_drafts",
    "blocks",
    "caches",
    "dkv",
    "draft_and_edit",
    "elastic",
    "entropy",
    "factor",
    "freedave",
    "learn2pd",
    "local_leap",
    "prophet",
    "static",
    "stops",
    "threshold",
]
