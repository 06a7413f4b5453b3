"""What the command line shares: one object on stdout, everything else on stderr, and exit codes.

0 is success, 1 an error that linspec explains in one line, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer

from linspec.errors import ConfigError, InputError, LinspecError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

RESUME = "give the same command with --resume to go on"
AGAIN = "nothing was changed; give the same command again"


def guarded(after_interrupt: str = AGAIN) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a verb: errors become one line and an exit code; LINSPEC_DEBUG=1 shows where."""

    def wrap(verb: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(verb)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return verb(*args, **kwargs)
            except KeyboardInterrupt:
                say(f"\ninterrupted: {after_interrupt}")
                raise typer.Exit(130) from None
            except BrokenPipeError:
                # the reader has what it wanted; the interpreter must not flush into the closed pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(0) from None
            except LinspecError as error:
                if os.environ.get("LINSPEC_DEBUG"):
                    raise
                say(f"error: {_one_line(error)}")
            except (OSError, MemoryError, RuntimeError) as error:
                if os.environ.get("LINSPEC_DEBUG") or isinstance(error, typer.Exit):
                    raise
                say(f"error: {_one_line(error)} (LINSPEC_DEBUG=1 shows where)")
            raise typer.Exit(1)

        return run

    return wrap


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_stdout(active: bool = True) -> Iterator[None]:
    """While it lasts, whatever a library prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While it lasts, garbage is not looked for; what was imported stays out of later searches.

    A fifth of the time of torch's import is spent on looking for garbage among what stays.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout; what JSON cannot say (NaN, infinity) becomes null."""
    print(json.dumps(_finite(data), ensure_ascii=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for people, on stdout."""
    # most verbs print none, and every verb waits for what is imported
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(each) for each in row))
    Console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values for people, on stdout."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"{name:<{width}}  {_cell(value)}")


def print_measured(result: Mapping[str, Any], rows: str = "") -> None:
    """A measurement for people: its list `rows`, if any, as a table, everything else as facts."""
    if rows:
        lines = result[rows]
        print_table(rows, list(lines[0]) if lines else [], [list(line.values()) for line in lines])
    print_facts({name: value for name, value in result.items() if name != rows})


def print_speed(result: Mapping[str, Any]) -> None:
    """What `bench` measured, for people."""
    print_facts({**result["machine"], **result["settings"]})
    rows = result["rows"]
    print_table("decoding", list(rows[0]) if rows else [], [list(row.values()) for row in rows])
    for left_out in result["skipped"]:
        say(f"skipped context {left_out['context']}: {left_out['reason']}")


def report_written(out: Path, as_json: bool) -> None:
    """Say where the result of a training verb lies."""
    if as_json:
        print_json({"out": str(out)})
    else:
        say(f"written to {out}")


def place_on(device: str, threads: int | None) -> str:
    """Apply --threads; returns the device, checked."""
    # torch takes seconds to import: --help must not wait for it
    from linspec.bench.machine import pick_device, set_threads

    set_threads(threads)
    return pick_device(device)


def sources(data: list[str] | None) -> list[str]:
    """What --data names; the standard library when it is left out."""
    return data or ["stdlib"]


def configure(kind: Callable[..., C], options: Mapping[str, Any]) -> C:
    """The configuration `kind` of those options that it knows and the user gave.

    What was not given (None) keeps the default of the library.
    """
    names = inspect.signature(kind).parameters
    chosen = {name: options[name] for name in names if options.get(name) is not None}
    return kind(**chosen)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of --prompt TEXT, --prompt - or --prompt-file; raises InputError without one."""
    if (prompt is None) == (file is None):
        raise ConfigError("give one of --prompt TEXT, --prompt - (standard input) or --prompt-file")
    if file is not None:
        try:
            text = _decode(file.read_bytes(), str(file))
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
    elif prompt == "-":
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = prompt or ""
    if not text:
        raise InputError("the prompt is empty; give at least one character")
    return text


def _decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start}); convert it") from error


def above_zero(number: int | None, option: str) -> int:
    """The number, 0 when it was not given; raises ConfigError for one below 1."""
    if number is not None and number < 1:
        raise ConfigError(f"{option} must be 1 or more, got {number}; leave it out for the default")
    return number or 0


def numbers(text: str, option: str) -> list[int]:
    """The numbers of a list like 128,2048; raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} takes numbers separated by commas, got {text!r}") from error
