"""Sizes and other settings, checked by name: a whole number, a positive number, one of some words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from linspec.errors import ConfigError, WrongType
from linspec.utils.messages import did_you_mean, quoted, shown

# the largest accepted value of each size: far beyond every known model, far below what makes
# a shape hang or a product of sizes leave 64 bits
MOST = 2**31 - 1
LARGEST = {
    "vocab_size": 2**24,
    "width": 2**20,
    "layers": 2**10,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_width": 2**16,
    "mlp_width": 2**24,
    "blocks": 2**8,
    "taps": 2**16,
    "features": 2**20,
    "group": 2**24,
    "span": 2**24,
    "seed": 2**63 - 1,
    "max_batch": 2**16,
    "draft nodes": 10**9,
}


def check_sizes(config: object, names: str, *, least: int = 1) -> None:
    """Raise ConfigError unless `check_size` accepts all the named (space-separated) sizes of `config`."""
    for name in names.split():
        check_size(name, getattr(config, name), least=least)


def check_size(name: str, value: object, *, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` to the largest accepted one."""
    most = LARGEST.get(name, MOST)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a whole number, got {quoted(value)}")
    if value < least:
        raise ConfigError(f"{name} must be {least} or more, got {quoted(value)}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, got {quoted(value)}")


def check_bytes(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a whole number of bytes above 0; memory ends beyond all sizes."""
    check_size(name, min(value, 1) if type(value) is int else value)


_UNITS = {"B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)}


def bytes_of(name: str, value: object) -> int:
    """A number of bytes, or a text such as '512MB' or '1.5 GiB'; raises ConfigError for anything else."""
    number: object = value
    if isinstance(value, str) and (
        found := re.fullmatch(r"([\d.]+)\s*([KMGT]?i?B)?", value.strip())
    ):
        unit = found[2] or "B"
        with suppress(ValueError, KeyError, OverflowError):
            number = int(float(found[1]) * _UNITS[unit])
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(
            f"{name} must be a number of bytes above 0, such as 500000000, '512MB' or '2GiB', got "
            f"{quoted(value)}"
        )
    return number


def check_positive(name: str, value: object, *, zero: bool = False) -> None:
    """Raise ConfigError unless `value` is a finite number above 0, or 0 where that is allowed."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if not 0 < number < math.inf and not (zero and number == 0):
        rule = "0 or more" if zero else "above 0"
        raise ConfigError(f"{name} must be finite and {rule}, got {quoted(value)}")


def check_lengths(name: str, sizes: object, *, least: int = 1, empty: bool = False) -> None:
    """Raise WrongType or ConfigError unless `sizes` are whole numbers, at least one if not `empty`."""
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Sequence):
        raise WrongType(f"{name} takes whole numbers in a list, got {shown(repr(sizes))}")
    if not sizes and not empty:
        raise ConfigError(f"{name} has no numbers; give one or more")
    for size in sizes:
        check_size(name, size, least=least)


def check_share(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in 0..1, got {quoted(value)}")


def check_instance(name: str, value: object, *kinds: type[Any], none: bool = False) -> None:
    """Raise WrongType unless `value` is of one of the `kinds`, or None where that is allowed."""
    if isinstance(value, kinds) or (none and value is None):
        return
    known = [kind.__name__ for kind in kinds] + ["None"] * none
    raise WrongType(f"{name} must be of type {' or '.join(known)}, got {shown(repr(value))}")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of the `known` words."""
    if value not in known:
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}, got {shown(repr(value))}"
            f"{did_you_mean(value, known)}"
        )
