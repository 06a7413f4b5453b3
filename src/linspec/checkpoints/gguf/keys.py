"""Typed access to the keys of a GGUF file: each answer is of the type that was asked for, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np

from linspec.checkpoints.gguf.reader import AGAIN, GgufFile
from linspec.errors import CheckpointError, UnsupportedModel
from linspec.utils.messages import quoted, shown

REQUIRED: Any = object()


class Keys:
    """The keys of `file`; `arch.` in a name stands for the architecture's own name."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._check_kind()
        self.architecture = self.text("general.architecture")

    def _check_kind(self) -> None:
        kind = self.file.keys.get("general.type", "model")
        if kind != "model":
            raise UnsupportedModel(
                f"{self.file.path} holds no model but {shown(repr(kind))} (general.type); give the "
                "file of the model itself"
            )
        parts = self.whole("split.count", 1)
        if parts > 1:
            raise UnsupportedModel(
                f"{self.file.path} is one of {parts} parts of a model; join them with "
                "`llama-gguf-split --merge` and give the whole file"
            )

    def name(self, key: str) -> str:
        """A key as it is written in this file."""
        return key.replace("arch.", f"{self.architecture}.", 1) if key.startswith("arch.") else key

    def has(self, key: str) -> bool:
        """Whether the file says anything about `key`."""
        return self.name(key) in self.file.keys

    def whole(self, key: str, default: Any = REQUIRED) -> int:
        """A whole number of 0 or more; a list with one number for all layers counts as that number."""
        found = self._same(key, self._get(key, default))
        if type(found) is not int or found < 0:
            self._wrong(key, found, "a whole number of 0 or more")
        return int(found)

    def real(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number, as it was written before it was rounded to float32."""
        found = self._same(key, self._get(key, default))
        if type(found) not in (int, float) or not np.isfinite(np.float32(found)):
            self._wrong(key, found, "a finite number")
        return float(str(np.float32(found)))

    def above_zero(self, key: str) -> float:
        """A finite number above 0."""
        found = self.real(key)
        if found <= 0:
            self._wrong(key, found, "above 0")
        return found

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or False."""
        found = self._get(key, default)
        if type(found) is not bool:
            self._wrong(key, found, "true or false")
        return bool(found)

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A string."""
        found = self._get(key, default)
        if not isinstance(found, str):
            self._wrong(key, found, "a text")
        return str(found)

    def texts(self, key: str, default: Any = REQUIRED) -> list[str]:
        """A list of strings."""
        found = self._get(key, default)
        if not isinstance(found, list):
            self._wrong(key, found, "a list of texts")
        return list(found)

    def numbers(self, key: str, kind: Any, default: Any = REQUIRED) -> list[Any]:
        """A list of numbers of `kind` (np.integer or np.floating), none of them NaN."""
        found = self._get(key, default)
        array = np.asarray(found)
        if isinstance(found, str) or array.ndim != 1 or not np.issubdtype(array.dtype, kind):
            self._wrong(key, type(found).__name__, f"a list of {kind.__name__} numbers")
        if np.isnan(array).any():
            self._wrong(key, "NaN", "a list of numbers")
        return array.tolist()

    def _get(self, key: str, default: Any) -> Any:
        found = self.file.keys.get(self.name(key), default)
        if found is REQUIRED:
            raise CheckpointError(
                f"{self.file.path} does not say {self.name(key)!r}, which its model needs; convert the "
                "model again with a current llama.cpp"
            )
        return found

    def _same(self, key: str, found: Any) -> Any:
        if not isinstance(found, np.ndarray) or not len(found):
            return found
        if (found != found[0]).any():
            raise UnsupportedModel(
                f"{self.file.path}: {self.name(key)} differs from layer to layer, which linspec does not "
                "support; use a model whose layers are alike"
            )
        return found[0].item()

    def _wrong(self, key: str, found: object, rule: str) -> None:
        raise CheckpointError(
            f"{self.file.path}: {shown(self.name(key))} must be {rule}, got {quoted(found)}; {AGAIN}"
        )
