"""linspec itself: the softmax checkpoint as it is, in float32, int8 and int4, and with an int8 cache."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.base import GGUF_FILE, Format, Peer, Prompts, Session, timed

if TYPE_CHECKING:
    import torch

    from linspec.mixers.config import MixerConfig
    from linspec.models.decoder import Decoder
    from linspec.state.sequence_states import SequenceStates

# as `LLM` reads prompts
_CHUNK = 512
_DRAFT = 5
# context of `decode_short`
_SHORT = 128


class Own(Peer):
    """Decoder.step: what the engine calls, without its bookkeeping of requests."""

    name = "linspec"
    packages = ("torch", "transformers", "safetensors")
    # a scale of int4 is a bfloat16 for 32 weights, one of the int8 cache a float32 for a head's 64
    formats: tuple[Format, ...] = (
        Format(name="float32", bits=32, weight_bytes=4, cache_bytes=4),
        Format(name="int8", bits=8, weight_bytes=1, cache_bytes=4),
        Format(name="int8-kv8", bits=8, weight_bytes=1, cache_bytes=1 + 4 / 64),
        Format(name="int4", bits=4, weight_bytes=0.5 + 2 / 32, cache_bytes=4),
        Format(name="int4-kv8", bits=4, weight_bytes=0.5 + 2 / 32, cache_bytes=1 + 4 / 64),
    )
    # named for their caches; Q4_1 and Q8_0 hold about this
    of_files = (
        Format(name="file-float16", bits=4, weight_bytes=20 / 32, cache_bytes=2),
        Format(name="file-int8", bits=4, weight_bytes=20 / 32, cache_bytes=1 + 4 / 64),
    )

    def mixer(self) -> MixerConfig | None:
        """What replaces the attention of the checkpoint."""
        return None

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from linspec.checkpoints.hub import load_tokenizer, save_model
        from linspec.checkpoints.load_quantized import quantize_model
        from linspec.checkpoints.quantized import save_quantized

        mixer = self.mixer()
        if mixer is None and form.bits == 32:
            for file in source.iterdir():
                os.link(file, target / file.name)
            return
        model = _with_mixer(source, mixer)
        tokenizer = load_tokenizer(source)
        # these write to a directory of their own and rename it
        inner = target / "model"
        if form.bits == 32:
            save_model(model, tokenizer, inner)
        else:
            quantize_model(model, form.bits, {})
            with save_quantized(model, tokenizer, inner, form.bits, {}):
                pass

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        import torch

        from linspec.checkpoints.hub import load_model

        torch.set_num_threads(threads)
        if form in self.of_files:
            blocks = load_model(folder / GGUF_FILE, keep_blocks=True).to_inference()
            return OwnSession(blocks, kv=form.name.removeprefix("file-"))
        inner = folder / "model"
        model = load_model(inner if inner.exists() else folder).to_inference()
        return OwnSession(model, kv="int8" if form.name.endswith("-kv8") else "float")


PEER: Peer = Own()


def _with_mixer(source: Path, mixer: MixerConfig | None) -> Decoder:
    """The model in `source`, with another mixer in every layer: what that adds starts at nothing."""
    from linspec.checkpoints.hub import load_model
    from linspec.models.decoder import Decoder

    model = load_model(source)
    if mixer is None:
        return model
    changed = Decoder(model.config.with_mixers((mixer,) * model.config.layers)).eval()
    changed.load_state_dict(model.state_dict(), strict=False)
    return changed


class OwnSession(Session):
    """A prepared decoder and the state of its rows."""

    def __init__(self, model: Decoder, kv: str = "float") -> None:
        self.model = model
        self.kv = kv
        self.state: SequenceStates = model.new_state(1, kv)
        self.tokens: list[int] = []
        self.context = 0
        self.short: OwnSession | None = None

    def open(self, prompts: Prompts) -> float:
        self.state = self.model.new_state(len(prompts), self.kv)
        self.context = len(prompts[0])
        return timed(lambda: self._read(prompts))

    def _read(self, prompts: Prompts) -> None:
        from linspec.decoding.step import StepInput

        self.tokens = []
        length = len(prompts[0])
        # short prompts share a step, as the scheduler would let them
        together = max(1, _CHUNK // length)
        for start in range(0, len(prompts), together):
            rows = range(start, min(start + together, len(prompts)))
            for first in range(0, length, _CHUNK):
                parts = [prompts[row][first : first + _CHUNK] for row in rows]
                inputs = [
                    StepInput(row, part, all_logits=False)
                    for row, part in zip(rows, parts, strict=True)
                ]
                logits = self.model.step(inputs, self.state).logits
                for row in rows:
                    self.state.commit(row, range(len(parts[0])))
            self.tokens += logits.argmax(-1).tolist()

    def decode(self, tokens: int) -> list[float]:
        return [timed(self._next) for _ in range(tokens)]

    def decode_short(self, tokens: int) -> list[float] | None:
        if self.context <= _SHORT or self.state.slots > 1:
            return None
        if self.short is None:
            self.short = OwnSession(self.model, self.kv)
            self.short.open([[_DRAFT] * _SHORT])
        return self.short.decode(tokens)

    def _next(self) -> None:
        from linspec.decoding.step import StepInput

        inputs = [StepInput(row, [token]) for row, token in enumerate(self.tokens)]
        self.tokens = self.model.step(inputs, self.state).logits.argmax(-1).tolist()
        for feed in inputs:
            self.state.commit(feed.slot, (0,))

    def rows(self, count: int, repeats: int) -> list[float] | None:
        return [timed(lambda: self._pass(count)) for _ in range(repeats)]

    def _pass(self, count: int) -> None:
        self._chain(count)
        self.state.drop(0)

    def _chain(self, count: int) -> torch.Tensor:
        from linspec.decoding.step import StepInput

        chain = [self.tokens[0], *([_DRAFT] * (count - 1))]
        return self.model.step([StepInput(0, chain)], self.state).logits

    def accept(self, nodes: int, rate: float, rounds: int) -> tuple[int, float] | None:
        """Rounds of a chain, each draft accepted at `rate` if all before it were."""
        draw = random.Random(0)
        tokens = 0
        began = time.perf_counter()
        for _ in range(rounds):
            # what a verifier needs of the logits belongs to the round
            self._chain(nodes).argmax(-1).tolist()
            path = 1
            while path < nodes and draw.random() < rate:
                path += 1
            self.state.commit(0, range(path))
            tokens += path
        return tokens, time.perf_counter() - began
