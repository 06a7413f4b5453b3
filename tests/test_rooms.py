"""Rooms import downwards only, as docs/architecture.md orders them."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import linspec

ROOT = Path(linspec.__file__).parent
# lowest first; rooms of one floor may know each other
FLOORS = (
    "errors utils",
    "decoding quantization",
    "kernels",
    "state",
    "mixers",
    "models",
    "checkpoints",
    "drafters verifiers policies diffusion",
    "engine llm",
    "train evaluate bench report",
    "serve integrations",
    "demo cli",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(path: Path) -> Iterator[str]:
    """Rooms that a file imports, for the type checker alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("linspec."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("linspec."))


def test_rooms_import_downwards_only() -> None:
    upwards = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        assert parts[0] in FLOOR, f"{parts[0]} is on no floor"
        upwards += [
            f"{'/'.join(parts)} imports {room}"
            for room in imports(path)
            if FLOOR.get(room, 0) > FLOOR[parts[0]]
        ]
    assert not upwards


def test_the_wheel_knows_nothing_of_what_runs_from_a_clone() -> None:
    beside = {"benchmarks", "studies"}
    found = {
        f"{path.name} imports {name}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name.partition(".")[0] in beside
    }
    assert not found
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["packages"]["find"] == {"where": ["src"]}
    assert not beside & {path.name for path in ROOT.parent.iterdir()}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []
