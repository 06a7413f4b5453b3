"""Means of what rounds brought, in which old rounds fade."""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.98


@dataclass(slots=True)
class Mean:
    """A mean in which old values fade, from a first guess that counts as `weight` values."""

    value: float
    weight: float = 1.0

    def add(self, value: float) -> None:
        """Enter a value."""
        self.weight = FORGET * self.weight + 1
        self.value += (value - self.value) / self.weight
