"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from linspec.decoding.accepted import TokenLogprob
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.engine.results import Generation, Piece
from linspec.llm import LLM
from linspec.serve.answering import Answer, answered, output_tokens
from linspec.serve.constraints import constrained
from linspec.serve.failures import RESPONSES, Failure, json_response
from linspec.serve.schemas.completions import Completion, CompletionRequest, as_prompts
from linspec.serve.served import Served, Serving
from linspec.serve.shapes import RunningUsage, TextLogprobs, drafts_of, in_order, new_id, usage_of
from linspec.serve.token_bytes import TokenBytes

router = APIRouter(responses=RESPONSES)
_USUAL_TOKENS = 16


@router.post(
    "/v1/completions",
    responses={200: {"model": Completion, "content": {"text/event-stream": {}}}},
)
async def completions(asked: CompletionRequest, http: HttpRequest, served: Serving) -> Any:
    """Continue texts."""
    name, worker = served.worker(asked.model)
    form = _Form.of(asked, served, name, worker.llm)
    answer = await answered(served, http, worker, form.requests, show_drafts=asked.with_drafts)
    if asked.stream:
        return answer.streamed(_chunks(answer, form))
    return json_response(form.whole(await answer.whole()))


@dataclass
class _Form:
    """How an answer is written; keep: whether there is an output beside the echo."""

    asked: CompletionRequest
    params: SamplingParams
    head: dict[str, Any]
    keep: bool
    llm: LLM

    @classmethod
    def of(cls, asked: CompletionRequest, served: Served, name: str, llm: LLM) -> _Form:
        """Raises Failure or ConfigError for what does not go together."""
        most = output_tokens(served.settings, asked.max_tokens, _USUAL_TOKENS)
        _check(asked, most)
        settings: dict[str, Any] = constrained(asked)
        logprobs = asked.logprobs
        if asked.echo and logprobs is not None:
            settings["prompt_logprobs"] = logprobs
        if asked.best_of is not None:
            settings["n"] = asked.best_of
            logprobs = 0 if logprobs is None else logprobs
        params = asked.to_params(
            served.settings.temperature, max_tokens=max(1, most), logprobs=logprobs, **settings
        )
        head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        return cls(asked, params, head, most > 0, llm)

    @property
    def n(self) -> int:
        """Choices of a prompt."""
        return self.asked.n or 1

    def requests(self, llm: LLM) -> list[Request]:
        """As the engine takes them; also reads the prompts."""
        return [
            llm.request(prompt, self.params, f"prompt {at}")
            for at, prompt in enumerate(as_prompts(self.asked.prompt))
        ]

    def whole(self, outputs: Sequence[Sequence[Generation]]) -> dict[str, Any]:
        """The answer in one piece."""
        if not self.keep:
            outputs = [[_without_output(each) for each in group] for group in outputs]
        choices = [
            self._choice(prompt, each, group[0].prompt_logprobs)
            for prompt, group in enumerate(outputs)
            for each in _best(group, self.n)
        ]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return {**self.head, "choices": choices, "usage": usage_of(outputs).model_dump()}

    def _choice(
        self, prompt: int, output: Generation, read: Sequence[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        logprobs, text = None, self.echo(prompt) + output.text
        if self.asked.logprobs is not None:
            found: list[TokenLogprob | None] = list(output.logprobs or ())
            tokens = list(output.token_ids)
            if self.asked.echo:
                found = [*(read or ()), *found]
                tokens = [*self.prompt_tokens(prompt), *tokens]
            logprobs = self.logprobs().take(found, tokens, text)
        reason = output.finish_reason if self.keep else "length"
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def logprobs(self) -> TextLogprobs:
        """Writes the log-probabilities of an output."""
        return TextLogprobs(self.words, special=not self.asked.skip_special_tokens)

    @cached_property
    def words(self) -> TokenBytes:
        """What the tokens of an answer stand for."""
        return TokenBytes(self.llm.tokenizer)

    def prompt_tokens(self, prompt: int) -> list[int]:
        """Token ids of a prompt."""
        return self.llm.encode(as_prompts(self.asked.prompt)[prompt])

    def echo(self, prompt: int) -> str:
        """What stands before the output of a prompt."""
        if not self.asked.echo:
            return ""
        given = as_prompts(self.asked.prompt)[prompt]
        if isinstance(given, str):
            return given
        text: str = self.llm.tokenizer.decode(given)
        return text


def _check(asked: CompletionRequest, most: int) -> None:
    n = asked.n or 1
    if most == 0 and (not asked.echo or asked.stream):
        raise Failure(
            400,
            "max_tokens is 0, which asks for nothing; give echo without stream, or a larger max_tokens",
            param="max_tokens",
        )
    if asked.best_of is not None and asked.best_of < n:
        message = f"best_of must be at least n, got {asked.best_of} and {n}; raise best_of"
        raise Failure(400, message, param="best_of")
    if asked.best_of is not None and asked.best_of > n and asked.stream:
        message = "best_of is known when all outputs are there; leave out stream, or best_of"
        raise Failure(400, message, param="best_of")
    if asked.echo and asked.stream and asked.logprobs is not None:
        message = "echo with logprobs cannot be streamed; leave out one of the three"
        raise Failure(400, message, param="logprobs")


def _without_output(output: Generation) -> Generation:
    logprobs = None if output.logprobs is None else ()
    return replace(output, token_ids=(), text="", logprobs=logprobs)


def _best(group: Sequence[Generation], n: int) -> list[Generation]:
    """The n outputs that are likeliest, a token on the average."""
    if len(group) <= n:
        return list(group)
    return sorted(group, key=_likelihood, reverse=True)[:n]


def _likelihood(output: Generation) -> float:
    found = output.logprobs or ()
    return sum(each.logprob for each in found) / max(1, len(found))


async def _chunks(answer: Answer, form: _Form) -> AsyncIterator[dict[str, Any]]:
    running = RunningUsage(form.asked.stream_options, answer.job.requests)
    offsets: dict[int, TextLogprobs] = {}
    ended: list[dict[int, Generation]] = [{} for _ in answer.job.requests]
    begun: set[int] = set()
    async for piece in answer.pieces():
        index = piece.index * form.n + piece.sequence
        text, more = piece.text, running.take(piece)
        if index not in begun:
            begun.add(index)
            text = form.echo(piece.index) + text
        if piece.done is not None:
            ended[piece.index][piece.sequence] = piece.done
        elif not text and not piece.logprobs and piece.drafts is None:
            continue
        choice = {
            "index": index,
            "text": text,
            "finish_reason": None if piece.done is None else piece.done.finish_reason,
            "logprobs": _piece_logprobs(piece, form, offsets, index),
            **drafts_of(piece, form.llm.tokenizer),
        }
        yield {**form.head, "choices": [choice], **more}
    if form.asked.with_usage:
        yield {**form.head, "choices": [], "usage": usage_of(in_order(ended)).model_dump()}


def _piece_logprobs(
    piece: Piece, form: _Form, offsets: dict[int, TextLogprobs], index: int
) -> dict[str, Any] | None:
    if form.asked.logprobs is None or piece.logprobs is None:
        return None
    if index not in offsets:
        offsets[index] = form.logprobs()
    text = None if piece.done is None else piece.done.text
    return offsets[index].take(piece.logprobs, piece.token_ids, text)
