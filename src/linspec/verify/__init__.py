"""Verifiers: what turns a token tree and the target's logits into accepted tokens."""

from __future__ import annotations

from linspec.errors import WrongType
from linspec.messages import shown
from linspec.verify.base import VERIFIERS, Accepted, TokenLogprob, Verifier
from linspec.verify.greedy import GreedyVerifier
from linspec.verify.lossless import LosslessVerifier
from linspec.verify.typical import TypicalOptions, TypicalVerifier

__all__ = [
    "VERIFIERS",
    "Accepted",
    "GreedyVerifier",
    "LosslessVerifier",
    "TokenLogprob",
    "TypicalOptions",
    "TypicalVerifier",
    "Verifier",
    "make_verifier",
]


def make_verifier(verifier: str | Verifier) -> Verifier:
    """The verifier that NAME or NAME:key=value,… stands for; raises ConfigError for unknown ones."""
    if isinstance(verifier, str):
        return VERIFIERS.build(verifier)
    if not callable(getattr(verifier, "accept", None)):
        raise WrongType(f"a verifier is a name or a Verifier, got {shown(repr(verifier))}")
    return verifier
