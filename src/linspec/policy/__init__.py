"""Policies: how many draft nodes each row gets."""

from __future__ import annotations

from linspec.errors import WrongType
from linspec.messages import shown
from linspec.models.backbone import Generator
from linspec.policy import auto, fixed
from linspec.policy.base import POLICIES, Policy, PolicyContext
from linspec.policy.fixed import Fixed

# more draft nodes than any tree has; longer numbers Python itself refuses to read
_DIGITS = 9

__all__ = ["POLICIES", "Policy", "PolicyContext", "auto", "fixed", "make_policy"]


def make_policy(policy: str | int | Policy, model: Generator) -> Policy:
    """The policy that NAME or NAME:key=value,… stands for; a number is a fixed one of so many nodes."""
    if isinstance(policy, int):
        return Fixed(policy)
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise WrongType(
            f"a policy is 'auto', a number of draft nodes or a Policy, got {shown(repr(policy))}"
        )
    if policy.isascii() and policy.isdecimal() and len(policy) <= _DIGITS:
        return Fixed(int(policy))
    return POLICIES.build(policy, PolicyContext(model))
