"""Write golden.json; see the package."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .cases import Bench, cases, fingerprint_of_machine
from .models import fingerprints, freeze

FILE = Path(__file__).with_name("golden.json")


def read() -> dict[str, Any]:
    """The golden file."""
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def main() -> None:
    """Measure every case and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", action="store_true", help="freeze the models anew")
    anew = parser.parse_args().models
    models = freeze() if anew else read()["models"]
    with tempfile.TemporaryDirectory() as root:
        if anew:
            fingerprints(models, Bench(models, Path(root, "bare")).folder)
        began, found = time.perf_counter(), measure(Bench(models, Path(root)))
    FILE.write_text(_text(found), encoding="utf-8")
    print(f"{len(found['cases'])} cases in {time.perf_counter() - began:.0f} s, see {FILE}")


def measure(bench: Bench) -> dict[str, Any]:
    """The file's contents."""
    # with more threads torch adds up some products in another order
    torch.set_num_threads(1)
    return {
        "format": 1,
        "machine": fingerprint_of_machine(),
        "models": bench.models,
        "cases": {case.key: bench.run(case) for case in cases(bench.models)},
        "forwards": {name: bench.forward(name) for name in bench.models},
    }


def _text(data: dict[str, Any]) -> str:
    """JSON with one entry a line, so that a change of one case is a change of one line."""
    parts = []
    for name, value in data.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
