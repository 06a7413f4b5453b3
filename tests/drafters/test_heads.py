"""Medusa heads: they start as the target's own guess, survive the disk, and know their target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linspec.checkpoints.fingerprint import fingerprint
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import HEADS
from linspec.errors import ConfigError, DrafterError
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

CONFIG = DecoderConfig(
    vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24
)
SHAPE = HeadsConfig(width=16, vocab_size=40, heads=3)


@pytest.fixture
def model() -> Decoder:
    return make_model(CONFIG)


def make_model(config: DecoderConfig, seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def shaken(heads: MedusaHeads) -> MedusaHeads:
    generator = torch.Generator().manual_seed(1)
    for weight in heads.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    return heads


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize(("blocks", "hidden"), [(1, 0), (2, 0), (1, 24), (2, 8)])
def test_untrained_heads_repeat_the_model_and_can_learn(
    model: Decoder, shared_head: bool, blocks: int, hidden: int
) -> None:
    shape = replace(SHAPE, blocks=blocks, hidden=hidden, shared_head=shared_head)
    heads = MedusaHeads(shape, model)
    heads.initialize(torch.Generator().manual_seed(0))
    h = torch.randn(2, 5, 16)
    torch.testing.assert_close(heads(h), model.head(h)[:, :, None].expand(-1, -1, 3, -1))
    heads(h).square().sum().backward()
    first = heads.blocks[0]
    moving = first.weight if first.out is None else first.out
    assert moving.grad is not None and moving.grad.abs().sum() > 0


def test_rooted_heads_read_the_embedding_of_the_root(model: Decoder) -> None:
    heads = shaken(MedusaHeads(replace(SHAPE, rooted=True, hidden=24), model))
    h, roots, block = torch.randn(4, 16), torch.tensor([3, 39, 0, 3]), heads.blocks[0]
    embedding = model.embed.weight[roots]
    unit = embedding / (embedding.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    for k in range(3):
        inner = nn.functional.silu(torch.cat((h, unit), -1) @ block.weight[k] + block.bias[k])
        expected = model.head(h + inner @ block.out[k])
        torch.testing.assert_close(heads(heads.seen(h, roots))[:, k], expected)


@pytest.mark.parametrize("shared_head", [True, False])
def test_heads_of_few_tokens_choose_among_these(model: Decoder, shared_head: bool) -> None:
    drafted = torch.tensor([2, 3, 11, 30], dtype=torch.int32)
    heads = MedusaHeads(replace(SHAPE, vocabulary=4, shared_head=shared_head), model, (), drafted)
    heads.initialize(torch.Generator().manual_seed(0))
    h = torch.randn(5, 16)
    expected = model.head(h)[:, drafted.long()]
    torch.testing.assert_close(heads(h), expected[:, None].expand(-1, 3, -1))
    best = drafted[expected.topk(2).indices].tolist()
    assert heads.guess(list(h), [0] * 5, 3, 2) == [row * 3 for row in best]


def test_heads_cannot_draft_more_tokens_than_there_are() -> None:
    with pytest.raises(ConfigError, match="cannot draft 41 tokens of the 40"):
        replace(SHAPE, vocabulary=41)


def test_one_block_is_the_papers_formula(model: Decoder) -> None:
    heads = shaken(MedusaHeads(replace(SHAPE, shared_head=False), model))
    h, block = torch.randn(4, 16), heads.blocks[0]
    for k in range(3):
        inner = nn.functional.silu(h @ block.weight[k] + block.bias[k])
        expected = (h + inner) @ heads.out[k].T
        torch.testing.assert_close(heads(h)[:, k], expected)
        torch.testing.assert_close(heads.logits(heads.features(h)[:, k], k), expected)


def test_stacked_blocks_do_not_share_weights(model: Decoder) -> None:
    heads = MedusaHeads(replace(SHAPE, blocks=3), model)
    assert len({id(p) for p in heads.parameters()}) == 6


def test_shared_heads_leave_the_target_out_of_their_weights(model: Decoder) -> None:
    names = MedusaHeads(SHAPE, model).state_dict()
    assert set(names) == {"blocks.0.weight", "blocks.0.bias"}


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize(("rooted", "vocabulary"), [(False, 0), (True, 7)])
def test_saved_heads_load_exactly(
    tmp_path: Path, model: Decoder, shared_head: bool, hidden: int, rooted: bool, vocabulary: int
) -> None:
    shape = replace(SHAPE, shared_head=shared_head, hidden=hidden)
    shape = replace(shape, rooted=rooted, vocabulary=vocabulary)
    drafted = torch.arange(5, 5 + vocabulary, dtype=torch.int32)
    heads = shaken(MedusaHeads(shape, model, [[0.5, 0.2], [0.4, 0.1]], drafted))
    out = save_drafter(heads, model, tmp_path / "d", dtype=None, facts={"loss": 1.0})
    loaded = HEADS.load(out, model)
    h = heads.seen(torch.randn(4, 16), torch.arange(4))
    assert torch.equal(loaded(h), heads(h))
    assert heads.drafted is None or torch.equal(loaded.drafted, heads.drafted)
    assert loaded.accuracies == [[0.5, 0.2], [0.4, 0.1]] and loaded.config == shape
    assert json.loads((out / "drafter.json").read_text())["loss"] == 1.0


def test_fingerprint_ignores_dtype_and_knows_weights_and_mixers(model: Decoder) -> None:
    rounded = make_model(CONFIG).to(torch.bfloat16)
    assert fingerprint(rounded) == fingerprint(rounded.float()) == fingerprint(model)
    assert fingerprint(make_model(CONFIG, seed=1)) != fingerprint(model)
    student = Decoder(CONFIG.with_mixers((MixerConfig(), MixerConfig(name="local"))))
    student.load_state_dict(model.state_dict(), strict=False)
    assert fingerprint(student) != fingerprint(model)


@pytest.fixture
def saved(tmp_path: Path, model: Decoder) -> Path:
    return save_drafter(MedusaHeads(SHAPE, model), model, tmp_path / "d")


def test_heads_of_another_shape_name_both_sides(saved: Path) -> None:
    other = make_model(replace(CONFIG, vocab_size=50))
    with pytest.raises(
        DrafterError, match=r"another model: width 16 and vocabulary 40.*16 and vocabulary 50"
    ):
        HEADS.load(saved, other)


def test_heads_of_another_model_name_both_fingerprints(saved: Path, model: Decoder) -> None:
    other = make_model(CONFIG, seed=1)
    message = (
        f"another model: fingerprint {fingerprint(model)}, this model has {fingerprint(other)}"
    )
    with pytest.raises(DrafterError, match=message):
        HEADS.load(saved, other)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "drafter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_weights(folder: Path) -> None:
    (folder / "drafter.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "drafter.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def no_config(folder: Path) -> None:
    (folder / "drafter.json").unlink()


def torn_config(folder: Path) -> None:
    (folder / "drafter.json").write_text('{"kind": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "missing or damaged"),
        (cut_weights, "missing or damaged"),
        (no_config, "no drafter in .*train-drafter"),
        (torn_config, "cannot read"),
        (lambda d: rewrite(d, kind="eagle"), "kind 'eagle', expected 'medusa'"),
        (lambda d: rewrite(d, heads=0), "heads must be 1 or more"),
        (lambda d: rewrite(d, blocks=2), "lacks blocks.1.bias"),
        (lambda d: rewrite(d, accuracies=[[0.5]] * 4), "4 tokens deep but has only 3 heads"),
    ],
)
def test_damaged_drafter(
    saved: Path, model: Decoder, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(DrafterError, match=message):
        HEADS.load(saved, model)


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ConfigError, match="blocks must be 1 or more"):
        replace(SHAPE, blocks=0)
    with pytest.raises(ConfigError, match="hidden"):
        replace(SHAPE, hidden=-1)
