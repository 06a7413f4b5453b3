"""Parts that a server has where their modules are there: metrics, the page.

Such a module may have `observer(model) -> Observer`, one for each worker, and `mount(app, served)`, which
adds routes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from fastapi import FastAPI

from linspec.serve.observers import Observer
from linspec.serve.served import Served

_NAMES = ("linspec.serve.metrics", "linspec.serve.loads", "linspec.serve.page")


@cache
def _parts() -> tuple[ModuleType, ...]:
    return tuple(import_module(name) for name in _NAMES if find_spec(name) is not None)


def observers(model: str) -> list[Observer]:
    """What watches the worker of a model."""
    return [each.observer(model) for each in _parts() if hasattr(each, "observer")]


def mount(app: FastAPI, served: Served) -> None:
    """Add the routes of all parts."""
    for each in _parts():
        if hasattr(each, "mount"):
            each.mount(app, served)
