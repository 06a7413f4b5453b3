"""One registry for each plug-in axis: a name, what it makes, its options and the paper it comes from.

    DRAFTERS.build("prompt-lookup:max_ngram=3", context)

Packages add plug-ins by entry points of the group `linspec.AXIS`. One is loaded when its name is asked
for, all of them when all names are. A plug-in that cannot be loaded is named and left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from linspec.errors import ConfigError, WrongType
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.options import Setting, parse_options, read_spec, settings_of, short_options

T = TypeVar("T")

_log = logging.getLogger("linspec")


@dataclass(frozen=True)
class NoOptions:
    """The options of a plug-in that has none."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One registered plug-in: what `linspec list` prints about it."""

    name: str
    value: type[T]
    summary: str
    paper: str
    options: type[Any] | None
    facts: dict[str, str]

    @property
    def settings(self) -> list[Setting]:
        """What can be set in its spec."""
        return settings_of(self.options or NoOptions)


class Registry(Generic[T]):
    """Names of one axis (mixer, drafter, verifier, policy) and the plug-ins that they stand for.

    Args:
        axis: what a message calls the plug-ins.
        group: of the entry points that bring further plug-ins; None for no such group.
        beside: names that users write for no plug-in, such as 'none'.
        options: the options class of plug-ins that are registered without one.
        base: the class that plug-ins derive from; None for no such class.
        joined: the plug-in that specs with + between them stand for; its short option has them all.
    """

    def __init__(
        self,
        axis: str,
        group: str | None = None,
        *,
        beside: Sequence[str] = (),
        options: type[Any] | None = None,
        base: type[Any] | None = None,
        joined: str | None = None,
    ) -> None:
        self.axis, self.group, self.beside, self.options = axis, group, tuple(beside), options
        self.base, self.joined = base, joined
        self._entries: dict[str, Entry[T]] = {}
        self._broken: dict[str, str] = {}
        # entry points that were loaded, or tried
        self._seen: set[metadata.EntryPoint] = set()

    def register(
        self,
        name: str,
        *,
        summary: str,
        paper: str,
        options: type[Any] | None = None,
        **facts: str,
    ) -> Callable[[type[T]], type[T]]:
        """A decorator that registers a class; the class gets the attribute `name`.

        Args:
            name: one word without colon and comma.
            summary: what it does, in one line of `linspec list`.
            paper: where it comes from.
            options: a frozen dataclass whose fields are made by `option`.
            facts: further columns of `linspec list`, such as `cost` or `needs`.

        Raises:
            ConfigError: the name is taken or no sound name, or the options cannot be read from a spec.
        """
        if name in self._entries or name in self.beside:
            raise ConfigError(f"{self.axis} {name!r} is registered twice")
        if not name or set(name) & set(":, \t\n" if self.joined is None else ":,+ \t\n"):
            raise ConfigError(
                f"{self.axis} {name!r}: a name is one word without colons and commas"
                + (", and without +" if self.joined is not None else "")
            )
        options = options or self.options
        settings_of(options or NoOptions)

        def add(value: type[T]) -> type[T]:
            if isinstance(value, type):
                value.name = name  # type: ignore[attr-defined]  # every axis declares it
            self._entries[name] = Entry(name, value, summary, paper, options, facts)
            return value

        return add

    def build(self, spec: str, *context: object) -> T:
        """Make the plug-in that a spec (NAME or NAME:key=value,…) describes.

        The class, or its class method `build` if it has one, is called with `context` and, if the plug-in
        has options, with these.

        Raises:
            ConfigError: the name or a setting is unknown, a value breaks a rule, or the class is none of this
                axis.
        """
        entry, options = self.read(spec)
        self._check_class(entry)
        make: Any = getattr(entry.value, "build", entry.value)
        made: T = make(*context) if entry.options is None else make(*context, options)
        self._check_kind(entry, type(made))
        return made

    def _check_class(self, entry: Entry[T]) -> None:
        """Raise ConfigError for a class of another kind, or one that lacks methods."""
        if isinstance(entry.value, type) and not hasattr(entry.value, "build"):
            self._check_kind(entry, entry.value)
        lacking = ", ".join(sorted(getattr(entry.value, "__abstractmethods__", ())))
        if lacking:
            raise ConfigError(
                f"{self.axis} {entry.name!r} lacks {lacking}; write them in its class "
                f"{entry.value.__name__}, or use another one of `linspec list`"
            )

    def _check_kind(self, entry: Entry[T], made: type[Any]) -> None:
        """Raise ConfigError for a class that does not derive from that of the axis."""
        if self.base is None or issubclass(made, self.base):
            return
        # those of its own classes, not of what they derive from in other libraries
        own = [vars(kind) for kind in self.base.__mro__ if kind.__module__.startswith("linspec.")]
        found = {name for each in own for name in each if not name.startswith("_")}
        # first what has to be written
        must: frozenset[str] = getattr(self.base, "__abstractmethods__", frozenset())
        names = sorted(found, key=lambda name: (name not in must, name))
        lacking = shown(", ".join(name for name in names if not hasattr(made, name)))
        base = self.base.__name__
        raise ConfigError(
            f"{self.axis} {entry.name!r} is a {made.__name__}, which is no {base}"
            f"{f' and lacks {lacking}' if lacking else ''}; derive its class from {base}"
        )

    def read(self, spec: str) -> tuple[Entry[T], Any]:
        """The entry that a spec names, and its options; raises ConfigError as `build` does."""
        if not isinstance(spec, str):
            raise WrongType(
                f"a {self.axis} is a text such as NAME or NAME:key=value, got {shown(repr(spec))}; see "
                "`linspec list`"
            )
        name, settings = read_spec(spec)
        if self.joined is not None and len(self.parts(spec)) > 1:
            name, settings = self.joined, spec
        if name in self.beside and settings is not None:
            raise ConfigError(f"{self.axis} {name!r} takes no options; leave them out")
        entry = self.entry(name)
        if name == self.joined and entry.options is not None and settings:
            return entry, short_options(entry.options, settings, self.axis, spec)
        return entry, parse_options(entry.options or NoOptions, settings, self.axis, name)

    def parts(self, spec: str) -> list[str]:
        """The specs that `spec` joins by +, or itself alone.

        Options may hold a + too: behind a colon, another spec begins where a known name follows the +.
        """
        if read_spec(spec)[0] == self.joined:
            return [spec]
        first, *rest = spec.split("+")
        found = [first]
        for part in rest:
            name, _ = read_spec(part)
            if ":" not in found[-1] or name in self or name in self.beside:
                found.append(part)
            else:
                found[-1] += f"+{part}"
        return found

    def forget(self, name: str) -> None:
        """Remove `name`, for plug-ins that exist only for a while, such as those of a test."""
        del self._entries[name]

    def __getitem__(self, name: str) -> type[T]:
        entry = self.entry(name)
        self._check_class(entry)
        return entry.value

    def entry(self, name: str) -> Entry[T]:
        """The entry of `name`; raises ConfigError with the known names if there is none."""
        if not isinstance(name, str) or name not in self:
            raise self._unknown(name)
        return self._entries[name]

    def _unknown(self, name: object) -> ConfigError:
        if isinstance(name, str) and name in self._broken:
            return ConfigError(self._broken[name])
        names = (*self.beside, *sorted({*self._entries, *(p.name for p in self._points())}))
        foreign = (
            ""
            if self.group is None
            else "; a plug-in may be missing: import or install its package"
        )
        return ConfigError(
            f"unknown {self.axis} {shown(repr(name))}; known: {', '.join(names)}{foreign}"
            f"{did_you_mean(name, names)}"
        )

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._look_outside(name)
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        self._look_outside()
        return iter(self._entries.values())

    def names(self) -> list[str]:
        """All registered names in the order of registration."""
        self._look_outside()
        return list(self._entries)

    def _points(self) -> Iterable[metadata.EntryPoint]:
        """The entry points of this axis; nothing is imported for it."""
        return () if self.group is None else metadata.entry_points(group=self.group)

    def _look_outside(self, name: object = None) -> None:
        """Load the entry points of this axis, each once: that of one name, or all of them."""
        for point in self._points():
            if point in self._seen or name not in (None, point.name):
                continue
            # first, because what is loaded may ask for names
            self._seen.add(point)
            reason = self._load(point)
            if reason is not None:
                maker = f" of package {point.dist.name!r}" if point.dist is not None else ""
                message = (
                    f"{self.axis} {point.name!r}{maker} cannot be used: {reason}; update that package or "
                    "remove it"
                )
                self._broken[point.name] = message
                _log.warning(message)

    def _load(self, point: metadata.EntryPoint) -> str | None:
        """Load an entry point; returns why it registered no plug-in of its name, None if it did."""
        try:
            point.load()
        # some modules end the program that imports them
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {shown(str(error))}"
        return None if point.name in self._entries else f"{point.value} registers no such name"
