"""OpenVINO GenAI: int8 or int4 weights, its cache of unsigned bytes.

Every call of GenAI begins with the prompt, which its prefix cache holds by then; passes over several
rows go through the runtime itself, with the same model and the same type of cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Format, Peer, Prompts, Session, timed


class OpenVino(Peer):
    """Converted by optimum-intel, weights compressed by NNCF, as its documentation advises."""

    name = "openvino"
    packages = ("openvino_genai",)
    converters = ("optimum.intel", "nncf", "torch")
    formats = (
        Format(name="int8", bits=8, weight_bytes=1, cache_bytes=1.0625),
        Format(name="int4", bits=4, weight_bytes=0.5 + 2.5 / 128, cache_bytes=1.0625),
    )

    def why_not(self, *, convert: bool) -> str | None:
        import importlib.util

        # find_spec of a submodule raises when its package is missing
        if convert and importlib.util.find_spec("optimum") is None:
            return "optimum-intel not installed (linspec[peers])"
        return super().why_not(convert=convert)

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        how = OVWeightQuantizationConfig(
            bits=form.bits,
            sym=form.bits == 8,
            group_size=_group(form),
            # a smaller group where the inputs of a layer are not a multiple of it
            group_size_fallback="adjust" if form.bits == 4 else None,
        )
        model = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=how)
        model.save_pretrained(target)

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        return _Session(folder, threads)


def _group(form: Format) -> int:
    """Weights that share a scale; -1 for a whole output channel."""
    return -1 if form.bits == 8 else 128


def steps_of(durations: Sequence[float], rows: int) -> list[float]:
    """Seconds of each step from GenAI's microseconds, which are of a token: a step's, shared among rows."""
    return [sum(durations[i : i + rows]) / 1e6 for i in range(0, len(durations), rows)]


PEER = OpenVino()


class _Session(Session):
    def __init__(self, folder: Path, threads: int) -> None:
        import openvino_genai as genai

        self.genai = genai
        self.folder, self.threads = folder, threads
        self.options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipe: Any = None
        self.request: Any = None
        self.prompts: Prompts = ()
        # tokens in the state of `request`
        self.seen = 0

    def open(self, prompts: Prompts) -> float:
        if self.pipe is None:
            self.pipe = self.genai.LLMPipeline(str(self.folder), "CPU", **self.options)
        self.prompts, self.seen = prompts, 0
        return self._generate(1)[0]

    def decode(self, tokens: int) -> list[float]:
        return self._generate(tokens + 1)[1:]

    def _generate(self, tokens: int) -> list[float]:
        """Seconds until the first token, and of each later one, as GenAI itself measures them."""
        import numpy as np
        import openvino as ov

        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        ids = np.array(self.prompts, dtype=np.int64)
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        metrics = self.pipe.generate(inputs, config).perf_metrics
        later = steps_of(metrics.raw_metrics.m_durations, len(self.prompts))
        return [metrics.get_ttft().mean / 1e3, *later]

    def rows(self, count: int, repeats: int) -> list[float] | None:
        import openvino as ov

        if self.request is None:
            model = ov.Core().compile_model(
                str(self.folder / "openvino_model.xml"), "CPU", self.options
            )
            self.request = model.create_infer_request()
        # passes stay in its state: that must not make the context much longer
        if self.seen == 0 or self.seen > 1.5 * len(self.prompts[0]):
            self.request.reset_state()
            self.seen = 0
            self._feed(list(self.prompts[0]))
        return [timed(lambda: self._feed([5] * count)) for _ in range(repeats)]

    def _feed(self, tokens: list[int]) -> None:
        import numpy as np

        count = len(tokens)
        places = np.arange(self.seen, self.seen + count, dtype=np.int64)[None]
        self.seen += count
        inputs = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, self.seen), dtype=np.int64),
            "position_ids": places,
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.request.infer(inputs)
