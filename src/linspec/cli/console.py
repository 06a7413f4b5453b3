"""What the command line shares: one object on stdout, everything else on stderr, and exit codes.

0 is success, 1 an error that linspec explains in one line, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer

from linspec.errors import ConfigError, InputError, LinspecError
from linspec.utils.files import cache_dir
from linspec.utils.messages import because, shown

P = ParamSpec("P")
R = TypeVar("R")

# longer messages are those of libraries, which quote whole files
_LONGEST_LINE = 1000
# how torch says it, in errors of no class of their own
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")

RESUME = "give the same command with --resume to go on, or without it if nothing was saved yet"
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
            except typer.Exit:
                raise
            except Exception as error:
                if os.environ.get("LINSPEC_DEBUG"):
                    raise
                say(explain(error))
            raise typer.Exit(1)

        return run

    return wrap


def explain(error: Exception) -> str:
    """One line for an error: what to do about it, or where the traceback of an unexpected one is kept."""
    if isinstance(error, LinspecError):
        return f"error: {_one_line(str(error))}"
    if isinstance(error, OSError):
        return f"error: {_one_line(because(error))}"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
        place = "GPU" if "CUDA" in str(error) else "machine"
        return (
            f"error: the memory of this {place} is used up ({_one_line(str(error)) or 'MemoryError'}); "
            "close other programs, or ask for less: a shorter context, fewer tokens or rows at once"
        )
    return (
        f"unexpected error: {type(error).__name__}: {_one_line(str(error))}; this is a fault of "
        f"linspec's: please report it with the traceback that is kept in {keep_traceback(error)}"
    )


def keep_traceback(error: Exception) -> Path:
    """The file that now holds the traceback: in the cache directory, or a temporary one."""
    text = "".join(traceback.format_exception(error))
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_dir() / "errors", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
    return Path("nowhere: no directory can be written")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"


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
    text = json.dumps(_finite(data), ensure_ascii=False)
    # names of files need not be Unicode
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


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
    for at, column in enumerate(columns):
        # what a line is about is never cut off; numbers may wrap on a narrow screen
        table.add_column(column, no_wrap=at == 0, overflow="fold")
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
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name:<{width}}  {_cell(value)}")


def print_rows(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """A table of records with the same keys, for people."""
    lines = list(rows)
    print_table(title, list(lines[0]) if lines else [], [list(line.values()) for line in lines])


def print_measured(result: Mapping[str, Any], rows: str = "") -> None:
    """A measurement for people: its list `rows`, if any, as a table, everything else as facts."""
    if rows:
        print_rows(rows, result[rows])
    print_facts({name: value for name, value in result.items() if name != rows})


def print_speed(result: Mapping[str, Any]) -> None:
    """What `bench` measured, for people."""
    print_facts({**result["machine"], **result["settings"]})
    print_rows("decoding", result["rows"])
    for left_out in result["skipped"]:
        say(f"skipped context {left_out['context']}: {left_out['reason']}")


def report_written(out: Path, as_json: bool, facts: Mapping[str, Any] | None = None) -> None:
    """Say where the result of a training verb lies, and in JSON the facts about it."""
    if as_json:
        print_json({"out": str(out), **(facts or {})})
    else:
        say(f"written to {out}")


def place_on(device: str, threads: int | None) -> str:
    """Apply --threads; returns the device, checked."""
    # torch takes seconds to import: --help must not wait for it
    from linspec.bench.machine import set_threads
    from linspec.kernels.device import pick_device

    set_threads(threads)
    return pick_device(device)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of --prompt TEXT, --prompt - or --prompt-file; raises InputError without one."""
    if (prompt is None) == (file is None):
        raise ConfigError("give one of --prompt TEXT, --prompt - (standard input) or --prompt-file")
    if file is not None:
        text = read_text(file)
    elif prompt == "-":
        text = _decode(_standard_input(), "standard input")
    else:
        text = prompt or ""
    if not text:
        raise InputError("the prompt is empty; give at least one character")
    return text


def read_text(file: Path) -> str:
    """The text in a file; raises InputError where it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {because(error)}") from error
    except ValueError as error:
        raise InputError(f"{shown(str(file))} is no path: {error}; check it") from error
    return _decode(content, str(file))


def _standard_input() -> bytes:
    # Python has no stdin at all where the caller closed it
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed; give --prompt TEXT, or pipe the text in")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"cannot read standard input: {because(error)}") from error


def _decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start}); convert it") from error


def numbers(text: str, option: str) -> list[int]:
    """The numbers of a list like 128,2048; raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(
            f"{option} takes numbers separated by commas, got {shown(repr(text))}"
        ) from error


def words(text: str) -> list[str]:
    """The words of a list like int8,int4."""
    return [part.strip() for part in text.split(",") if part.strip()]
