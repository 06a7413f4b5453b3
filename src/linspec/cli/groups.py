"""Options that several verbs share, as one parameter: a dataclass whose fields are the options.

@grouped
def chat(model: Model, sampling: Sampling, decoding: Decoding) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` as typer reads it: each parameter that is a dataclass stands for one option a field."""
    hints = get_type_hints(verb, include_extras=True)
    plain, groups = list[inspect.Parameter](), dict[str, type[Any]]()
    for name, parameter in inspect.signature(verb).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            plain += _options(hints[name])
        else:
            plain.append(_keyword(name, parameter.default, hints[name]))

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)})
            for name, group in groups.items()
        }
        verb(**given, **made)

    run.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]  # what inspect reads
    run.__annotations__ = {each.name: each.annotation for each in plain}
    return run


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        _keyword(f.name, empty if f.default is MISSING else f.default, hints[f.name])
        for f in fields(group)
    ]


def _keyword(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
