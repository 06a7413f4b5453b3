"""A teacher small enough to train in seconds, its tokenizer, and a text to train on."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from helpers import kill_before
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import save_model
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.pretrain import initialize
from linspec.train.tokenizer import train_tokenizer

WORDS = (
    "the",
    "old",
    "fox",
    "sees",
    "a",
    "red",
    "dog",
    "near",
    "my",
    "big",
    "house",
    "and",
    "runs",
)


def make_text(seed: int, words: int = 400) -> str:
    """Sentences of a tiny grammar: every word is mostly decided by the one before it."""
    rng = random.Random(seed)
    place, picked = 0, []
    for _ in range(words):
        picked.append(WORDS[place])
        place = (place + rng.choice((1, 1, 1, 2))) % len(WORDS)
    return " ".join(picked) + "\n"


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(make_text(i))
    return folder


@pytest.fixture(scope="session")
def text() -> str:
    return make_text(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([make_text(i) for i in range(10)], 290)


@pytest.fixture(scope="session")
def teacher_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random softmax model on disk, float32."""
    out = tmp_path_factory.mktemp("models") / "teacher"
    return save_model(random_teacher(len(tokenizer)), tokenizer, out)


@pytest.fixture(scope="session")
def tiny_teacher() -> Callable[..., Decoder]:
    return random_teacher


@pytest.fixture(scope="session")
def assert_same() -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    return assert_same_weights


@pytest.fixture(scope="session")
def killed_before() -> Callable[[int], AbstractContextManager[None]]:
    return kill_before


@pytest.fixture(scope="session")
def no_training() -> Callable[[], AbstractContextManager[None]]:
    return lambda: kill_before(0)


def random_teacher(vocab_size: int = 290, seed: int = 0) -> Decoder:
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        mlp_width=48,
        max_positions=128,
        eos_ids=(0,),
        bos_id=0,
    )
    model = Decoder(config)
    initialize(model, config.layers, torch.Generator().manual_seed(seed))
    # larger embeddings: a random model whose outputs differ visibly from token to token
    with torch.no_grad():
        model.embed.weight.mul_(10)
    return model.eval()


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
