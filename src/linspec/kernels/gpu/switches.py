"""Switches in the environment that choose how a GPU is used."""

from __future__ import annotations

import os
from collections.abc import Sequence

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown


def switch(name: str, words: Sequence[str]) -> str:
    """The word that the environment has for a switch, the first one if it has none, or an empty one.

    Raises ConfigError for any other word.
    """
    chosen = os.environ.get(name) or words[0]
    if chosen not in words:
        raise ConfigError(
            f"{name} must be one of {', '.join(words)}, got {shown(repr(chosen))}"
            f"{did_you_mean(chosen, words)}"
        )
    return chosen
