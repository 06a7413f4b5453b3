"""Certainty-forcing distillation: what is hidden, the loss in float64, and a run that writes a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import source, talker
from diffusion_tasks import MASK, untrained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.cli import app
from linspec.errors import ConfigError, InputError, TrainingError, UnsupportedModel
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.certainty import Spans, Text, certainty, certainty_loss
from linspec.train.loop import Trainer
from linspec.train.parallel import ParallelConfig, train_parallel

# a token that no model has
PADDING = MASK + 1
TEXTS = [
    Text((8, 1, 2, 10, 1, 2, 3, 4, 5, 6, 7), 4),
    Text((9, 10, 7, 6, 5, 4, 3, 2), 2),
    Text((8, 10, 3), 2),
]


def _spans(block: int | None = 4, seed: int = 0) -> Spans:
    return Spans(TEXTS, MASK, PADDING, block, seed)


@given(st.integers(0, 200), st.integers(1, 6), st.sampled_from([None, 1, 3, 4, 50]))
def test_each_token_of_a_span_is_hidden_in_one_of_two_rows(
    step: int, rows: int, block: int | None
) -> None:
    batch = _spans(block).batch(step, rows)
    assert len(batch) == 2 * rows
    for one, other in zip(batch[:rows], batch[rows:], strict=True):
        text = next(e for e in TEXTS if e.ids[: e.begin] == tuple(one[: e.begin].tolist()))
        hidden = (one < 0).nonzero().flatten().tolist() + (other < 0).nonzero().flatten().tolist()
        start, stop = min(hidden), max(hidden) + 1
        assert sorted(hidden) == list(range(start, stop)) and start >= text.begin
        size = block or len(text.ids)
        assert (start - text.begin) % size == 0 and stop == min(start + size, len(text.ids))
        for row in (one, other):
            shown = torch.where(row < 0, -1 - row, row).tolist()
            assert tuple(shown[:stop]) == text.ids[:stop]
            assert {*shown[stop : len(text.ids)]} <= {MASK}
            assert {*shown[len(text.ids) :]} <= {PADDING}


def test_spans_of_a_step_are_the_same_again_and_begin_at_every_block() -> None:
    assert torch.equal(_spans().batch(7, 4), _spans().batch(7, 4))
    assert not torch.equal(_spans().batch(7, 4), _spans(seed=1).batch(7, 4))
    spans = Spans(TEXTS[:1], MASK, PADDING, 3, 0)
    starts = [int((spans.batch(step, 1) < 0).any(0).nonzero()[0]) for step in range(60)]
    assert {*starts} == {4, 7, 10}


def _by_hand(logits: torch.Tensor, batch: torch.Tensor, weight: float, temperature: float) -> float:
    """The published loss of one text after the other, in plain float64."""
    texts, total = len(batch) // 2, 0.0
    for at in range(texts):
        for row in (at, at + texts):
            crossed, sharp = list[float](), list[float]()
            for place in range(batch.shape[1]):
                if batch[row, place] >= 0:
                    continue
                values = logits[row, place].tolist()
                wanted = -1 - int(batch[row, place])
                top = math.log(math.fsum(map(math.exp, values)))
                crossed.append(top - values[wanted])
                if values.index(max(values)) == wanted:
                    cold = [each / temperature for each in values]
                    top = math.log(math.fsum(map(math.exp, cold)))
                    sharp.append(-math.fsum(math.exp(each - top) * (each - top) for each in cold))
            total += sum(crossed) / max(1, len(crossed))
            total += weight * sum(sharp) / max(1, len(sharp))
    return total / texts


class _Fixed(MaskedDiffusion):
    """Says the logits that it is given, which are its states, and remembers what it was shown."""

    logits: torch.Tensor

    def telling(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.shown, self.real = ids, mask
        return self.logits


def _fixed(batch: torch.Tensor, seed: int) -> _Fixed:
    model = _Fixed(untrained().config)
    model.head = nn.Linear(MASK + 1, MASK + 1, bias=False).requires_grad_(False)
    model.head.weight.copy_(torch.eye(MASK + 1))
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*batch.shape, MASK + 1, generator=generator)
    # some are right
    labels = torch.where(batch < 0, -1 - batch, batch).clamp_max(MASK)
    chosen = torch.rand(batch.shape, generator=generator) < 0.5
    model.logits = (logits + 9 * chosen[..., None] * torch.eye(MASK + 1)[labels]).requires_grad_()
    return model


@given(st.integers(0, 99), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_loss_is_the_published_one(seed: int, weight: float, temperature: float) -> None:
    batch = _spans().batch(seed, 3)
    model = _fixed(batch, seed)
    found = certainty_loss(model, batch, weight, temperature)
    wanted = _by_hand(model.logits.detach().double(), batch, weight, temperature)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    # of hidden tokens nothing is shown
    assert bool((model.shown[batch < 0] == MASK).all())
    assert model.real is not None and torch.equal(model.real, batch != PADDING)


def test_gradients_reach_hidden_tokens_alone_and_entropy_only_right_ones() -> None:
    batch = _spans().batch(3, 3)
    model = _fixed(batch, 3)
    (whole,) = torch.autograd.grad(certainty_loss(model, batch, 2.0), model.logits)
    (plain,) = torch.autograd.grad(certainty_loss(model, batch, 0.0), model.logits)
    hidden = batch < 0
    assert bool((whole[~hidden] == 0).all()) and bool((whole[hidden] != 0).any(-1).all())
    right = hidden & (model.logits.argmax(-1) == -1 - batch)
    assert bool(right.any()) and bool((hidden & ~right).any())
    sharpened = (whole - plain).abs().amax(-1)
    assert bool((sharpened[~right] == 0).all()) and bool((sharpened[right] > 0).all())


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_row_costs_the_same_beside_a_longer_one(name: str) -> None:
    model = load_diffusion(source(name)[0]).double()
    mask, vocab = model.config.mask_id, model.config.vocab_size
    texts = [Text(tuple(range(3, 20)), 5), Text((7, 8, 9, 10, 11), 2)]
    rng = np.random.default_rng(0)
    batch = Spans(texts, mask, vocab, 4, 0).of(texts, rng)
    alone = [batch[[0, 2]], batch[[1, 3], :5]]
    # float32 of the loss itself
    mean = sum(certainty_loss(model, each).item() for each in alone) / 2
    assert certainty_loss(model, batch).item() == pytest.approx(mean, rel=1e-5)


def test_a_sure_model_is_said_to_be_sure() -> None:
    batch = _spans().batch(1, 3)
    model = _fixed(batch, 1)
    labels = torch.where(batch < 0, -1 - batch, batch).clamp_max(MASK)
    model.logits = 50.0 * torch.eye(MASK + 1)[labels]
    assert certainty(model, batch) == {"nats": 0.0, "sure": 1.0, "sure_and_right": 1.0}
    model.logits = torch.zeros(*batch.shape, MASK + 1)
    assert certainty(model, batch)["sure"] == 0.0


PROMPTS = [[3 + n, 4 + 2 * n % 50, 7][: 1 + n % 3] for n in range(14)]
SMALL = ParallelConfig(
    tokens=8, block=4, steps=6, rows=3, lr=1e-2, warmup=1, precision="float32", save_every=0
)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_diffusion(folder).state_dict())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ParallelConfig(**{**SMALL.to_json(), "rank": rank, "save_every": 0})
    asked = (source("dream")[0],)
    options = {"tokenizer": tiny_tokenizer()}
    whole = train_parallel(*asked, tmp_path / "whole", PROMPTS, config, **options)
    plain = Trainer._train_step

    def stopping(self: Trainer, batch: torch.Tensor) -> tuple[float, int]:
        if self.step == 4:
            raise TrainingError("stopped")
        return plain(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", stopping)
    with pytest.raises(TrainingError, match="stopped"):
        train_parallel(*asked, tmp_path / "cut", PROMPTS, config, **options)
    monkeypatch.setattr(Trainer, "_train_step", plain)
    with pytest.raises(TrainingError, match="config"):
        train_parallel(*asked, tmp_path / "cut", PROMPTS, SMALL_AGAIN, resume=True, **options)
    cut = train_parallel(*asked, tmp_path / "cut", PROMPTS, config, resume=True, **options)
    old, one, two = _weights(asked[0]), _weights(whole), _weights(cut)
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in old if not torch.equal(old[name], one[name])}
    if rank:
        assert changed and all(name.startswith("blocks.") for name in changed)
        for name in changed:
            assert torch.linalg.matrix_rank((one[name] - old[name]).double(), atol=1e-4) <= rank
    else:
        assert changed == old.keys()
    record = json.loads((whole / "parallel.json").read_text())
    assert record["plan"]["source"] == str(asked[0]) and len(record["plan"]["fingerprint"]) == 33
    assert record["answers"] == record["learned"] == len(PROMPTS)
    assert record["before"] != record["after"]


SMALL_AGAIN = ParallelConfig(**{**SMALL.to_json(), "weight": 1.0})


def test_only_right_answers_are_learned(tmp_path: Path) -> None:
    asked = (source("llada")[0], tmp_path / "m", PROMPTS, SMALL)
    seen = list[tuple[int, ...]]()

    def right(prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
        seen.append(prompt)
        assert 0 < len(answer) <= 8
        return len(prompt) == 2

    train_parallel(*asked, right=right, tokenizer=tiny_tokenizer())
    record = json.loads((tmp_path / "m" / "parallel.json").read_text())
    assert seen == [tuple(each) for each in PROMPTS] and record["learned"] == 5
    with pytest.raises(InputError, match="0 of 14 answers are right"):
        train_parallel(*asked, right=lambda p, a: False, tokenizer=tiny_tokenizer(), overwrite=True)


def test_a_directory_with_a_tokenizer_learns_texts_and_writes_again(tmp_path: Path) -> None:
    texts = [f"{letter}b {letter}" for letter in "abcdefgh"]
    out = train_parallel(talker(), tmp_path / "m", texts, SMALL)
    (found,) = LLM(out, loop="masked-diffusion:commit=entropy").generate(
        "xyz", SamplingParams(max_tokens=5)
    )
    assert found.error is None
    with pytest.raises(ConfigError, match="train-parallel"):
        train_parallel(talker(), out, texts, SMALL)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    options = {"tokenizer": tiny_tokenizer()}
    with pytest.raises(UnsupportedModel, match="block-diffusion"):
        train_parallel(source("sdar")[0], tmp_path / "m", PROMPTS, SMALL, **options)
    with pytest.raises(InputError, match="no prompt"):
        train_parallel(source("llada")[0], tmp_path / "m", [], SMALL, **options)
    config = ParallelConfig(tokens=100_000)
    with pytest.raises(ConfigError, match="masks are more than"):
        train_parallel(source("llada")[0], tmp_path / "m", PROMPTS, config, **options)
    for wrong in ({"block": 0}, {"weight": -1.0}, {"temperature": 0.0}, {"precision": "no"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ParallelConfig(**wrong)


def test_the_verb_trains_on_the_prompts_of_a_file(tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"{each}b a"}) + "\n" for each in "abcdef"))
    args = ["train-parallel", str(talker()), "--prompts", str(asked), "--out", str(tmp_path / "m")]
    args += ["--tokens", "6", "--steps", "2", "--answers", "2", "--json"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0 and json.loads(found.stdout) == {"out": str(tmp_path / "m")}
    record = json.loads((tmp_path / "m" / "parallel.json").read_text())
    assert record["plan"]["config"]["tokens"] == 6 and record["answers"] == 6
    args[1] = "embedded-softmax"
    refused = CliRunner().invoke(app, [*args, "--overwrite"])
    assert refused.exit_code == 1 and "wants kind 'diffusion'" in refused.output
