"""Where kernels find what is past of each slot and layer: see `ls_past` in kernels/cpu/structs.py."""

from __future__ import annotations

from ctypes import POINTER, addressof, c_int32, c_void_p, cast, pointer, sizeof
from typing import TYPE_CHECKING, Any

from linspec.kernels.cpu.structs import PastStruct

if TYPE_CHECKING:
    from linspec.state.shadow import Past


class PastTable:
    """For each slot two entries a layer: what is past now, and once further segments have closed.

    Who puts something there keeps it; the table has addresses.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self._layers = [(PastStruct * (2 * slots))() for _ in range(layers)]

    def put(self, layer: int, slot: int, past: Past, *, ahead: bool = False) -> None:
        """From now on this is past of a slot, and nothing ahead of it; or it will be."""
        entries, at = self._layers[layer], 2 * slot
        entries[at + 1] = _entry(past) if ahead else PastStruct()
        if not ahead:
            entries[at] = _entry(past)

    def seen_from(self, layer: int, slot: int) -> int:
        """The address of the entries of the slots from `slot` on."""
        return addressof(self._layers[layer]) + 2 * slot * sizeof(PastStruct)


def _entry(past: Past) -> PastStruct:
    """The tensors and the file of what is past, as C reads them."""
    if past.kept is None:
        return PastStruct()
    places: Any = {name: each.data_ptr() for name, each in past.kept.items()}
    places["outliers"] = cast(places["outliers"], POINTER(c_int32))
    if past.file is None:
        values, regions = c_void_p(places["values"]), None
    else:
        values = past.file.mapped
        regions = (c_int32 * past.segments)(*(region.number for region in past.regions))
    # a pointer keeps what it points to, an address does not
    places["values"] = pointer(values)
    return PastStruct(segments=past.segments, regions=regions, **places)
