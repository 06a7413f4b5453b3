"""Batches: every line of a file is answered once, also when the process is killed in between.

    with open_batch(Path("in.jsonl"), Path("out.jsonl"), "smollm2") as batch:
        summary = asyncio.run(batch.run(ask, at_once=16))

`ask` answers as the server does. `app_asker` asks a server of this process, without a socket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from linspec.errors import InputError
from linspec.serve.batch_file import AnswerFile
from linspec.serve.batch_lines import Line, answered, failed, id_of, read_line, refused, usage_of
from linspec.utils.messages import because
from linspec.utils.progress import Progress

# a server that has no room now says so with this; the line is asked again
_NO_ROOM, _PAUSE = 429, 0.05
# ... and with this that it stops
_STOPPING = 503


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered."""

    status: int
    body: Mapping[str, Any]
    request_id: str = ""


Ask = Callable[[str, Mapping[str, Any]], Awaitable[Reply]]


@dataclass(slots=True)
class Summary:
    """What a batch came to.

    Attributes:
        lines: lines of the input that ask for something.
        resumed: of these, the ones that an earlier run answered.
        failed: the ones that this run answered with an error.
        prompt_tokens, completion_tokens, seconds: of this run.
    """

    lines: int
    resumed: int
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, with the speed."""
        speed = self.completion_tokens / self.seconds if self.seconds else 0.0
        return {**asdict(self), "tokens_per_s": speed}


class Batch:
    """The lines of `source` that `answers` does not hold yet, for `model`.

    max_tokens: of lines of the simple form that name none. Raises InputError if `source` cannot be read, or
    `answers` are those of other lines.

    made_by: what makes the answers of `run` (see `batch_model.maker_of`); '' where that is not known.
    """

    made_by = ""

    def __init__(
        self, source: Path, answers: AnswerFile, model: str, max_tokens: int = 512
    ) -> None:
        self.source, self.answers, self.model = source, answers, model
        self.max_tokens = max_tokens
        numbers = set[int]()
        for number, raw in self._raw():
            numbers.add(number)
            own = id_of(raw, model)
            if answers.done.get(number, own) != own:
                raise self._other(number)
        if others := answers.done.keys() - numbers:
            raise self._other(min(others))
        self.summary = Summary(len(numbers), len(answers.done))

    @property
    def left(self) -> int:
        """Lines that have no answer yet."""
        return self.summary.lines - len(self.answers.done)

    def _other(self, number: int) -> InputError:
        return InputError(
            f"{self.answers.path} answers another line {number} than {self.source} has, or by another model "
            f"than {self.model}; give what it was begun with, choose another output, or replace this one "
            "with --overwrite"
        )

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not empty, by their numbers."""
        try:
            with open(self.source, "rb") as file:
                yield from ((n, raw) for n, raw in enumerate(file, 1) if raw.strip())
        except OSError as error:
            raise InputError(f"cannot read {because(error)}") from error

    def open_lines(self) -> Iterator[Line]:
        """The lines that have no answer yet; a custom_id that came before is the second line's fault."""
        seen: dict[str, int] = {}
        for number, raw in self._raw():
            line = read_line(number, raw, self.model, self.max_tokens)
            first = number if line.custom_id is None else seen.setdefault(line.custom_id, number)
            if number in self.answers.done:
                continue
            if first != number:
                fault = f"custom_id {line.custom_id!r} is that of line {first} too; give it another"
                line = replace(line, fault=line.fault or fault)
            yield line

    async def run(self, ask: Ask, *, at_once: int, show_progress: bool = False) -> Summary:
        """Answer all open lines, `at_once` at a time; what is answered is on disk, whatever ends this.

        Raises what `ask` raises and OSError when the disk refuses.
        """
        began = time.perf_counter()
        lines, summary = self.open_lines(), self.summary
        progress = Progress("batch", summary.lines, summary.resumed) if show_progress else None
        with progress or nullcontext():
            async with _first_error() as tasks:
                for _ in range(at_once):
                    tasks.create_task(self._work(lines, ask, progress))
        summary.seconds = time.perf_counter() - began
        return summary

    async def _work(self, lines: Iterator[Line], ask: Ask, progress: Progress | None) -> None:
        """One of several that take the next line each."""
        for line in lines:
            self.enter(await answer(line, ask, self.made_by))
            if progress is not None:
                failures = f"{self.summary.failed} failed" if self.summary.failed else ""
                progress.update(len(self.answers.done), failures)

    def begin(self, made_by: str) -> None:
        """Say what makes the answers; raises InputError where something else made those that are there."""
        self.answers.check_maker(made_by)
        self.made_by = made_by

    def enter(self, record: Mapping[str, Any]) -> None:
        """Write the answer of a line, which had none; raises what `AnswerFile.add` raises."""
        self.answers.add(record)
        usage, summary = usage_of(record), self.summary
        summary.failed += failed(record)
        summary.prompt_tokens += usage.get("prompt_tokens") or 0
        summary.completion_tokens += usage.get("completion_tokens") or 0


async def answer(line: Line, ask: Ask, made_by: str = "") -> dict[str, Any]:
    """What is written about a line; raises InputError where the server stops before it is answered.

    made_by: as in `Batch`.
    """
    if line.fault:
        return refused(line)
    assert line.body is not None
    while (reply := await ask(line.url, line.body)).status == _NO_ROOM:
        await asyncio.sleep(_PAUSE)
    if reply.status == _STOPPING:
        raise InputError(f"the model answers no more, from line {line.number} on: {reply.body}")
    record = answered(line, reply.status, reply.body, reply.request_id)
    return {**record, "made_by": made_by} if made_by else record


@asynccontextmanager
async def _first_error() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that end together; the first error of one is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


@contextmanager
def open_batch(
    source: Path, target: Path, model: str, *, overwrite: bool = False, max_tokens: int = 512
) -> Iterator[Batch]:
    """The batch of `source` with its answers at `target`; goes on with those that are there.

    overwrite: the first new answer takes the place of those that are there. Raises InputError before anything
    is written, and where `target` holds something else or is no file.
    """
    if not source.is_file():
        raise InputError(f"{source} is no file; a batch reads its lines more than once")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the input; choose another output")
    with AnswerFile(target, overwrite=overwrite) as answers:
        yield Batch(source, answers, model, max_tokens)


@asynccontextmanager
async def app_asker(app: Any) -> AsyncIterator[Ask]:
    """Asks `app`, an ASGI application in this process."""
    from httpx import ASGITransport, AsyncClient

    transport = ASGITransport(app=app)
    async with AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=None
    ) as client:

        async def ask(url: str, body: Mapping[str, Any]) -> Reply:
            reply = await client.post(url, json=body)
            return Reply(reply.status_code, reply.json(), reply.headers.get("x-request-id", ""))

        yield ask
