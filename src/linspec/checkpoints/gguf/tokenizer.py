"""The tokenizer that a GGUF file describes, built with the library `tokenizers`.

    backend = read_tokenizer(file)          # what does the work
    tokenizer = load_gguf_tokenizer(path)   # the same under transformers' interface

Two kinds are known: byte pairs over a byte alphabet (`gpt2`), and SentencePiece's pairs by score with
bytes for what is unknown (`llama`). Their special tokens, the tokens around a text and the chat template
come from the file too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from linspec.checkpoints.gguf.config import EMBEDDING
from linspec.checkpoints.gguf.kept_tokenizer import kept
from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.pre_tokenizers import (
    BEGIN_WITH_BOS,
    WHOLE_PIECES,
    normalizer,
    pre_tokenizer,
)
from linspec.checkpoints.gguf.reader import AGAIN, GgufFile, read_gguf
from linspec.errors import CheckpointError, UnsupportedModel
from linspec.utils.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "▁"
# all ways to halve a piece are tried, which takes the square of its length
LONGEST_PIECE = 1024
# what SentencePiece's files leave unsaid
LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces by id with their kinds, and the special tokens among them."""

    pieces: list[str]
    kinds: list[int]
    special: dict[str, int]

    def text(self, name: str) -> str | None:
        """How a special token ('bos', 'eos', 'unknown', 'padding') is written."""
        return self.pieces[self.special[name]] if name in self.special else None

    @property
    def ids(self) -> dict[str, int]:
        """Pieces to ids."""
        return {piece: number for number, piece in enumerate(self.pieces)}


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file; raises CheckpointError if it has none that can be built."""
    from transformers import PreTrainedTokenizerFast

    file = read_gguf(path)
    backend, words = read_tokenizer(file), _vocabulary(Keys(file))
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    keys = Keys(file)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=keys.text("tokenizer.chat_template", "") or None,
        clean_up_tokenization_spaces=False,
        **{there: words.text(here) for here, there in names.items() if words.text(here)},
    )


def end_token(file: GgufFile) -> str | None:
    """How the end of a text is written."""
    return _vocabulary(Keys(file)).text("eos")


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the keys of `file` describe; raises CheckpointError if they describe none."""
    keys = Keys(file)
    words = _vocabulary(keys)
    kind = keys.text(PREFIX + "model")
    if kind not in BUILDERS:
        raise UnsupportedModel(
            f"{file.path}: tokenizers of the kind {shown(repr(kind))} are not supported; supported: "
            f"{', '.join(BUILDERS)}"
        )
    try:
        # pairs of bytes come with their merges and are built at once
        pieces = len(words.pieces) if kind == "llama" else 0
        return kept(file, pieces, lambda: _built(keys, words, kind))
    except CheckpointError:
        raise
    # the library raises bare Exception for merges and tokens that contradict each other
    except Exception as error:
        raise CheckpointError(
            f"{file.path} describes no sound tokenizer: {error}; {AGAIN}"
        ) from error


def _built(keys: Keys, words: Vocabulary, kind: str) -> Tokenizer:
    backend = BUILDERS[kind](keys, words)
    backend.add_special_tokens(_added(words, {UNKNOWN, CONTROL}, special=True))
    backend.add_tokens(_added(words, {USER_DEFINED}, special=False))
    _put_around(backend, keys, words, starts=_starts_with_bos(keys, kind))
    # settings that do not fit each other show when they are first used
    backend.decode(backend.encode("a b").ids)
    return backend


def _vocabulary(keys: Keys) -> Vocabulary:
    if not keys.has(PREFIX + "tokens"):
        raise CheckpointError(
            f"no tokenizer in {keys.file.path}: the key {PREFIX}tokens is missing; give a tokenizer, "
            "or convert the model again together with its tokenizer"
        )
    pieces = keys.texts(PREFIX + "tokens")
    kinds = keys.numbers(PREFIX + "token_type", np.integer, np.full(len(pieces), NORMAL))
    rows = keys.file.tensors[EMBEDDING].shape[0] if EMBEDDING in keys.file.tensors else 0
    if len(kinds) != len(pieces) or len(set(pieces)) != len(pieces) or len(pieces) > rows:
        raise CheckpointError(
            f"{keys.file.path} has {len(pieces)} tokens, {len(set(pieces))} of them different, "
            f"{len(kinds)} kinds of tokens and an embedding of {rows}; {AGAIN}"
        )
    return Vocabulary(pieces, kinds, _special(keys, len(pieces)))


