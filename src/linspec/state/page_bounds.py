"""The bounds of the pages of a cache: the greatest and least keys of JUDGED rows, for who selects by them.

Kernels make them of committed entries when they need them, see kernels/cpu/csrc/select.inc.h. They are no
part of a snapshot, a fork or what slots share: who gets such entries has them made again, by one reading of
the keys.
"""

from __future__ import annotations

import torch

from linspec.kernels.step_plan import JUDGED
from linspec.state.memory import zeros

# positions of JUDGED pages, which lie side by side
_BLOCK = JUDGED * JUDGED


class PageBounds:
    """Those of all slots of a state.

    Attributes:
        kept: [L, slots, Hkv, B, 2, K, JUDGED], bfloat16: the greatest keys of JUDGED pages, then the least.
        counts: [L, slots, Hkv], int32: how many pages have theirs, which kernels raise.
    """

    @torch.inference_mode()
    def __init__(self, layers: int, slots: int, heads: int, width: int, positions: int) -> None:
        self._shape, self._width = (layers, slots, heads), width
        self.counts = torch.zeros(*self._shape, dtype=torch.int32)
        self.kept = self._room(positions)

    @torch.inference_mode()
    def ensure(self, positions: int) -> None:
        """Make room for the pages of so many positions, or of more."""
        have = self.kept.shape[3]
        if positions <= have * _BLOCK:
            return
        grown = self._room(max(positions, 2 * have * _BLOCK))
        for slot in range(self.counts.shape[1]):
            used = -(-int(self.counts[:, slot].max()) // JUDGED)
            grown[:, slot, :, :used] = self.kept[:, slot, :, :used]
        self.kept = grown

    @torch.inference_mode()
    def forget(self, slot: int, first: int = 0) -> None:
        """The entries of `slot` from position `first` on are no longer what they were."""
        self.counts[:, slot].clamp_(max=first // JUDGED)

    def of(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The greatest and the least keys of the whole pages of `length` positions, [L, Hkv, pages, K]."""
        pages = (
            self.kept[:, slot].permute(3, 0, 1, 2, 5, 4).flatten(3, 4)[..., : length // JUDGED, :]
        )
        return pages[0], pages[1]

    def bytes_at(self, length: int) -> int:
        """Bytes of those of a sequence of `length` positions."""
        layers, _, heads = self._shape
        return layers * heads * 2 * self._width * self.kept.itemsize * (length // JUDGED)

    def missing_bytes(self, length: int) -> int:
        """Bytes that are still to be allocated for sequences of `length` positions."""
        have = self.kept.shape[3]
        return max(0, -(-length // _BLOCK) - have) * (self.kept.nbytes // have)

    def _room(self, positions: int) -> torch.Tensor:
        return zeros(
            (*self._shape, -(-positions // _BLOCK), 2, self._width, JUDGED), torch.bfloat16
        )
