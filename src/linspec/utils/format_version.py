"""The version of the files that linspec writes: `"format_version": "0.2"` in each JSON object of its own.

A file without one is of linspec 0.1. Files of any older version are read; one of a newer version is
refused by name, because what it says may mean something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from linspec.errors import CheckpointError, LinspecError
from linspec.utils.messages import shown

KEY = "format_version"
CURRENT = "0.2"
FIRST = "0.1"


def stamped(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the present version in front."""
    return {KEY: CURRENT, **data}


def check_format(
    data: Mapping[str, Any], where: object, error: type[LinspecError] = CheckpointError
) -> str:
    """The version of what was read from `where`; raises `error` for a newer or an unsound one."""
    version = data.get(KEY, FIRST)
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
        raise error(
            f"{where}: {KEY} must be two numbers like {CURRENT!r}, got {shown(repr(version))}; copy the "
            "file again"
        )
    if _numbers(version) > _numbers(CURRENT):
        raise error(
            f"{where} has {KEY} {version}, and this linspec knows {CURRENT} and older; install a newer "
            "linspec"
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
