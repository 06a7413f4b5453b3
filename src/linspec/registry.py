"""One registry for each plug-in axis: a name, a factory and the paper it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from linspec.errors import ConfigError
from linspec.messages import did_you_mean, shown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One registered plug-in: what `linspec list` prints about it."""

    name: str
    value: T
    summary: str
    paper: str
    facts: dict[str, str]


class Registry(Generic[T]):
    """Names of one axis (mixer, drafter, verifier, policy) and what they stand for."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, summary: str, paper: str, **facts: str) -> Callable[[T], T]:
        """Decorator that files a class or function under `name`."""

        def add(value: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.axis} {name!r} is registered twice")
            self._entries[name] = Entry(name, value, summary, paper, facts)
            return value

        return add

    def forget(self, name: str) -> None:
        """Remove `name`; for plug-ins that live only for a while, such as a test's."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entry(name).value

    def entry(self, name: str) -> Entry[T]:
        """The entry of `name`; raises ConfigError with the known names if there is none."""
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ConfigError(
                f"unknown {self.axis} {shown(repr(name))}; known: {known}"
                f"{did_you_mean(name, self._entries)}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        """All registered names in the order of registration."""
        return list(self._entries)
