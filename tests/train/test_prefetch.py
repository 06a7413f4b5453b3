"""Batches made ahead: the same ones in the same order, errors at their step, and no thread left."""

from __future__ import annotations

import threading

import pytest
import torch

from linspec.train.prefetch import Prefetch

CPU = torch.device("cpu")


def batch(step: int) -> torch.Tensor:
    return torch.full((2, 3), step)


def test_batches_come_in_the_order_they_are_asked_for() -> None:
    with Prefetch(batch, CPU, 6) as batches:
        # as a run that is resumed, and one that goes back
        for step in (2, 3, 4, 1, 2, 5):
            assert torch.equal(batches(step), batch(step))


def test_the_next_batch_is_made_while_a_step_runs() -> None:
    made = [threading.Event() for _ in range(3)]

    def note(step: int) -> torch.Tensor:
        made[step].set()
        return batch(step)

    with Prefetch(note, CPU, 3) as batches:
        batches(0)
        assert made[1].wait(30) and not made[2].is_set()


def test_no_batch_is_made_behind_the_last_step() -> None:
    seen: list[int] = []

    def note(step: int) -> torch.Tensor:
        seen.append(step)
        return batch(step)

    with Prefetch(note, CPU, 2) as batches:
        assert [int(batches(step)[0, 0]) for step in range(2)] == [0, 1]
    assert seen == [0, 1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_belongs_to_its_step(error: type[BaseException]) -> None:
    def bad(step: int) -> torch.Tensor:
        if step == 1:
            raise error("here")
        return batch(step)

    with Prefetch(bad, CPU, 3) as batches:
        batches(0)
        with pytest.raises(error, match="here"):
            batches(1)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
