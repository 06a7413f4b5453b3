"""An installation without the extension: it succeeds, torch computes, and both are said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import linspec
from linspec.decoding.sampling import SamplingParams
from linspec.kernels.cpu.library import SWITCH
from linspec.llm import LLM

PACKAGE = Path(linspec.__file__).parent
ROOT = PACKAGE.parent.parent
PROMPT = "import os\nimport"
REASONS = {"absent": "the extension was not built", "off": f"{SWITCH}=off"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is where no compiler was."""
    folder = tmp_path_factory.mktemp("without")
    unbuilt = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(PACKAGE, folder / "linspec", ignore=unbuilt, copy_function=os.symlink)
    return folder


def run(how: str, folder: Path, *args: str) -> tuple[dict[str, Any], str]:
    """The JSON that a process of its own prints, and its stderr."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    environment.pop(SWITCH, None)
    if how == "absent":
        environment["PYTHONPATH"] = str(folder)
    else:
        environment[SWITCH] = how
    command = [sys.executable, "-m", "linspec", *args, "--json"]
    # not in the repository, whose packages would be found first
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("how", REASONS)
def test_info_names_what_is_used_and_why(how: str, without: Path) -> None:
    found, _ = run(how, without, "info")
    assert found["kernels"]["native"]["name"] == "torch"
    assert REASONS[how] in found["kernels"]["native"]["reason"]
    assert not found["kernels"]["linear"]["name"].startswith("linspec-")
    assert REASONS[how] in found["kernels"]["linear"]["reason"]


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_torch_decodes_the_same(how: str, bits: int | None, without: Path) -> None:
    """The reason is said once where nobody chose it; the text is that of the kernels."""
    args = ("generate", "embedded-softmax", "--prompt", PROMPT, "--max-tokens", "16")
    args = (*args, "--drafter", "prompt-lookup", "--policy", "4")
    found, errors = run(how, without, *args, *(("--quantize", str(bits)) if bits else ()))
    assert errors.count("CPU kernels: torch's own are used") == (how == "absent")
    llm = LLM("embedded-softmax", quantize=bits, max_batch=1)
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=16))[0]
    assert found["token_ids"] == list(expected.token_ids)


def test_a_build_without_a_compiler_succeeds(tmp_path: Path) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("the package is not in its source tree")
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--force", *places],
        capture_output=True,
        text=True,
        env={**os.environ, "CC": str(tmp_path / "no-compiler")},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "no-compiler" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("_native*.so"))
