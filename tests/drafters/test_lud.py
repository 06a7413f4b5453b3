"""Slots fill with what the model is sure of: verified they change nothing, trusted they are the output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from copying import PERIOD, copying, periodic
from helpers import assert_close, random_tokens, randomise, tiny_model
from torch.nn import functional as F

from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree, chain
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.drafters.lud import LUD, LUDOptions, Slot, SlotConfig
from linspec.drafters.saved import save_drafter
from linspec.engine.engine import Engine
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.train.drafters.chains import cut_of, hidden_behind
from linspec.train.drafters.lud import in_unit, lud_loss
from linspec.verifiers import LosslessVerifier, TrustingOptions, TrustingVerifier, Verifier


def slots_of(model: Decoder, threshold: float = 0.9, slots: int = 3) -> LUD:
    config = model.config
    shape = SlotConfig(width=config.width, vocab_size=config.vocab_size, slots=slots)
    return LUD(Slot(shape).to(model.dtype), LUDOptions(threshold=threshold))


def trusting(threshold: float = 0.9) -> TrustingVerifier:
    return TrustingVerifier(TrustingOptions(threshold=threshold))


def decoded(
    model: Decoder,
    drafter: Drafter | None,
    verifier: Verifier,
    prompts: list[list[int]],
    temperature: float = 0.0,
) -> list[RunningSequence]:
    engine = Engine(model, verifier=verifier, drafter=drafter, policy=Fixed(8))
    params = SamplingParams(max_tokens=50, ignore_eos=True, temperature=temperature, seed=3)
    for prompt in prompts:
        engine.add(Request(tuple(prompt), params))
    found = {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                found[outcome.sequence.request] = outcome.sequence
    return [found[request] for request in sorted(found)]


@pytest.mark.parametrize("verifier", [LosslessVerifier(), trusting()], ids=["exact", "trusting"])
def test_frozen_phrases_come_several_tokens_at_a_time(verifier: Verifier) -> None:
    model, prompts = copying(), [periodic(11, seed) for seed in range(3)]
    plain = decoded(model, None, LosslessVerifier(), prompts)
    found = decoded(model, slots_of(model), verifier, prompts)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert all(each.stats.tokens_per_round > 3.0 for each in found)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_what_is_trusted_is_ever_more_the_lower_the_threshold(mixer: str) -> None:
    """Above 1 the output is that of plain decoding; agreement falls as tokens per round rise."""
    model = tiny_model(mixer)
    prompts = [random_tokens(9, seed=seed) for seed in range(4)]
    plain = [each.tokens for each in decoded(model, None, LosslessVerifier(), prompts)]
    brought, agreed = [], []
    for threshold in (1.01, 0.6, 0.2, 1e-3):
        drafter = slots_of(model, threshold)
        found = decoded(model, drafter, trusting(threshold), prompts)
        brought.append(sum(each.stats.tokens_per_round for each in found))
        agreed.append(sum(each.tokens == other for each, other in zip(found, plain, strict=True)))
        verified = decoded(model, slots_of(model, threshold), LosslessVerifier(), prompts)
        assert [each.tokens for each in verified] == plain
    assert agreed[0] == 4 and agreed[-1] < 4
    assert brought == sorted(brought) and brought[0] == 4.0 and brought[-1] > 6.0


def test_a_slot_never_says_again_what_was_just_said() -> None:
    model = copying()
    # the text has one token only, so every slot would say it
    (found,) = decoded(model, slots_of(model), trusting(), [[3] * 11])
    assert found.stats.accepted == 0 and set(found.tokens) == {3}


def test_trusted_drafts_are_taken_whatever_the_target_says() -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, 2), confidences=(1.0, 0.95, 0.9, 0.89))
    sampler = Sampler(SamplingParams(temperature=0.0), (1,), 12, ())
    accepted = trusting().accept(tree, logits, sampler)
    assert accepted.path == (0, 1, 2) and accepted.token == int(logits[2].argmax())
    assert trusting(1.01).accept(tree, logits, sampler).path == (0,)
    wide = TokenTree((1, 2, 3), (-1, 0, 0), confidences=(1.0, 0.91, 0.99))
    assert trusting().accept(wide, logits[:3], sampler).path == (0, 2)
    unsure = chain((1, 2, 3))
    exact = LosslessVerifier().accept(unsure, logits[:3], sampler)
    assert trusting().accept(unsure, logits[:3], sampler).path == exact.path


@pytest.mark.parametrize("slots", [1, 3])
def test_the_loss_teaches_units_alone(slots: int) -> None:
    model, batch = tiny_model("softmax"), torch.randint(0, 31, (3, 12))
    slot = randomise(Slot(SlotConfig(width=16, vocab_size=31, slots=slots)), 2).double()
    with torch.no_grad():
        found = lud_loss(model, slot, batch, alpha=0.05, slot_weight=0.5)
        logs = model(batch[:, :-1]).log_softmax(-1)
        text = F.nll_loss(logs.flatten(0, 1), batch[:, 1:].flatten())
        cut, losses = cut_of(batch[:, :-1], 11 - slots), []
        hidden = hidden_behind(model, batch[:, :cut], slot.embedding.expand(slots, -1))
        said = model.head(hidden).log_softmax(-1)
        for row in range(3):
            for k in range(1, slots + 1):
                # token cut is the first of the unit and needs no confidence
                if float(logs[row, cut + k - 1, batch[row, cut + k]].exp()) < 0.05:
                    break
                losses.append(-said[row, k - 1, batch[row, cut + k]])
        extra = 0.5 * torch.stack(losses).mean() if losses else 0.0
        assert_close(found, text + extra, atol=1e-5)


def test_a_unit_ends_at_the_first_token_that_is_unsure() -> None:
    sure = torch.tensor([[0.95, 0.5, 0.99], [0.1, 0.99, 0.99], [0.9, 0.9, 0.9]])
    assert in_unit(sure, 0.9).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_it_survives_the_disk(tmp_path: Path) -> None:
    model = copying()
    slot = randomise(Slot(SlotConfig(width=16, vocab_size=12, slots=PERIOD - 1)), 1)
    folder = save_drafter(slot, model, tmp_path / "lud", dtype=None)
    made = make_drafter(f"lud:path={folder},threshold=0.7", DrafterContext(model))
    assert isinstance(made, LUD) and made.threshold == 0.7
    assert torch.equal(made.slot.embedding, slot.embedding)
    with pytest.raises(ConfigError, match="threshold must be above 0"):
        make_drafter(f"lud:path={folder},threshold=0", DrafterContext(model))
    with pytest.raises(ConfigError, match="threshold must be above 0"):
        TrustingOptions(threshold=-1.0)
