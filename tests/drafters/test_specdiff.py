"""A masked-diffusion model drafts: what it computes once, its trees, its draws, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_config, text_model, tiny_tokenizer
from helpers import VOCAB, assert_close, random_tokens, tiny_model
from scipy.stats import chisquare
from test_engine import GREEDY, PROMPTS, decode, outputs, random_denoiser
from tokenizer_kinds import tokenizer_of

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import save_model
from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.specdiff import Asked, SpecDiff, SpecDiffOptions, drawn
from linspec.drafters.specdiff_net import (
    SpecDiffNet,
    hidden_in_rounds,
    layers_kept,
    target_logits,
)
from linspec.errors import ConfigError, DrafterError
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

MEASURED = [[0.5, 0.2], [0.4], [0.3], [0.2]]


def double(shift: int = 1, **changes: Any) -> MaskedDiffusion:
    return random_denoiser(shift=shift, **changes).double()


@pytest.mark.crossed(2)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("options", ["places=1", "top=1", "top=5,places=6", "cache=none"])
def test_any_shape_of_draft_leaves_the_output_alone(shift: int, options: str) -> None:
    target = tiny_model("aug").to_inference()
    given = dict(each.split("=") for each in options.split(","))
    kept = SpecDiffOptions(**{k: v if k == "cache" else int(v) for k, v in given.items()})  # type: ignore[arg-type]
    plain = outputs(decode(target, PROMPTS, GREEDY))
    for trained in ((), (MEASURED, 4)):
        drafter = SpecDiff(double(shift), target.config, 4, kept, *trained)
        for nodes in (1, 3, 17):
            assert outputs(decode(target, PROMPTS, GREEDY, drafter, policy=Fixed(nodes))) == plain


class Noted(SpecDiff):
    """Writes down the text, the rounds and the logits of each forward."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.notes: list[tuple[list[int], list[int], torch.Tensor]] = []
        self.ends: list[int] = []

    def _guessed(self, asked: Sequence[Asked]) -> list[torch.Tensor]:
        found = super()._guessed(asked)
        for each, logits in zip(asked, found, strict=True):
            self.ends.append(len(each.sequence.tokens) - 1)
            self.notes.append(([*each.sequence.tokens], [*self.ends], logits))
        return found


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("places", [0, 4], ids=["any", "trained"])
def test_each_token_is_computed_once_in_the_round_that_reads_it(shift: int, places: int) -> None:
    """So the drafts are those of the full form in which training sees the same rounds."""
    target, model = tiny_model("aug").to_inference(), double(shift)
    drafter = Noted(model, target.config, 1, None, (), places)
    decode(target, [PROMPTS[4]], SamplingParams(max_tokens=30), drafter, slots=1)
    whole = [note for note in drafter.notes if len(note[2]) == drafter.places]
    assert len(whole) > 5
    masks = drafter.places - drafter.masks_less
    for tokens, ends, logits in whole:
        ids = torch.tensor([tokens])
        hidden = hidden_in_rounds(model, ids, torch.tensor(ends), masks)[0, -1, : len(logits)]
        assert_close(logits, target_logits(model.head(hidden), VOCAB, VOCAB), atol=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_without_a_cache_the_drafts_are_those_of_the_model_itself(shift: int) -> None:
    target, model = tiny_model("aug").to_inference(), double(shift)
    drafter = Noted(model, target.config, 1, SpecDiffOptions(cache="none"))
    decode(target, [PROMPTS[2]], SamplingParams(max_tokens=20), drafter, slots=1)
    for tokens, _, logits in drafter.notes:
        depth = len(logits)
        ids = torch.tensor([[*tokens, *[VOCAB] * depth]])
        own = model.predicted(ids)[0, len(tokens) :]
        assert_close(logits, target_logits(own, VOCAB, VOCAB), atol=1e-5)


def test_a_round_that_is_proposed_again_is_proposed_alike() -> None:
    target = tiny_model("aug").to_inference()

    class Twice(SpecDiff):
        def propose(self, rows: Any, budgets: Any) -> Any:
            first = super().propose(rows, budgets)
            again = [
                tree
                for row, budget in zip(rows, budgets, strict=True)
                for tree in super(Twice, self).propose([row], [budget])
            ]
            assert [each.tokens for each in first] == [each.tokens for each in again]
            return first

    params = [SamplingParams(max_tokens=15, temperature=float(s % 2), seed=s) for s in range(5)]
    made = [kind(double(), target.config, 4) for kind in (SpecDiff, Twice)]
    once, twice = (outputs(decode(target, PROMPTS, params, each)) for each in made)
    assert once == twice


def test_at_its_last_position_and_behind_tokens_it_does_not_know_it_drafts_nothing() -> None:
    target = tiny_model("aug").to_inference()
    short = SpecDiff(double(max_positions=20), target.config, 4)
    rows = decode(
        target, [random_tokens(12), random_tokens(25)], SamplingParams(max_tokens=25), short
    )
    assert [row.emitted for row in rows] == [25, 25]
    assert rows[0].stats.drafted and not rows[1].stats.drafted
    few = random_denoiser(vocab_size=4).double()
    prompts = [[1, 2, 3], [9, 9]]
    rows = decode(target, prompts, SamplingParams(max_tokens=20), SpecDiff(few, target.config, 4))
    assert outputs(rows) == outputs(decode(target, prompts, SamplingParams(max_tokens=20)))


def test_greedy_trees_hold_the_likeliest_combinations_first() -> None:
    asked, logits = sampled_round(0.0, 0), torch.randn(3, 6)
    drafter = SpecDiff(random_denoiser(6), tiny_model("aug").config, 1)
    tree = drafter._tree(asked, logits)
    shares = logits.softmax(-1)
    worth = sorted(
        (
            float(shares[range(len(path)), path].prod())
            for n in (1, 2, 3)
            for path in product(range(6), repeat=n)
        ),
        reverse=True,
    )
    found = [
        float(shares[range(len(path)), path].prod())
        for node in range(1, len(tree))
        if (path := [tree.tokens[n] for n in tree.path_to(node)[1:]])
    ]
    assert found == pytest.approx(worth[: len(found)]) and not tree.proposals
    assert len(tree) == asked.budget.nodes + 1


# ---- draws

SMALL = 6
TARGET = torch.randn(1 + SMALL + SMALL**2, SMALL, generator=torch.Generator().manual_seed(1)) * 1.5


def sampled_round(temperature: float, seed: int, nodes: int = 7) -> Asked:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=seed), [1], SMALL)
    sequence = RunningSequence(0, sampler, [1], 1, slot=0)
    return Asked(0, sequence, Budget(nodes, 3), 0, 3)


