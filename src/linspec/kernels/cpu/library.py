"""The compiled kernels: found, checked and loaded once, or a reason why torch computes instead.

    found = load()
    print(found.name, found.reason)       # avx512-vnni, best that this processor runs

LINSPEC_CPU_KERNELS=off leaves the kernels unused; the name of an instruction set (avx512-vnni,
avx2-vnni, avx2, neon-dotprod, portable) takes that one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from linspec.errors import ConfigError
from linspec.kernels.cpu.structs import ABI, LinearPartStruct, LinearStruct, layout
from linspec.utils.messages import did_you_mean, shown

SWITCH = "LINSPEC_CPU_KERNELS"


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: the library (None without one), the instruction set, and why."""

    library: ctypes.CDLL | None
    name: str
    reason: str


@functools.cache
def load() -> Found:
    """The kernels for this process; raises ConfigError when LINSPEC_CPU_KERNELS asks for the impossible."""
    # here, as whoever only asks for the version of linspec need not wait for torch
    from linspec.kernels.cpu.threads import limit_to_quota

    limit_to_quota()
    wanted = os.environ.get(SWITCH, "")
    if wanted == "off":
        return Found(None, "torch", f"{SWITCH}=off")
    path = _path()
    if path is None:
        return _none("the extension was not built; install linspec again with a C compiler")
    try:
        library = _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return _none(f"{path.name} cannot be loaded: {error}")
    if library.ls_abi() != ABI or _layout(library) != layout():
        return _none(f"{path.name} is of another version; install linspec again")
    if wanted and not library.ls_use_isa(wanted.encode()):
        sets = ", ".join(instruction_sets(library))
        near = did_you_mean(wanted, ("off", *instruction_sets(library)))
        raise ConfigError(
            f"{SWITCH}={shown(wanted)} cannot be used here; use off or one of {sets}{near}"
        )
    name = library.ls_isa().decode()
    if not _passes(library):
        return _none(f"{name} failed its self-test")
    return Found(library, name, f"{SWITCH} asks for it" if wanted else "best of this processor")


def _none(reason: str) -> Found:
    # said once, as `load` is called once
    logging.getLogger("linspec").warning("CPU kernels: torch's own are used, as %s", reason)
    return Found(None, "torch", reason)


def _path() -> Path | None:
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = here / f"_native{suffix}"
        if path.exists():
            return path
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Types of the functions; raises AttributeError when one is missing."""
    library.ls_layout.restype = POINTER(c_int32)
    library.ls_isa.restype = c_char_p
    library.ls_isa_at.restype = c_char_p
    library.ls_linear_workspace.restype = c_int64
    library.ls_linear_workspace.argtypes = [POINTER(LinearStruct), c_int32]
    library.ls_linear_forward.restype = None
    library.ls_linear_forward.argtypes = [
        POINTER(LinearStruct),
        *(c_void_p, c_int64, c_int32),
        *(c_void_p, c_int64),
        *(c_void_p, c_int32),
    ]
    library.ls_pack_blocks.restype = c_int32
    library.ls_pack_blocks.argtypes = [
        *(c_int32, c_void_p, c_void_p, c_int32, c_int32),
        *(c_void_p, c_int32),
    ]
    library.ls_block_rows_at.restype = None
    library.ls_block_rows_at.argtypes = [
        *(POINTER(LinearPartStruct), c_int32, c_void_p, c_int32),
        *(c_void_p, c_int32),
    ]
    return library


def _layout(library: ctypes.CDLL) -> list[int]:
    """What the compiler made of the structures; see `layout`."""
    numbers = library.ls_layout()
    return list(itertools.takewhile(lambda number: number >= 0, numbers))


def instruction_sets(library: ctypes.CDLL) -> list[str]:
    """Names of the sets that this processor runs, best first."""
    names: list[str] = []
    while (name := library.ls_isa_at(len(names))) is not None:
        names.append(name.decode())
    return names


def _passes(library: ctypes.CDLL) -> bool:
    """Whether small products of all kinds of weights are what they must be; about a millisecond."""
    from linspec.kernels.cpu.check import passes

    return passes(library)
