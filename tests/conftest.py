"""Shared test settings; being here also makes tests/helpers.py importable from every test."""

from __future__ import annotations

import re

from hypothesis import settings

# the same examples on every run, and no deadline on a busy machine
settings.register_profile("linspec", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("linspec")


def pytest_make_parametrize_id(val: object) -> str | None:
    """One name in every process: no path of a model made for the tests, nothing that is no UTF-8."""
    if not isinstance(val, str):
        return None
    name = re.sub(r"/\S*linspec-test-[^/\s]+", "models", val)
    return name.encode("utf-8", "backslashreplace").decode()
