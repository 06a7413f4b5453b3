"""The state of a batch as transformers' generate() keeps it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache

from linspec.errors import StateError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

UNCROPPABLE = (
    "linear state cannot be cropped: it sums tokens and keeps no history, so generate() cannot "
    "take drafted tokens back. Leave assistant_model and prompt_lookup_num_tokens out, or "
    "speculate with linspec.LLM(..., drafter=...)"
)


class LinspecCache(Cache):
    """The decoder state of one batch, one slot a row.

    It is bound to a model by the first call that gets it. It can be copied (`copy.deepcopy`) to go
    on from one prompt several times; it cannot be cropped.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: SequenceStates | None = None
        self.shape: DecoderConfig | None = None
        # padded columns seen so far: rows may have fewer tokens
        self.columns = 0

    def bind(self, decoder: Decoder, rows: int) -> SequenceStates:
        """The state, made on first use; raises StateError for another model or batch size."""
        if self.state is None:
            self.state, self.shape = decoder.new_state(rows), decoder.config
        if self.shape != decoder.config:
            raise StateError("past_key_values is of another model; start with LinspecCache()")
        if self.state.slots != rows:
            raise StateError(
                f"past_key_values has {self.state.slots} rows, input_ids has {rows}; call "
                "past_key_values.batch_repeat_interleave(n) to go on with n copies of each row"
            )
        return self.state

    def __deepcopy__(self, memo: dict[int, Any]) -> LinspecCache:
        other = copy.copy(self)
        # field by field the copy would hold every weight of the mixers, whose fold rules states keep
        if self.state is not None:
            other.state = self.state.empty(self.state.slots)
            for slot in range(self.state.slots):
                other.state.restore(slot, self.state.snapshot(slot))
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that an attention mask has after `query_length` more, and the first of them."""
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Longest sequence, -1 if only memory bounds it."""
        limit = self.shape.position_limit if self.shape is not None else None
        return -1 if limit is None else limit

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether any column was seen."""
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return -1 if self.state is None else self.state.slots

    @property
    def is_initialized(self) -> bool:
        """Whether a model was bound."""
        return self.state is not None

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"LinspecCache(rows={self.batch_size}, columns={self.columns})"

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.shape, self.columns = None, None, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._take(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.state is not None:
            self._take([row for row in range(self.state.slots) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises StateError."""
        raise StateError(UNCROPPABLE)

    def activate_past_recording(self) -> None:
        """Raises StateError: what asks for a record of the past will crop."""
        raise StateError(UNCROPPABLE)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises StateError: only linspec's decoder writes to this cache."""
        raise StateError("LinspecCache holds no keys and values of another model's layers")

    def _take(self, rows: list[int]) -> None:
        old = self.state
        if old is None:
            return
        new = old if len(rows) == old.slots else old.empty(len(rows))
        moved = [(slot, row) for slot, row in enumerate(rows) if new is not old or slot != row]
        # all copies before any restore: rows change places
        copies = {row: old.snapshot(row) for row in {row for _, row in moved}}
        for slot, row in moved:
            new.restore(slot, copies[row])
        self.state = new
