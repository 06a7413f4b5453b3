"""What the engine asks of a model that generates: the step form, whatever family is behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from linspec.decoding.step import LOGITS, StepInput, StepOutput, Want


class CausalModelConfig(Protocol):
    """Facts about a generating model."""

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        ...

    @property
    def position_limit(self) -> int | None:
        """Longest sequence in tokens, or None when only memory bounds it."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        ...


class CausalModel(Protocol):
    """A model with a step form."""

    is_inference: bool
    # whether the output goes on from the prompt; else the prompt is a source that is answered
    continues_prompt: bool
    # a whole step in one native call, if there is such a form of this model
    native: Any

    @property
    def config(self) -> CausalModelConfig:
        """Facts about the model."""
        ...

    @property
    def embed(self) -> torch.nn.Embedding:
        """The token embedding."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What is computed and kept in states; embeddings may be narrower."""
        ...

    @property
    def kernels(self) -> str:
        """What computes a step, for whoever keeps its cost."""
        ...

    def to_inference(self) -> CausalModel:
        """Turn into the inference form, in place."""
        ...

    def new_state(self, slots: int = 1, kv: str = "float", *, offload: Path | None = None) -> Any:
        """Empty state for up to `slots` sequences; kv: how the entries of a cache are kept.

        offload: a directory for what it can have in files.
        """
        ...

    def open(
        self, prompt: Sequence[int], slot: int, state: Any
    ) -> tuple[list[int], tuple[int, ...]]:
        """Make `slot` an empty sequence for `prompt`.

        Returns the tokens to feed it, and the source that was read instead of being fed, if any.
        """
        ...

    def full_logits(self, prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, vocab] behind `prompt` and each of B equally long outputs, by the full form."""
        ...

    def step(
        self,
        inputs: Sequence[StepInput],
        state: Any,
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        """Run new tokens of several slots against their committed state and stage them there.

        layers: only these are computed, None for all. want: what is handed out beside logits.
        """
        ...
