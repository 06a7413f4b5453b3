"""Checks of options that run before a verb begins: numbers within bounds, directories with a name.

Rate = Annotated[float | None, typer.Option(callback=real(above=0), help="Learning rate.")]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import typer

from linspec.errors import ConfigError
from linspec.utils.messages import shown

Number = int | float | None


def whole(least: int = 1, most: int = 2**31 - 1) -> Callable[..., Number]:
    """A check that a whole number lies in least..most."""

    def check(ctx: typer.Context, param: typer.CallbackParam, value: int | None) -> Number:
        if value is not None and value < least:
            raise _broken(_given_as(ctx, param), f"must be {least} or more", value)
        if value is not None and value > most:
            raise _broken(_given_as(ctx, param), f"must be at most {most}", value)
        return value

    return check


def real(
    *, above: float | None = None, least: float | None = None, most: float | None = None
) -> Callable[..., Number]:
    """A check that a number is finite, and above, at least or at most the given bounds."""
    bounds = ((f"above {above}", above), (f"{least} or more", least), (f"at most {most}", most))
    rule = " and ".join(["finite", *(text for text, bound in bounds if bound is not None)])

    def check(param: typer.CallbackParam, value: float | None) -> Number:
        if value is None:
            return None
        low = (above is None or value > above) and (least is None or value >= least)
        if not math.isfinite(value) or not low or (most is not None and value > most):
            raise _broken(_option(param), f"must be {rule}", value)
        return value

    return check


def named(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A check that a path to write to names a directory of its own."""
    if value is not None and value.name in ("", ".."):
        raise ConfigError(
            f"{_option(param)} must name a new directory, got {str(value)!r}, which is there already; "
            "give a name, such as ./model"
        )
    return value


def sources(param: typer.CallbackParam, value: list[str] | None) -> list[str] | None:
    """A check that no data source is the empty text, which would be the current directory."""
    if value is not None and not all(value):
        raise ConfigError(
            f"{_option(param)}: a data source has no name; give a file, a folder or 'stdlib'"
        )
    return value


def cache_dtype(value: str) -> str:
    """The kind of cache that a name stands for; raises ConfigError for an unknown one."""
    # the library imports torch, which --help must not wait for
    if value == "auto":
        return value
    from linspec.state.registry import kv_of

    return kv_of(value)


def _broken(name: str, rule: str, value: float) -> ConfigError:
    return ConfigError(f"{name} {rule}, got {shown(value)}; leave it out for the default")


def _given_as(ctx: typer.Context, param: typer.CallbackParam) -> str:
    """The flag, or the variable of the environment that the value came from."""
    source = ctx.get_parameter_source(param.name or "")
    from_environment = source is not None and source.name == "ENVIRONMENT"
    return str(param.envvar) if from_environment else _option(param)


def _option(param: typer.CallbackParam) -> str:
    return max(param.opts, key=len)


def check_serve_extra() -> None:
    """Raise ConfigError where what the server is built on is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import pydantic_settings  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}, which is not installed; pip install 'linspec[serve]'"
        ) from error
