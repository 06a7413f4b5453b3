"""The proof must pass what is lossless and must catch what is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.draft_model import DraftModel
from linspec.errors import ConfigError
from linspec.evaluate import lossless
from linspec.evaluate.lossless import (
    Divergence,
    chi_square,
    divergence,
    sampling_p_value,
    survival,
    verify,
)
from linspec.llm import LLM
from linspec.verifiers import Accepted


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"abcd end {i} the end\n" * (i + 9))
    return folder


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "draft-model", "student"])
def test_lossless_drafters_pass(mixer: str, drafter: str, data: Path) -> None:
    where = {"draft-model": f":{model_dir('softmax', 1)}", "student": f":{model_dir('aug', 1)}"}
    report = verify(
        model_dir(mixer), drafter + where.get(drafter, ""), prompts=4, tokens=12, draws=40,
        data=[data],
    )  # fmt: skip
    assert report.lossless_greedy
    assert report.first_divergence is None
    assert (report.prompts, report.tokens) == (4, 2 * 4 * 12)
    assert report.sampling_p_value is not None and report.sampling_p_value > 1e-3
    assert report.to_json()["first_divergence"] is None


def test_samples_of_rounded_weights_are_held_against_the_steps(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full form and step of SmolLM2's blocks differ by as much as 8-bit inputs cost: the test once failed
    for plain decoding."""
    llm = LLM(model_dir("softmax"), quantize=8)
    monkeypatch.setattr(type(llm.model), "full_logits", None)
    assert sampling_p_value(llm, [[5, 6, 7, 8]], 200) > 1e-3


def test_a_model_that_drafts_for_itself_saves_rounds(data: Path) -> None:
    itself = f"draft-model:{model_dir('aug')}"
    report = verify(model_dir("aug"), itself, prompts=2, tokens=20, draws=0, data=[data])
    assert report.tokens_per_round > 5
    assert report.sampling_p_value is None


def test_a_broken_verifier_is_caught(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is accepted unseen."""

    def gullible(self: object, tree: TokenTree, logits: torch.Tensor, sampler: object) -> Accepted:
        deepest = max(range(len(tree)), key=lambda node: tree.depths[node])
        return Accepted(tree.path_to(deepest), int(logits[deepest].argmax()), None)

    monkeypatch.setattr("linspec.verifiers.lossless.LosslessVerifier.accept", gullible)
    other = f"draft-model:{model_dir('softmax', 1)}"
    report = verify(model_dir("aug"), other, prompts=3, tokens=20, draws=0, data=[data])
    assert not report.lossless_greedy
    first = report.first_divergence
    assert first is not None and first.expected != first.got and first.logit_gap > 1e-4
    assert report.tokens < 2 * 3 * 20


def test_samples_of_the_wrong_distribution_are_caught() -> None:
    class Sly(DraftModel):
        """Says that it drew from a sharper distribution than it did."""

        def propose(
            self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
        ) -> list[TokenTree]:
            trees = super().propose(rows, budgets)
            return [
                TokenTree(t.tokens, t.parents, {n: q**3 / (q**3).sum() for n, q in t.proposals.items()})
                for t in trees
            ]  # fmt: skip

    model = text_model("aug")
    prompts = [tiny_tokenizer()("abcd end the")["input_ids"]]
    honest = DraftModel(model, model.config, 8)
    sly = Sly(model, model.config, 8)
    p = [
        sampling_p_value(
            LLM(model, tokenizer=tiny_tokenizer(), drafter=drafter, policy=4), prompts, 600
        )
        for drafter in (honest, sly)
    ]
    assert p[0] > 1e-3
    assert p[1] < 1e-4


def test_near_ties_are_counted_apart(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tie, real = Divergence(0, 3, 1, 2, 5e-5), Divergence(0, 3, 1, 2, 5e-3)
    for found in (tie, real):
        monkeypatch.setattr(lossless, "divergence", lambda *_, found=found: found)
        report = verify(model_dir("aug"), prompts=2, tokens=5, draws=0, data=[data])
        assert report.lossless_greedy == (found is tie)
        assert report.near_ties == (4 if found is tie else 0) == len(report.ties)
        assert report.first_divergence == (None if found is tie else real)


def test_divergence_names_the_place_and_the_gap() -> None:
    model, text = text_model("softmax").double(), [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([[*text, 8]]))[0, -1]
    best, second = logits.topk(2).indices.tolist()
    found = divergence(model, 4, text, (8, best, 3), (8, second, 9))
    assert found is not None
    assert (found.prompt, found.position, found.expected, found.got) == (4, 1, best, second)
    assert found.logit_gap == pytest.approx(float(logits[best] - logits[second]))
    assert divergence(model, 4, text, (8, 9), (8, 9)) is None
    shorter = divergence(model, 4, text, (8, 9), (8,))
    assert shorter is not None and shorter.logit_gap == math.inf and not shorter.near_tie


def test_chi_square_is_the_textbook_one() -> None:
    scipy = pytest.importorskip("scipy.stats")
    exact = {(i,): p for i, p in enumerate((0.4, 0.3, 0.2, 0.1))}
    counts = Counter({(0,): 50, (1,): 25, (2,): 17, (3,): 8})
    statistic, bins = chi_square(counts, exact)
    expected = scipy.chisquare([50, 25, 17, 8], [40, 30, 20, 10])
    assert (statistic, bins) == (pytest.approx(expected.statistic), 4)
    assert survival(statistic, bins - 1) == pytest.approx(expected.pvalue)


def test_rare_outcomes_share_a_bin() -> None:
    exact = {(0,): 0.9, **{(i,): 0.01 for i in range(1, 11)}}
    counts = Counter({(0,): 90, (3,): 5, (8,): 5})
    assert chi_square(counts, exact) == (pytest.approx(0.0, abs=1e-9), 3)


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"tokens": 0}, {"draws": -1}])
def test_impossible_sizes(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        verify(model_dir("aug"), **settings)  # type: ignore[arg-type]


def test_more_tokens_than_a_softmax_model_takes(data: Path) -> None:
    with pytest.raises(ConfigError, match="256 positions"):
        verify(model_dir("softmax"), tokens=300, data=[data])
