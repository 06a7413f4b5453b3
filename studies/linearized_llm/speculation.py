"""Speculation: plain against speculative decoding for each attention, and one tree step against many."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linspec.bench.speed import PLAIN as PLAIN_MODE
from linspec.bench.speed import bench
from linspec.checkpoints.hub import load_model
from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree, best_first, from_paths
from linspec.drafters.saved import CONFIG_FILE
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.report.data import Bar, Bars
from linspec.state.sequence_states import SequenceStates
from linspec.train.drafters import DrafterConfig, train_drafter
from linspec.train.linearize_record import RECORD
from linspec.train.run import begun
from studies.linearized_llm.attentions import AUG, PLAIN, choose, in_one_call
from studies.linearized_llm.cache import workplace
from studies.linearized_llm.grid import AttentionTable
from studies.linearized_llm.table import TABLES, Cell, Result, Results, Section
from studies.linearized_llm.training import KIND, train, training_settings

# a tree as wide and deep as Medusa's 64 nodes: four heads, the best guess right 6 times in 10
_GUESSES = [[0.6 * 0.5**rank for rank in range(10)] for _ in range(4)]
TREE_NODES = 64
_COLUMNS = (
    "plain tokens/s",
    "lookup tokens/s",
    "lookup τ",
    "Medusa tokens/s",
    "Medusa τ",
    "tree step ms",
    "one by one ms",
)
_LOOKUP, _MEDUSA = "prompt-lookup", "medusa"
# cells that were measured before they said so: these mixers decoded in one call then
_FIRST_IN_C = frozenset(("softmax", "window", "local", "grouped", "aug"))


@TABLES.register(
    "speculation",
    summary="plain against speculative decoding, one tree step against candidates one by one",
    paper="You et al. 2024, arXiv 2406.07368, tables 8 and 9",
)
class Speculation(AttentionTable):
    """Students are those of the quality table; their Medusa heads are trained here."""

    name = "speculation"
    place = 3

    def cells(self) -> list[Cell]:
        return [
            self._cell(row, part)
            for row in self.rows
            for part in (PLAIN, AUG)
            if (row, part) != ("softmax", AUG)
        ]

    def _cell(self, row: str, part: str) -> Cell:
        place = f"{row}, {part}"
        try:
            choice = choose(row, part, self.plan.size)
        except ConfigError as error:
            return Cell(table=self.name, row=place, column="all", undefined=str(error))
        size = self.plan.size
        settings = {
            "student": training_settings(self.plan, choice, self.plan.domain),
            "prompt": size.prompt,
            "decoded": size.decoded,
            "repeats": size.repeats,
            "heads_tokens": size.heads_tokens,
            "threads": torch.get_num_threads(),
        }
        rank = 1.5 if row in ("softmax", "local") else 4.0
        return Cell(
            table=self.name, row=place, column="all", kind=self.name, settings=settings, rank=rank
        )

    def measure(self, cell: Cell, folder: Path) -> Result:
        settings, size = cell.settings, self.plan.size
        student = self._student(settings["student"], folder)
        drafters = [_LOOKUP]
        if size.heads_tokens:
            drafters.append(f"{_MEDUSA}:{self._heads(student, folder / _MEDUSA)}")
        data = self.plan.domains[self.plan.domain]
        speed = bench(
            student, [size.prompt], drafters, tokens=size.decoded, repeats=size.repeats, data=data
        )
        found: Result = {"one_call": in_one_call(settings["student"]["mixer"])}
        for row in speed.rows:
            mode = row.mode.partition(":")[0]
            found[f"{mode}_tokens_per_s"] = row.tokens_per_s
            found[f"{mode}_tokens_per_round"] = row.tokens_per_round
            found[f"{mode}_spread"] = row.spread
        return found | tree_against_candidates(
            load_model(student).to_inference(), size.prompt, size.repeats
        )

    def _student(self, settings: dict[str, Any], folder: Path) -> Path:
        """The model that the quality table left behind, else one trained here in the same way."""
        place = Cell(table=self.name, row="", column="", kind=KIND, settings=settings)
        kept = workplace(self.plan.out, place) / "model"
        if (kept / RECORD).exists():
            return kept
        return train(self.plan, settings, 0, folder, MixerConfig(**settings["mixer"]))

    def _heads(self, student: Path, out: Path) -> Path:
        size = self.plan.size
        config = DrafterConfig(
            tokens=size.heads_tokens,
            context=min(size.context, self.plan.config.max_positions),
            batch_tokens=size.batch_tokens,
            calibration_tokens=max(size.context, min(65_536, size.heads_tokens)),
        )
        data, resume = self.plan.domains[self.plan.domain], begun(out, CONFIG_FILE)
        return train_drafter(student, out, data=data, config=config, resume=resume)

    def section(self, results: Results) -> Section:
        defined = [cell for cell in self.listed if not cell.undefined]
        rows = [cell.row for cell in defined]
        native = [cell.row for cell in defined if self._was_one_call(results, cell)]
        grid = self.grid(
            results, rows, _COLUMNS, lambda row, column: self._show(results, row, column)
        )
        size = self.plan.size
        text = (
            f"Greedy decoding of {size.decoded} tokens after {size.prompt} of held-out text, batch 1, "
            "`auto` policy, medians; output equal to plain decoding or the cell fails. In brackets: "
            "against plain decoding. τ: tokens per round. Right: a tree of "
            f"{TREE_NODES} nodes in one step against each of its paths in a step of its own.\n\n"
            f"One call of the C library a step: {'; '.join(native)}. The others decode in "
            "torch, operation by operation: compare them with each other.\n\n"
            + self.reasons(results)
        )
        return Section("Speculation", text, (grid,), self._plots(results, rows))

    def _was_one_call(self, results: Results, cell: Cell) -> bool:
        """Whether the C library decoded in one call a step when a cell was measured."""
        found = results.of(self.name, cell.row, "all")
        mixer = cell.settings["student"]["mixer"]
        if not found:
            return in_one_call(mixer)
        return bool(found[0].get("one_call", mixer["name"] in _FIRST_IN_C))

    def _show(self, results: Results, row: str, column: str) -> str:
        found = results.of(self.name, row, "all")
        return _shown(found[0], column) if found else "–"

    def _plots(self, results: Results, rows: list[str]) -> tuple[Bars, ...]:
        bars = []
        for row in rows:
            for found in results.of(self.name, row, "all"):
                plain = found[f"{PLAIN_MODE}_tokens_per_s"]
                for colour, mode in enumerate((_LOOKUP, _MEDUSA), 1):
                    if (speed := found.get(f"{mode}_tokens_per_s")) is not None:
                        bars.append(Bar(f"{row}: {mode}", speed / plain, colour))
        if not bars:
            return ()
        label = "tokens per second over plain decoding"
        return (Bars(title="Speed-up by speculation", x_label=label, bars=tuple(bars)),)


def _shown(found: dict[str, Any], column: str) -> str:
    if column == "tree step ms":
        return f"{found['tree_ms']:.2f}"
    if column == "one by one ms":
        ms = found["candidates_ms"]
        return f"{ms:.2f} ({ms / found['tree_ms']:.1f}×, {found['candidates']} paths)"
    name, _, unit = column.partition(" ")
    mode = {"plain": PLAIN_MODE, "lookup": _LOOKUP, "Medusa": _MEDUSA}[name]
    if f"{mode}_tokens_per_s" not in found:
        return "–"
    if unit == "τ":
        return f"{found[f'{mode}_tokens_per_round']:.2f}"
    speed, plain = found[f"{mode}_tokens_per_s"], found[f"{PLAIN_MODE}_tokens_per_s"]
    return f"{speed:.1f}" if mode == PLAIN_MODE else f"{speed:.1f} ({speed / plain:.2f}×)"


def tree_against_candidates(model: Decoder, prompt: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to verify a tree of 64 nodes in one step, and its paths one after the other."""
    rng, vocabulary = random.Random(0), model.config.vocab_size
    state = model.new_state()
    model.step([StepInput(0, [rng.randrange(vocabulary) for _ in range(prompt)])], state)
    state.commit(0, range(prompt))
    tree, paths = _tree(rng, vocabulary)
    inputs = [StepInput(0, [tree.tokens[node] for node in path]) for path in paths]
    whole = _timed(lambda: _verify(model, state, [StepInput.tree(0, tree)]), repeats)
    apart = _timed(lambda: _verify(model, state, inputs), repeats)
    return {"tree_ms": whole, "candidates_ms": apart, "candidates": len(paths)}


def _tree(rng: random.Random, vocabulary: int) -> tuple[TokenTree, list[tuple[int, ...]]]:
    """A tree of random tokens, and its paths from the root to every leaf."""
    ranks = best_first(_GUESSES, TREE_NODES - 1)
    shift = rng.randrange(vocabulary)
    # different ranks of one depth are different tokens, so that no paths merge that should not
    tree = from_paths(shift, [[(shift + rank + 1) % vocabulary for rank in path] for path in ranks])
    leaves = set(range(len(tree))) - set(tree.parents)
    return tree, [tree.path_to(leaf) for leaf in sorted(leaves)]


def _verify(model: Decoder, state: SequenceStates, inputs: list[StepInput]) -> None:
    for feed in inputs:
        model.step([feed], state)
        state.drop(0)


def _timed(work: Callable[[], None], repeats: int) -> float:
    """Median milliseconds after a warm-up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)
