"""Batches on Ray Data: actors answer the lines, this process alone writes the answers.

    with open_batch(Path("in.jsonl"), Path("out.jsonl"), "smollm2") as batch:
        answer_on_ray(batch, "smollm2", replicas=4)

An actor that dies is replaced, and the lines that it had are asked again; what is written stays written.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from linspec.errors import InputError
from linspec.serve.app import make_app
from linspec.serve.batch import Batch, answer, app_asker
from linspec.serve.batch_lines import Line, refused
from linspec.serve.batch_model import batch_settings, batch_worker, maker_of
from linspec.serve.ray_found import cpus_of_each, enter, hushed, ray_running
from linspec.utils.progress import Progress

# lines of a task for each slot of a model: they are answered, and lost, together
_LINES_A_SLOT = 4
# tasks of an actor at once: the last lines of one run beside the first of the next
_TASKS = 2
# a line that kills its actor is not tried for ever
_TRIES = 4


class Answerer:
    """A model in a process of Ray's."""

    def __init__(
        self,
        name: str,
        model: str,
        max_batch: int,
        max_tokens: int,
        options: Mapping[str, Any],
        folder: str,
    ) -> None:
        enter(folder)
        self._settings = batch_settings(max_batch)
        worker = batch_worker(model, self._settings, _TASKS * 2 * max_batch, **options)
        self._app = make_app({name: worker}, self._settings)
        self._made_by = maker_of(worker.llm, max_tokens, options)

    def __call__(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The records of lines; both are JSON."""
        lines = [Line(**json.loads(each)) for each in rows["line"]]
        return {"record": [json.dumps(each) for each in asyncio.run(self._answer(lines))]}

    async def _answer(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        limit = asyncio.Semaphore(2 * self._settings.max_batch)
        async with app_asker(self._app) as ask:

            async def one(line: Line) -> dict[str, Any]:
                async with limit:
                    return await answer(line, ask, self._made_by)

            return await asyncio.gather(*map(one, lines))


def answer_on_ray(
    batch: Batch, model: str, *, replicas: int = 1, max_batch: int = 8, **options: Any
) -> None:
    """Answer the open lines of `batch` with copies of `model`, loaded with `options`; see `LLM`.

    Raises ConfigError where Ray is not there, InputError where it gives up or where another model made the
    answers that are there, or other settings; what is answered until then is on disk.
    """
    began = time.perf_counter()
    lines, faulty = list[str](), list[Line]()
    for line in batch.open_lines():
        if line.fault:
            faulty.append(line)
        else:
            lines.append(json.dumps(asdict(line)))
    summary = batch.summary
    with (
        ray_running(),
        Progress("batch", summary.lines, len(batch.answers.done)) as progress,
    ):
        given = (batch.model, model, max_batch, batch.max_tokens, options, os.getcwd())
        for record in _records(lines, replicas, _LINES_A_SLOT * max_batch, given):
            # every line has one answer, however often Ray has asked
            if record["line"] not in batch.answers.done:
                batch.enter(record)
                failures = f"{summary.failed} failed" if summary.failed else ""
                progress.update(len(batch.answers.done), failures)
        # not before: without a model that answers, nothing is written
        for line in faulty:
            batch.enter(refused(line))
    summary.seconds = time.perf_counter() - began


def _records(
    lines: Sequence[str], replicas: int, size: int, given: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    """What is written about lines, in the order in which it comes."""
    import ray.data
    from ray.exceptions import RayError

    if not lines:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    hushed("ray.data")
    # few lines are shared out too
    size = min(size, -(-len(lines) // replicas))
    tasks = -(-len(lines) // size)
    asked = ray.data.from_items([{"line": line} for line in lines], override_num_blocks=tasks)
    answers = asked.map_batches(
        Answerer,
        fn_constructor_args=given,
        compute=ray.data.ActorPoolStrategy(
            size=min(replicas, tasks), max_tasks_in_flight_per_actor=_TASKS
        ),
        batch_size=size,
        num_cpus=cpus_of_each(replicas),
        max_concurrency=_TASKS,
        max_restarts=_TRIES,
        max_task_retries=_TRIES,
    )
    try:
        for rows in answers.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(json.loads, rows["record"])
    except RayError as error:
        said = " ".join(str(error).split())[-400:]
        raise InputError(f"Ray answers no more lines: {said}") from error
