"""The rounds of a generation loop, held to its contract: what a plug-in hands out is checked here, once.

A loop that hands out nothing for ever would hang everybody who waits; one that hands out foreign tokens or
sequences would harm its callers far from where the fault is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from linspec.decoding.accepted import Accepted
from linspec.decoding.outcome import FAILED, Outcome
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree
from linspec.engine.loops.base import GenerationLoop
from linspec.engine.scheduler import Batch
from linspec.errors import ConfigError
from linspec.utils.messages import shown

_LISTS = (list, tuple)
_ENDS = (None, "stop", "length", FAILED)
_WAY_OUT = "mend the loop, or use another one of `linspec list`"


class Rounds:
    """Asks `loop` for one round after the other, for a model of `vocab_size` tokens."""

    def __init__(self, loop: GenerationLoop, vocab_size: int) -> None:
        self.loop, self.vocab_size = loop, vocab_size
        # rounds in a row that handed out nothing, and how far every sequence was in the last of them
        self._idle = 0
        self._reached: list[tuple[int, int, int]] = []

    def next(self, batch: Batch) -> list[Outcome]:
        """What a round brought; a sequence for which the loop broke a rule has failed.

        What says nothing about whose fault it was ends every sequence of the batch.
        """
        taking = [*batch.decoding, *(sequence for sequence, _ in batch.prefilling)]
        try:
            outcomes = self._listed(self.loop.round(batch), taking)
            self._check_progress(outcomes, taking)
        except Exception as error:
            self._idle = 0
            return [Outcome.failure(sequence, error) for sequence in taking]
        return [self._sound(outcome) for outcome in outcomes]

    def _listed(self, given: object, taking: Sequence[RunningSequence]) -> list[Outcome]:
        """An answer as it is, if it is outcomes of sequences that take part, one for each at most."""
        if not isinstance(given, _LISTS):
            raise self._no_list(given)
        left = list(taking)
        for outcome in given:
            if not isinstance(outcome, Outcome):
                raise self._no_list(given)
            # two sequences are never equal
            if outcome.sequence not in left:
                raise self._broken(
                    f"handed out an Outcome of {shown(repr(outcome.sequence))}; an Outcome is of a sequence "
                    "of the batch, one for each at most"
                )
            left.remove(outcome.sequence)
        return list(given)

    def _check_progress(
        self, outcomes: Sequence[Outcome], taking: Sequence[RunningSequence]
    ) -> None:
        """Raise ConfigError for the last of too many rounds in a row that brought nobody any further."""
        for outcome in outcomes:
            if outcome.tokens or outcome.finished:
                self._idle = 0
                return
        # a prompt may be read in silence
        reached = [(each.number, each.prefilled, len(each.tokens)) for each in taking]
        self._idle = self._idle + 1 if reached == self._reached else 0
        self._reached = reached
        if self._idle > self.loop.patience:
            raise self._broken(
                f"brought no sequence any further in {self._idle} rounds; its `patience` is "
                f"{self.loop.patience} rounds: raise it if the loop needs more"
            )

    def _sound(self, outcome: Outcome) -> Outcome:
        """`outcome`, or the failure of its sequence if it breaks a rule."""
        if fault := _fault(outcome, self.vocab_size):
            return Outcome.failure(outcome.sequence, self._broken(f"handed out {fault}"))
        return outcome

    def _no_list(self, given: object) -> ConfigError:
        return self._broken(
            f"answered {shown(repr(given))}; a round answers with a list of Outcome, empty where nothing "
            "is new"
        )

    def _broken(self, what: str) -> ConfigError:
        return ConfigError(f"generation loop {self.loop.name!r} {what}; {_WAY_OUT}")


def _fault(outcome: Any, vocab_size: int) -> str | None:
    """What is wrong with an outcome: the value and the rule."""
    tokens, sequence = outcome.tokens, outcome.sequence
    for token in tokens if isinstance(tokens, tuple) else (None,):
        if type(token) is not int:
            return f"tokens {shown(repr(tokens))}; tokens are a tuple of whole numbers"
        if not 0 <= token < vocab_size:
            return f"tokens {shown(repr(tokens))}; token ids of this model go from 0 to {vocab_size - 1}"
    if tokens and tuple(sequence.tokens[-len(tokens) :]) != tokens:
        return f"tokens {shown(repr(tokens))} that it did not append to sequence.tokens"
    if sequence.remaining < 0:
        return (
            f"{sequence.emitted} tokens; the request asked for {sequence.params.max_tokens} at most"
        )
    if outcome.finished not in _ENDS:
        return f"finished={shown(repr(outcome.finished))}; known: {', '.join(map(str, _ENDS))}"
    failed = isinstance(outcome.error, Exception)
    if failed != (outcome.finished == FAILED) or not (failed or outcome.error is None):
        return (
            f"finished={outcome.finished!r} with error={shown(repr(outcome.error))}; 'error' comes with an "
            "exception, and nothing else does"
        )
    if outcome.accepted is not None and not isinstance(outcome.accepted, Accepted):
        return f"accepted={shown(repr(outcome.accepted))}; it is an Accepted or None"
    if outcome.tree is not None and not isinstance(outcome.tree, TokenTree):
        return f"tree={shown(repr(outcome.tree))}; it is a TokenTree or None"
    return None
