"""Whether a model and its state fit, said before they are loaded and filled."""

from __future__ import annotations

from pathlib import Path

from linspec.errors import CheckpointError, StateError
from linspec.state.decoder_state import DecoderState
from linspec.utils.ram import available_bytes


def check_memory(needed: int, folder: Path) -> None:
    """Raises CheckpointError if `needed` bytes are more than there are."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 2**30:.1f} GiB of memory for its weights and {free / 2**30:.1f} GiB "
            "are free; close other programs, or quantise the model on a larger machine with "
            "`linspec quantize --bits 4`"
        )


def check_state(state: DecoderState, tokens: int) -> None:
    """Raises StateError if caches cannot grow to a sequence of `tokens` tokens."""
    missing = 0
    for part in state.parts:
        if part.spec.group or part.spec.window:
            continue
        for rows in (part.keys, part.values):
            have = rows.shape[3]
            missing += max(0, tokens - have) * (rows.nbytes // have)
    free = available_bytes() if missing else None
    if free is not None and missing > free:
        raise StateError(
            f"the keys and values of {tokens} tokens need {missing / 2**30:.1f} GiB more memory and "
            f"{free / 2**30:.1f} GiB are free; shorten the prompt, lower max_batch, or linearize the "
            "model: the state of linear mixers does not grow"
        )
