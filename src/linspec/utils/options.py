"""The options of a plug-in: a frozen dataclass with a help text for each field, read from a spec.

    @dataclass(frozen=True)
    class SuffixOptions:
        max_depth: int = option("tokens of the longest context", default=32)

    parse_options(SuffixOptions, "max_depth=16", "drafter", "suffix")     # SuffixOptions(16)

A spec is NAME, NAME:key=value,key=value or NAME:VALUE. The last sets the one field that is `short`. A
comma ends a value where a key follows it, so paths may hold commas and colons.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

# longer whole numbers are no sizes, and Python itself refuses to read the longest
_DIGITS = 18
_NEXT = re.compile(r",\s*(?=[A-Za-z_][\w-]*\s*=)")
_SETTING = re.compile(r"\s*([A-Za-z_][\w-]*)\s*=(.*)", re.DOTALL)


def option(help: str, *, default: Any = dataclasses.MISSING, short: bool = False) -> Any:
    """A field of the options of a plug-in, which are a frozen dataclass.

    Its type is int, float, bool, str or Path, or one of them or None. A spec such as
    'prompt-lookup:max_ngram=3' sets it.

    Args:
        help: what it means, as `linspec list` shows it.
        default: its value if a spec does not set it; without a default every spec must.
        short: whether 'NAME:VALUE' sets this field.
    """
    return dataclasses.field(default=default, metadata={"help": help, "short": short})


def read_spec(text: str) -> tuple[str, str | None]:
    """A plug-in's name and the settings behind it, None where there is no colon."""
    name, colon, rest = text.partition(":")
    return name, rest if colon else None


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a plug-in's options, as it is shown."""

    name: str
    kind: str
    default: str | None
    help: str
    short: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; default is None where the setting has to be given."""
        return {key: getattr(self, key) for key in ("name", "kind", "default", "help")}


def settings_of(options: type[Any]) -> list[Setting]:
    """Every field of an options class; raises ConfigError for a class that cannot be read from a spec."""
    if not dataclasses.is_dataclass(options) or not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # dataclasses says so nowhere else
        raise ConfigError(f"options {options!r} must be a frozen dataclass")
    return [_setting(field, kinds) for field, kinds in _fields(options)]


def _fields(options: type[Any]) -> list[tuple[dataclasses.Field[Any], tuple[type[Any], ...]]]:
    """Fields that can be set, with the types that each may have."""
    hints = typing.get_type_hints(options)
    return [(each, _kinds(each.name, hints)) for each in dataclasses.fields(options) if each.init]


def _kinds(name: str, hints: Mapping[str, Any]) -> tuple[type[Any], ...]:
    hint = hints[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if not set(kinds) <= {*_READERS, types.NoneType} or len(set(kinds) - {types.NoneType}) != 1:
        raise ConfigError(
            f"option {name} is of type {hint}; an option is an int, float, bool, str or Path, or one of "
            "them or None"
        )
    return kinds


def _setting(field: dataclasses.Field[Any], kinds: tuple[type[Any], ...]) -> Setting:
    text = field.metadata.get("help")
    if not text:
        raise ConfigError(
            f"option {field.name} has no help text: option('what it means', default=…)"
        )
    default = None if field.default is dataclasses.MISSING else _text(field.default)
    kind = " or ".join("none" if k is types.NoneType else k.__name__.lower() for k in kinds)
    return Setting(field.name, kind, default, text, bool(field.metadata.get("short")))


def _text(value: object) -> str:
    """A value as a spec writes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_options(options: type[Any], settings: str | None, axis: str, name: str) -> Any:
    """The options that the settings of a spec give; raises ConfigError that names the plug-in."""
    spec = name if settings is None else f"{name}:{settings}"
    given = dict(_given(options, settings, f"{axis} {name!r}"))
    for each in settings_of(options):
        if each.default is None and each.name not in given:
            way = each.name.upper() if each.short else f"{each.name}=VALUE"
            raise ConfigError(f"{axis} {name!r} needs {each.name}, {each.help}: {name}:{way}")
    return _made(options, given, axis, spec)


def short_options(options: type[Any], value: str, axis: str, spec: str) -> Any:
    """The options whose short field has the text `value` as it stands, with its commas and colons."""
    short = next(each.name for each in settings_of(options) if each.short)
    return _made(options, {short: value.removeprefix(f"{short}=")}, axis, spec)


def _made(options: type[Any], given: Mapping[str, Any], axis: str, spec: str) -> Any:
    try:
        return options(**given)
    except ValueError as error:
        raise ConfigError(f"{axis} {shown(repr(spec))}: {error}") from error


def _given(options: type[Any], settings: str | None, who: str) -> Iterator[tuple[str, Any]]:
    kinds = {field.name: kinds for field, kinds in _fields(options)}
    seen: set[str] = set()
    for key, text in _pairs(options, settings, who):
        if key not in kinds:
            raise ConfigError(
                f"{who} has no option {shown(repr(key))}; {_known(kinds)}{did_you_mean(key, kinds)}"
            )
        if key in seen:
            raise ConfigError(f"{who}: {key} is given twice; leave one out")
        seen.add(key)
        yield key, _value(text, kinds[key], f"{who}: {key}")


def _known(names: Mapping[str, object]) -> str:
    return f"known: {', '.join(names)}" if names else "it takes none"


def _pairs(options: type[Any], settings: str | None, who: str) -> Iterator[tuple[str, str]]:
    """Keys and the text of their values."""
    if settings is None:
        return
    if not settings:
        raise ConfigError(
            f"{who}: nothing follows the colon; leave the colon out or name a setting"
        )
    for place, part in enumerate(_NEXT.split(settings)):
        found = _SETTING.fullmatch(part)
        short = [each.name for each in settings_of(options) if each.short]
        if found:
            yield found[1], found[2].strip()
        elif place == 0 and short:
            yield short[0], part
        else:
            names = {each.name: each for each in settings_of(options)}
            raise ConfigError(
                f"{who}: {shown(repr(part))} is no setting; write key=value, with commas between; "
                f"{_known(names)}"
            )


def _value(text: str, kinds: tuple[type[Any], ...], where: str) -> Any:
    """A value of the first kind; 'none' where there may be none."""
    if types.NoneType in kinds and text.lower() == "none":
        return None
    kind = next(k for k in kinds if k is not types.NoneType)
    rule, read = _READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        none = " or none" if types.NoneType in kinds else ""
        raise ConfigError(f"{where} must be {rule}{none}, got {shown(repr(text))}") from None


def _whole(text: str) -> int:
    if not re.fullmatch(rf"[+-]?[0-9]{{1,{_DIGITS}}}", text):
        raise ValueError(text)
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or not text.isascii() or "_" in text:
        raise ValueError(text)
    return number


def _some(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: (f"a whole number of at most {_DIGITS} digits", _whole),
    float: ("a finite number", _real),
    str: ("a text", _some),
    Path: ("a path", lambda text: Path(_some(text))),
}
