"""How a server of OpenAI's API does under load: linspec's own, or another one beside it.

    report = bench_serving("http://127.0.0.1:8000", prompts, Workload(rate=2.0))
    print(report.output_tokens_per_s, report.first_token["p95"])

Answers are streamed, so what a reader sees is timed from outside: *first token* is from sending a request to
its first text, *between pieces* from one piece of text to the next, *per token* what a request's tokens took
in the mean, behind the first.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from linspec.bench.arrivals import Workload, poisson
from linspec.bench.prompts import Question
from linspec.errors import ConfigError, InputError
from linspec.utils.progress import Progress

if TYPE_CHECKING:
    from httpx import AsyncClient

_SHARES = {"p50": 50, "p95": 95, "p99": 99}
_DATA, _DONE = "data:", "[DONE]"


@dataclass(slots=True)
class Answer:
    """What one request got; times are seconds from the begin of the run.

    Attributes:
        family: of its prompt.
        sent: when it was sent.
        pieces: when each piece of text came.
        ended: when its stream was at its end.
        tokens: of the output, as the server counts them.
        error: what went wrong; '' for nothing.
    """

    family: str
    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [later - sooner for sooner, later in itertools.pairwise(self.pieces)]

    @property
    def per_token(self) -> float:
        """Seconds of a token behind the first piece, in the mean; 0 where there is none."""
        if len(self.pieces) < 2:
            return 0.0
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Serving:
    """Figures of a run; seconds, percentiles by name.

    Attributes:
        seconds: from the first request to the last answer.
        output_tokens_per_s: of all requests together.
        first_token: seconds from sending to the first text.
        between_pieces: seconds from one piece of text to the next, all pieces of all requests.
        per_token: seconds of a token in the mean of a request.
        request_seconds: from sending to the end of the answer.
        goodput: share of the requests whose first token and time per token met the targets; None
            without targets.
        errors: what went wrong, with how often.
    """

    requests: int
    answered: int
    seconds: float
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    first_token: dict[str, float]
    between_pieces: dict[str, float]
    per_token: dict[str, float]
    request_seconds: dict[str, float]
    goodput: float | None
    errors: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Targets:
    """Latencies that a request is to have: seconds to the first token, and of a token in the mean."""

    first_token: float
    per_token: float

    def met(self, answer: Answer) -> bool:
        """Whether a request had them."""
        if answer.error or not answer.pieces:
            # who was told nothing at all waited for nothing
            return not answer.error
        soon = answer.pieces[0] - answer.sent <= self.first_token
        return soon and answer.per_token <= self.per_token


def bench_serving(
    url: str,
    questions: Sequence[Question],
    workload: Workload,
    *,
    model: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    targets: Targets | None = None,
    key: str = "",
    timeout: float = 600.0,
) -> Serving:
    """Load the server at `url` with `questions`, in turns, greedily unless told otherwise.

    model: its name there; None takes the first that the server names. key: a bearer token. timeout: seconds
    that a server may say nothing.

    Raises ConfigError without httpx, InputError where no server answers.
    """
    if not questions:
        raise InputError("there is no prompt to ask; give a file with one JSON object in a line")
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    answers = asyncio.run(_run(url, questions, workload, model, sampling, key, timeout))
    return summary(answers, targets)


async def _run(
    url: str,
    questions: Sequence[Question],
    workload: Workload,
    model: str | None,
    sampling: dict[str, Any],
    key: str,
    timeout: float,
) -> list[Answer]:
    try:
        import httpx
    except ImportError as error:
        raise ConfigError(
            "asking a server needs the package httpx: pip install 'linspec[serve]'"
        ) from error
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # every request has a connection of its own, as those of different people
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=timeout
    ) as client:
        name = model or await _first_model(client, url)
        asker = _Asker(client, {"model": name, "stream": True, **sampling})
        # the first answer of a server pays for much that the others do not
        await asker.ask(questions[0])
        return await _load(asker, questions, workload)


async def _first_model(client: AsyncClient, url: str) -> str:
    import httpx

    try:
        reply = await client.get("/v1/models")
        return str(reply.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"no server at {url} names its models ({error!r}); start one, such as `linspec serve "
            "embedded-aug`, or give --name"
        ) from error


async def _load(asker: _Asker, questions: Sequence[Question], workload: Workload) -> list[Answer]:
    """Every answer of the workload, in the order of the requests."""
    asked = list(itertools.islice(itertools.cycle(questions), workload.requests))
    until = workload.seconds
    of = ("requests", len(asked)) if until is None else ("seconds", math.ceil(until))
    with Progress(*of) as progress:
        done = itertools.count(1)

        async def one(question: Question) -> Answer:
            answer = await asker.ask(question)
            progress.update(next(done) if until is None else min(of[1], int(asker.now())))
            return answer

        asker.begin()
        if workload.rate is not None:
            times = poisson(workload.rate, len(asked), workload.seed)
            return await asyncio.gather(
                *(_later(at, one, each) for at, each in zip(times, asked, strict=True))
            )
        answers: list[Answer] = []
        left = iter(asked)

        async def client() -> None:
            for question in left:
                answers.append(await one(question))
                if until is not None and asker.now() >= until:
                    return

        await asyncio.gather(*(client() for _ in range(workload.clients or 1)))
        return answers


async def _later(at: float, ask: Any, question: Question) -> Answer:
    await asyncio.sleep(at)
    return await ask(question)


class _Asker:
    """Asks one question after the other, or several at once; `common` goes with every one."""

    def __init__(self, client: AsyncClient, common: dict[str, Any]) -> None:
        self.client, self.common = client, common
        self.began = time.perf_counter()

    def begin(self) -> None:
        """Count seconds from now on."""
        self.began = time.perf_counter()

    def now(self) -> float:
        """Seconds from the begin."""
        return time.perf_counter() - self.began

    async def ask(self, question: Question) -> Answer:
        """Send a question and read its answer to the end; an error is part of what was found."""
        import httpx

        answer = Answer(question.family, self.now())
        try:
            await self._read(question, answer)
        except (httpx.HTTPError, ValueError, InputError) as error:
            answer.error = str(error) or type(error).__name__
        answer.ended = self.now()
        return answer

    async def _read(self, question: Question, answer: Answer) -> None:
        path, body = _body(question)
        given = {**self.common, **body, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", path, json=given) as reply:
            if reply.status_code != 200:
                await reply.aread()
                raise InputError(f"status {reply.status_code}: {reply.text[:200]}")
            async for event in _events(reply.aiter_lines()):
                if "error" in event:
                    raise InputError(str(event["error"])[:200])
                if any(_texts(event)):
                    answer.pieces.append(self.now())
                usage = event.get("usage")
                if isinstance(usage, dict):
                    answer.tokens = int(usage.get("completion_tokens") or 0)
        answer.tokens = answer.tokens or len(answer.pieces)


def _body(question: Question) -> tuple[str, dict[str, Any]]:
    """Where a question is asked, and how."""
    if question.asked:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": question.text}]}
    return "/v1/completions", {"prompt": question.text}


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """What a stream of server-sent events says."""
    async for line in lines:
        data = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else ""
        if data and data != _DONE:
            yield json.loads(data)


def _texts(event: dict[str, Any]) -> Iterator[str]:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        yield choice.get("text") or delta.get("content") or ""


def summary(answers: Sequence[Answer], targets: Targets | None = None) -> Serving:
    """The figures of a run."""
    good = [each for each in answers if not each.error]
    errors: dict[str, int] = {}
    for each in answers:
        if each.error:
            errors[each.error] = errors.get(each.error, 0) + 1
    begin = min((each.sent for each in answers), default=0.0)
    seconds = max((each.ended for each in answers), default=0.0) - begin
    tokens = sum(each.tokens for each in good)
    return Serving(
        requests=len(answers),
        answered=len(good),
        seconds=seconds,
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds if seconds else 0.0,
        requests_per_s=len(good) / seconds if seconds else 0.0,
        first_token=_shares([each.pieces[0] - each.sent for each in good if each.pieces]),
        between_pieces=_shares([gap for each in good for gap in each.gaps]),
        per_token=_shares([each.per_token for each in good if len(each.pieces) > 1]),
        request_seconds=_shares([each.ended - each.sent for each in good]),
        goodput=None if targets is None else sum(map(targets.met, answers)) / len(answers),
        errors=errors,
    )


def _shares(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {name: float(np.percentile(values, share)) for name, share in _SHARES.items()}
    return {"mean": float(np.mean(values)), **found, "max": float(max(values))}
