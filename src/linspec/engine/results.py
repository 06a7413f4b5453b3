"""What a caller gets back: pieces of text as they come, and the finished sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from linspec.decoding.accepted import TokenLogprob
from linspec.decoding.outcome import FAILED, Outcome
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence, Stats
from linspec.engine.detokenizer import Detokenizer
from linspec.engine.drafts import DraftedText, Drafts, rejected


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished request; with n > 1 its first sequence, and the `others`.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: tokens of the output.
        text: the output as text, up to an error if there was one.
        finish_reason: 'stop' (end of sequence, stop text or stop token), 'length' or 'error'.
        logprobs: one entry for each output token, None if the request did not ask for them.
        stats: rounds, drafted and accepted tokens, seconds.
        error: why the request failed; None if it did not.
        prompt_logprobs: one entry for each token of the prompt, None for the first token.
        others: the sequences 2 to n.
        cached_tokens: tokens of the prompt that were not read, because a cache had their state.
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    stats: Stats
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    others: tuple[Generation, ...] = ()
    cached_tokens: int = 0

    @property
    def outputs(self) -> tuple[Generation, ...]:
        """All n sequences of the request, this one first."""
        return (replace(self, others=()), *self.others)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of decoding, without the first: the step of the prompt gives that."""
        seconds = self.stats.decode_seconds
        return (len(self.token_ids) - 1) / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types; seconds are floats, an error is its message."""
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
        if self.cached_tokens:
            found["cached_tokens"] = self.cached_tokens
        if stats.computed:
            found["computed"] = stats.computed
        if stats.decision:
            found["decision"] = stats.decision
        if self.logprobs is not None:
            found["logprobs"] = [asdict(each) for each in self.logprobs]
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = [each and asdict(each) for each in self.prompt_logprobs]
        if self.error is not None:
            found["error"] = str(self.error)
        if self.others:
            found["outputs"] = [each.to_json() for each in self.outputs]
        return found

    def summary(self) -> str:
        """For people: tokens, tokens per second and per round, finish reason; what the policy decided."""
        said = (
            f"[{len(self.token_ids)} tokens, {self.tokens_per_s:.1f} tokens/s, "
            f"{self.stats.tokens_per_round:.2f} tokens per round, {self.finish_reason}]"
        )
        return f"{said}\n[{self.stats.decision}]" if self.stats.decision else said


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one sequence.

    Attributes:
        index: the number of the prompt in the call, from 0.
        text: may be empty where the new tokens do not complete a character yet.
        token_ids: the new tokens.
        done: the finished sequence, on its last piece; None before.
        sequence: the number of the sequence in its request, from 0 to n - 1.
        drafts: what the piece owes to drafts; None unless the caller asked for it.
        logprobs: one entry for each of `token_ids`, None if the request did not ask for them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    done: Generation | None
    sequence: int = 0
    drafts: Drafts | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class Collector:
    """Collects what the engine emits for one sequence of a request.

    continues: whether the output goes on from the prompt, as that of a decoder does.
    """

    def __init__(
        self,
        place: tuple[int, int],
        tokenizer: Any,
        request: Request,
        params: SamplingParams,
        *,
        continues: bool,
    ) -> None:
        self.index, self.sequence = place
        self.request, self.params = request, params
        self.text = Detokenizer(
            tokenizer,
            request.prompt if continues else (),
            params.stop,
            special=not params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._authors: DraftedText | None = None

    def show_drafts(self) -> None:
        """Say of every piece from now on what it owes to drafts."""
        self._authors = DraftedText()

    def take(self, outcome: Outcome) -> Piece:
        """Add a round's tokens, up to a stop string."""
        before, finished = len(self.tokens), outcome.finished
        shown = len(outcome.tokens) - self._hides_end(outcome)
        for place, token in enumerate(outcome.tokens):
            self.tokens.append(token)
            stopped = place < shown and self.text.push(token)
            if self._authors is not None:
                author = outcome.drafter if place < outcome.drafted else ""
                self._authors.grew(len(self.text.full), author)
            if stopped:
                finished = finished if finished == FAILED else "stop"
                break
        if outcome.accepted is not None and outcome.accepted.logprobs is not None:
            self.logprobs += outcome.accepted.logprobs[: len(self.tokens) - before]
        if finished and not self.text.stopped:
            self.text.finish()
            finished = "stop" if self.text.stopped else finished
        piece = self.text.release(last=finished is not None)
        done = self._result(outcome.sequence, finished, outcome.error) if finished else None
        new = tuple(self.tokens[before:])
        drafts = self._drafts(outcome, len(new), piece)
        logprobs = None if self.params.logprobs is None else tuple(self.logprobs[before:])
        return Piece(self.index, piece, new, done, self.sequence, drafts, logprobs)

    def _drafts(self, outcome: Outcome, count: int, text: str) -> Drafts | None:
        if self._authors is None:
            return None
        drafted = min(outcome.drafted, count)
        return Drafts(drafted, outcome.drafter, rejected(outcome), self._authors.show(text))

    def _hides_end(self, outcome: Outcome) -> bool:
        """Whether the last token ended the output and is no part of its text."""
        params = self.params
        if outcome.finished != "stop" or not outcome.tokens or params.include_stop_str_in_output:
            return False
        # the model's own end is a special token, which is hidden with the others
        return outcome.tokens[-1] in params.stop_token_ids or not params.skip_special_tokens

    def failed(self, sequence: RunningSequence, error: Exception) -> Piece:
        """The last piece where `take` raised: what was shown before stands."""
        return Piece(self.index, "", (), self._result(sequence, FAILED, error), self.sequence)

    def _result(
        self, sequence: RunningSequence, reason: str, error: Exception | None
    ) -> Generation:
        params = self.params
        return Generation(
            prompt_tokens=sequence.prompt_tokens,
            token_ids=tuple(self.tokens),
            text=self.text.full,
            finish_reason=reason,
            logprobs=None if params.logprobs is None else tuple(self.logprobs),
            stats=sequence.stats,
            error=error,
            prompt_logprobs=None
            if params.prompt_logprobs is None
            else tuple(sequence.prompt_logprobs),
            cached_tokens=sequence.cached_tokens,
        )


def joined(pieces: Iterable[Piece]) -> list[Generation]:
    """The finished requests, in the order of their prompts, each with all its sequences."""
    done = {(piece.index, piece.sequence): piece.done for piece in pieces if piece.done}
    found: list[list[Generation]] = []
    for (_, sequence), each in sorted(done.items(), key=lambda item: item[0]):
        if sequence == 0:
            found.append([])
        found[-1].append(each)
    return [replace(first, others=tuple(others)) if others else first for first, *others in found]
