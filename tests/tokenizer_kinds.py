"""Small tokenizers of every kind that the library `tokenizers` knows, built here."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
LETTERS = "abcdefghinox.,'日é🙂"
WORDS = ["ab", "an", "end", "the", "日本", "éЖ"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("a", "b"), ("a", "n"), ("e", "n"), ("en", "d"), ("▁", "a"), ("▁a", "b"), ("日", "本")]


def _ids(symbols: list[str]) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(dict.fromkeys([*SPECIAL, *symbols]))}


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: every byte is a symbol."""
    merges = [("a", "b"), ("Ġ", "t"), ("e", "n"), ("en", "d"), ("Ã", "©")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(_ids(symbols), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2, Mistral, TinyLlama: what has no symbol is spelled in bytes; a space in front."""
    symbols = [*BYTES, "▁", *LETTERS, "本", *("".join(pair) for pair in MERGES)]
    model = models.BPE(_ids(symbols), MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT: words and their continuations, joined by spaces."""
    symbols = [*LETTERS, *WORDS, *(f"##{piece}" for piece in (*LETTERS, *WORDS))]
    tokenizer = Tokenizer(models.WordPiece(_ids(symbols), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def _unigram(*, fallback: bool) -> Tokenizer:
    pieces = _ids([*(BYTES if fallback else ()), "▁", *LETTERS, *WORDS, "▁the", "▁a"])
    scores = [(piece, -1.0 - len(pieces) * (len(piece) == 1)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def unigram() -> Tokenizer:
    """T5, XLM-R: SentencePiece's other model, unknown characters as one token."""
    tokenizer = _unigram(fallback=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def unigram_with_bytes() -> Tokenizer:
    """Gemma, Phi-3 and others: the same with bytes for what is unknown."""
    tokenizer = _unigram(fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return tokenizer


def word_ends() -> Tokenizer:
    """GPT, CLIP: the last symbol of a word says so."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ab", "abn</w>"]
    merges = [("a", "b"), ("ab", "n</w>")]
    model = models.BPE(_ids(symbols), merges, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "WordPiece": word_piece,
    "Unigram": unigram,
    "Unigram with bytes": unigram_with_bytes,
    "word ends": word_ends,
}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind under transformers' interface."""
    backend = KINDS[kind]()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
