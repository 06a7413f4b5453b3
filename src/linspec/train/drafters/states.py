"""What a drafter learns from: tokens, and what the target computed for them.

    states = states_of(target, batch, layers=(14,))     # ids [B, T + 1] in; states of T places out

A run that reads its text more than once keeps the states in a file (`StateCache`). Its batches hold ids and
states side by side in one tensor, as the training loop takes one, and `states_of` reads both forms.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from linspec.decoding.step import FINAL
from linspec.errors import TrainingError
from linspec.mixers.base import Rope
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.train.pieces import likeliest
from linspec.utils.border import read_json
from linspec.utils.files import disk_errors, replace_text
from linspec.utils.messages import shown
from linspec.utils.progress import Progress

_DONE = "states.json"
# windows that go through the target together
_ROWS = 8


@dataclass(frozen=True, slots=True)
class TargetStates:
    """Windows of text and what the target made of them.

    Attributes:
        target: the model.
        ids: [B, T + 1] tokens; the state of place t has seen those up to t.
        chosen: [B, T] the target's likeliest token behind each place.
        layers: by layer, states [B, T, D]; FINAL are those that the output layer reads.
    """

    target: Decoder
    ids: torch.Tensor
    chosen: torch.Tensor
    layers: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def final(self) -> torch.Tensor:
        """States [B, T, D] that the output layer reads."""
        return self.layers[FINAL]


@torch.no_grad()
def states_of(target: Decoder, batch: torch.Tensor, layers: Sequence[int] = ()) -> TargetStates:
    """The states of a batch: computed for token ids [B, T + 1], read where they are in it."""
    if batch.is_floating_point():
        return _unpacked(target, batch, layers)
    found: dict[int, torch.Tensor] = {}
    number = iter(range(target.config.layers))

    def through(block: Block, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        x, layer = block(x, rope), next(number)
        if layer in layers:
            found[layer] = x
        return x

    found[FINAL] = target.hidden(batch[:, :-1], through)
    chosen = likeliest(found[FINAL], target.head, target.config.vocab_size)
    return TargetStates(target, batch, chosen, found)


def _unpacked(target: Decoder, batch: torch.Tensor, layers: Sequence[int]) -> TargetStates:
    """The states of a batch [B, T + 1, 2 + (1 + layers) D]: ids, choices, states; see `StateCache.batch`."""
    ids, chosen = batch[..., 0].long(), batch[:, :-1, 1].long()
    parts = batch[:, :-1, 2:].to(target.dtype).split(target.config.width, -1)
    return TargetStates(target, ids, chosen, dict(zip((FINAL, *layers), parts, strict=True)))


class StateCache:
    """The states of consecutive windows of a stream, in float16 in a folder; made once, resumable.

    Windows have `context` + 1 tokens, as the target reads each from its begin.
    """

    def __init__(
        self, target: Decoder, stream: np.ndarray, context: int, layers: Sequence[int], folder: Path
    ) -> None:
        self.target, self.layers, self.folder = target, tuple(layers), folder
        self.context = min(context, len(stream) - 1)
        count = (len(stream) - 1) // self.context
        starts = np.arange(count) * self.context
        self.ids = np.stack([stream[s : s + self.context + 1] for s in starts]).astype(np.int32)
        self.chosen = self._file("chosen", np.int32, (count, self.context))
        width = (1 + len(self.layers)) * target.config.width
        self.states = self._file("states", np.float16, (count, self.context, width))

    @staticmethod
    def size_gb(stream: np.ndarray, layers: Sequence[int], width: int) -> float:
        """What the states of a stream take on disk."""
        return len(stream) * ((1 + len(layers)) * width * 2 + 4) / 1e9

    def _file(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        """A file of the folder, mapped; where it is not there or damaged, nothing counts as computed."""
        path = self.folder / f"{name}.npy"
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            found = _mapped(path)
            if found is None or found.shape != shape or found.dtype != dtype:
                (self.folder / _DONE).unlink(missing_ok=True)
                found = np.lib.format.open_memmap(path, "w+", dtype, shape)
            _take_room(path)
        return found

    def _windows_done(self) -> int:
        record = self.folder / _DONE
        if not record.exists():
            return 0
        done = read_json(record, TrainingError).get("windows")
        if not isinstance(done, int) or not 0 <= done <= len(self.ids):
            raise TrainingError(
                f"{record} says that {shown(done)} of {len(self.ids)} windows are computed; remove the file, "
                "and all are computed again"
            )
        return done

    def fill(self) -> None:
        """Compute the states that are not there yet; what is there stays after an interruption."""
        record, done = self.folder / _DONE, self._windows_done()
        with Progress("states of the model", len(self.ids), start=done) as progress:
            for first in range(done, len(self.ids), _ROWS):
                rows = slice(first, first + _ROWS)
                self._fill(rows)
                done = min(first + _ROWS, len(self.ids))
                progress.update(done)
                replace_text(record, json.dumps({"windows": done}))

    def _fill(self, rows: slice) -> None:
        device = self.target.device
        ids = torch.from_numpy(self.ids[rows].astype(np.int64)).to(device)
        found = states_of(self.target, ids, self.layers)
        packed = torch.cat([found.layers[n] for n in (FINAL, *self.layers)], -1).float().cpu()
        largest = float(packed.abs().max())
        if not largest <= np.finfo(np.float16).max:
            raise TrainingError(
                f"states of this model reach {largest:.3g}, and a file of states holds numbers up to "
                f"{np.finfo(np.float16).max:.0f}; compute them as they are needed: cache_gb=0"
            )
        self.states[rows] = packed.numpy().astype(np.float16)
        self.chosen[rows] = found.chosen.cpu().numpy()
        self.states.flush()
        self.chosen.flush()

    def batch(self, step: int, rows: int, seed: int, process: int = 0) -> torch.Tensor:
        """Ids, choices and states of random windows: [rows, T + 1, 2 + (1 + layers) D] float32."""
        picked = np.random.default_rng([seed, step, process]).integers(0, len(self.ids), size=rows)
        whole = np.zeros((rows, self.context + 1, 2 + self.states.shape[-1]), dtype=np.float32)
        whole[..., 0] = self.ids[picked]
        whole[:, :-1, 1] = self.chosen[picked]
        whole[:, :-1, 2:] = self.states[picked]
        return torch.from_numpy(whole)


def _mapped(path: Path) -> np.memmap | None:
    """The array in a file, to read and write; None where there is none or less than its header says."""
    try:
        # a file that is cut short is filled up with zeros where it may be written to
        np.lib.format.open_memmap(path, "r")
        return np.lib.format.open_memmap(path, "r+")
    except (FileNotFoundError, ValueError):
        return None


def _take_room(path: Path) -> None:
    """Have the disk keep room for a whole file: a mapped page that it has none for ends the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
