"""The keys of a GGUF file for a tokenizer: what `tokenizer` reads, written in llama.cpp's conventions.

Two kinds can be said: byte pairs over a byte alphabet (`gpt2`) and SentencePiece's pairs (`llama`). The
scores of the latter are the places of its merges. `check_ids` builds a tokenizer from the keys and holds
its ids against those of the original, before anything is written.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from linspec.checkpoints.gguf.cut_names import PROBES, cut_name
from linspec.checkpoints.gguf.model_keys import PlannedFile
from linspec.checkpoints.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    read_tokenizer,
)
from linspec.errors import UnsupportedModel
from linspec.models.config import DecoderConfig
from linspec.utils.messages import shown

_log = logging.getLogger("linspec")

UNUSED, BYTE = 5, 6
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# the keys for tokens that end a text, in this order
ENDS = ("eos", "eot", "eom")


def tokenizer_keys(tokenizer: Any, config: DecoderConfig, source: Path) -> dict[str, Any]:
    """Keys and values for a fast tokenizer of transformers; raises UnsupportedModel for another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{source} has no tokenizer of the library `tokenizers`; {_AGAIN}")
    model = json.loads(backend.to_str())["model"]
    odd = [name for name in _ODD if model.get(name)]
    if model["type"] != "BPE" or odd:
        what = " with ".join([model["type"], *odd])
        raise UnsupportedModel(
            f"{source}: a tokenizer of the kind {what} cannot be written as GGUF; plain byte pairs (BPE) can"
        )
    tokens = _tokens(backend, config.vocab_size)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        own = _by_score(backend, tokens, merges)
    else:
        pre = cut_name(backend, bool(model.get("ignore_merges")), source)
        own = {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}
    kinds = _kinds(backend, tokens, model.get("unk_token"), bytes_=own["model"] == "llama")
    found = {**own, "tokens": tokens, "token_type": kinds, **_ids(tokenizer, config)}
    found |= _around(backend, tokenizer, source)
    return {**{PREFIX + name: value for name, value in found.items()}, **_templates(tokenizer)}


def check_ids(backend: Tokenizer, file: PlannedFile, source: Path) -> None:
    """Raise UnsupportedModel if a tokenizer that is built from the keys gives other ids than `backend`."""
    again = read_tokenizer(file)
    added = [each.content for each in backend.get_added_tokens_decoder().values()]
    # each piece of the vocabulary is made by its own merges
    pieces = [backend.decode([number], skip_special_tokens=False) for number in _numbers(backend)]
    texts = [*PROBES, "", " ", "a b", " ".join(f"x {text} y{text}z" for text in added), *pieces]
    theirs, ours = backend.encode_batch(texts), again.encode_batch(texts)
    for text, left, right in zip(texts, theirs, ours, strict=True):
        if left.ids != right.ids:
            raise UnsupportedModel(
                f"{source}: a tokenizer in a GGUF file would give other ids than its own for "
                f"{shown(repr(text))}; what it does there has no key. Use its Hugging Face directory"
            )


def _numbers(backend: Tokenizer) -> list[int]:
    return sorted(backend.get_vocab(with_added_tokens=True).values())


_AGAIN = "save it again as tokenizer.json"
_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _tokens(backend: Tokenizer, size: int) -> list[str]:
    """The text of every row of the embedding; rows without a token get a name, as in llama.cpp."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    for text, number in backend.get_vocab(with_added_tokens=True).items():
        tokens[number] = text
    return tokens


def _kinds(backend: Tokenizer, tokens: list[str], unknown: str | None, *, bytes_: bool) -> Any:
    """What each token is: normal, control, ...; rows without a token are unused."""
    known = backend.get_vocab(with_added_tokens=True)
    kinds = [NORMAL if text in known else UNUSED for text in tokens]
    for number, text in enumerate(tokens):
        if bytes_ and BYTE_PIECE.fullmatch(text):
            kinds[number] = BYTE
    for number, each in backend.get_added_tokens_decoder().items():
        kinds[number] = CONTROL if each.special else USER_DEFINED
    if bytes_ and unknown in known:
        kinds[known[unknown]] = UNKNOWN
    return np.array(kinds, np.int32)


def _by_score(
    backend: Tokenizer, tokens: list[str], merges: list[tuple[str, ...]]
) -> dict[str, Any]:
    """SentencePiece's kind: a piece has the score of the first merge that makes it, the first the highest."""
    places: dict[str, int] = {}
    for pair in merges:
        places.setdefault("".join(pair), len(places))
    scores = [-float(places.get(text, len(places))) for text in tokens]
    begins = backend.encode("a", add_special_tokens=False).tokens[:1]
    return {
        "model": "llama",
        "pre": "default",
        "scores": np.array(scores, np.float32),
        "add_space_prefix": bool(begins) and begins[0].startswith(SPACE),
    }


def _ids(tokenizer: Any, config: DecoderConfig) -> dict[str, Any]:
    """Special tokens: the tokenizer's, else those of the configuration; all ends that there are keys for."""
    bos = config.bos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = config.pad_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos = tokenizer.eos_token_id
    ends = sorted(config.eos_ids, key=lambda number: number != eos) or [eos]
    if ends[len(ENDS) :]:
        _log.warning(
            "a GGUF file has keys for %d tokens that end a text; %s do not end one there",
            len(ENDS),
            ends[len(ENDS) :],
        )
    found = {"bos": bos, "padding": pad, "unknown": tokenizer.unk_token_id}
    found |= dict(zip(ENDS, ends, strict=False))
    return {f"{name}_token_id": int(number) for name, number in found.items() if number is not None}


def _around(backend: Tokenizer, tokenizer: Any, source: Path) -> dict[str, bool]:
    """Whether a text begins with BOS and ends with EOS; raises UnsupportedModel for other tokens there."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for begins in (False, True):
        for ends in (False, True):
            if whole == bos * begins + bare + eos * ends:
                return {"add_bos_token": begins, "add_eos_token": ends}
    raise UnsupportedModel(
        f"{source}: its tokenizer puts other tokens around a text than BOS and EOS ({whole} for {bare}), "
        "which no GGUF file can say; use its Hugging Face directory"
    )


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": template} if template else {}
    found: dict[str, str] = {}
    for name, text in (template or {}).items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    return found
