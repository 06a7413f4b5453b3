"""The public way in: prompts to text.

llm = LLM("embedded-aug", drafter="medusa")
print(llm.generate("def fibonacci(n):")[0].text)
for piece in llm.stream("class Stack:"):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from linspec.compress.load import load_for
from linspec.config import check_size
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.engine import FAILED, Emitted, Engine
from linspec.errors import ConfigError, ContextOverflow, InputError, WrongType
from linspec.kernels.cpu.threads import check_fork
from linspec.kernels.device import pick_device
from linspec.kv import check_kv
from linspec.messages import shown
from linspec.models.backbone import Generator
from linspec.models.hub import load_generator, resolve
from linspec.models.t5 import T5
from linspec.models.tokenizer import load_text_tokenizer
from linspec.policy import check_policy, make_policy
from linspec.policy.base import Policy
from linspec.prompts import Prompt, as_prompts, token_ids
from linspec.row import Row, Stats
from linspec.sampling import SamplingParams
from linspec.text import Detokenizer
from linspec.verify import make_verifier
from linspec.verify.base import TokenLogprob, Verifier


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished request.

    finish_reason: 'stop' (end of sequence or stop string), 'length', or 'error' for one that could not
    go on: `error` says why, and the text is what came before. tokens_per_s counts generated tokens over
    the seconds of the steps after the prompt was read.
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    stats: Stats
    error: Exception | None = None

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of decoding; the first token belongs to the prompt's step."""
        seconds = self.stats.decode_seconds
        return (len(self.token_ids) - 1) / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        stats = self.stats
        found: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "tokens_per_round": stats.tokens_per_round,
            "tokens_per_s": self.tokens_per_s,
            "rounds": stats.rounds,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance": stats.acceptance,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
        }
        if self.logprobs is not None:
            found["logprobs"] = [asdict(each) for each in self.logprobs]
        if self.error is not None:
            found["error"] = str(self.error)
        return found

    def summary(self) -> str:
        """One line for people."""
        return (
            f"[{len(self.token_ids)} tokens, {self.tokens_per_s:.1f} tokens/s, "
            f"{self.stats.tokens_per_round:.2f} tokens per round, {self.finish_reason}]"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of request `index`; `done` is set on its last piece."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    done: Generation | None


class _Request:
    """Collects what the engine emits for one prompt."""

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        continues: bool,
    ) -> None:
        self.index, self.prompt, self.params = index, prompt, params
        # the output of an encoder-decoder does not go on from its prompt
        self.text = Detokenizer(tokenizer, prompt if continues else (), params.stop)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def take(self, emitted: Emitted) -> Piece:
        """Add a round's tokens, up to a stop string."""
        before, finished = len(self.tokens), emitted.finished
        for token in emitted.tokens:
            self.tokens.append(token)
            if self.text.push(token):
                finished = finished if finished == FAILED else "stop"
                break
        if emitted.accepted is not None and emitted.accepted.logprobs is not None:
            self.logprobs += emitted.accepted.logprobs[: len(self.tokens) - before]
        if finished and not self.text.stopped:
            self.text.finish()
            finished = "stop" if self.text.stopped else finished
        piece = self.text.release(last=finished is not None)
        done = self._result(emitted.row, finished, emitted.error) if finished else None
        return Piece(self.index, piece, tuple(self.tokens[before:]), done)

    def failed(self, row: Row, error: Exception) -> Piece:
        """The last piece where `take` raised: what was shown before stands."""
        return Piece(self.index, "", (), self._result(row, FAILED, error))

    def _result(self, row: Row, reason: str, error: Exception | None) -> Generation:
        return Generation(
            prompt_tokens=row.prompt_tokens,
            token_ids=tuple(self.tokens),
            text=self.text.full,
            finish_reason=reason,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            stats=row.stats,
            error=error,
        )