def _special(keys: Keys, size: int) -> dict[str, int]:
    defaults = LLAMA_IDS if keys.text(PREFIX + "model") == "llama" else {}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"{PREFIX}{name}_token_id"
        if not keys.has(key) and defaults.get(name, size) >= size:
            continue
        found[name] = keys.whole(key, defaults.get(name))
        if found[name] >= size:
            raise CheckpointError(
                f"{keys.file.path}: {key} is {found[name]}, and there are {size} tokens; {AGAIN}"
            )
    return found


def _added(words: Vocabulary, kinds: set[int], *, special: bool) -> list[AddedToken]:
    """Tokens that a text is searched for before anything else is done to it."""
    return [
        AddedToken(piece, special=special, normalized=False)
        for piece, kind in zip(words.pieces, words.kinds, strict=True)
        if kind in kinds and piece
    ]


def _starts_with_bos(keys: Keys, kind: str) -> bool:
    default = kind == "llama" or keys.text(PREFIX + "pre", "") in BEGIN_WITH_BOS
    return keys.flag(PREFIX + "add_bos_token", default)


def _put_around(backend: Tokenizer, keys: Keys, words: Vocabulary, *, starts: bool) -> None:
    """The tokens that stand before and after a whole text."""
    bos, eos = words.text("bos") if starts else None, None
    if keys.flag(PREFIX + "add_eos_token", False):
        eos = words.text("eos")
    around = {text: words.ids[text] for text in (bos, eos) if text is not None}
    if around:
        one = [text for text in (bos, "$A", eos) if text is not None]
        two = [*one, *(text for text in (bos, "$B", eos) if text is not None)]
        backend.post_processor = processors.TemplateProcessing(
            single=one, pair=two, special_tokens=list(around.items())
        )


def _byte_pairs(keys: Keys, words: Vocabulary) -> Tokenizer:
    """Byte-level pairs: GPT-2, Llama 3, Qwen, SmolLM."""
    name = keys.text(PREFIX + "pre", "") or None
    cut = pre_tokenizer(name, keys.file.path)
    merges = [_halves(each) for each in keys.texts(PREFIX + "merges")]
    model = models.BPE(words.ids, merges, ignore_merges=name in WHOLE_PIECES)
    backend = Tokenizer(model)
    backend.pre_tokenizer = cut
    if (changed := normalizer(name)) is not None:
        backend.normalizer = changed
    backend.decoder = decoders.ByteLevel()
    return backend


def _halves(merge: str) -> tuple[str, str]:
    """Both parts of a merge; a part may itself begin with a space."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _by_score(keys: Keys, words: Vocabulary) -> Tokenizer:
    """SentencePiece's pairs: Llama 2, Mistral, TinyLlama."""
    unknown = words.text("unknown")
    model = models.BPE(
        words.ids,
        _merges_of_scores(keys, words),
        unk_token=unknown,
        fuse_unk=unknown is not None,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    prefix = keys.flag(PREFIX + "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    steps = [normalizers.Prepend(SPACE), spaces] if prefix else [spaces]
    backend.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _merges_of_scores(keys: Keys, words: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece with the highest score first."""
    scores = keys.numbers(PREFIX + "scores", np.floating)
    if len(scores) != len(words.pieces):
        raise CheckpointError(
            f"{keys.file.path} has {len(words.pieces)} tokens and {len(scores)} scores; {AGAIN}"
        )
    ids, found = words.ids, []
    for piece, score, kind in zip(words.pieces, scores, words.kinds, strict=True):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        if len(piece) > LONGEST_PIECE:
            raise CheckpointError(
                f"{keys.file.path} has a token of {len(piece)} characters, and at most {LONGEST_PIECE} "
                f"are read; {AGAIN}"
            )
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda each: each[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


BUILDERS = {"gpt2": _byte_pairs, "llama": _by_score}
