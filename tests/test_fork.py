"""A forked child generates what its parent does, and does not wait for threads that are gone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer

from linspec.decoding.sampling import SamplingParams
from linspec.errors import ConfigError, StateError
from linspec.kernels.cpu.threads import native_threads
from linspec.llm import LLM

PROMPTS = ["ab cd end", "def f(x):"]
PARAMS = SamplingParams(max_tokens=12)
# far more than a child needs, far less than for ever
SECONDS = 60
Tokens = list[tuple[int, ...]]

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Python warns of just what is tested here
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads that both have worked: only then has a child something to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.ones(400, 400)
    (x @ x).exp().sum()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    plain, by_layer = text_model("aug"), text_model("softmax").double()
    return {
        "one call": LLM(plain, tokenizer=tiny_tokenizer()),
        "by layer": LLM(by_layer, tokenizer=tiny_tokenizer()),
    }


def tokens(llm: LLM) -> Tokens:
    return [result.token_ids for result in llm.generate(PROMPTS, PARAMS)]


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child, or the exception that it raises there."""
    assert FORK is not None
    here, there = FORK.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send(work())
        except Exception as error:
            there.send(error)

    child = FORK.Process(target=run)
    child.start()
    try:
        assert here.poll(SECONDS), "the child hangs"
        return here.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("form", ["one call", "by layer"])
def test_a_forked_child_once_waited_for_ever(form: str, llms: dict[str, LLM]) -> None:
    expected = tokens(llms[form])
    assert in_child(lambda: tokens(llms[form])) == expected
    # the parent is as it was
    assert torch.get_num_threads() == 2 and tokens(llms[form]) == expected


def test_a_child_loads_a_model_and_multiplies(llms: dict[str, LLM]) -> None:
    def work() -> tuple[Tokens, float]:
        x = torch.ones(400, 400)
        return tokens(LLM(model_dir("aug"))), float((x @ x).sum())

    assert in_child(work) == (tokens(LLM(model_dir("aug"))), 400.0**3)


def test_torch_has_one_thread_in_a_child_and_the_kernels_have_theirs() -> None:
    assert in_child(lambda: (torch.get_num_threads(), native_threads())) == (1, 2)


def test_a_child_of_a_child(llms: dict[str, LLM]) -> None:
    expected = tokens(llms["one call"])
    assert in_child(lambda: in_child(lambda: tokens(llms["one call"]))) == expected


_shared: LLM | None = None


def _in_pool(_: int) -> Tokens:
    assert _shared is not None
    return tokens(_shared)


def test_a_pool_of_children(llms: dict[str, LLM]) -> None:
    global _shared
    _shared = llms["one call"]
    expected = tokens(_shared)
    with ProcessPoolExecutor(3, mp_context=FORK) as pool:
        for found in pool.map(_in_pool, range(6), timeout=SECONDS):
            assert found == expected


def test_a_child_that_is_forked_in_the_middle_of_a_stream_goes_on_with_it() -> None:
    llm = LLM(text_model("aug"), tokenizer=tiny_tokenizer())
    expected = tokens(llm)
    stream = llm.stream(PROMPTS, PARAMS)
    first = next(stream)

    def rest() -> Tokens:
        done = {piece.index: piece.done.token_ids for piece in stream if piece.done}
        return [done[i] for i in sorted(done)]

    assert first.done is None
    assert in_child(rest) == expected
    assert rest() == expected


class Generating:
    """A thread that generates with an LLM of its own until it is told to stop."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.begun, self.stop = llm, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.stop.is_set():
            for _ in self.llm.stream(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True)):
                self.begun.set()
                if self.stop.is_set():
                    break

    def __enter__(self) -> Generating:
        self.thread.start()
        self.begun.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(SECONDS)


def test_a_fork_while_another_thread_generates(llms: dict[str, LLM]) -> None:
    mine, busy = llms["one call"], LLM(text_model("aug"), tokenizer=tiny_tokenizer())
    expected = tokens(mine)

    def work() -> tuple[Tokens, str, Tokens]:
        said = ""
        try:
            tokens(busy)
        except StateError as error:
            said = str(error)
        # what the message recommends
        return tokens(mine), said, tokens(LLM(busy.model, tokenizer=busy.tokenizer))

    with Generating(busy):
        for _ in range(3):
            found = in_child(work)
            assert isinstance(found, tuple), found
            assert found[0] == found[2] == expected
            assert "another thread of its parent generated" in found[1]
    assert torch.get_num_threads() == 2


def test_threads_that_are_gone_are_named_when_torch_is_told_to_use_them(
    llms: dict[str, LLM],
) -> None:
    def work() -> Tokens:
        torch.set_num_threads(2)
        return tokens(llms["by layer"])

    error = in_child(work)
    assert isinstance(error, ConfigError)
    assert "2 threads in a forked process" in str(error)
    assert "torch.set_num_threads(1)" in str(error)


def test_threads_that_generate_at_once_leave_torch_its_threads() -> None:
    """The last to finish once set what the first had set for itself."""
    with (
        Generating(LLM(text_model("aug"), tokenizer=tiny_tokenizer())),
        Generating(LLM(text_model("aug", seed=1), tokenizer=tiny_tokenizer())),
    ):
        pass
    assert torch.get_num_threads() == native_threads() == 2