def row_behind(path: Sequence[int]) -> torch.Tensor:
    """The target's logits behind some drafts."""
    place = (
        0 if not path else 1 + path[0] if len(path) == 1 else 1 + SMALL + SMALL * path[0] + path[1]
    )
    return TARGET[place]


def logits_of(tree: TokenTree) -> torch.Tensor:
    paths = [[tree.tokens[n] for n in tree.path_to(node)[1:]][:2] for node in range(len(tree))]
    return torch.stack([row_behind(path) for path in paths])


def first_two(tree: TokenTree, sampler: Sampler) -> tuple[int, int]:
    """The next two tokens of a sequence, where the second may need a round without drafts."""
    emitted = LosslessVerifier().accept(tree, logits_of(tree), sampler).emitted(tree)
    if len(emitted) == 1:
        emitted = (*emitted, sampler.draw(row_behind(emitted).softmax(-1)))
    return emitted[0], emitted[1]


def p_value(pairs: Sequence[tuple[int, int]]) -> float:
    found = torch.zeros(SMALL, SMALL, dtype=torch.float64)
    for pair in pairs:
        found[pair] += 1
    firsts = TARGET[0].double().softmax(-1)
    seconds = TARGET[1 : 1 + SMALL].double().softmax(-1)
    expected = (firsts[:, None] * seconds * len(pairs)).flatten()
    often = expected >= 5
    groups = [often] if often.all() else [often, ~often]
    kept, wanted = (
        [*each.flatten()[often].tolist(), *(float(each.flatten()[at].sum()) for at in groups[1:])]
        for each in (found, expected)
    )
    total = sum(wanted)
    return float(chisquare(kept, [each * sum(kept) / total for each in wanted]).pvalue)


BAD = torch.randn(3, SMALL, generator=torch.Generator().manual_seed(2)) * 2


@pytest.mark.parametrize("top", [1, 4])
@pytest.mark.parametrize("trials", [2500, pytest.param(50_000, marks=pytest.mark.slow)])
def test_two_tokens_have_the_targets_joint_distribution_however_bad_the_drafts(
    top: int, trials: int
) -> None:
    drafter = SpecDiff(
        random_denoiser(SMALL), tiny_model("aug").config, 1, SpecDiffOptions(top=top)
    )
    pairs = []
    for seed in range(trials):
        asked = sampled_round(1.0, seed)
        drafter.finished(asked.sequence)
        tree = drafter._tree(asked, BAD)
        assert tree.proposals and len(tree) == (4 if top == 1 else 8)
        pairs.append(first_two(tree, asked.sequence.sampler))
    assert p_value(pairs) > 1e-3


def test_the_best_of_several_drafts_judged_as_if_it_were_the_only_one_would_be_biased() -> None:
    """Why several drafts take the rule for trees, and none of them is selected before it is judged."""
    pairs = []
    shares = BAD.softmax(-1)
    for seed in range(2500):
        sampler = sampled_round(1.0, seed).sequence.sampler
        generator = torch.Generator().manual_seed(seed)
        drafts = torch.multinomial(shares, 4, replacement=True, generator=generator).T.tolist()

        def streak(draft: Sequence[int]) -> float:
            one = float(row_behind([]).softmax(-1)[draft[0]])
            return one * (1 + float(row_behind(draft[:1]).softmax(-1)[draft[1]]))

        best = max(drafts, key=streak)
        tree = chain((1, *best[:2]), {0: shares[0], 1: shares[1]})
        pairs.append(first_two(tree, sampler))
    assert p_value(pairs) < 1e-6


