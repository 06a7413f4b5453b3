"""Masked diffusion: every policy and combination on one model and prompts, its quality beside its cost.

    python -m benchmarks.diffusion tasks --folder cells
    python -m benchmarks.diffusion embedded-diffusion --beside embedded-softmax --folder cells

Combinations take turns, a round after the other, one request at a time. What each has done is kept in the
folder, so a run that was stopped goes on. `lattice.py` says which combinations there are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.diffusion_work import Answer, Tasks, Text, Work
from benchmarks.lattice import lattice, left_out
from linspec.bench.machine import machine
from linspec.errors import ConfigError, LinspecError
from linspec.evaluate.lossless_denoising import spec_of
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.utils.files import replace_text
from linspec.utils.progress import Progress


@dataclass(frozen=True, slots=True)
class Way:
    """A way to answer the prompts; compared: whether its tokens are held against those of the reference."""

    name: str
    make: Callable[[], LLM]
    prompts: Sequence[Any]
    compared: bool = True


def ways_of(work: Work, plans: Sequence[str], beside: str | None) -> list[Way]:
    """The combinations, the reference first, and the model that is shown beside them."""

    def make(spec: str) -> Callable[[], LLM]:
        return lambda: LLM(work.model, tokenizer=work.tokenizer, loop=spec, max_batch=1)

    found = [Way(spec, make(spec), work.prompts) for spec in plans]
    if beside is not None:
        if not isinstance(work, Text):
            raise ConfigError("--beside is a model of text; leave it out for tasks")
        found.append(Way(beside, lambda: LLM(beside, max_batch=1), work.texts, compared=False))
    return found


class Cells:
    """What was measured, a file for each way."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError for a folder that was begun with other settings."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "settings.json"
        if not place.exists():
            replace_text(place, json.dumps(settings))
        begun = json.loads(place.read_text(encoding="utf-8"))
        if begun != settings:
            raise ConfigError(
                f"{folder} was begun with {begun}, not with {dict(settings)}; give another folder"
            )

    def read(self, name: str) -> dict[str, Any]:
        """A cell; one without rounds if it was not measured yet."""
        place = self._place(name)
        if not place.exists():
            return {"name": name, "seconds": []}
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return found

    def write(self, cell: Mapping[str, Any]) -> None:
        """Keep it."""
        replace_text(self._place(cell["name"]), json.dumps(cell))

    def _place(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def measure(
    work: Work,
    ways: Sequence[Way],
    cells: Cells,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Answer all prompts in every way, `rounds` times; what the cells have already is not done again."""
    turns = [(at, way) for at in range(rounds) for way in (ways if at % 2 == 0 else ways[::-1])]
    with Progress("lattice", len(turns)) as progress:
        for done, (at, way) in enumerate(turns, 1):
            cell = cells.read(way.name)
            if len(cell["seconds"]) <= at and "error" not in cell:
                cells.write(_measured(work, way, cell, clock))
            progress.update(done, way.name)


def _measured(
    work: Work, way: Way, cell: dict[str, Any], clock: Callable[[], float]
) -> dict[str, Any]:
    try:
        llm = way.make()
        began = clock()
        found = llm.generate(list(way.prompts), work.params)
    # a policy may refuse a model or a combination: the others go on
    except LinspecError as error:
        return cell | {"error": str(error)}
    seconds = [*cell["seconds"], clock() - began]
    tokens = sum(len(each.token_ids) for each in found)
    return cell | {
        "seconds": seconds,
        "tokens": tokens,
        "forwards": sum(each.stats.rounds for each in found),
        "computed": sum(each.stats.computed for each in found) or _once(llm.model, tokens),
        "answers": [(each.token_ids, each.text) for each in found],
    }


def _once(model: object, tokens: int) -> int:
    """Positions × layers of an autoregressive model, which computes each token once."""
    return tokens * model.config.layers if isinstance(model, Decoder) else 0


def rows(work: Work, ways: Sequence[Way], cells: Cells) -> Iterator[dict[str, Any]]:
    """A line for each way: its cost as a share of the reference's, how much faster it is, and its quality."""
    found = [cells.read(way.name) for way in ways]
    first = found[0]
    if "answers" not in first:
        raise ConfigError(f"the reference {first['name']} failed: {first.get('error', 'no round')}")
    reference = _answers(first)
    for way, cell in zip(ways, found, strict=True):
        if "answers" not in cell:
            yield {"name": way.name, "error": cell.get("error", "not measured")}
            continue
        pairs = zip(first["seconds"], cell["seconds"], strict=False)
        ratios = [theirs / mine for theirs, mine in pairs]
        speed = statistics.median(ratios)
        yield {
            "name": way.name,
            "forwards": cell["forwards"] / first["forwards"],
            "computed": cell["computed"] / first["computed"],
            "speed": speed,
            "spread": (max(ratios) - min(ratios)) / speed,
            "tokens_per_forward": cell["tokens"] / cell["forwards"],
            **work.judged(_answers(cell), reference if way.compared else None),
        }


def _answers(cell: Mapping[str, Any]) -> list[Answer]:
    return [Answer(tuple(ids), text) for ids, text in cell["answers"]]


def on_the_front(lines: Sequence[Mapping[str, Any]], quality: str, falls: bool) -> set[str]:
    """The ways that no other way beats in speed and quality both."""
    good = {each["name"]: each[quality] * (-1 if falls else 1) for each in lines if quality in each}
    fast = {each["name"]: each["speed"] for each in lines if quality in each}

    def beaten(mine: str) -> bool:
        return any(
            good[name] >= good[mine]
            and fast[name] >= fast[mine]
            and (good[name], fast[name]) != (good[mine], fast[mine])
            for name in good
        )

    return {name for name in good if not beaten(name)}


def table(lines: Sequence[Mapping[str, Any]], quality: str, falls: bool) -> str:
    """Markdown: bold is what nothing else beats in both; failures stand below."""
    front = on_the_front(lines, quality, falls)
    measured = [each for each in lines if "error" not in each]
    columns = list(dict.fromkeys(name for each in measured for name in each if name != "name"))
    head = ["policies", *(name.replace("_", " ") for name in columns)]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in measured:
        name = f"`{each['name'].removeprefix('masked-diffusion:')}`"
        values = [f"{each[column]:.3g}" if column in each else "–" for column in columns]
        bold = f"**{name}**" if each["name"] in front else name
        text.append("| " + " | ".join([bold, *values]) + " |")
    text += [f"\n`{each['name']}`: {each['error']}" for each in lines if "error" in each]
    return "\n".join(text)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument("work", help="'tasks', or a diffusion model that writes text")
    about.add_argument("--folder", type=Path, required=True, help="of what was measured")
    about.add_argument("--beside", help="an autoregressive model to show too, and to judge text")
    about.add_argument("--prompts", type=int, default=24)
    about.add_argument("--tokens", type=int, default=64, help="of a text")
    about.add_argument("--steps", type=int, default=4000, help="of training the model of tasks")
    about.add_argument("--depth", type=int, default=3, help="most kinds that are changed at once")
    about.add_argument("--also", action="append", default=[], help="such as cache=dual:2")
    about.add_argument("--only", default="", help="ways whose spec has this text")
    about.add_argument("--rounds", type=int, default=5)
    about.add_argument("--json", action="store_true", help="a line of JSON for each way")
    return about.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    given = _arguments(words)
    work: Work
    if given.work == "tasks":
        work = Tasks(given.folder, given.prompts, given.steps)
    else:
        work = Text(given.work, given.prompts, given.tokens, given.beside)
    for line in left_out():
        print(line, file=sys.stderr)
    plans = [spec_of(plan) for plan in lattice(work.blocks, given.depth, given.also)]
    plans = [plan for at, plan in enumerate(plans) if at == 0 or given.only in plan]
    ways = ways_of(work, plans, given.beside)
    kept = ("work", "prompts", "tokens", "steps")
    cells = Cells(given.folder / work.name, {name: getattr(given, name) for name in kept})
    measure(work, ways, cells, given.rounds)
    found = list(rows(work, ways, cells))
    if given.json:
        print(json.dumps({"machine": machine(), "work": work.name}))
    for each in found if given.json else ():
        print(json.dumps(each))
    if not given.json:
        print(table(found, work.quality, work.falls))


if __name__ == "__main__":
    main()
