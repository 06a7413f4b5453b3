"""LocalLeap against a loop over anchors, and against the thresholds that it lies between."""

from __future__ import annotations

import pytest
import torch
from denoisers import make, tokens
from torch import Tensor

from linspec import SamplingParams
from linspec.diffusion.candidates import Candidates
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.commits.local_leap import LocalLeap, LocalLeapOptions
from linspec.diffusion.commits.threshold import Threshold, ThresholdOptions
from linspec.diffusion.predictions import Predictions


def candidates(seed: int) -> Candidates:
    """Some positions of a block of 32 with confidences between a half and one."""
    draw = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 33, (), generator=draw))
    positions = torch.randperm(32, generator=draw)[:count].sort().values + 40
    sure = 0.5 + 0.5 * torch.rand(count, generator=draw, dtype=torch.float64)
    logits = torch.stack((sure, 1 - sure), -1).log()
    tokens, canvas = torch.zeros(count, dtype=torch.long), Canvas([0] * 40, 32, mask_id=2)
    predictions = Predictions(positions.tolist(), logits, shift=0, mask_id=1)
    return Candidates(positions, tokens, logits, torch.zeros, canvas, predictions)


def by_anchor(given: Candidates, options: LocalLeapOptions) -> Tensor:
    """The published rule, one anchor after the other."""
    chosen = torch.zeros(len(given.positions), dtype=torch.bool)
    chosen[int(given.confidence.argmax())] = True
    for place, anchor in enumerate(given.positions.tolist()):
        if given.confidence[place] < options.sure:
            continue
        for other, position in enumerate(given.positions.tolist()):
            near = abs(position - anchor) <= options.radius
            chosen[other] |= near and bool(given.confidence[other] >= options.near)
    return chosen


def threshold(given: Candidates, least: float) -> Tensor:
    return Threshold(ThresholdOptions(least=least)).commit(given)


@pytest.mark.parametrize("radius", [0, 1, 4, 40])
def test_the_rule_is_that_of_a_loop_over_anchors(radius: int) -> None:
    options = LocalLeapOptions(radius=radius)
    for seed in range(100):
        given = candidates(seed)
        found = LocalLeap(options).commit(given)
        assert torch.equal(found, by_anchor(given, options))
        strict, loose = threshold(given, options.sure), threshold(given, options.near)
        # from one state: never less than the strict threshold decides, never more than the loose one
        assert not (strict & ~found).any() and not (found & ~loose).any()
        if radius == 0:
            assert torch.equal(found, strict)
        if radius == 40 and (given.confidence >= options.sure).any():
            assert torch.equal(found, loose)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_leap_of_no_length_is_the_threshold(name: str) -> None:
    for sure in (0.2, 0.5):
        expected = tokens(name, f"block=fixed:5,commit=threshold:{sure}")
        for rest in ("near=0.01+radius=0", f"near={sure}+radius=4"):
            assert tokens(name, f"block=fixed:5,commit=local-leap:sure={sure}+{rest}") == expected


def test_it_lies_between_the_thresholds_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    options, rounds = LocalLeapOptions(sure=0.4, near=0.15, radius=2), []
    plain = LocalLeap.commit

    def commit(self: LocalLeap, given: Candidates) -> Tensor:
        found = plain(self, given)
        strict, loose = threshold(given, options.sure), threshold(given, options.near)
        assert not (strict & ~found).any() and not (found & ~loose).any()
        rounds.append((int(strict.sum()), int(found.sum()), int(loose.sum())))
        return found

    monkeypatch.setattr(LocalLeap, "commit", commit)
    llm = make(spec="block=fixed:8,commit=local-leap:sure=0.4+near=0.15+radius=2")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    llm.generate([[3 + seed, 3 + seed % 7] for seed in range(50)], params)
    assert any(strict < found for strict, found, _ in rounds)
    assert any(found < loose for _, found, loose in rounds)
