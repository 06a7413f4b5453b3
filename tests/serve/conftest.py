"""Where the extra `serve` is not installed, nothing here can be imported."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [name for name in ("fastapi", "llguidance", "openai") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    """Say so: a part of the tests that is missing must not go unseen."""
    if not MISSING:
        return ""
    return f"tests/serve is left out, without {', '.join(MISSING)}: pip install 'linspec[serve]' openai"
