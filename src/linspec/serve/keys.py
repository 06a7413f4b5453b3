"""Bearer keys: several, each with a name, of which only hashes are kept.

    keys = Keys.read(Path("keys.txt"))    # lines NAME:SHA256; `printf %s "$KEY" | sha256sum` writes one
    keys.name_of("Bearer sk-...")         # the name, or None

Keys are long random texts, so a plain hash is enough: nobody can try them all.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from linspec.errors import ConfigError
from linspec.serve.settings import Settings
from linspec.utils.messages import because, shown

_LINE = re.compile(r"([A-Za-z0-9_.@-]{1,64}):([0-9a-fA-F]{64})")
_SHORTEST = 8


class Keys:
    """Hashes of keys by the name of their holder; no keys at all let everybody in."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = {name: bytes.fromhex(each) for name, each in hashes.items()}

    @classmethod
    def of(cls, settings: Settings) -> Keys:
        """Those that settings name; raises as `read` does."""
        secret = None if settings.api_key is None else settings.api_key.get_secret_value()
        return cls.read(settings.key_file, secret)

    @classmethod
    def read(cls, file: Path | None, key: str | None = None) -> Keys:
        """The keys of a file and one more, in plain text, whose holder is 'default'.

        Raises ConfigError for what is no such file, and for a short key.
        """
        found = {} if file is None else _of_file(file)
        if key is not None:
            if len(key) < _SHORTEST:
                raise ConfigError(
                    f"a key has at least {_SHORTEST} characters, this one {len(key)}; take "
                    "`openssl rand -hex 24`"
                )
            if "default" in found:
                raise ConfigError(
                    f"{shown(file)} names a key 'default', as the single key is called; rename it there, or "
                    "leave out the single key"
                )
            found["default"] = hashlib.sha256(key.encode()).hexdigest()
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def name_of(self, header: str) -> str | None:
        """The holder of the key in an Authorization header, None for an unknown one."""
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # all are compared, each in constant time: how long it takes tells nothing
        found = [name for name, each in self._hashes.items() if hmac.compare_digest(each, given)]
        return found[0] if found and scheme.lower() == "bearer" else None


def _of_file(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = because(error) if isinstance(error, OSError) else f"{file} is not UTF-8 text"
        raise ConfigError(f"cannot read the keys: {why}") from error
    found: dict[str, str] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        # the line may be a key in plain text: it is not shown
        if match is None or match[1] in found:
            raise ConfigError(
                f"line {at} of {shown(file)} must be NAME:SHA256 with a new name, such as "
                'alice:$(printf %s "$KEY" | sha256sum | cut -c1-64)'
            )
        found[match[1]] = match[2]
    if not found:
        raise ConfigError(f"{shown(file)} holds no keys; write lines NAME:SHA256")
    return found
