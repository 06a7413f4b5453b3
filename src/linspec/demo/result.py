"""What the demo found out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TEACHER, STUDENT, SHIPPED = "teacher", "student", "shipped student"
SWAPPED = "teacher, mixers swapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One model with one drafter over all prompts, batch 1, greedy.

    tokens_per_round counts accepted drafts and the bonus token; plain decoding is 1.0. acceptance:
    share of tried drafts that were accepted, by depth. lossless: the output was that of plain
    decoding, token for token; near_ties: prompts where rounding decided between two equal tokens.
    """

    model: str
    drafter: str
    tokens_per_s: float
    tokens_per_round: float
    tokens: int
    acceptance: tuple[float, ...]
    lossless: bool
    near_ties: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Everything measured.

    swapped_bits_per_byte: the teacher's weights with linear mixers, before any training. rows: the
    student made by this demo; comparison: the teacher and the shipped student. state_bytes: bytes
    of one sequence by model and context. phases: seconds of each part.
    """

    teacher_bits_per_byte: float
    student_bits_per_byte: float
    swapped_bits_per_byte: float
    shipped_student_bits_per_byte: float | None
    lossless: bool
    rows: tuple[Decoded, ...]
    comparison: tuple[Decoded, ...]
    state_bytes: dict[str, dict[int, int]]
    linearize_tokens: int
    heads_tokens: int
    parameters: int
    seconds: float
    phases: dict[str, float]
    machine: dict[str, Any]
    report: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = asdict(self)
        data["report"] = str(self.report)
        data["state_bytes"] = {
            model: {str(context): size for context, size in sizes.items()}
            for model, sizes in self.state_bytes.items()
        }
        return data

    def find(self, model: str, drafter: str) -> Decoded | None:
        """The row of a model with a drafter, None if it was not measured."""
        rows = (*self.rows, *self.comparison)
        return next((r for r in rows if (r.model, r.drafter) == (model, drafter)), None)

    def bits_per_byte(self, model: str) -> float | None:
        """Held-out bits per byte of a model."""
        known = {
            TEACHER: self.teacher_bits_per_byte,
            STUDENT: self.student_bits_per_byte,
            SHIPPED: self.shipped_student_bits_per_byte,
        }
        return known[model]