class LLM:
    """A model with its tokenizer, a drafter, a verifier and a policy.

    model: a directory, 'embedded-softmax', 'embedded-aug', or a loaded model (then give `tokenizer`).
    An encoder-decoder reads its prompts and answers them.
    drafter: 'none', NAME or NAME:key=value,… of `linspec list`, such as 'prompt-lookup:max_ngram=3',
    'medusa' or 'draft-model:DIR', or a Drafter. verifier: 'lossless' (greedy requests are verified
    greedily), 'greedy', 'typical' (lossy) or a Verifier. policy: 'auto', a number of draft nodes, or a
    Policy. max_batch: sequences that run at
    once. A loaded model is turned into its inference form, in place. quantize: 8 or 4 bits for the
    weights of a model directory, made as it is loaded (CPU only). kv: 'int8' keeps the caches of softmax
    layers in about a quarter of the memory. Raises CheckpointError, DrafterError or ConfigError before
    any long work.
    """

    def __init__(
        self,
        model: str | Path | Generator,
        *,
        tokenizer: Any = None,
        drafter: str | Drafter = "none",
        verifier: str | Verifier = "lossless",
        policy: str | int | Policy = "auto",
        max_batch: int = 8,
        prefill_tokens: int = 512,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantize: int | None = None,
        kv: str = "float",
    ) -> None:
        check_fork()
        check_kv(kv)
        check_policy(policy)
        check_size("max_batch", max_batch)
        check_size("prefill_tokens", prefill_tokens)
        device = pick_device(device)
        source = resolve(model) if isinstance(model, str | Path) else None
        if isinstance(model, str | Path):
            options: dict[str, Any] = {"dtype": dtype, "device": device}
            self.model: Generator = (
                load_generator(model, **options)
                if quantize is None
                else load_for(model, quantize, **options)
            )
            tokenizer = tokenizer or load_text_tokenizer(model)
        else:
            self.model = model
        if tokenizer is None:
            raise ConfigError("a loaded model needs its tokenizer: LLM(model, tokenizer=...)")
        self.tokenizer = tokenizer
        made = make_drafter(drafter, DrafterContext(self.model, tokenizer, source, max_batch))
        self.model.prepare()
        self.engine = Engine(
            self.model,
            verifier=make_verifier(verifier),
            drafter=made,
            policy=make_policy(policy, self.model) if made is not None else None,
            slots=max_batch,
            prefill_tokens=prefill_tokens,
            kv=kv,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises InputError for an empty one or text that is not Unicode."""
        if not isinstance(prompt, str):
            ids = token_ids(prompt, self.model.config.vocab_size)
        else:
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"the prompt is not valid text at character {error.start}: {error.reason}; leave "
                    "that character out"
                ) from error
            ids = self._tokenize(prompt)
            start = self._start
            # a rendered chat template begins with the token that the tokenizer adds
            if start and ids[: 2 * len(start)] == start * 2:
                ids = ids[len(start) :]
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ids

    @cached_property
    def _start(self) -> list[int]:
        """The tokens that the tokenizer puts in front of every text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        begin = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
        return list(whole[:begin])

    def _tokenize(self, prompt: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
        # the tokenizers library raises bare Exception for what its file cannot encode
        except Exception as error:
            raise InputError(
                f"this tokenizer cannot encode the prompt: {error}; write it otherwise, or copy the "
                "tokenizer's files again"
            ) from error
        return token_ids(ids, self.model.config.vocab_size) if ids else []

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> list[Generation]:
        """Finish every prompt; results in the order of the prompts.

        One that fails takes nothing from the others. When all have ended, its error is raised, or with
        `return_errors` is part of its result.
        """
        pieces = self.stream(prompts, params, return_errors=return_errors)
        done = {piece.index: piece.done for piece in pieces if piece.done}
        return [done[i] for i in sorted(done)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> Iterator[Piece]:
        """Pieces of text as they are decided, of all prompts as they come.

        Leaving the loop early (or Ctrl-C) cancels what is left. The last piece of a prompt that failed
        has a `done` with its error; when all have ended the first such error is raised, unless
        `return_errors`.
        """
        self.engine.check_process()
        requests = self._requests(prompts, params)
        limit = self.model.config.position_limit
        for request in requests:
            if limit is not None and len(request.prompt) > limit:
                raise ContextOverflow(
                    f"prompt {request.index} has {len(request.prompt)} tokens, this model takes "
                    f"{limit}; shorten it, or linearize the model: linear mixers have no such limit"
                )
        self._check_idle()
        by_row: dict[int, _Request] = {}
        errors: list[Exception] = []
        try:
            for request in requests:
                by_row[self.engine.submit(request.prompt, request.params)] = request
            while self.engine.busy:
                for emitted in self.engine.step():
                    piece = self._piece(by_row[emitted.row.request], emitted)
                    if piece.done is not None and piece.done.error is not None:
                        errors.append(piece.done.error)
                    yield piece
        finally:
            self.engine.cancel()
        if errors and not return_errors:
            raise errors[0]

    def _piece(self, request: _Request, emitted: Emitted) -> Piece:
        """What `emitted` is for the caller; a row that has ended for the caller is retired."""
        try:
            piece = request.take(emitted)
        except Exception as error:
            piece = request.failed(emitted.row, error)
        if piece.done is None:
            return piece
        late = self.engine.retire(emitted.row)
        if late is None or piece.done.error is not None:
            return piece
        return replace(piece, done=replace(piece.done, finish_reason=FAILED, error=late))

    def _check_idle(self) -> None:
        if self.engine.busy:
            raise ConfigError(
                "this LLM is still streaming another call; finish or close that one first, or give "
                "all prompts in one call"
            )

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Request]:
        given = as_prompts(prompts)
        if not given:
            raise InputError("no prompts were given")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(given)
        if not isinstance(params, Sequence) or not all(
            isinstance(p, SamplingParams) for p in params
        ):
            raise WrongType(f"params are SamplingParams, one or a list, got {shown(repr(params))}")
        if len(params) != len(given):
            raise ConfigError(
                f"{len(params)} sampling parameters for {len(given)} prompts; give one for all, or one "
                "for each"
            )
        continues = not isinstance(self.model, T5)
        return [
            _Request(i, self.tokenizer, self.encode(prompt), each, continues=continues)
            for i, (prompt, each) in enumerate(zip(given, params, strict=True))
        ]
