"""What one forward says of the positions of a canvas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linspec.errors import ConfigError


class Predictions:
    """The logits of one forward, found by the position of the token that they are about.

    rows: the positions that the forward computed. shift: how many positions ahead of a token its logits
    stand. The mask token is never predicted.
    """

    def __init__(self, rows: Sequence[int], logits: torch.Tensor, shift: int, mask_id: int) -> None:
        self._rows = {position + shift: row for row, position in enumerate(rows)}
        self._logits, self._mask_id = logits, mask_id

    def knows(self, positions: Sequence[int]) -> bool:
        """Whether the forward computed what is asked about all of these."""
        return self._rows.keys() >= set(positions)

    def among(self, positions: Sequence[int]) -> list[int]:
        """Those of `positions` that the forward says something about."""
        return [position for position in positions if position in self._rows]

    def logits(self, positions: Sequence[int]) -> torch.Tensor:
        """[P, vocab] in float64; raises ConfigError for a position that was not computed."""
        missing = sorted(set(positions) - self._rows.keys())
        if missing:
            raise ConfigError(
                f"the forward says nothing of positions {missing[:4]}; ask for what is open, or let the "
                "cache policy compute their rows"
            )
        found = self._logits[[self._rows[position] for position in positions]].double()
        found[:, self._mask_id] = -torch.inf
        return found
