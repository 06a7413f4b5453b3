"""How byte-level tokenizers cut a text before they join pairs, by the name that `tokenizer.ggml.pre` gives.

A wrong cut looks like a bad model: the ids are sound and not those of the training. The names are
llama.cpp's, the patterns those of the original tokenizers; where the two differ the original is right.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

from linspec.errors import UnsupportedModel
from linspec.utils.messages import did_you_mean, shown

_log = logging.getLogger("linspec")

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LEAD = r"[^\r\n\p{L}\p{N}]?"
SIGNS = r" ?[^\s\p{L}\p{N}]+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
WORDS = rf"{CONTRACTION}|{LEAD}\p{{L}}+"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{SIGNS}|\s+(?!\S)|\s+"

PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{WORDS}|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{SPACES}",),
    "qwen2": (rf"{WORDS}|\p{{N}}|{SIGNS}[\r\n]*|{SPACES}",),
    "tekken": (rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}|{SIGNS}[\r\n/]*|{SPACES}",),
    "gpt-4o": (
        rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTION}?|{LEAD}{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}"
        rf"|{SIGNS}[\r\n/]*|{SPACES}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        rf"{ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
    ),
    "falcon": (PUNCTUATION, GPT2, "[0-9][0-9][0-9]"),
    "default": (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# other names of the same cut
ALIKE = {
    "gpt-2": "gpt2 phi-2 olmo mpt jais exaone4 roberta-bpe modern-bert",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 pixtral lfm2 smaug-bpe dbrx chatglm-bpe glm4",
    "qwen2": "stablelm2 deepseek-r1-qwen hunyuan megrez",
    "gpt-4o": "llama4 kanana2 minimax-m2",
}
NAMES = {name: name for name in PATTERNS}
NAMES |= {other: name for name, others in ALIKE.items() for other in others.split()}
# a whole piece that is in the vocabulary is taken as it is
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "tekken")
# byte-level tokenizers that begin a text with BOS unless their file says something else
BEGIN_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
NORMALIZED = ("qwen2",)


def pre_tokenizer(name: str | None, path: Path) -> pre_tokenizers.PreTokenizer:
    """The cut with this name; that of old files where there is none.

    Raises UnsupportedModel for a name that is not known: any other cut would give other ids.
    """
    if name is None or name == "default":
        _log.warning("%s does not name its pre-tokenizer; its token ids may be wrong", path)
        name = "default"
    if name not in NAMES:
        raise UnsupportedModel(
            f"{path}: pre-tokenizer {shown(repr(name))} is not supported; supported: {', '.join(NAMES)}"
            f"{did_you_mean(name, NAMES)}"
        )
    cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in PATTERNS[NAMES[name]]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, as_bytes])


def normalizer(name: str | None) -> normalizers.Normalizer | None:
    """What the original tokenizer does to a text before it is cut."""
    return normalizers.NFC() if name in NORMALIZED else None
