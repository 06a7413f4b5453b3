"""The options that say of which language an output is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linspec.cli.console import importing, read_text
from linspec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Language:
    """What the output must be, from its first character to its last; at most one of these."""

    json_schema: Annotated[
        str | None, typer.Option(help="JSON of this schema: a file, or the schema itself.")
    ] = None
    regex: Annotated[str | None, typer.Option(help="Text that this expression matches.")] = None
    grammar: Annotated[
        Path | None, typer.Option(help="Text of the grammar in this file: Lark's or GBNF.")
    ] = None

    def to_library(self) -> Any:
        """The Grammar of the library; None if the output may be anything."""
        with importing():
            from linspec.decoding.sampling import Grammar

        given = {
            "--json-schema": self.json_schema,
            "--regex": self.regex,
            "--grammar": self.grammar,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ConfigError(f"give one of {' and '.join(named)}: an output is of one language")
        if self.json_schema is not None:
            told = self.json_schema.lstrip().startswith("{")
            return Grammar.json_schema(
                self.json_schema if told else read_text(Path(self.json_schema))
            )
        if self.regex is not None:
            return Grammar.regex(self.regex)
        return None if self.grammar is None else Grammar.cfg(read_text(self.grammar))
