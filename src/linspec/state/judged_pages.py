"""What judges the pages of a cache, for nodes that select what they read: two-bit keys, or bounds.

Kernels make it of committed entries when they need it, see kernels/cpu/csrc/select.c. It is no part of a
snapshot, a fork or what slots share: who gets such entries has it made again, by reading the keys once.
"""

from __future__ import annotations

import torch

from linspec.kernels.step_plan import JUDGED, PAGE
from linspec.state.memory import zeros

# positions of JUDGED pages with bounds, which lie side by side
_BOUNDED = JUDGED * JUDGED


class JudgedPages:
    """That of all slots of a state.

    Attributes:
        kept: [L, slots, Hkv, B, numbers], int16, as csrc/select.inc.h (bounds of JUDGED pages of JUDGED
            positions) or csrc/codes.inc.h (one page of PAGE positions) has them.
        counts: [L, slots, Hkv], int32: how many pages have theirs, which kernels raise.
    """

    @torch.inference_mode()
    def __init__(
        self, layers: int, slots: int, heads: int, width: int, positions: int, *, coded: bool
    ) -> None:
        self._shape, self._width, self.coded = (layers, slots, heads), width, coded
        # positions of a page, and of a block of them
        self.page, self._block = (PAGE, PAGE) if coded else (JUDGED, _BOUNDED)
        self.counts = torch.zeros(*self._shape, dtype=torch.int32)
        self.kept = self._room(positions)

    @torch.inference_mode()
    def ensure(self, positions: int) -> None:
        """Make room for the pages of so many positions, or of more."""
        have = self.kept.shape[3]
        if positions <= have * self._block:
            return
        grown = self._room(max(positions, 2 * have * self._block))
        for slot in range(self.counts.shape[1]):
            used = -(-int(self.counts[:, slot].max()) * self.page // self._block)
            grown[:, slot, :, :used] = self.kept[:, slot, :, :used]
        self.kept = grown

    @torch.inference_mode()
    def forget(self, slot: int, first: int = 0) -> None:
        """The entries of `slot` from position `first` on are no longer what they were."""
        self.counts[:, slot].clamp_(max=first // self.page)

    def bounds_of(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The greatest and the least keys of the whole pages of `length` positions, [L, Hkv, pages, K]."""
        kept = self.kept[:, slot].view(torch.bfloat16)
        if self.coded:
            padded = _padded(self._width)
            found = kept[..., : 2 * padded].unflatten(-1, (2, padded))[..., : self._width]
            found = found.permute(3, 0, 1, 2, 4)
        else:
            found = kept.unflatten(-1, (2, self._width, JUDGED)).permute(3, 0, 1, 2, 5, 4)
            found = found.flatten(3, 4)
        pages = found[..., : length // self.page, :]
        return pages[0], pages[1]

    def codes_of(self, slot: int, length: int) -> torch.Tensor:
        """The codes 0..3 of the keys of these pages, [L, Hkv, pages, PAGE, K]."""
        kept = self.kept[:, slot, :, : length // self.page, 2 * _padded(self._width) :]
        words = kept.contiguous().view(torch.uint8).unflatten(-1, (-1, PAGE, 1, 4))
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
        found = (words >> shifts) & 3
        return found.transpose(-4, -3).flatten(-3)[..., : self._width]

    def bytes_at(self, length: int) -> int:
        """Bytes of that of a sequence of `length` positions."""
        layers, _, heads = self._shape
        page = self._numbers * self.kept.itemsize * self.page // self._block
        return layers * heads * page * (length // self.page)

    def missing_bytes(self, length: int) -> int:
        """Bytes that are still to be allocated for sequences of `length` positions."""
        have = self.kept.shape[3]
        return max(0, -(-length // self._block) - have) * (self.kept.nbytes // have)

    @property
    def _numbers(self) -> int:
        """Of a block: greatest and least keys, and behind those codes of two bits."""
        if self.coded:
            return _padded(self._width) * (2 + PAGE // 8)
        return 2 * self._width * JUDGED

    def _room(self, positions: int) -> torch.Tensor:
        return zeros((*self._shape, -(-positions // self._block), self._numbers), torch.int16)


def _padded(width: int) -> int:
    """Features of codes, which come in sixteens."""
    return -(-width // 16) * 16
