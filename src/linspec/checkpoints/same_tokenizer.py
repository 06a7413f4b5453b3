"""Whether two tokenizers number text alike; equally many tokens are no proof.

Special tokens may differ: a chat model and its base share all that text is made of.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from linspec.errors import ConfigError, DrafterError


def check_same_tokenizer(target: Any, draft: Any, name: str) -> None:
    """Raises DrafterError unless the draft model `name` has the tokenizer of its target."""
    reason = difference(target, draft)
    if reason is not None:
        raise DrafterError(
            f"the draft model {name} has another tokenizer than its target: {reason}. Its drafts would "
            "mean something else; use a draft model of the same family"
        )


def check_same_text(model: Any, teacher: Any, name: str) -> None:
    """Raises ConfigError unless the teacher `name` reads the same ids as what is compared with it."""
    reason = difference(model, teacher)
    if reason is not None:
        raise ConfigError(
            f"{name} numbers text otherwise than the model that is compared with it: {reason}; compare "
            "models of one tokenizer"
        )


def difference(ours: Any, theirs: Any) -> str | None:
    """What one tokenizer has otherwise than the other; None if texts get the same ids."""
    one, other = _vocabulary(ours), _vocabulary(theirs)
    if one is None or other is None:
        return None
    special = _special(ours) | _special(theirs)
    for token in sorted({*one, *other} - special):
        if one.get(token) != other.get(token):
            return f"{token!r} is {_id(one.get(token))} of one and {_id(other.get(token))} of the other"
    rules = _merges(ours), _merges(theirs)
    if None not in rules and rules[0] != rules[1]:
        return "they join the same tokens by other rules"
    return None


def _id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"


def _vocabulary(tokenizer: Any) -> dict[str, int] | None:
    """The id of each token; None for a tokenizer of the caller's own that does not say."""
    known = _backend(tokenizer) or tokenizer
    return known.get_vocab() if hasattr(known, "get_vocab") else None


def _special(tokenizer: Any) -> set[str]:
    backend = _backend(tokenizer)
    if backend is None:
        return set(getattr(tokenizer, "all_special_tokens", ()))
    added = backend.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special}


def _merges(tokenizer: Any) -> Any:
    """Pairs in the order in which they are joined, or what each token weighs; None if nothing says so."""
    backend = _backend(tokenizer)
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    return model["vocab"] if model["type"] == "Unigram" else model.get("merges")


def _backend(tokenizer: Any) -> Tokenizer | None:
    found: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    return found