def test_draws_come_without_replacement_in_the_order_of_such_draws() -> None:
    shares, generator = (
        torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64),
        torch.Generator().manual_seed(0),
    )
    draws = [tuple(drawn(shares, 4, generator)) for _ in range(3000)]
    assert {len(each) for each in draws} == {3}
    orders = {
        (a, b): float(shares[a] * shares[b] / (1 - shares[a]))
        for a, b in product(range(3), repeat=2)
        if a != b
    }
    counts = [sum(each[:2] == pair for each in draws) for pair in orders]
    assert chisquare(counts, [3000 * chance for chance in orders.values()]).pvalue > 1e-3


def test_likeliest_drafts_leave_what_a_seed_gives() -> None:
    target = tiny_model("softmax").to_inference()
    params = [SamplingParams(max_tokens=20, temperature=0.9, seed=s) for s in range(5)]
    drafter = SpecDiff(double(), target.config, 4, SpecDiffOptions(draws=False))
    rows = decode(target, PROMPTS, params, drafter)
    assert outputs(rows) == outputs(decode(target, PROMPTS, params))


# ---- from disk


@pytest.fixture(scope="module")
def denoiser_dir(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A diffusion model with the tokenizer of the tiny ones."""
    model = random_denoiser(len(tiny_tokenizer())).float()
    return save_model(model, tiny_tokenizer(), tmp_path_factory.mktemp("specdiff") / "m")


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_any_diffusion_model_of_the_same_tokens_drafts(mixer: str, denoiser_dir: Any) -> None:
    params = SamplingParams(max_tokens=20)
    plain = LLM(model_dir(mixer), drafter="none").generate(["the red", "a b c"], params)
    llm = LLM(model_dir(mixer), drafter=f"specdiff:model={denoiser_dir}", policy=6)
    found = llm.generate(["the red", "a b c"], params)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert all(each.stats.drafted for each in found)


def test_what_cannot_draft_is_named(denoiser_dir: Any, tmp_path: Any) -> None:
    context = DrafterContext(text_model("softmax"), tiny_tokenizer(), slots=2)

    def made(spec: str) -> Any:
        return make_drafter(f"specdiff:{spec}", context)

    with pytest.raises(DrafterError, match="fills masks, and this model has none"):
        made(f"model={model_dir('softmax')}")
    with pytest.raises(DrafterError, match="no drafter of kind 'specdiff'"):
        make_drafter("specdiff", context)
    with pytest.raises(ConfigError, match="got both; leave one"):
        made(f"path={tmp_path},model={denoiser_dir}")
    with pytest.raises(ConfigError, match="cache must be one of prefix, none, got 'all'"):
        made(f"model={denoiser_dir},cache=all")
    other = random_denoiser(len(tokenizer_of("Unigram"))).float()
    folder = save_model(other, tokenizer_of("Unigram"), tmp_path / "other")
    with pytest.raises(DrafterError, match="another tokenizer than its target"):
        made(f"model={folder}")


# ---- the trained form


def test_a_drafter_starts_from_a_diffusion_model_or_from_its_target() -> None:
    model = random_denoiser(VOCAB, layers=3)
    same = SpecDiffNet.starting_from(model, VOCAB, 4)
    ids = torch.tensor([random_tokens(9)])
    assert_close(same.denoiser(ids), model(ids), atol=1e-6)
    target = text_model("softmax")
    vocabulary = target.config.vocab_size
    made = SpecDiffNet.starting_from(target, vocabulary, 4)
    config = made.denoiser.config
    assert (config.mask_id, config.logit_shift, config.vocab_size) == (
        vocabulary,
        1,
        vocabulary + 1,
    )
    assert_close(made.denoiser.embed.weight[:-1], target.embed.weight, atol=0)
    assert_close(made.denoiser.embed.weight[-1], target.embed.weight.mean(0), atol=1e-6)
    few = SpecDiffNet.starting_from(text_model("aug"), vocabulary, 4, layers=1)
    assert few.denoiser.config.layers == 1
    assert [layers_kept(6, n) for n in (0, 1, 2, 3, 6)] == [
        [*range(6)],
        [0],
        [0, 5],
        [0, 2, 5],
        [*range(6)],
    ]
    assert text_config("aug").layers == 2


def test_a_model_of_blocks_is_no_start() -> None:
    data = random_denoiser(shift=0).config.to_dict() | {"block_length": 4}
    blocks = MaskedDiffusion(DiffusionConfig.from_dict(data))
    with pytest.raises(ConfigError, match="whose drafts begin anywhere"):
        SpecDiffNet.starting_from(blocks, VOCAB, 4)
