"""Policies: how many draft nodes each row gets."""

from __future__ import annotations

from linspec.errors import ConfigError, WrongType
from linspec.messages import did_you_mean, shown
from linspec.models.backbone import Generator
from linspec.policy.auto import Auto
from linspec.policy.base import POLICIES, Policy
from linspec.policy.costs import load_or_measure
from linspec.policy.fixed import Fixed

# more draft nodes than any tree has; longer numbers Python itself refuses to read
_DIGITS = 9

__all__ = ["POLICIES", "Policy", "make_policy"]


def make_policy(policy: str | int | Policy, model: Generator) -> Policy:
    """'auto', a fixed number of draft nodes, or a policy as it is."""
    if isinstance(policy, int):
        return Fixed(policy)
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise WrongType(
            f"a policy is 'auto', a number of draft nodes or a Policy, got {shown(repr(policy))}"
        )
    if policy == "auto":
        return Auto(load_or_measure(model))
    if policy.isascii() and policy.isdecimal() and len(policy) <= _DIGITS:
        return Fixed(int(policy))
    raise ConfigError(
        f"unknown policy {shown(repr(policy))}; use 'auto' or a number of draft nodes below 10^{_DIGITS}"
        f"{did_you_mean(policy, ('auto',))}"
    )
