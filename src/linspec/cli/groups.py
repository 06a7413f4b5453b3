"""Options that several verbs share, as one parameter: a dataclass whose fields are the options.

@grouped
def chat(model: Model, sampling: Sampling, decoding: Decoding) -> None: ...

A group may tell in `usual` what stands in the help as the default of an option that is None.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints


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
    for name, text in getattr(group, "usual", {}).items():
        hints[name] = _told(hints[name], text)
    empty = inspect.Parameter.empty
    return [
        _keyword(f.name, empty if f.default is MISSING else f.default, hints[f.name])
        for f in fields(group)
    ]


def _told(hint: Any, default: str) -> Any:
    """The type of an option whose help names the default, which the library has."""
    kind, option = get_args(hint)
    option = copy(option)
    option.show_default = default
    return Annotated[kind, option]


def _keyword(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
