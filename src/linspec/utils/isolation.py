"""Find the item that made a call raise: repeat the call for each item alone.

    for item, result in zip(items, isolated(items, compute)):
        if isinstance(result, Exception): ...     # this item's own error

The call must be repeatable: a call that raised must not change the result of the next one.
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
