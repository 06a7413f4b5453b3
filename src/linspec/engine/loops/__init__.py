"""Generation loops: how tokens come about, one file each."""

from __future__ import annotations

from linspec.engine.loops import autoregressive, beam, dsbd, first, masked_diffusion, mirror
from linspec.engine.loops.base import LOOPS, GenerationLoop, LoopContext

__all__ = [
    "LOOPS",
    "GenerationLoop",
    "LoopContext",
    "autoregressive",
    "beam",
    "dsbd",
    "first",
    "masked_diffusion",
    "mirror",
]
