"""The bytes that a token stands for, as the vocabulary spells them.

A single token need not be a whole character, so its decoded text does not tell: that is U+FFFD for each part
of one.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes and names of the tokens of a tokenizer.

    Byte-level vocabularies (GPT-2's alphabet) and those with byte fallback (`<0x0A>`, and a sign for a space)
    are read; any other tokenizer is asked for the text of each token.

    special: ids of the special tokens, which texts usually hide.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added = {} if self._backend is None else self._backend.get_added_tokens_decoder()
        self._added = {number: each.content for number, each in added.items()}
        self.special = frozenset(number for number, each in added.items() if each.special)
        steps = _decoder_steps(self._backend)
        kinds = {step["type"] for step in steps}
        self._by_bytes = "ByteLevel" in kinds
        self._by_pieces = bool(kinds & {"ByteFallback", "Metaspace"})
        self._replaced = [found for step in steps if (found := _replacement(step))]

    def read(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name; none for an id without a token."""
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        if not (self._by_bytes or self._by_pieces):
            text: str = self._tokenizer.decode([token])
            return text.encode("utf-8", "replace")
        piece = self._backend.id_to_token(token) or ""
        return _from_alphabet(piece) if self._by_bytes else self._from_piece(piece)

    def name(self, token: int) -> str:
        """The text of a token; its bytes where they are no whole characters, so that no two read the same."""
        found = self.read(token)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in found)

    def _from_piece(self, piece: str) -> bytes:
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        for sign, text in self._replaced:
            piece = piece.replace(sign, text)
        return piece.encode("utf-8", "replace")


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    """What a tokenizer does to join tokens, as its JSON says it."""
    if backend is None or backend.decoder is None:
        return []
    told = json.loads(backend.decoder.__getstate__())
    return told["decoders"] if told["type"] == "Sequence" else [told]


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    """A sign of the vocabulary, and the text that it stands for."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


@lru_cache(1)
def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet of bytes: visible Latin-1 characters are themselves, the others follow from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _from_alphabet(piece: str) -> bytes:
    known = _alphabet()
    if all(character in known for character in piece):
        return bytes(known[character] for character in piece)
    # what is spelled otherwise is text, as the library's decoder takes it
    return piece.encode("utf-8", "replace")
