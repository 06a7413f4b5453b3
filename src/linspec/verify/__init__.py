"""Verifiers: what turns a token tree and the target's logits into accepted tokens."""

from linspec.verify.base import VERIFIERS, Accepted, TokenLogprob, Verifier
from linspec.verify.greedy import GreedyVerifier
from linspec.verify.lossless import LosslessVerifier
from linspec.verify.typical import TypicalVerifier

__all__ = [
    "VERIFIERS",
    "Accepted",
    "GreedyVerifier",
    "LosslessVerifier",
    "TokenLogprob",
    "TypicalVerifier",
    "Verifier",
]
