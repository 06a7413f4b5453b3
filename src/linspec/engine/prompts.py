"""What a caller gives as prompts: text or token ids, one or several.

as_prompts("def f(")            # ["def f("]
as_prompts([5, 6])              # [[5, 6]]: token ids of one prompt
token_ids(np.array([5, 6]), 8)  # [5, 6], checked against the vocabulary
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Set
from typing import Any

from linspec.decoding.request import Request
from linspec.errors import InputError, WrongType
from linspec.utils.messages import shown

Prompt = str | Sequence[int] | Request


def as_prompts(prompts: Any) -> list[Prompt]:
    """The prompts in what a caller gave; one prompt, as text, token ids or a request, is a list of one."""
    if isinstance(prompts, str | Request):
        return [prompts]
    items = list(_iterable(prompts))
    return [items] if items and all(_as_id(item) is not None for item in items) else items


def token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """Whole numbers of any library as token ids; raises WrongType or InputError for what is none."""
    found: list[int] = []
    for item in _iterable(prompt):
        number = _as_id(item)
        if number is None:
            raise WrongType(
                f"a prompt is a text or a list of token ids, got {shown(repr(item))} in one; give "
                "whole numbers"
            )
        if not 0 <= number < vocab_size:
            raise InputError(
                f"the prompt names token {shown(number)}, but the model has {vocab_size} tokens: ids go "
                f"from 0 to {vocab_size - 1}"
            )
        found.append(number)
    return found


def _iterable(prompt: Any) -> Iterable[Any]:
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise WrongType("a prompt of bytes could be text or token ids; give prompt.decode()")
    if isinstance(prompt, dict | Set) or not isinstance(prompt, Iterable):
        raise WrongType(
            f"a prompt is a text or a list of token ids, got {shown(repr(prompt))}; give one of these"
        )
    return prompt


def _as_id(item: Any) -> int | None:
    """A whole number, also numpy's and torch's; None for anything else."""
    if isinstance(item, bool) or getattr(item, "ndim", False):
        return None
    try:
        return operator.index(item)
    except TypeError:
        return None
