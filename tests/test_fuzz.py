"""Damaged files of every kind: each is refused by a named error, or computes finite numbers.

python -m pytest tests/test_fuzz.py                # some hundreds of cases
python -m pytest -m slow tests/test_fuzz.py        # more than ten thousand, some under sanitizers
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import KINDS, contents, damaged, damages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.test_proof import SANITIZERS, SOURCES

from linspec import LLM, SamplingParams
from linspec.errors import LinspecError
from linspec.evaluate.files import verify_files
from linspec.kernels.cpu import library

ENDINGS = ("config.json", "drafter.json", "tokenizer.json", ".safetensors", "checksums.json")
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
# cases of each kind of directory and ending, fast and slow: 20 pairs
FEW, MANY = 12, 550
# messages that say nothing
BARE = [os.strerror(number) for number in range(1, 40)]
NAMES = [kind.__name__ for kind in (LinspecError, *LinspecError.__subclasses__())]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny models: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attempt(kind: str, file: str, content: bytes) -> str:
    """How far a damaged directory comes: 'refused', or 'used'."""
    with damaged(kind, file, content) as folder:
        said = ""
        try:
            if file.endswith("checksums.json"):
                verify_files(folder)
            llm = LLM(folder, drafter="medusa", policy=3, max_batch=1)
            (found,) = llm.generate("abcd end", GREEDY)
        except LinspecError as error:
            said = str(error).strip() or type(error).__name__
    assert said not in (*BARE, *NAMES)
    # a damaged context of few positions ends an output early, and says so
    assert said or len(found.token_ids) == 4 or found.finish_reason == "length"
    return "refused" if said else "used"


def pairs() -> list[tuple[str, str]]:
    return [(kind, ending) for kind in KINDS for ending in ENDINGS]


def fuzz(kind: str, ending: str, cases: int) -> None:
    """Raises on the first case that ends in anything but a named error or finite numbers."""

    # said in full: the process under sanitizers has no settings of a conftest
    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        attempt(kind, *data.draw(damages(kind, ending)))

    run()


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("kind", "ending"), pairs())
def test_damaged_files_are_refused_by_name(kind: str, ending: str) -> None:
    fuzz(kind, ending, FEW)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "ending"), pairs())
def test_ten_thousand_damaged_files_are_refused_by_name(kind: str, ending: str) -> None:
    fuzz(kind, ending, MANY)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_directories_are_used(kind: str) -> None:
    for file, content in contents(kind).items():
        assert attempt(kind, file, content) == "used", file


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damaged_tensors_stay_within_the_memory_of_the_kernels(tmp_path: Path) -> None:
    """The same cases with the C library built with the address and undefined-behaviour sanitizers."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    native = tmp_path / "native.so"
    sources = map(str, sorted(SOURCES.glob("*.c")))
    flags = ("-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wno-psabi")
    command = ["gcc", *flags, *SANITIZERS, "-shared", "-fPIC", *sources, "-o", str(native), "-lm"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("gcc has no address and undefined-behaviour sanitizers")
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in names
    ]
    done = subprocess.run(
        [sys.executable, __file__, str(native)],
        env=os.environ
        | {
            "LD_PRELOAD": ":".join(path.strip() for path in found),
            # Python itself leaves what it has at its end
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def under_sanitizers(native: Path) -> None:
    """What the process that has the sanitizers runs."""
    library._path = lambda: native  # type: ignore[assignment]  # the library that was built for it
    assert library.load().library is not None
    torch.set_num_threads(1)
    for kind in KINDS:
        fuzz(kind, ".safetensors", MANY)
        fuzz(kind, "config.json", MANY // 4)


if __name__ == "__main__":
    under_sanitizers(Path(sys.argv[1]))
