"""The tokenizer of a model directory or GGUF file, as transformers' class.

    tokenizer = load_tokenizer("path/to/llama")

`tokenizer.py` reads most of them without transformers, for generating text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from linspec.checkpoints.delta import base_of, read_delta
from linspec.checkpoints.gguf.reader import is_gguf
from linspec.checkpoints.gguf.tokenizer import load_gguf_tokenizer
from linspec.checkpoints.resolve import resolve
from linspec.errors import CheckpointError
from linspec.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def tokenizer_place(source: str | Path) -> Path:
    """The directory or GGUF file whose tokenizer the model in `source` has; of a delta, its base."""
    folder = resolve(source)
    delta = None if is_gguf(folder) else read_delta(folder)
    return folder if delta is None else base_of(delta, folder)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in `source`, as transformers' class.

    Args:
        source: a model directory, a GGUF file, or the name of an embedded or fetched model.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    folder = tokenizer_place(source)
    if is_gguf(folder):
        return load_gguf_tokenizer(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"no tokenizer in {folder}: none of {', '.join(TOKENIZER_FILES)} is there. "
            "Copy the tokenizer files of the original model into it"
        )
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # settings of a wrong type show when they are first used
        tokenizer.decode(tokenizer("a b", verbose=False)["input_ids"])
        return tokenizer
    # the tokenizers library raises bare Exception for a malformed tokenizer.json
    except Exception as error:
        raise CheckpointError(
            f"cannot read the tokenizer in {folder}: {error}; copy its files again"
        ) from error


def _tokenizer_class(folder: Path) -> Any:
    # tokenizer.json says everything itself; the Auto class would look for a class by model_type
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    # a quarter of a second that most directories do not need
    from transformers import AutoTokenizer

    return AutoTokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raises CheckpointError if the tokenizer can produce ids that the model cannot embed."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {size} entries but the model embeds {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
