"""Reading a tokenizer without transformers, whose import takes longer than loading a model.

    tokenizer = load_text_tokenizer("path/to/model")

tokenizer.json holds the whole tokenizer, and the library `tokenizers` runs it. transformers adds what
tokenizer_config.json and older files say beside it; a directory where that changes ids or texts is
not *plain* and is left to transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.gguf.tokenizer import end_token, read_tokenizer
from linspec.checkpoints.load_tokenizer import load_tokenizer, tokenizer_place

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# files of older formats, which transformers merges into the tokenizer
OLDER = ("added_tokens.json", "special_tokens_map.json")
# whichever class wrote it, transformers reads tokenizer.json with this one, under both of its names
CLASSES = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
# entries that change neither ids nor texts; what `add_prefix_space` says, tokenizer.json says again
WITHOUT_EFFECT = {
    *("add_prefix_space", "backend", "chat_template", "errors", "is_local", "legacy"),
    *("local_files_only", "max_length", "model_input_names", "model_max_length", "name_or_path"),
    *("pad_to_multiple_of", "pad_token_type_id", "padding_side", "processor_class"),
    *("response_template", "sp_model_kwargs", "stride", "tokenizer_class", "truncation_side"),
    *("truncation_strategy", "use_default_system_prompt"),
}


class PlainTokenizer:
    """A tokenizer whose ids and texts are those of transformers' class.

    eos_token_id: the end of a text, or None. What generating text does not need is answered by
    transformers' class itself, which is imported when it is first asked.
    """

    def __init__(self, folder: Path, backend: Tokenizer, eos_token: str | None) -> None:
        # transformers too truncates and pads only on demand, whatever the file says
        backend.no_truncation()
        backend.no_padding()
        self._folder, self._backend = folder, backend
        self.eos_token_id: int | None = (
            None if eos_token is None else backend.token_to_id(eos_token)
        )

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        """Token ids of a text, under "input_ids"; the special tokens are those around a text."""
        if options or not isinstance(text, str):
            return self._whole(text, add_special_tokens=add_special_tokens, **options)
        found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": found.ids}

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """What does the work, under the name that it has in transformers."""
        return self._backend

    @functools.cached_property
    def _whole(self) -> Any:
        return load_tokenizer(self._folder)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "eos_token_id":
            super().__setattr__(name, value)
        else:
            setattr(self._whole, name, value)

    def __getattr__(self, name: str) -> Any:
        # copying and pickling look for private names before there is a folder
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._whole, name)


def load_text_tokenizer(source: str | Path) -> Any:
    """The tokenizer in `source` for generating text: a PlainTokenizer where that can be.

    Elsewhere `load_tokenizer` reads it, and raises CheckpointError where it cannot.
    """
    return plain_tokenizer(tokenizer_place(source)) or load_tokenizer(source)


def plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """The tokenizer in `folder`, or None where tokenizer.json does not say all of it or cannot be read."""
    if is_gguf(folder):
        file = read_gguf(folder)
        return PlainTokenizer(folder, read_tokenizer(file), end_token(file))
    if not (folder / FILE).exists() or any((folder / name).exists() for name in OLDER):
        return None
    try:
        said = (folder / CONFIG).read_text("utf-8") if (folder / CONFIG).exists() else "{}"
        config = json.loads(said)
        backend = Tokenizer.from_file(str(folder / FILE))
    # the library raises bare Exception for a malformed file; transformers then says what is wrong
    except Exception:
        return None
    if not isinstance(config, dict) or not _says_nothing_more(config, backend):
        return None
    return PlainTokenizer(folder, backend, config.get("eos_token"))


def _says_nothing_more(config: Mapping[str, Any], backend: Tokenizer) -> bool:
    """Whether tokenizer_config.json leaves the tokenizer as tokenizer.json has it."""
    added = backend.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    byte_pairs = type(backend.model).__name__ == "BPE"
    return config.get("tokenizer_class") in CLASSES and all(
        _without_effect(key, value, special, byte_pairs) for key, value in config.items()
    )


def _without_effect(key: str, value: object, special: Collection[str], byte_pairs: bool) -> bool:
    if key in WITHOUT_EFFECT:
        return True
    if key == "clean_up_tokenization_spaces":
        # the spaces between byte pairs are their own: transformers cleans up after other models
        return byte_pairs or not value
    if key == "split_special_tokens":
        return not value
    if key == "extra_special_tokens":
        return isinstance(value, list) and all(token in special for token in value)
    # a token that tokenizer.json does not know as a special one, transformers would add
    return key.endswith("_token") and (value is None or value in special)
