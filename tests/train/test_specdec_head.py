"""Acceptance heads: what is learned is what is served, and the proofs of SpecDec++'s card."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise
from test_engine import decode, outputs
from transformers import PreTrainedTokenizerFast

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_model, save_model
from linspec.decoding.tree import TokenTree
from linspec.drafters.acceptance_head import AcceptanceConfig, AcceptanceHead, AcceptanceQuality
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.specdec_head import SpecDecHead, SpecDecHeadOptions
from linspec.errors import CheckpointError, ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.auto import Auto
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.specdec_pp import SpecDecPP
from linspec.train.drafters import TRAININGS, DrafterConfig, train_drafter
from linspec.train.drafters.specdec_head import (
    SpecDecHeadTraining,
    drawn,
    fitted,
    quality_of,
    served_states,
    weighted_loss,
)
from linspec.train.drafters.states import states_of

PROMPTS = [[5, 9, 200], [31], [7, 8, 9, 10, 11, 12], [101, 44]]


def hurt(model: Decoder, noise: float) -> Decoder:
    """A model that knows half of its tokens less well."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = model.embed.weight
        rows = torch.rand(len(weight), generator=generator) < 0.5
        usual = torch.randn(int(rows.sum()), weight.shape[1], generator=generator)
        weight[rows] += noise * weight.std() * usual
    return model


@pytest.fixture(scope="module")
def draft_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    tiny_teacher: Callable[..., Decoder],
) -> Path:
    out = tmp_path_factory.mktemp("draft") / "model"
    return save_model(hurt(tiny_teacher(len(tokenizer)), 1.0), tokenizer, out)


