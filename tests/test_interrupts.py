"""Ctrl-C at any line of the engine: nothing is left that nobody owns, and the next request is served."""

from __future__ import annotations

import gc
import linecache
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from checkpoints import model_dir
from helpers import tiny_model

import linspec.engine
from linspec import LLM, Request, SamplingParams
from linspec.engine.engine import Engine
from linspec.verifiers import LosslessVerifier

PROMPTS = ("abcd end", "the end")
PARAMS = SamplingParams(max_tokens=2, ignore_eos=True, n=2, temperature=0.8, seed=1)
WATCHED = {
    str(Path(linspec.engine.__file__).parent / name)
    for name in (
        "engine.py",
        "scheduler.py",
        "preemption.py",
        "budget.py",
        "streams.py",
        "rounds.py",
    )
}
# Python looks for signals at calls and jumps; these lines have neither
NEVER = ("self._inside = None", "self._stepping = False")


class Interrupt:
    """Raises KeyboardInterrupt once, at the line number `at` of those that are run in WATCHED."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Interrupt | None:
        file = frame.f_code.co_filename
        if file not in WATCHED or frame.f_code.co_name == "__del__":
            return None
        line = linecache.getline(file, frame.f_lineno).strip()
        if event == "line" and line not in NEVER:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def interrupted(at: int, run: Callable[[], object]) -> bool:
    """Run it with an interrupt; False if it ended before the interrupt came."""
    before = sys.gettrace()
    sys.settrace(Interrupt(at))
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, marks=(pytest.mark.slow, pytest.mark.timeout(1800)), id="every-line"),
        pytest.param(151, id="some"),
    ],
)
def test_an_interrupt_anywhere_leaves_no_sequence_and_no_slot_behind(step: int) -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    expected = [each.token_ids for each in llm.generate(PROMPTS, PARAMS)]
    for at in range(1, 10**6, step):
        if not interrupted(at, lambda: llm.generate(PROMPTS, PARAMS)):
            break
        gc.collect()
        assert not llm.engine.busy, at
        assert llm.engine.scheduler.free == [0, 1], at
    assert at > 300
    assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == expected


def test_an_interrupt_while_requests_are_added_queues_all_of_a_request_or_nothing() -> None:
    params = SamplingParams(max_tokens=3, n=3, temperature=0.8)
    for at in range(1, 1000):
        engine = Engine(tiny_model("aug"), verifier=LosslessVerifier(), slots=2)
        if not interrupted(at, lambda engine=engine: engine.add(Request((5, 6), params))):  # type: ignore[misc]
            break
        assert not engine.busy, at
    assert at > 20
    while engine.busy:
        engine.step()


def test_an_interrupted_step_of_an_engine_drops_its_requests_and_hands_out_none_of_them_later() -> (
    None
):
    params = SamplingParams(max_tokens=3, n=3, temperature=0.8, ignore_eos=True)
    engine = Engine(tiny_model("aug"), verifier=LosslessVerifier(), slots=2)
    for at in range(1, 1000, 3):
        engine.add(Request((5, 6), params))
        if not interrupted(at, engine.step):
            break
        if at > 20:
            # before, the step had not begun
            assert not engine.busy, at
        engine.cancel()
        assert engine.scheduler.free == [0, 1], at
        kept = engine.add(Request((7,), SamplingParams(max_tokens=2)))
        while engine.busy:
            assert {each.sequence.request for each in engine.step()} <= {kept}
    assert at > 50


def test_an_interrupt_while_sequences_leave_their_slots_and_come_back_leaves_nothing_behind() -> (
    None
):
    """A step in which one leaves and another takes its slot, and one in which it comes back."""
    params = SamplingParams(max_tokens=4, temperature=0.8, ignore_eos=True)
    engine = Engine(tiny_model("aug"), verifier=LosslessVerifier(), slots=1)

    def finish() -> None:
        while engine.busy:
            engine.step()

    for at in range(1, 10**4, 3):
        engine.add(Request((5, 6), params))
        engine.step()
        engine.add(Request((7,), replace(params, max_tokens=2), priority=1))
        if not interrupted(at, finish):
            break
        # it may have come between two steps
        engine.cancel()
        assert engine.scheduler.free == [0] and not engine.busy, at
        kept = engine.add(Request((7,), SamplingParams(max_tokens=2)))
        while engine.busy:
            assert {each.sequence.request for each in engine.step()} <= {kept}
    assert at > 300
