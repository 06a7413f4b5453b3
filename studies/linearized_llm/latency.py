"""Latency and memory of prefill and decoding against the context, softmax beside aug."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.hub import load_model
from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.report.data import Chart, Series
from linspec.report.plots import format_value
from linspec.state.sequence_states import SequenceStates
from linspec.train.student import with_mixers
from studies.linearized_llm.attentions import AUG, choose
from studies.linearized_llm.table import TABLES, Cell, Result, Results, Section, Table
from studies.linearized_llm.timing import PeakMemory, Stopwatch

MODELS = ("softmax", "aug")
_COLUMNS = (
    "prefill ms",
    "peak memory",
    "decode ms/token",
    "state",
    "prefill: attention/MLP/other",
    "decode: attention/MLP/other",
)


@TABLES.register(
    "latency",
    summary="prefill and decoding against context, softmax and aug, with breakdown",
    paper="You et al. 2024, arXiv 2406.07368, tables 4, 5 and 11",
)
class Latency(Table):
    """A cell is one context; both models take turns in it, so that a busy machine is so for both."""

    name = "latency"
    place = 2

    def _mixers(self) -> dict[str, MixerConfig]:
        return {"softmax": MixerConfig(), "aug": choose("local", AUG, self.plan.size).mixer}

    def cells(self) -> list[Cell]:
        size = self.plan.size
        return [
            Cell(
                table=self.name,
                row=str(context),
                column="both",
                kind="latency",
                settings={
                    "teacher": self.plan.weights,
                    "mixer": choose("local", AUG, size).to_json(),
                    "context": context,
                    "decoded": size.decoded,
                    "repeats": size.repeats,
                    "shares": "layer by layer",
                    "threads": torch.get_num_threads(),
                },
                rank=1.5,
            )
            for context in size.contexts
        ]

    def measure(self, cell: Cell, folder: Path) -> Result:
        context, size = cell.settings["context"], self.plan.size
        models = {name: self._model(mixer, context) for name, mixer in self._mixers().items()}
        rng = random.Random(context)
        vocabulary = self.plan.config.vocab_size
        ids = [rng.randrange(vocabulary) for _ in range(context + size.decoded)]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
        for _ in range(size.repeats):
            for name, model in models.items():
                runs[name].append(_run(model, ids[:context], ids[context:]))
        return {
            name: _median(each) | _shares(models[name], ids[:context], ids[context:])
            for name, each in runs.items()
        }

    def _model(self, mixer: MixerConfig, context: int) -> Decoder:
        """The teacher with this mixer and room for the context: speed does not ask for training."""
        teacher = load_model(self.plan.teacher)
        room = max(self.plan.config.max_positions, context + self.plan.size.decoded)
        if self.plan.config.positions == "rope":
            teacher.config = replace(teacher.config, max_positions=room)
        return with_mixers(teacher, (mixer,) * teacher.config.layers).to_inference()

    def section(self, results: Results) -> Section:
        grids = []
        contexts = [str(context) for context in self.plan.size.contexts]
        for name in MODELS:

            def show(row: str, column: str, name: str = name) -> str:
                found = results.of(self.name, row, "both")
                return _shown(found[0][name], column) if found else "–"

            grids.append(self.grid(results, contexts, _COLUMNS, show, corner=f"{name}: context"))
        text = (
            "Batch 1, the teacher's weights, one step for the whole prompt, then one token at a time; "
            "medians. Peak memory is the growth of the process while it reads the prompt, sampled. "
            "The shares are those of a run layer by layer, as the one-call step that is timed has no layers; "
            "attention includes its projections.\n\n" + self.reasons(results)
        )
        return Section("Latency and memory", text, tuple(grids), self._plots(results))

    def _plots(self, results: Results) -> tuple[Chart, ...]:
        drawn = [
            self._plot(results, "Prefill", "prefill_ms", "ms"),
            self._plot(results, "Decoding", "decode_ms", "ms per token"),
        ]
        return tuple(chart for chart in drawn if chart is not None)

    def _plot(self, results: Results, title: str, figure: str, label: str) -> Chart | None:
        lines = []
        for name in MODELS:
            points = [
                (float(context), found[0][name][figure])
                for context in self.plan.size.contexts
                if (found := results.of(self.name, str(context), "both"))
            ]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Series(name, x, y))
        if not lines:
            return None
        return Chart(
            title=f"{title} against context",
            x_label="context, tokens",
            y_label=label,
            series=tuple(lines),
            x_unit="tokens",
            log_x=True,
            log_y=True,
        )


def _run(model: Decoder, prompt: list[int], after: list[int]) -> dict[str, Any]:
    """One prompt read and some tokens decoded."""
    state = model.new_state()
    with PeakMemory() as peak:
        began = time.perf_counter()
        _read(model, state, prompt)
        seconds = time.perf_counter() - began
    # the first step after a prompt moves its rows into place
    _decode(model, state, after[:1])
    began = time.perf_counter()
    _decode(model, state, after[1:])
    decoding = time.perf_counter() - began
    return {
        "prefill_ms": 1000 * seconds,
        "decode_ms": 1000 * decoding / (len(after) - 1),
        "peak_bytes": peak.bytes,
        "state_bytes": state.bytes(0),
    }


def _shares(model: Decoder, prompt: list[int], after: list[int]) -> dict[str, Any]:
    """Which part of the time the parts of a block take, layer by layer."""
    model.native = None
    state, found = model.new_state(), {}
    for stage, work in (("prefill", _read), ("decode", _decode)):
        watch = Stopwatch()
        with watch.watch(model):
            began = time.perf_counter()
            work(model, state, prompt if stage == "prefill" else after)
            found[f"{stage}_shares"] = watch.shares(time.perf_counter() - began)
    return found


def _read(model: Decoder, state: SequenceStates, prompt: list[int]) -> None:
    model.step([StepInput(0, prompt, all_logits=False)], state)
    state.commit(0, range(len(prompt)))


def _decode(model: Decoder, state: SequenceStates, tokens: list[int]) -> None:
    for token in tokens:
        model.step([StepInput(0, (token,))], state)
        state.commit(0, (0,))


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the figures."""
    found: dict[str, Any] = {"state_bytes": runs[0]["state_bytes"]}
    for stage in ("prefill", "decode"):
        found[f"{stage}_ms"] = statistics.median(run[f"{stage}_ms"] for run in runs)
    # the first repeat grows the heap that later ones reuse
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return found | {"peak_bytes": max(peaks) if peaks else None}


def _shown(found: dict[str, Any], column: str) -> str:
    if column == "peak memory":
        peak = found["peak_bytes"]
        return "–" if peak is None else format_value(peak, "bytes")
    if column == "state":
        return format_value(found["state_bytes"], "bytes")
    stage = "prefill" if column.startswith("prefill") else "decode"
    if "/MLP/" in column:
        shares = found[f"{stage}_shares"]
        return "/".join(f"{100 * shares[part]:.0f}%" for part in ("attention", "mlp", "other"))
    return f"{found[f'{stage}_ms']:.2f}"