def trained(draft: Path, target: Decoder, temperature: float, steps: int = 150) -> Any:
    """A head after a little training, its training and the models."""
    training = TRAININGS.build(f"specdec-head:draft={draft},temperature={temperature}")
    assert isinstance(training, SpecDecHeadTraining)
    stream = np.random.default_rng(0).integers(0, 290, 20000)
    head = training.make(target.requires_grad_(False), stream, 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(steps):
        starts = np.random.default_rng(step).integers(0, 15000, 16)
        batch = torch.from_numpy(np.stack([stream[at : at + 33] for at in starts]))
        loss = training.loss(head, states_of(target, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if steps:
        training.measure(head, stream[16000:], context=64, tokens=3000)
    return head, training


def random_head(width: int, spread: float = 3.0, seed: int = 0) -> AcceptanceHead:
    shape = AcceptanceConfig(width=width, vocab_size=290, draft="", draft_fingerprint="")
    head = randomise(AcceptanceHead(shape), seed)
    head.quality = AcceptanceQuality(slope=spread, shift=1.0)
    return head


def test_the_loss_is_the_papers(draft_dir: Path, tiny_teacher: Callable[..., Decoder]) -> None:
    head, training = trained(draft_dir, tiny_teacher(), 1.0, steps=0)
    randomise(head, 1).requires_grad_(False)
    target, draft = tiny_teacher().requires_grad_(False), training.draft
    ids = torch.randint(0, 290, (3, 12), generator=torch.Generator().manual_seed(2))
    states = states_of(target, ids)
    seen: list[torch.Tensor] = []
    whole = draft.hidden
    draft.hidden = lambda batch: seen.append(batch) or whole(batch)  # type: ignore[method-assign]
    loss = training.loss(head, states)
    plain, mixed = seen
    assert torch.equal(plain, ids[:, :-1])
    q = draft.head(whole(plain)).double().softmax(-1)
    p = target.head(target.hidden(plain)).double().softmax(-1)
    above = below = 0.0
    for b, t in ((b, t) for b in range(3) for t in range(11)):
        token = int(mixed[b, t + 1])
        if token == int(ids[b, t + 1]):
            continue
        share = min(1.0, float(p[b, t, token] / q[b, t, token]))
        logit = float(head.logits(whole(mixed[b : b + 1, : t + 2])[0, -1]))
        above -= share * math.log(1 / (1 + math.exp(-logit)))
        above -= 6 * (1 - share) * math.log(1 / (1 + math.exp(logit)))
        below += share + 6 * (1 - share)
    # a draw may be the text's own token: it counts then, and not here
    assert float(loss) == pytest.approx(above / below, rel=0.05)
    assert float(training.loss(head, states)) == float(loss)


@torch.no_grad()
def test_draws_have_the_drafts_distribution_and_its_acceptance(
    draft_dir: Path, tiny_teacher: Callable[..., Decoder]
) -> None:
    target, draft = tiny_teacher(), load_model(draft_dir)
    states = states_of(target, torch.full((4000, 2), 17))
    found = drawn(draft, states, 1.0, torch.Generator().manual_seed(0))
    q = draft.head(draft.hidden(torch.tensor([[17]]))).softmax(-1)[0, 0]
    p = target.head(target.hidden(torch.tensor([[17]]))).softmax(-1)[0, 0]
    sets = torch.arange(290) % 8
    counts = torch.bincount(sets[found.tokens.flatten()], minlength=8)
    wanted = 4000 * torch.zeros(8).index_add_(0, sets, q.detach())
    # chi-square of 7 degrees of freedom: one in ten thousand is above 29.9
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 29.9
    # the mean acceptance is the overlap of the two
    assert float(found.accepted.mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.03)
    greedy = drawn(draft, states, 0.0, torch.Generator())
    assert set(greedy.accepted.unique().tolist()) <= {0.0, 1.0}
    assert greedy.tokens.unique().tolist() == [int(q.argmax())]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_states_in_measuring_are_those_of_drafts_behind_the_text(
    draft_dir: Path, length: int
) -> None:
    draft = load_model(draft_dir)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 290, (length,), generator=generator)
    drafts = torch.randint(0, 290, (length,), generator=generator)
    found = served_states(draft, ids, drafts)
    for t in {0, length // 2, length - 1}:
        alone = draft.hidden(torch.cat((ids[: t + 1], drafts[t : t + 1]))[None])[0, -1]
        torch.testing.assert_close(found[t], alone, rtol=1e-4, atol=1e-4)


class Watched(SpecDecHead):
    """Keeps its trees and how many of their tokens were accepted."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trees: list[TokenTree] = []
        self.accepted: list[int] = []

    def propose(self, sequences: Any, budgets: Any) -> list[TokenTree]:
        trees = super().propose(sequences, budgets)
        if len(trees) == 1:
            self.prefix, self.budget = list(sequences[0].tokens), budgets[0].chain
            self.trees += trees
            self.check(trees[0])
        return trees

    def check(self, tree: TokenTree) -> None:
        """Overridden where a tree is looked at with what it stands behind."""

    def observe(self, sequence: Any, tree: TokenTree, path: Sequence[int]) -> None:
        super().observe(sequence, tree, path)
        self.accepted.append(len(path) - 1)


@pytest.mark.crossed(5)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_draft_ends_by_the_closed_form(
    draft_dir: Path, tiny_teacher: Callable[..., Decoder], threshold: float, temperature: float
) -> None:
    """Behind the first token s >= 2 with 1 - f_1 … f_(s-1) > h, of states as training computes them."""
    target, draft = tiny_teacher(), load_model(draft_dir)
    head, most, lengths = random_head(draft.config.width), 7, set[int]()

    class Checked(Watched):
        def check(self, tree: TokenTree) -> None:
            drafts = len(tree) - 1
            text = torch.tensor([[*self.prefix, *tree.tokens[1:]]])
            hidden = load_model(draft_dir).hidden(text)[0, len(self.prefix) :]
            chances = head(hidden).tolist()
            assert tree.confidences is not None
            assert tree.confidences[1:drafts] == pytest.approx(chances[: drafts - 1], abs=1e-3)
            ended = (s for s in range(2, drafts + 1) if 1 - math.prod(chances[: s - 1]) > threshold)
            assert drafts == min(next(ended, self.budget), self.budget)
            lengths.add(drafts)

    drafter = Checked(
        draft, target.config, 1, head, SpecDecHeadOptions(threshold=threshold, most=most)
    )
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=1)
    for prompt in PROMPTS:
        decode(target, [prompt], params, drafter, policy=Fixed(most))
    few = {0.0: {1, 2}, 1.0: set(range(1, most + 1))}.get(threshold)
    # a greedy answer of a random model soon repeats itself
    assert lengths <= few if few else len(lengths) > (2 if temperature else 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("constant", [2, 5])
def test_bounds_that_leave_no_choice_are_a_constant_length(
    draft_dir: Path, tiny_teacher: Callable[..., Decoder], constant: int, temperature: float
) -> None:
    """The same random numbers, the same trees, whatever the threshold is."""
    target = tiny_teacher()
    params = [SamplingParams(max_tokens=20, temperature=temperature, seed=s) for s in range(4)]
    plain = DraftModel(load_model(draft_dir), target.config, 4)
    usual = decode(target, PROMPTS, params, plain, policy=Fixed(constant))
    options = SpecDecHeadOptions(threshold=0.0, least=constant, most=constant)
    head = random_head(plain.model.config.width)
    drafter = SpecDecHead(load_model(draft_dir), target.config, 4, head, options)
    found = decode(target, PROMPTS, params, drafter, policy=Fixed(63))
    assert outputs(found) == outputs(usual)
    assert [row.stats.drafted for row in found] == [row.stats.drafted for row in usual]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "policy", [lambda: Fixed(8), lambda: SpecDecPP(CHEAP), lambda: Auto(CHEAP)]
)
def test_greedy_outputs_are_those_of_the_target(
    draft_dir: Path,
    tiny_teacher: Callable[..., Decoder],
    threshold: float,
    policy: Callable[[], Any],
) -> None:
    target, params = tiny_teacher(), SamplingParams(max_tokens=25)
    drafter = SpecDecHead(
        load_model(draft_dir),
        target.config,
        4,
        random_head(32),
        SpecDecHeadOptions(threshold=threshold),
    )
    rows = decode(target, PROMPTS, params, drafter, policy=policy())
    assert outputs(rows) == outputs(decode(target, PROMPTS, params))
    assert sum(row.stats.drafted for row in rows) > 0


CHEAP = CostCurve({1: 1.0e-3, 8: 1.2e-3, 64: 7.0e-3})


@pytest.mark.crossed(2)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_samples_have_the_distribution_of_the_target(
    draft_dir: Path, tiny_teacher: Callable[..., Decoder], threshold: float
) -> None:
    """The third token of many answers to one prompt, in eight sets of tokens (chi-square)."""
    target, count = tiny_teacher(), 600
    options = SpecDecHeadOptions(threshold=threshold)

    def drawn_by(drafter: Any, seed: int) -> torch.Tensor:
        params = [
            SamplingParams(max_tokens=3, temperature=1.0, seed=seed + i) for i in range(count)
        ]
        rows = decode(target, [PROMPTS[0]] * count, params, drafter, policy=Fixed(4), slots=16)
        return torch.tensor([row.tokens[-1] % 8 for row in rows]).bincount(minlength=8)

    head = random_head(32)
    drafter = SpecDecHead(load_model(draft_dir), target.config, 16, head, options)
    found, plain = drawn_by(drafter, 0), drawn_by(None, 10_000)
    both = (found + plain).clamp(min=1)
    # of 7 degrees of freedom, one in ten thousand is above 29.9
    assert float(((found - plain) ** 2 / both).sum()) < 29.9


@pytest.fixture(scope="module")
def learned(draft_dir: Path, tiny_teacher: Callable[..., Decoder]) -> tuple[AcceptanceHead, Any]:
    found: tuple[AcceptanceHead, Any] = trained(draft_dir, tiny_teacher(), 1.0, steps=200)
    return found


def test_a_trained_head_tells_rejections_on_held_out_text(
    learned: tuple[AcceptanceHead, Any],
) -> None:
    quality = learned[0].quality
    assert quality.gain >= 0.2 and quality.auc >= 0.7 and quality.error <= 0.06
    # the weight of rejections had to be taken back
    assert quality.shift == pytest.approx(math.log(6), abs=0.7)


@pytest.mark.slow
def test_what_is_said_of_whole_drafts_comes_true(
    learned: tuple[AcceptanceHead, Any], draft_dir: Path, tiny_teacher: Callable[..., Decoder]
) -> None:
    """The product of chances against the share of drafts accepted whole, without the unjudged last token."""
    target = tiny_teacher()
    options = SpecDecHeadOptions(threshold=0.5, most=6)
    drafter = Watched(load_model(draft_dir), target.config, 1, learned[0], options)
    rng = np.random.default_rng(0)
    for seed in range(60):
        prompt = rng.integers(0, 290, 6).tolist()
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed)
        decode(target, [prompt], params, drafter, policy=Fixed(6), slots=1)
    said, found = [], []
    for tree, accepted in zip(drafter.trees, drafter.accepted, strict=True):
        judged = len(tree) - 2
        if judged > 0 and tree.confidences is not None:
            said.append(math.prod(tree.confidences[1 : judged + 1]))
            found.append(accepted >= judged)
    assert len(said) > 150
    assert np.mean(said) == pytest.approx(np.mean(found), abs=0.05)


@pytest.mark.slow
def test_fewer_drafts_are_made_for_nothing_than_with_any_constant_length(
    learned: tuple[AcceptanceHead, Any], draft_dir: Path, tiny_teacher: Callable[..., Decoder]
) -> None:
    """At no more steps of the target, under 0.9 times what a constant length discards (here about a half)."""
    target, rng = tiny_teacher(), np.random.default_rng(0)
    prompts = [rng.integers(0, 290, 6).tolist() for _ in range(48)]
    params = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True)
        for seed in range(48)
    ]

    def spent(options: SpecDecHeadOptions) -> tuple[int, int]:
        """Steps of the target, and drafts that were not accepted."""
        drafter = SpecDecHead(load_model(draft_dir), target.config, 16, learned[0], options)
        rows = decode(target, prompts, params, drafter, policy=Fixed(20), slots=16)
        stats = [row.stats for row in rows]
        return sum(each.rounds for each in stats), sum(
            each.drafted - each.accepted for each in stats
        )

    steps, discarded = spent(SpecDecHeadOptions(threshold=0.5))
    constants = [spent(SpecDecHeadOptions(least=n, most=n)) for n in (4, 6)]
    assert all(steps <= 1.02 * each and discarded <= 0.9 * lost for each, lost in constants)


def test_calibration_takes_back_what_a_weight_does() -> None:
    """Chances that a weight of 6 has made too low by log 6 are found again."""
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(8000, generator=generator)
    accepted = (torch.rand(8000, generator=generator) < true.sigmoid()).float()
    found = quality_of(true - math.log(6), accepted, math.log(6))
    assert (found.slope, found.shift) == pytest.approx((1.0, math.log(6)), abs=0.12)
    assert found.error < 0.02 and found.gain > 0.2
    # nothing but the assumption where nothing was judged
    assert fitted(torch.zeros(0), torch.zeros(0), 1.5) == pytest.approx((1.0, 1.5))


def test_the_weighted_loss_is_least_at_weighted_odds() -> None:
    accepted = torch.tensor([1.0, 1.0, 1.0, 0.0])
    logits = torch.linspace(-5, 5, 2001)
    losses = [float(weighted_loss(each.expand(4), accepted, 6.0)) for each in logits]
    assert float(logits[int(np.argmin(losses))]) == pytest.approx(math.log(3 / 6), abs=0.01)


def test_a_head_is_trained_saved_found_and_used(
    draft_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tiny_teacher: Callable[..., Decoder],
    tmp_path: Path,
    corpus: Path,
) -> None:
    model = save_model(tiny_teacher(len(tokenizer)), tokenizer, tmp_path / "model")
    config = DrafterConfig(
        tokens=6 * 128, context=32, batch_tokens=128, calibration_tokens=256, precision="float32"
    )
    kind = f"specdec-head:draft={draft_dir}"
    out = train_drafter(model, kind=kind, data=[corpus], config=config)
    assert out == model / "specdec-head"
    prompts, params = ["the old fox", "a red dog"], SamplingParams(max_tokens=12)
    plain = [each.token_ids for each in LLM(model).generate(prompts, params)]
    for spec in ("specdec-head", f"specdec-head:{out},threshold=0.2", f"suffix+specdec-head:{out}"):
        found = LLM(model, drafter=spec, policy=6).generate(prompts, params)
        assert [each.token_ids for each in found] == plain
    other = save_model(tiny_teacher(len(tokenizer), seed=3), tokenizer, tmp_path / "other")
    with pytest.raises(DrafterError, match="judges drafts of .* train its own"):
        LLM(model, drafter=f"specdec-head:draft={other}")
    with pytest.raises(DrafterError, match="trained for another model"):
        LLM(other, drafter=f"specdec-head:{out}")


def test_bad_settings_are_named(draft_dir: Path) -> None:
    with pytest.raises(ConfigError, match="name it: --kind specdec-head:draft=DIR"):
        TRAININGS.build("specdec-head")
    with pytest.raises(CheckpointError):
        TRAININGS.build("specdec-head:draft=nowhere")
    with pytest.raises(ConfigError, match="mix must be at least 0 and below 1"):
        TRAININGS.build(f"specdec-head:draft={draft_dir},mix=1")
    with pytest.raises(ConfigError, match=r"threshold must be in 0\.\.1"):
        SpecDecHeadOptions(threshold=1.5)
