"""A tokenizer of bytes and a few pairs, and tiny model directories that use it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from helpers import mixer_config, randomise, tiny_config
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import save_model
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

MERGES = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "n"), ("en", "d"), ("Ġ", "t")]


def scratch(name: str) -> Path:
    """A new directory outside pytest's own, for what parameters need; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"linspec-test-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: any text can be written, characters beyond ASCII take several tokens."""
    symbols = ["<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [left + right for left, right in MERGES]
    tokenizer = Tokenizer(BPE({s: i for i, s in enumerate(symbols)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>")


def text_config(mixer: str, max_positions: int = 256) -> DecoderConfig:
    shape = tiny_config(mixer_config(mixer), mixer_config(mixer), max_positions=max_positions)
    data = shape.to_dict() | {"vocab_size": len(tiny_tokenizer()), "eos_ids": (0,), "bos_id": 0}
    return DecoderConfig.from_dict(data)


def text_model(mixer: str, *, seed: int = 0, max_positions: int = 256) -> Decoder:
    """A random float32 decoder over the tiny tokenizer."""
    return randomise(Decoder(text_config(mixer, max_positions)), seed).float()


@functools.cache
def model_dir(mixer: str, seed: int = 0) -> Path:
    """A model directory, made once."""
    folder = scratch("model") / mixer
    return save_model(text_model(mixer, seed=seed), tiny_tokenizer(), folder)
