"""transformers: `generate` in float32 with its default cache."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Format, Peer, Prompts, Session, timed


class Transformers(Peer):
    """The checkpoint as it is."""

    name = "transformers"
    packages = ("transformers", "torch")
    formats = (Format(name="float32", bits=32, weight_bytes=4, cache_bytes=4),)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        for file in source.iterdir():
            os.link(file, target / file.name)

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        return _Session(folder, threads)


PEER = Transformers()


class _Stamps:
    """A streamer that notes when tokens come; the first thing it gets is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Session(Session):
    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids: Any = None
        self.cache: Any = None

    def open(self, prompts: Prompts) -> float:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.ids = self.torch.tensor(prompts)
        return timed(lambda: self._generate(1))

    def decode(self, tokens: int) -> list[float]:
        # the first token of a call may come later: it belongs to the set-up of `generate`
        times = self._generate(tokens + 1)[1:]
        return [b - a for a, b in itertools.pairwise(times)]

    def _generate(self, tokens: int) -> list[float]:
        stamps = _Stamps()
        with self.torch.inference_mode():
            self.ids = self.model.generate(
                self.ids,
                attention_mask=self.torch.ones_like(self.ids),
                past_key_values=self.cache,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                streamer=stamps,
            )
        return stamps.times

    def rows(self, count: int, repeats: int) -> list[float] | None:
        return [self._pass(count) for _ in range(repeats)]

    def _pass(self, count: int) -> float:
        new = self.torch.full((1, count), 5)
        with self.torch.inference_mode():
            seconds = timed(lambda: self.model(new, past_key_values=self.cache))
        self.cache.crop(-count)
        return seconds
