"""Policies: how many draft nodes each row gets."""

from __future__ import annotations

from linspec.errors import ConfigError
from linspec.models.backbone import Generator
from linspec.policy.auto import Auto
from linspec.policy.base import POLICIES, Policy
from linspec.policy.costs import load_or_measure
from linspec.policy.fixed import Fixed

__all__ = ["POLICIES", "Policy", "make_policy"]


def make_policy(policy: str | int | Policy, model: Generator) -> Policy:
    """'auto', a fixed number of draft nodes, or a policy as it is."""
    if isinstance(policy, int):
        return Fixed(policy)
    if not isinstance(policy, str):
        return policy
    if policy == "auto":
        return Auto(load_or_measure(model))
    if policy.isdecimal():
        return Fixed(int(policy))
    raise ConfigError(f"unknown policy {policy!r}; use 'auto' or a number of draft nodes")
