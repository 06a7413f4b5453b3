"""Kernels are made into machine code for CUDA devices, which needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has a compiler for Linux alone")
def test_all_kernels_compile_and_multiply_in_one_way() -> None:
    # the interpreter and the compiler exclude each other in one process
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compiled", "90"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in found} == {
        *("_parts", "_merge", "_read", "_fold", "_int8", "_int4", "_blocks", "_convolve", "_join")
    }
    for each in found:
        multiplies = each["kernel"] in ("_parts", "_int8", "_int4", "_blocks")
        assert len(each["products"]) == multiplies, each
