"""The training of Learn2PD's filter: an oracle that writes the answer, true labels, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import make, source, talker
from plain_diffusion import CONFIGS

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.diffusion.filters import CommitFilter, load_filter
from linspec.errors import ConfigError
from linspec.train.commit_filter import FilterConfig, Oracle, train_filter

SMALL = FilterConfig(block=6, tokens=13, steps=200, patience=3)
TEXTS = [[3 + n, 4 + 2 * n % 50, 7] for n in range(12)]


@pytest.mark.parametrize("cached", ["none", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_oracle_writes_the_answer_and_labels_are_true(name: str, cached: str) -> None:
    loop = f"block=fixed:6,cache={cached},stop=never,commit=static"
    params = SamplingParams(max_tokens=13, ignore_eos=True)
    llm: Any = make(name, loop)
    answers = llm.generate(TEXTS, params)
    oracle = Oracle(
        {tuple(p): [*p, *each.token_ids] for p, each in zip(TEXTS, answers, strict=True)},
        CommitFilter(6),
    )
    llm.engine.loop.commit = oracle
    found = llm.generate(TEXTS, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in answers]
    static, fewest = (sum(each.stats.rounds for each in part) for part in (answers, found))
    assert static == 13 * len(TEXTS) and fewest < static
    assert len(oracle.seen) == fewest
    for each in oracle.seen:
        assert each.confidences.shape == each.right.shape == each.real.shape == (6,)
        # the last block has one position; what it lacks is settled
        missing = ~each.real
        assert bool(each.right[missing].all()) and bool((each.confidences[missing] == 1).all())
    assert {int(each.real.sum()) for each in oracle.seen} == {6, 1}


def test_labels_of_the_first_forward_are_those_of_plain_torch() -> None:
    plain, config = source("dream")[1], SMALL
    llm: Any = make("dream", "block=fixed:6,stop=never,commit=static")
    params = SamplingParams(max_tokens=config.tokens, ignore_eos=True)
    (answer,) = llm.generate([TEXTS[0]], params)
    text = [*TEXTS[0], *answer.token_ids]
    llm.engine.loop.commit = oracle = Oracle({tuple(TEXTS[0]): text}, CommitFilter(6))
    llm.generate([TEXTS[0]], params)
    logits = plain.predicted([*TEXTS[0], *[60] * 13])[3:9]
    logits[:, 60] = -torch.inf
    best = logits.double().softmax(-1).max(-1)
    first = oracle.seen[0]
    assert first.right.tolist() == (best.indices == torch.tensor(text[3:9])).tolist()
    torch.testing.assert_close(first.confidences, best.values.float())


def test_a_directory_gets_its_filter_and_decodes_by_it(tmp_path: Path) -> None:
    texts = [f"{letter}b {letter}" for letter in "abcdefghijklmn"]
    trained = train_filter(talker(), texts, SMALL, out=tmp_path / "f")
    assert trained.folder == tmp_path / "f" and trained.fewest <= trained.static == 13 * 14
    kept = load_filter(tmp_path / "f", load_diffusion(talker())).state_dict()
    assert all(torch.equal(kept[k], v) for k, v in trained.filter.state_dict().items())
    loop = f"masked-diffusion:block=fixed:6,commit=learn2pd:path={tmp_path / 'f'}"
    (found,) = LLM(talker(), loop=loop).generate("xyz", SamplingParams(max_tokens=5))
    assert found.error is None
    with pytest.raises(ConfigError, match="was written by `train_filter` before"):
        train_filter(talker(), texts, SMALL, out=tmp_path / "f")
    again = train_filter(talker(), texts, SMALL, out=tmp_path / "f", overwrite=True)
    assert again.auc == trained.auc and again.precision == trained.precision


def test_a_model_in_memory_gets_its_filter_back_and_global_numbers_stay() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = load_diffusion(source("llada")[0])
    trained = train_filter(model, TEXTS, SMALL, tokenizer=tiny_tokenizer())
    assert trained.folder is None and trained.filter.block == 6
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.auc is None or 0 <= trained.auc <= 1


@pytest.mark.parametrize("settings", [{"block": 0}, {"tokens": 0}, {"lr": 0.0}, {"patience": 0}])
def test_settings_that_mean_nothing_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FilterConfig(**settings)


def test_too_few_prompts_are_named() -> None:
    model = load_diffusion(source("llada")[0])
    with pytest.raises(ConfigError, match="10 different prompts or more, got 1"):
        train_filter(model, [TEXTS[0]] * 20, SMALL, tokenizer=tiny_tokenizer())
