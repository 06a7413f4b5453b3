"""Rows that leave memory for a file: regions of equal size, written once and read through a mapping.

    file = OffloadFile(Path("/scratch"), region_bytes=2**16, row_bytes=512)
    region = file.put(rows)                  # uint8 [128, 512]; it lives as long as somebody has `region`
    file.read([region], chosen)              # the rows of these numbers, counted over the regions

The file has no name: the system takes it back when the process ends, however it ends. What goes wrong with
it is a StateError, never other rows.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_void_p
from pathlib import Path

import numpy as np
import torch

from linspec.errors import ConfigError, StateError
from linspec.utils.messages import shown

# regions that the file grows by
_MORE = 64


class Region:
    """A part of a file that holds the rows of one `put`; who lets go of it last frees it."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


class OffloadFile:
    """A file without a name in `folder`.

    Raises ConfigError where no file can be made there.

    Attributes:
        rows_read: how many rows `read` has given until now.
        mapped: the address where the file is mapped now, for kernels, which read it there.
    """

    def __init__(self, folder: Path, region_bytes: int, row_bytes: int) -> None:
        self.folder, self.region_bytes, self.row_bytes = folder, region_bytes, row_bytes
        try:
            # without a buffer, whose errors would come later
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"offload is {shown(repr(str(folder)))}, where no file can be made ({error.strerror}); name "
                "a directory that can be written"
            ) from error
        # ahead of its own end, which warns of files that are open
        weakref.finalize(self, self._file.close)
        self._free: list[int] = []
        self._regions = 0
        self._rows: np.ndarray | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.rows_read, self.mapped = 0, c_void_p()

    @property
    def bytes(self) -> int:
        """Of the file, regions that are free included."""
        return self._regions * self.region_bytes

    def put(self, rows: torch.Tensor) -> Region:
        """Write the contiguous `rows` of one region; raises StateError where there is no room for them."""
        if not self._free:
            self._grow()
        number = self._free.pop()
        try:
            self._write(rows.numpy().data.cast("B"), number * self.region_bytes)
        except OSError as error:
            self._free.append(number)
            raise self._no_room(error) from error
        region = Region(number)
        weakref.finalize(region, self._free.append, number).atexit = False
        return region

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count

    def _grow(self) -> None:
        """Have more regions, on the disk and in the mapping."""
        before, more = self.bytes, _MORE * self.region_bytes
        try:
            # a hole would be a signal, not an error, once it is written and the disk is full
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), before, more)
            else:
                self._file.truncate(before + more)
            mapped = mmap.mmap(self._file.fileno(), before + more, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._no_room(error) from error
        self._rows = np.frombuffer(mapped, np.uint8).reshape(-1, self.row_bytes)
        self.mapped.value = self._rows.ctypes.data
        self._free += range(self._regions + _MORE - 1, self._regions - 1, -1)
        self._regions += _MORE

    def _no_room(self, error: OSError) -> StateError:
        return StateError(
            f"the values of a closed segment do not fit into {shown(repr(str(self.folder)))} "
            f"({error.strerror}); the file there has {self.bytes / 1e6:.0f} MB: make room, name another "
            "directory as offload, or leave it out"
        )

    def check(self) -> None:
        """Raise StateError if the file is no longer as long as it was made."""
        found = os.fstat(self._file.fileno()).st_size
        if found < self.bytes:
            raise StateError(
                f"the file of offloaded values in {shown(repr(str(self.folder)))} has {found} bytes and was "
                f"made with {self.bytes}: something else has cut it, and what it held is lost; start again"
            )

    def read(self, regions: Sequence[Region], rows: torch.Tensor) -> torch.Tensor:
        """The rows [.., row_bytes] of these numbers, of all rows of the regions one behind the other."""
        self.check()
        each = self.region_bytes // self.row_bytes
        starts = np.array([region.number * each for region in regions])
        numbers = rows.numpy()
        assert self._rows is not None, "there are regions, so there are rows"
        found = self._rows.take(starts[numbers // each] + numbers % each, axis=0)
        self.rows_read += numbers.size
        return torch.from_numpy(found)

    def read_ahead(self, regions: Sequence[Region], rows: torch.Tensor) -> Future[torch.Tensor]:
        """As `read`, on a thread beside the caller."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "linspec-offload")
        return self._thread.submit(self.read, regions, rows)
