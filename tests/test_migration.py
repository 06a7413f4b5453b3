"""docs/migration.md names what was renamed, and what it names is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from linspec.cli import app
from linspec.cli.verbs import MOVED, RENAMED, WORDS
from linspec.train.linearize_recipe import OLD_NAMES

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if line.startswith("|")]


def named_together(*names: str) -> bool:
    """Whether one line of a table has all of these."""
    return any(all(name in line for name in names) for line in LINES)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_page_names_every_renamed_flag(old: str, new: str) -> None:
    assert named_together(f"`{old}`", f"`{new}`")


def test_the_page_names_every_flag_and_verb_that_became_words() -> None:
    for first, words in WORDS.items():
        for flag, word in words.items():
            assert named_together(f"`{flag}`", f"`linspec {first} {word} MODEL`")
    for words_of_old, module in MOVED.items():
        assert named_together(f"`linspec {' '.join(words_of_old)}`", f"`python -m {module}`")
    for old, new in OLD_NAMES.items():
        assert named_together(f"{old}=", f"{new}=")


def test_new_flags_and_modules_of_the_page_are_there() -> None:
    options = {name for command in _commands() for each in command.params for name in each.opts}
    assert set(RENAMED.values()) <= options
    assert not set(RENAMED) & options, "an old name is no option of its own"
    places = [line.split("|")[2] for line in LINES if line.startswith("| `linspec.")]
    for module in re.findall(r"`(linspec\.[\w.]+)`", " ".join(places)):
        assert importlib.util.find_spec(module) is not None, module


def _commands() -> list[object]:
    import typer.main

    group = typer.main.get_command(app)
    return list(group.commands.values())  # type: ignore[attr-defined]
