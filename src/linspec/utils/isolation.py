"""Whose fault it was: a call for many that raises is repeated for each alone.

    for item, result in zip(items, isolated(items, compute)):
        if isinstance(result, Exception): ...     # this item's own error

The call must be repeatable: what it did before it raised changes nothing about the next result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def isolated(
    items: Sequence[Item], call: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result | Exception]:
    """The result of each item by one `call`; where that raises, each item's own result or error."""
    try:
        return list(call(items)) if items else []
    except Exception as error:
        if len(items) == 1:
            return [error]
    return [each for item in items for each in isolated([item], call)]
