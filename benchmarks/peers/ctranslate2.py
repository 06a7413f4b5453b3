"""CTranslate2, int8 weights and float32 cache.

It keeps no context between calls: one generation runs in a thread and waits between rounds.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Format, Peer, Prompts, Session

# tokens behind the prompt: more than any comparison decodes
_MOST = 4096


class CTranslate2(Peer):
    """Generator.generate_batch; a callback tells when each token came."""

    name = "ctranslate2"
    packages = ("ctranslate2",)
    converters = ("torch", "transformers")
    formats = (Format(name="int8", bits=8, weight_bytes=1, cache_bytes=4),)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(str(target), quantization="int8", force=True)
        _name_tokens(target)

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        return _Session(folder, threads)


PEER = CTranslate2()


def _name_tokens(folder: Path) -> None:
    """Give special tokens that a tokenizer does not have the name of its first word: none may lack."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    named = {key: words[0] if value is None else value for key, value in config.items()}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")


class Paced:
    """Lets an engine's callback through for so many steps, then makes it wait for the next round."""

    def __init__(self) -> None:
        self.asked, self.answered = threading.Semaphore(0), threading.Semaphore(0)
        self.stopping = False
        self.steps = 0

    def note(self, result: Any) -> bool:
        """Called for every row of every step; True ends the generation."""
        if result.step >= self.steps:
            self.steps += 1
            self.answered.release()
            self.asked.acquire()
        return self.stopping

    def seconds(self) -> float:
        """Time until the next step is done."""
        began = time.perf_counter()
        self.asked.release()
        self.answered.acquire()
        return time.perf_counter() - began


class _Session(Session):
    def __init__(self, folder: Path, threads: int) -> None:
        from ctranslate2 import Generator

        self.generator = Generator(
            str(folder), device="cpu", intra_threads=threads, compute_type="int8"
        )
        vocabulary = folder / "vocabulary.json"
        self.words: list[str] = json.loads(vocabulary.read_text(encoding="utf-8"))
        self.pace = Paced()
        self.thread: threading.Thread | None = None

    def open(self, prompts: Prompts) -> float:
        self._stop()
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        self.pace = Paced()
        # a daemon: the process must be able to end in the middle of a generation
        self.thread = threading.Thread(target=self._generate, args=(words, self.pace), daemon=True)
        began = time.perf_counter()
        self.thread.start()
        self.pace.answered.acquire()
        return time.perf_counter() - began

    def decode(self, tokens: int) -> list[float]:
        return [self.pace.seconds() for _ in range(tokens)]

    def _stop(self) -> None:
        if self.thread is None:
            return
        self.pace.stopping = True
        self.pace.asked.release()
        self.thread.join()

    def _generate(self, prompts: list[list[str]], pace: Paced) -> None:
        self.generator.generate_batch(
            prompts,
            max_length=_MOST,
            min_length=_MOST,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            callback=pace.note,
            end_token=[],
        )
