"""Which replica answers a request: the one that has read its beginning before, while its load allows.

    key = opening("/v1/chat/completions", body, tenant)
    first, *others = ranked(key, {"a": 3, "b": 0}, roomy=4)

Each replica keeps states of what it has read, so requests that begin alike belong together. Rendezvous
hashing gives every beginning a home without a table, and moves only the beginnings of a replica that leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# characters of a conversation that say where it belongs; fewer would not tell system prompts apart
CHARACTERS = 256
# about as many tokens
TOKENS = 64
# a home may have this many times the mean load
SHARE = 1.25


def ranked(key: str, loads: Mapping[str, int], roomy: int) -> list[str]:
    """Replicas in the order in which they are asked; loads: requests under way, by replica.

    The home of `key` is first while it has fewer than `roomy` requests, or no more than its SHARE of all;
    otherwise the least loaded is, and the home has its place among the others.
    """
    order = sorted(loads, key=lambda name: _weight(key, name), reverse=True)
    by_load = sorted(order, key=lambda name: loads[name])
    if not order:
        return []
    home = order[0]
    allowed = SHARE * (sum(loads.values()) + 1) / len(loads)
    if loads[home] < roomy or loads[home] + 1 <= allowed:
        return [home, *(name for name in by_load if name != home)]
    return by_load


def _weight(key: str, name: str) -> bytes:
    text = f"{name}\0{key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).digest()


def opening(path: str, body: bytes, tenant: str = "") -> str | None:
    """What requests that belong together share: model, tenant and how their text begins.

    None where there is no text to have read before, or none that can be read. A conversation that grows keeps
    its opening: turns behind the first of the user's are left out.
    """
    try:
        data = json.loads(body)
    # what is wrong with it is said by the replica that gets it
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    text = _of_path(path, data)
    return f"{tenant}\0{data.get('model')}\0{text}" if text else None


def _of_path(path: str, data: Mapping[str, Any]) -> str | None:
    if path == "/v1/chat/completions":
        return _of_turns(data.get("messages"))
    if path == "/v1/completions":
        return _of_prompt(data.get("prompt"))
    if path == "/v1/responses":
        told = _text(data.get("instructions"))
        return (told + (_of_turns(data.get("input")) or ""))[:CHARACTERS]
    return None


def _of_turns(turns: object) -> str | None:
    """The turns up to the first of the user's, or a text that stands for one."""
    if isinstance(turns, str):
        return turns[:CHARACTERS]
    if not isinstance(turns, Sequence):
        return None
    found, size = [], 0
    for turn in turns:
        if not isinstance(turn, Mapping):
            return None
        found.append(f"{turn.get('role')}\0{_text(turn.get('content'))}\0")
        size += len(found[-1])
        if turn.get("role") == "user" or size >= CHARACTERS:
            break
    return "".join(found)[:CHARACTERS]


def _of_prompt(prompt: object) -> str | None:
    """The first of several prompts speaks for them."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt[:CHARACTERS]
    if isinstance(prompt, list) and all(isinstance(each, int) for each in prompt[:TOKENS]):
        return ",".join(map(str, prompt[:TOKENS]))
    return None


def _text(content: object) -> str:
    """The beginning of a turn's text, which may be in parts."""
    if isinstance(content, str):
        return content[:CHARACTERS]
    if not isinstance(content, list):
        return ""
    parts = (part.get("text") for part in content if isinstance(part, Mapping))
    return "".join(part[:CHARACTERS] for part in parts if isinstance(part, str))[:CHARACTERS]
