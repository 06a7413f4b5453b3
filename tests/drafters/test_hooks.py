"""A drafter hears once when a request starts and once when it has ended, however it did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from checkpoints import model_dir

from linspec import LLM, ChainDrafter, RunningSequence, SamplingParams, TokenTree

PROMPTS = ("abcd", "the end", "cd")


class Recorder(ChainDrafter):
    """Drafts the root again and writes down what it hears."""

    name = "test-recorder"

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.fails, self.heard = fails, list[tuple[str, int, int]]()

    def started(self, row: RunningSequence) -> None:
        self.heard.append(("started", row.number, len(row.tokens)))
        if row.number == self.fails:
            raise RuntimeError("no place for it")

    def draft(self, rows: Sequence[RunningSequence], budgets: Sequence[int]) -> list[list[int]]:
        return [[row.root] for row in rows]

    def observe(self, row: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        super().observe(row, tree, path)
        self.heard.append(("observed", row.number, len(row.tokens)))

    def finished(self, row: RunningSequence) -> None:
        self.heard.append(("finished", row.number, len(row.tokens)))

    def of(self, request: int) -> list[str]:
        return [what for what, number, _ in self.heard if number == request]


def test_each_request_is_started_observed_and_finished_by_its_number() -> None:
    drafter = Recorder()
    llm = LLM(model_dir("aug"), drafter=drafter, policy=2, max_batch=2)
    found = llm.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
    for request, done in enumerate(found, 1):
        heard = drafter.of(request)
        assert heard[0] == "started" and heard[-1] == "finished"
        assert set(heard[1:-1]) == {"observed"}
        (began,) = [n for what, r, n in drafter.heard if (what, r) == ("started", request)]
        (ended,) = [n for what, r, n in drafter.heard if (what, r) == ("finished", request)]
        assert began == done.prompt_tokens and ended == began + len(done.token_ids)


@pytest.mark.parametrize("fails", [None, 2])
def test_requests_that_are_left_or_cannot_start_are_finished_too(fails: int | None) -> None:
    drafter = Recorder(fails)
    llm = LLM(model_dir("aug"), drafter=drafter, policy=2, max_batch=2)
    stream = llm.stream(PROMPTS, SamplingParams(max_tokens=6), return_errors=True)
    for piece in stream:
        if piece.index != 1:
            break
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    started = {request for what, request, _ in drafter.heard if what == "started"}
    assert started >= {1, 2}
    for request in started:
        assert drafter.of(request).count("finished") == 1
