"""Where a JSON value ends in a text that comes in pieces."""

from __future__ import annotations


class JsonSpan:
    """Follows an object or array character by character; knows how deep it is, and when it is over.

    Attributes:
        depth: brackets that are open.
    """

    def __init__(self) -> None:
        self.depth, self._characters = 0, list[str]()
        self._quoted = self._escaped = False

    @property
    def text(self) -> str:
        """What belongs to the value so far."""
        return "".join(self._characters)

    @property
    def over(self) -> bool:
        """Whether the last bracket is closed."""
        return bool(self._characters) and not self.depth

    def push(self, character: str) -> None:
        """Add the next character of the value."""
        self._characters.append(character)
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
