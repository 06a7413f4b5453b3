"""Drafter training: heads learn, the backbone does not, and calibration counts what it says."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import load_model, save_model
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.saved_packed import HEADS
from linspec.errors import CheckpointError, ConfigError, DrafterError, InputError, TrainingError
from linspec.models.decoder import Decoder
from linspec.train.drafters import DrafterConfig, train_drafter
from linspec.train.drafters import run as module
from linspec.train.drafters import states as states_module
from linspec.train.drafters.medusa import calibrate, commonest, heads_loss
from linspec.train.drafters.states import StateCache, states_of
from linspec.train.loop import Trainer
from linspec.utils.files import exclusive

SHORT = DrafterConfig(
    tokens=16 * 256,
    context=64,
    batch_tokens=256,
    lr=1e-2,
    calibration_tokens=512,
    precision="float32",
    save_every=0.0,
)


def run(model: Path, out: Path, corpus: Path, **options: Any) -> Path:
    return train_drafter(model, out, **({"config": SHORT, "data": [corpus]} | options))


def random_heads(model: Decoder, count: int = 3) -> MedusaHeads:
    shape = HeadsConfig(width=model.config.width, vocab_size=model.config.vocab_size, heads=count)
    heads = MedusaHeads(shape, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return heads


def test_trained_heads_load_with_their_accuracies(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = run(teacher_dir, tmp_path / "d", corpus)
    heads = HEADS.load(out, load_model(teacher_dir))
    assert len(heads.accuracies) == 3 and all(len(row) == 10 for row in heads.accuracies)
    assert all(0 <= sum(row) <= 1.001 for row in heads.accuracies)
    assert heads.blocks[0].bias.abs().sum() > 0
    names = ["checksums.json", "drafter.json", "drafter.safetensors", "linspec.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_default_place_is_inside_the_model(
    tmp_path: Path,
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tiny_teacher: Callable[..., Decoder],
) -> None:
    model = save_model(tiny_teacher(), tokenizer, tmp_path / "m")
    assert train_drafter(model, data=[corpus], config=SHORT) == model / "medusa"
    HEADS.load(model / "medusa", load_model(model))


def test_heads_learn_and_the_backbone_stays(
    teacher_dir: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = []
    finish = Trainer.run

    def spy(self: Trainer, **options: Any) -> Any:
        logs.append(finish(self, **options))
        return logs[-1]

    monkeypatch.setattr(Trainer, "run", spy)
    run(teacher_dir, tmp_path / "d", corpus, config=replace(SHORT, tokens=100 * 256))
    losses = [entry["loss"] for entry in logs[0]]
    assert losses[-1] < 0.9 * losses[0]


def test_loss_gives_no_gradient_to_the_backbone(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher().requires_grad_(False)
    heads = random_heads(model)
    batch = torch.randint(0, 290, (2, 20))
    heads_loss(heads, states_of(model, batch), 0.8).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in heads.parameters())


def test_loss_is_the_papers_weighted_sum(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher()
    heads, batch = random_heads(model), torch.randint(0, 290, (2, 20))
    with torch.no_grad():
        hidden = model.hidden(batch[:, :-1])
        logits, chosen = heads(hidden), model.head(hidden).argmax(-1)
        expected = torch.zeros(())
        for k in (1, 2, 3):
            pairs = [(b, t) for b in range(2) for t in range(19 - k)]
            given = torch.stack([logits[b, t, k - 1] for b, t in pairs])
            wanted = torch.tensor([int(chosen[b, t + k]) for b, t in pairs])
            expected += 0.8**k * F.cross_entropy(given, wanted)
        torch.testing.assert_close(heads_loss(heads, states_of(model, batch), 0.8), expected)


def test_rooted_heads_of_few_tokens_learn_what_they_will_be_asked(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    model = tiny_teacher()
    size = {"width": model.config.width, "vocab_size": model.config.vocab_size}
    shape = HeadsConfig(**size, heads=2, rooted=True, vocabulary=40)
    drafted = commonest(np.random.default_rng(0).integers(0, 290, 400), 40, 290)
    heads, batch = MedusaHeads(shape, model, (), drafted), torch.randint(0, 290, (2, 20))
    nn.init.normal_(heads.blocks[0].weight)
    with torch.no_grad():
        hidden = model.hidden(batch[:, :-1])
        chosen, expected = model.head(hidden).argmax(-1), torch.zeros(())
        places = {int(token): place for place, token in enumerate(drafted)}
        for k in (1, 2):
            losses = []
            for b, t in ((b, t) for b in range(2) for t in range(19 - k)):
                # when this is drafted, token t + 1 is the root
                logits = heads(heads.seen(hidden[b, t], batch[b, t + 1]))[k - 1]
                place = places.get(int(chosen[b, t + k]))
                losses += [] if place is None else [-logits.log_softmax(-1)[place]]
            expected += 0.8**k * (torch.stack(losses).mean() if losses else 0.0)
        torch.testing.assert_close(heads_loss(heads, states_of(model, batch), 0.8), expected)


def test_the_commonest_tokens_are_drafted_and_ties_go_by_id() -> None:
    found = commonest(np.array([7, 7, 2, 5, 5, 5, 4]), 3, 9)
    assert found is not None and found.tolist() == [2, 5, 7]
    assert commonest(np.array([1]), 0, 9) is None


def test_calibration_equals_a_brute_force_count(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher()
    heads, stream = random_heads(model), np.random.default_rng(0).integers(0, 8, 90)
    # a model that prefers the tokens of the stream, so that there is something to count
    with torch.no_grad():
        model.embed.weight[:8] *= 3
    counted = calibrate(model, heads, stream, context=20, tokens=60)
    for k in (1, 2, 3):
        hits, seen = [0] * 10, 0
        for start in (0, 20, 40):
            window = torch.from_numpy(stream[start : start + 20])
            with torch.no_grad():
                hidden = model.hidden(window[None])
                logits, chosen = heads(hidden)[0, :, k - 1], model.head(hidden)[0].argmax(-1)
            for t in range(20 - k):
                seen += 1
                order = logits[t].argsort(descending=True)[:10].tolist()
                if int(chosen[t + k]) in order:
                    hits[order.index(int(chosen[t + k]))] += 1
        assert sum(hits) > 0
        assert counted[k - 1] == pytest.approx([h / seen for h in hits], abs=1e-5)


@pytest.mark.parametrize("update", [0, 7])
def test_killed_training_resumes_bit_for_bit(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    killed_before: Callable[[int], AbstractContextManager[None]],
    update: int,
) -> None:
    whole = run(teacher_dir, tmp_path / "whole", corpus)
    with pytest.raises(RuntimeError, match="killed"), killed_before(update):
        run(teacher_dir, tmp_path / "cut", corpus)
    cut = run(teacher_dir, tmp_path / "cut", corpus, resume=True)
    for name in ("drafter.json", "drafter.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_old_heads_stay_until_the_new_ones_are_whole(
    teacher_dir: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(teacher_dir, tmp_path / "d", corpus)
    before = (out / "drafter.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("could not write: No space left on device")

    other = replace(SHORT, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_drafter", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(teacher_dir, out, corpus, config=other, overwrite=True)
    assert (out / "drafter.safetensors").read_bytes() == before
    HEADS.load(out, load_model(teacher_dir))
    run(teacher_dir, out, corpus, config=other, resume=True)
    assert (out / "drafter.safetensors").read_bytes() != before


def test_finished_training_resumes_at_once(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    no_training: Callable[[], AbstractContextManager[None]],
) -> None:
    out = run(teacher_dir, tmp_path / "d", corpus)
    with no_training():
        assert run(teacher_dir, out, corpus, resume=True) == out
    with pytest.raises(TrainingError, match="started with config"):
        run(teacher_dir, out, corpus, config=replace(SHORT, seed=1), resume=True)


def test_heads_refuse_another_model(
    teacher_dir: Path, tmp_path: Path, corpus: Path, tiny_teacher: Callable[..., Decoder]
) -> None:
    out = run(teacher_dir, tmp_path / "d", corpus)
    with pytest.raises(DrafterError, match="trained for another model"):
        HEADS.load(out, tiny_teacher(seed=1))


def test_bad_input_is_refused(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="drafter 'eagel'; known: .*medusa"):
        run(teacher_dir, tmp_path / "d", corpus, kind="eagel")
    with pytest.raises(ConfigError, match="give --out"):
        train_drafter("embedded-aug")
    with exclusive(tmp_path / "d"), pytest.raises(CheckpointError, match="in use"):
        run(teacher_dir, tmp_path / "d", corpus)
    with pytest.raises(InputError, match="windows of 3 tokens are too few"):
        run(teacher_dir, tmp_path / "d", corpus, config=replace(SHORT, context=3))
    (tmp_path / "tiny.txt").write_text("hi")
    with pytest.raises(InputError, match="too few"):
        run(teacher_dir, tmp_path / "d", tmp_path / "tiny.txt")


def test_kept_states_are_those_that_are_computed(
    tiny_teacher: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = tiny_teacher().requires_grad_(False)
    stream = np.random.default_rng(0).integers(0, 290, 200)
    cache = StateCache(model, stream, 16, (0, 1), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states_module, "replace_text", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.fill()
    again = StateCache(model, stream, 16, (0, 1), tmp_path)
    again.fill()
    kept = states_of(model, again.batch(3, 4, seed=0), (0, 1))
    computed = states_of(model, kept.ids, (0, 1))
    assert torch.equal(kept.chosen, computed.chosen) and len(kept.layers) == 3
    for layer, states in computed.layers.items():
        torch.testing.assert_close(kept.layers[layer], states, rtol=1e-3, atol=1e-3)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["states.npy", "chosen.npy", "states.json"])
@pytest.mark.parametrize("damage", [_cut, partial(Path.write_bytes, data=b""), Path.unlink])
def test_damaged_kept_states_were_an_unexpected_error(
    tiny_teacher: Callable[..., Decoder],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    model = tiny_teacher().requires_grad_(False)
    stream = np.random.default_rng(0).integers(0, 290, 200)
    whole = StateCache(model, stream, 16, (0, 1), tmp_path)
    whole.fill()
    expected = whole.batch(3, 4, seed=0)
    damage(tmp_path / name)
    again = StateCache(model, stream, 16, (0, 1), tmp_path)
    if name == "states.json" and (tmp_path / name).exists():
        with pytest.raises(TrainingError, match="not valid JSON"):
            again.fill()
        return
    again.fill()
    assert torch.equal(again.batch(3, 4, seed=0), expected)


def test_a_full_disk_ended_the_process_that_kept_states(
    tiny_teacher: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"could not write .*No space left"):
        StateCache(tiny_teacher(), np.arange(200), 16, (0, 1), tmp_path)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_text_that_is_read_twice_goes_through_the_target_once(
    teacher_dir: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = []
    fill = StateCache.fill
    monkeypatch.setattr(StateCache, "fill", lambda cache: filled.append(fill(cache)))
    run(teacher_dir, tmp_path / "once", corpus)
    small = tmp_path / "small.txt"
    small.write_text(corpus.read_text()[:2000] if corpus.is_file() else "some words again " * 100)
    out = run(teacher_dir, tmp_path / "twice", small)
    assert len(filled) == 1 and not (out / "training").exists()
