"""ONNX Runtime GenAI: int4 weights in blocks of 32, int8 arithmetic, float32 cache."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.base import Format, Peer, Prompts, Session, timed


class OnnxRuntime(Peer):
    """The package's own model builder and its generator."""

    name = "onnxruntime"
    packages = ("onnxruntime_genai",)
    converters = ("torch", "transformers", "onnx", "onnx_ir")
    formats = (Format(name="int4", bits=4, weight_bytes=0.5 + 4 / 32, cache_bytes=4),)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        where = ("", str(source), str(target), "int4", "cpu", str(target / "cache"))
        how = ["int4_block_size=32", "int4_accuracy_level=4"]
        create_model(*where, **parse_extra_options(*where, how))

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        return _Session(folder, context, threads)


PEER = OnnxRuntime()


class _Session(Session):
    def __init__(self, folder: Path, context: int, threads: int) -> None:
        import onnxruntime_genai as og

        self.api, self.limit = og, context
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def open(self, prompts: Prompts) -> float:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(
            max_length=self.limit, min_length=self.limit, batch_size=len(prompts), do_sample=False
        )
        self.generator = self.api.Generator(self.model, params)
        return timed(lambda: self._read(prompts))

    def _read(self, prompts: Prompts) -> None:
        import numpy as np

        self.generator.append_tokens(np.array(prompts, dtype=np.int32))
        self.generator.generate_next_token()

    def decode(self, tokens: int) -> list[float]:
        return [timed(self.generator.generate_next_token) for _ in range(tokens)]

    def rows(self, count: int, repeats: int) -> list[float] | None:
        import numpy as np

        length = int(self.generator.token_count())
        new = np.full((1, count), 5, dtype=np.int32)
        found = []
        for _ in range(repeats):
            found.append(timed(lambda: self.generator.append_tokens(new)))
            self.generator.rewind_to(length)
        return found
