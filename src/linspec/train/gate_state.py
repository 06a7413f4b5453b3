"""What a training of gates is resumed from: one JSON file, for it is a few hundred numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linspec.errors import ConfigError, TrainingError
from linspec.utils.border import STRICT, parse, read_json

Rows = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateState:
    """Gates, their sums over all steps, Adam's two moments [layers, KV heads]; what was found, by count."""

    steps: int
    weight: float
    seconds: float
    gates: Rows
    seen: Rows
    moments: tuple[Rows, Rows]
    found: dict[str, dict[str, Any]]
    __pydantic_config__ = STRICT

    def to_text(self) -> str:
        """As JSON, in which floats lose nothing."""
        return json.dumps(asdict(self)) + "\n"


def read_gate_state(path: Path, shape: Sequence[int]) -> GateState:
    """The state in a file; raises TrainingError if it is damaged or of gates of another shape."""
    again = "run without --resume to begin again"
    try:
        state = parse(GateState, read_json(path, TrainingError), path)
    except ConfigError as error:
        raise TrainingError(f"{error}; {again}") from error
    for rows in (state.gates, state.seen, *state.moments):
        found = [len(rows), *{len(row) for row in rows}]
        if found != list(shape):
            raise TrainingError(
                f"{path} holds gates [layers, KV heads] of {found}, this model has {list(shape)}; {again}"
            )
    return state


def adam_moments(optimizer: torch.optim.Adam, gates: Sequence[torch.Tensor]) -> tuple[Rows, Rows]:
    """Both moments of each gate."""
    first, second = (
        [optimizer.state[gate][name].float().cpu().tolist() for gate in gates]
        for name in ("exp_avg", "exp_avg_sq")
    )
    return first, second


def with_moments(
    optimizer: torch.optim.Adam,
    gates: Sequence[torch.Tensor],
    moments: tuple[Rows, Rows],
    steps: int,
) -> None:
    """Let `optimizer` go on as one that made `steps` steps."""
    for gate, first, second in zip(gates, *moments, strict=True):
        optimizer.state[gate] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.tensor(first).to(gate),
            "exp_avg_sq": torch.tensor(second).to(gate),
        }
