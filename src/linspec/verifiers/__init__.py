"""Verifiers: what turns a token tree and the target's logits into accepted tokens."""

from __future__ import annotations

from linspec.decoding.accepted import Accepted, TokenLogprob
from linspec.errors import WrongType
from linspec.utils.messages import shown
from linspec.verifiers.base import VERIFIERS, Verifier
from linspec.verifiers.block import BlockVerifier
from linspec.verifiers.greedy import GreedyVerifier
from linspec.verifiers.lossless import LosslessVerifier
from linspec.verifiers.trusting import TrustingOptions, TrustingVerifier
from linspec.verifiers.typical import TypicalOptions, TypicalVerifier

__all__ = [
    "VERIFIERS",
    "Accepted",
    "BlockVerifier",
    "GreedyVerifier",
    "LosslessVerifier",
    "TokenLogprob",
    "TrustingOptions",
    "TrustingVerifier",
    "TypicalOptions",
    "TypicalVerifier",
    "Verifier",
    "make_verifier",
]


def make_verifier(verifier: str | Verifier) -> Verifier:
    """The verifier that NAME or NAME:key=value,… stands for; raises ConfigError for unknown ones."""
    made = VERIFIERS.build(verifier) if isinstance(verifier, str) else verifier
    if not callable(getattr(made, "accept", None)):
        raise WrongType(
            f"a verifier is a name or a Verifier, which has the method accept, got {shown(repr(verifier))}"
        )
    return made
