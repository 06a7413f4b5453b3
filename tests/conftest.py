"""Shared test settings; being here also makes tests/helpers.py importable from every test."""

from __future__ import annotations

from hypothesis import settings

# the same examples on every run, and no deadline on a busy machine
settings.register_profile("linspec", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("linspec")
