"""Checks of what a user asks of a measurement, made before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from linspec.errors import ConfigError


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError unless every given name is known."""
    names = list(known)
    strange = [name for name in given if name not in names]
    if strange:
        raise ConfigError(f"unknown {what} {', '.join(strange)}; known: {', '.join(names)}")


def check_above_zero(name: str, value: float | None, otherwise: str) -> None:
    """Raises ConfigError unless a number is finite and above 0; None is not checked.

    otherwise: what leaving the option out means.
    """
    # "not >" instead of "<=": NaN must fail too
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(
            f"{name} must be a finite number above 0, got {value}; leave it out for {otherwise}"
        )


def check_share(name: str, value: float) -> None:
    """Raises ConfigError unless a share lies in 0..1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be from 0 to 1, got {value}")


def check_counts(least: int = 1, **given: int | Iterable[int]) -> None:
    """Raises ConfigError unless every count, or each of a list of counts, reaches `least`."""
    for name, value in given.items():
        counts = [value] if isinstance(value, int) else list(value)
        if not counts:
            raise ConfigError(f"{name} must name at least one number")
        if min(counts) < least:
            raise ConfigError(f"{name} must be {least} or more, got {min(counts)}")


def check_places(out: Path, page: Path | None) -> None:
    """Raises ConfigError unless `out` can be a folder of its own, and `page` a file."""
    # an empty name is the present folder too
    if out == Path():
        raise ConfigError("--out is the present folder; name one for the cells alone, as runs/x")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    if page is not None and (page == Path() or page.is_dir()):
        raise ConfigError(f"--page {page} is a folder; name a file, as {page / 'page.md'}")


def check_named(**given: str) -> None:
    """Raises ConfigError for an empty name: as a path it would be the present folder."""
    for option, value in given.items():
        if not value:
            raise ConfigError(f"--{option} is empty; give a name or a path, or leave it out")
