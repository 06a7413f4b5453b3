"""Settings of all tests. This file also makes tests/helpers.py importable from every test."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples on every run, and no deadline on a busy machine; fewer where slow tests are left out
settings.register_profile("all", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("some", settings.get_profile("all"), max_examples=8)
settings.load_profile("all")

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# longer ids hide the name of the test, and every worker sends all of its ids
_LONGEST_ID = 80

if _WORKERS > 1:
    # before torch is imported: workers that share the cores would wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))


def pytest_make_parametrize_id(val: object) -> str | None:
    """A short id that is the same in every process: no path of a model made for the tests."""
    if not isinstance(val, str | bytes):
        return None
    text = val if isinstance(val, str) else val.decode("latin-1")
    text = re.sub(r"/\S*linspec-test-[^/\s]+", "models", text)
    name = text.encode("unicode_escape").decode("ascii")
    if len(name) <= _LONGEST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_ID]}-{digest}"


def pytest_configure(config: pytest.Config) -> None:
    """Ahead of the tests, whose own numbers of examples are shares of that of the profile."""
    settings.load_profile("some" if config.getoption("markexpr") == "not slow" else "all")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `crossed(n)`, one case in n is for `make test`, the others are slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("crossed") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for drawn in cases.values():
        one_in = drawn[0].get_closest_marker("crossed").args[0]
        # in the order of their names' sums, which is as good as chance
        drawn.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in drawn[-(-len(drawn) // one_in) :]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def private_cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of this process alone: no test reads or writes that of the user."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINSPEC_CACHE", str(folder))
        yield folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, also in a worker that has one: how they share the work is part of some proofs."""
    # here, because the number of threads above has to be set first
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
