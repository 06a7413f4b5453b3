"""CTranslate2, int8 weights and float32 cache. It reads the prompts again for every `decode`."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from linspec.bench.peers.base import Format, Peer, Prompts, Session


class CTranslate2(Peer):
    """Generator.generate_batch; a callback tells when each token came."""

    name = "ctranslate2"
    packages = ("ctranslate2",)
    converters = ("torch", "transformers")
    formats = (Format(name="int8", bits=8, weight_bytes=1, cache_bytes=4),)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(str(target), quantization="int8", force=True)

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        return _Session(folder, threads)


PEER = CTranslate2()


class _Session(Session):
    keeps_context = False

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2
        from ctranslate2 import Generator

        self.generator = Generator(
            str(folder), device="cpu", intra_threads=threads, compute_type="int8"
        )
        vocabulary = folder / "vocabulary.json"
        import json

        self.words: list[str] = json.loads(vocabulary.read_text(encoding="utf-8"))
        self.version = ctranslate2.__version__
        self.prompts: list[list[str]] = []

    def open(self, prompts: Prompts) -> float:
        self.prompts = [[self.words[token] for token in prompt] for prompt in prompts]
        return self._generate(1)[0]

    def decode(self, tokens: int) -> list[float]:
        return self._generate(tokens + 1)[1:]

    def _generate(self, tokens: int) -> list[float]:
        """Seconds until the first token, and of each later one."""
        stamps = [time.perf_counter()]
        steps = 0

        def note(result: Any) -> bool:
            nonlocal steps
            if result.step >= steps:
                steps += 1
                stamps.append(time.perf_counter())
            return False

        self.generator.generate_batch(
            self.prompts,
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            callback=note,
            end_token=[],
        )
        return [b - a for a, b in itertools.pairwise(stamps)]
