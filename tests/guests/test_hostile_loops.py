"""Generation loops that break their contract: a clear error that names the loop, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import model_dir

from linspec import LLM, LOOPS, Batch, Outcome, RunningSequence, SamplingParams
from linspec.engine.loops.autoregressive import Autoregressive
from linspec.errors import ConfigError

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


class Hostile(Autoregressive):
    """Decodes as usual, then spoils what it hands out."""

    spoil: Callable[[list[Outcome]], Any]

    def round(self, batch: Batch) -> list[Outcome]:
        found: list[Outcome] = type(self).spoil(super().round(batch))
        return found


class Idle(Autoregressive):
    """Does nothing, round after round."""

    def started(self, sequence: RunningSequence) -> None:
        super().started(sequence)
        sequence.prefilled = sequence.prompt_length

    def round(self, batch: Batch) -> list[Outcome]:
        return []


class Blank(Idle):
    """Hands out outcomes without tokens, round after round."""

    def round(self, batch: Batch) -> list[Outcome]:
        return [Outcome(sequence, (), None, None) for sequence in batch.decoding]


@pytest.fixture
def hostile() -> Iterator[Callable[[type[Any]], LLM]]:
    def made(loop: type[Any]) -> LLM:
        LOOPS.register("test-hostile", summary="breaks rules", paper="none")(loop)
        return LLM(model_dir("aug"), loop="test-hostile")

    yield made
    LOOPS.forget("test-hostile")


@pytest.mark.parametrize("loop", [Idle, Blank])
def test_a_loop_that_brings_nothing_for_ever_ends_with_its_name(
    hostile: Callable[[type[Any]], LLM], loop: type[Any]
) -> None:
    llm = hostile(loop)
    with pytest.raises(
        ConfigError, match="loop 'test-hostile' brought no .* in 1001 rounds.*raise"
    ):
        llm.generate(["abcd", "the end"], GREEDY)
    assert not llm.engine.busy


def _with(**changes: Any) -> Callable[[list[Outcome]], Any]:
    return lambda found: [replace(each, **changes) for each in found]


def _stranger(found: list[Outcome]) -> list[Outcome]:
    sequence = found[0].sequence
    other = RunningSequence(99, sequence.sampler, list(sequence.tokens), 1)
    return [replace(found[0], sequence=other)]


def _unending(found: list[Outcome]) -> list[Outcome]:
    for each in found:
        each.sequence.tokens += [1] * 50
    return [replace(each, tokens=(1,) * 50, finished=None) for each in found]


def _unappended(found: list[Outcome]) -> list[Outcome]:
    return [replace(each, tokens=(*each.tokens, 1, 2, 3)) for each in found]


SPOILS: dict[str, tuple[Callable[[list[Outcome]], Any], str]] = {
    "no list": (lambda found: None, "answered None; a round answers with a list"),
    "a number": (lambda found: 5, "answered 5; a round answers with a list"),
    "a dict": (lambda found: dict(enumerate(found)), "a round answers with a list"),
    "no outcomes": (lambda found: ["abc"], r"answered \['abc'\]; a round answers with a list"),
    "twice": (lambda found: found * 2, "one for each at most"),
    "a stranger": (_stranger, "an Outcome is of a sequence of the batch"),
    "no sequence": (_with(sequence=None), "handed out an Outcome of None"),
    "a text": (_with(tokens="abc"), "tokens 'abc'; tokens are a tuple of whole numbers"),
    "halves": (_with(tokens=(1.5,)), r"tokens \(1.5,\); tokens are a tuple of whole numbers"),
    "booleans": (_with(tokens=(True,)), "tokens are a tuple of whole numbers"),
    "nothing": (_with(tokens=None), "tokens are a tuple of whole numbers"),
    "negative": (_with(tokens=(-1,)), "token ids of this model go from 0 to"),
    "foreign": (_with(tokens=(10**6,)), "token ids of this model go from 0 to"),
    "not appended": (_unappended, "that it did not append to sequence.tokens"),
    "too many": (_unending, "the request asked for 6 at most"),
    "unknown end": (_with(finished="done"), "finished='done'; known: None, stop, length, error"),
    "a list as end": (_with(finished=[]), r"finished=\[\]; known: None, stop"),
    "error without one": (_with(finished="error"), "'error' comes with an exception"),
    "error without end": (_with(error=KeyError("x")), "'error' comes with an exception"),
    "no exception": (_with(finished="error", error="bad"), "'error' comes with an exception"),
    "accepted": (_with(accepted=(1, 2)), r"accepted=\(1, 2\); it is an Accepted or None"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_an_outcome_that_breaks_a_rule_is_an_error_that_names_the_loop(
    hostile: Callable[[type[Any]], LLM], name: str
) -> None:
    spoil, message = SPOILS[name]
    llm = hostile(type("Spoiling", (Hostile,), {"spoil": staticmethod(spoil)}))
    with pytest.raises(ConfigError, match=message) as caught:
        llm.generate(["abcd", "the end"], GREEDY)
    assert str(caught.value).startswith("generation loop 'test-hostile' ")
    assert "mend the loop" in str(caught.value)
    assert not llm.engine.busy
    assert llm.engine.scheduler.free == list(range(8))


def test_a_bad_outcome_of_one_sequence_ends_that_one_alone(
    hostile: Callable[[type[Any]], LLM],
) -> None:
    (expected,) = LLM(model_dir("aug")).generate("abcd", GREEDY)

    def spoil(found: list[Outcome]) -> list[Outcome]:
        return [replace(o, tokens=(-1,)) if o.sequence.request == 2 else o for o in found]

    llm = hostile(type("Spoiling", (Hostile,), {"spoil": staticmethod(spoil)}))
    good, bad = llm.generate(["abcd", "the end"], GREEDY, return_errors=True)
    assert good.error is None and good.token_ids == expected.token_ids
    assert "test-hostile" in str(bad.error)
