"""Which of llama.cpp's names a byte-level tokenizer's cut has, found by what it does to a text.

llama.cpp's own converter knows a tokenizer by a hash of its token ids, so it knows only those that it has
seen. Here the cut itself is compared, with what is done to a text before and to whole pieces after it.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from linspec.checkpoints.gguf.pre_tokenizers import (
    NAMES,
    PATTERNS,
    WHOLE_PIECES,
    normalizer,
    pre_tokenizer,
)
from linspec.errors import UnsupportedModel

# one name for each behaviour; the second ones of llama-bpe and qwen2 differ in whole pieces and in NFC
WRITTEN = (
    *("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o"),
    *("deepseek-coder", "deepseek-v3", "falcon"),
)
# every known cut does something else to one of these
PROBES = (
    "I'll DON'T we'Ve it's I'M 'S'd x'RE x'stop x'STOP I'LLama don'TEll y'REd",
    "1 12 123 1234 12345678901 3.14 a1b22 ٣٤٥٦ １２３４ ²½",
    "a\r\nb\n\nc\r\r\n  d\n \n\te \t\t f" + " " * 17 + "g  \n   ",
    "x+=1; y->z() !== $5.00 <a/b>\n//c\n#!/x -- … _under_score__ «q» ~^|`",
    "Ünï ÀÉ ıİ ǅ HelloWorld camelCase ABCdef МИРмир e\u0301a\u0308x हिन्दी ไทย",
    "中文字 かなカナ漢字12 한국어 🙂👍🏽 a🙂b 👨‍👩 \u00a0x\u2028y\u3000z\u200bw ﬁ",
)


def cut_name(backend: Tokenizer, whole_pieces: bool, source: Path) -> str:
    """The name for `tokenizer.ggml.pre`; raises UnsupportedModel for a cut that has none.

    whole_pieces: a piece that is in the vocabulary is taken as it is.
    """
    for name in WRITTEN:
        if whole_pieces == (name in WHOLE_PIECES) and _alike(backend, name):
            return name
    known = [name for name in WRITTEN if name in PATTERNS]
    raise UnsupportedModel(
        f"{source}: its tokenizer cuts texts in a way that has no llama.cpp name (tokenizer.ggml.pre), so a "
        f"GGUF file would give other token ids; known are the cuts of {', '.join(known)}. Use its Hugging "
        "Face directory"
    )


def _alike(backend: Tokenizer, name: str) -> bool:
    """Whether every probe is changed and cut by `backend` as by the cut `name`."""
    if backend.pre_tokenizer is None:
        return False
    assert name in NAMES
    ours, before = pre_tokenizer(name, Path(name)), normalizer(name)
    for text in PROBES:
        theirs = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if theirs != (text if before is None else before.normalize_str(text)):
            return False
        if _parts(backend.pre_tokenizer, theirs) != _parts(ours, theirs):
            return False
    return True


def _parts(cut: object, text: str) -> list[str]:
    return [part for part, _ in cut.pre_tokenize_str(text)]  # type: ignore[attr-defined]
