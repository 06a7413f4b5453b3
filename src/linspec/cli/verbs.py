"""How verbs of two words are found (`bench load` beside `bench MODEL`), what became of old verbs and
flags, and how wrong usage ends: in one line and with 2.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from linspec.cli.console import explain, say
from linspec.utils.messages import did_you_mean, shown

# what `linspec eval MODEL` means, without a second word
DEFAULTS = {"eval": "eval perplexity", "bench": "bench speed"}
# verbs of 0.1.0 that measure more than linspec itself: modules that run from a clone
MOVED = {
    ("study",): "studies.linearized_llm",
    ("bench", "peers"): "benchmarks.peers",
}
# flags of 0.1.0: they still work, and the verb says what they are called now
RENAMED = {"--kv": "--kv-cache-dtype", "--rows": "--exact-tokens"}
# ... and those that became a word of their own
WORDS = {
    "eval": {"--recall": "recall", "--repeats": "repeats", "--by-position": "positions"},
}
_LONGEST_LINE = 1000
# typer re-exports only some of click's errors; this is the base of all that mean wrong usage
UsageError: Any = typer.BadParameter.__mro__[1]


class _OneLine:
    """A command whose every failure is one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the verb that `args` name, and exit with its code."""
        try:
            code = super().main(  # type: ignore[misc]  # of what it is mixed into
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except UsageError as error:
            code = _wrong_usage(error)
        except typer.Abort:
            code = 130
        # options are checked before the verb begins
        except Exception as error:
            if os.environ.get("LINSPEC_DEBUG"):
                raise
            say(explain(error))
            code = 1
        sys.exit(code)


class Verb(_OneLine, TyperCommand):
    """A command of its own, which knows the old names of its flags."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own class of contexts
        """Take an old flag as the new one, and say so."""
        found = _with_new_names(args, self.params)
        _check_names(args, found)
        for old, new in zip(args, found, strict=True):
            if old != new:
                say(f"note: {old.partition('=')[0]} is now called {new.partition('=')[0]}")
        return super().parse_args(ctx, found)


class Verbs(_OneLine, TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own class of contexts
        """Join the words of a verb of two; a verb that moved is answered with the new command."""
        for old, module in MOVED.items():
            if tuple(args[: len(old)]) == old:
                print(_moved(old, module, args[len(old) :]), file=sys.stderr)
                ctx.exit(2)
        _check_verb(args, self.commands)
        return super().parse_args(ctx, _joined(args, self.commands))


def epilog(name: str, example: str, names: Sequence[str]) -> str:
    """What the help of a verb ends with; the verb that needs no second word tells of the others."""
    told = f"Example: linspec {name} {example}".rstrip()
    first = next((first for first, default in DEFAULTS.items() if default == name), None)
    if first is None:
        return told
    others = [each for each in names if each.startswith(f"{first} ") and each != name]
    word = others[0].removeprefix(f"{first} ")
    return (
        f"{told}\n\n`linspec {first} MODEL` is the same. Also: {', '.join(others)}. A directory with the "
        f"name of one is written ./{word}."
    )


def _joined(args: list[str], commands: Mapping[str, Any]) -> list[str]:
    """The arguments with a verb of two words as one: the default one where no second word is known."""
    if not args or args[0] not in DEFAULTS:
        return args
    first, rest = args[0], args[1:]
    _check_words(first, rest, commands)
    if rest and f"{first} {rest[0]}" in commands:
        return [f"{first} {rest[0]}", *rest[1:]]
    for flag, word in WORDS.get(first, {}).items():
        if flag in rest:
            say(f"note: linspec {first} MODEL {flag} is now called linspec {first} {word} MODEL")
            return [f"{first} {word}", *(each for each in rest if each != flag)]
    if rest and not rest[0].startswith("-") and not Path(rest[0]).exists():
        _check_word(first, rest[0], commands)
    return [DEFAULTS[first], *rest]


def _check_verb(args: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Raise UsageError for a first word that is no verb; without any, the help says what there is."""
    known = dict.fromkeys(name.partition(" ")[0] for name in commands)
    if args and not args[0].startswith("-") and args[0] not in {*known, *commands}:
        raise UsageError(f"no such verb: {shown(args[0])}{did_you_mean(args[0], known)}")


def _check_words(first: str, rest: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Raise UsageError for flags of 0.1.0 of which nobody can say which command they mean now."""
    given = [flag for flag in WORDS.get(first, {}) if flag in rest]
    second = bool(rest) and f"{first} {rest[0]}" in commands
    if len(given) > 1 or (given and second):
        ways = " and ".join(f"linspec {first} {WORDS[first][flag]} MODEL" for flag in given)
        raise UsageError(
            f"{' and '.join(given)}: what linspec {first} measured with it is now {ways}; give one command "
            "at a time"
        )


def _check_word(first: str, word: str, commands: Mapping[str, Any]) -> None:
    """Raise UsageError for what is no model here and nearly a second word."""
    words = [name.removeprefix(f"{first} ") for name in commands if name.startswith(f"{first} ")]
    if near := difflib.get_close_matches(word, words, n=1, cutoff=0.8):
        raise UsageError(
            f"no such verb or model: {first} {word}; did you mean {first} {near[0]!r}?"
        )


def _check_names(args: Sequence[str], found: Sequence[str]) -> None:
    """Raise UsageError where an option is given by its old name and by its new one."""
    names = {old.partition("=")[0]: new for old, new in zip(args, found, strict=True) if old != new}
    for old, new in names.items():
        name = new.partition("=")[0]
        if any(each.partition("=")[0] == name for each in args):
            raise UsageError(f"{old} and {name} are two names of one option; give one of them")


def _with_new_names(args: Sequence[str], params: Sequence[Any]) -> list[str]:
    """`args` with old flags replaced; values of options, and what follows `--`, stay as they are."""
    options = [each for each in params if each.param_type_name == "option"]
    known = {name: each for each in options for name in each.opts}
    found: list[str] = []
    is_value = False
    for at, arg in enumerate(args):
        if arg == "--" and not is_value:
            return [*found, *args[at:]]
        name, sign, value = arg.partition("=")
        if not is_value and RENAMED.get(name) in known:
            name = RENAMED[name]
        found.append(name + sign + value)
        option = None if is_value or sign else known.get(name)
        is_value = option is not None and not option.is_flag
    return found


def _wrong_usage(error: Any) -> int:
    """One line about it, with the way to the help; without any verb, the help itself."""
    if error.message.startswith("Usage:"):
        error.show()
        return int(error.exit_code)
    command = error.ctx.command_path if error.ctx else "linspec"
    # an option without its value has a name too, and nothing like it
    near = getattr(error, "possibilities", None)
    if near and hasattr(error, "option_name"):
        said = error.message + did_you_mean(error.option_name, near)
    else:
        said = error.format_message()
    said = " ".join(said.split()).rstrip(".") + _maybe_a_directory(error, command)
    say(f"error: {said[:_LONGEST_LINE]}; see {command} --help")
    return int(error.exit_code)


def _maybe_a_directory(error: Any, command: str) -> str:
    """A clause for a model that is missing because its directory has the name of a verb."""
    word = command.rpartition(" ")[2]
    missing = getattr(getattr(error, "param", None), "param_type_name", "") == "argument"
    return f"; the directory {word} is written ./{word}" if missing and Path(word).is_dir() else ""


def _moved(old: tuple[str, ...], module: str, rest: list[str]) -> str:
    new = shlex.join(["python", "-m", module, *rest])
    return f"error: linspec {' '.join(old)} now runs from a clone of linspec's repository: {new}"
