"""Policies: how many draft nodes each sequence gets."""

from __future__ import annotations

from linspec.decoding.protocols import CausalModel
from linspec.errors import WrongType
from linspec.policies import auto, fixed, goodput, specdec_pp
from linspec.policies.base import POLICIES, Policy, PolicyContext
from linspec.utils.messages import shown

# more draft nodes than any tree has; longer numbers Python itself refuses to read
_DIGITS = 9

__all__ = [
    "POLICIES",
    "Policy",
    "PolicyContext",
    "auto",
    "check_policy",
    "fixed",
    "goodput",
    "make_policy",
    "specdec_pp",
]


def make_policy(policy: str | int | Policy, model: CausalModel) -> Policy:
    """The policy that NAME or NAME:key=value,… stands for; a number is a fixed one of so many nodes."""
    return (
        policy
        if isinstance(policy, Policy)
        else POLICIES.build(_spec(policy), PolicyContext(model))
    )


def check_policy(policy: str | int | Policy) -> None:
    """Raise what `make_policy` would raise about the spec, without measuring a model for it."""
    if not isinstance(policy, Policy):
        POLICIES.read(_spec(policy))


def _spec(policy: object) -> str:
    """A name with its options for whatever was written."""
    if isinstance(policy, int):
        return f"fixed:nodes={shown(policy)}"
    if not isinstance(policy, str):
        raise WrongType(
            f"a policy is 'auto', a number of draft nodes or a Policy, got {shown(repr(policy))}"
        )
    number = policy.isascii() and policy.isdecimal() and len(policy) <= _DIGITS
    return f"fixed:nodes={policy}" if number else policy
