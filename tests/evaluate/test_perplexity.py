from __future__ import annotations

import math

import pytest
import torch
from checkpoints import text_model, tiny_tokenizer

from linspec.errors import ConfigError, InputError
from linspec.evaluate.perplexity import evaluate, held_out_documents

TEXTS = ["abcd end the end\n" * 9, "é", "x = 1  # naïve €\n" * 3, "", "abcd"]


@torch.no_grad()
def nats_token_by_token(model: torch.nn.Module, ids: list[int], context: int, stride: int) -> float:
    """The specification: each token from the window that must predict it, one forward each."""
    text, total = [0, *ids], 0.0
    for target in range(1, len(text)):
        start = max(0, -(-(target - context) // stride)) * stride
        logits = model(torch.tensor([text[start:target]]))[0, -1]
        total -= float(logits.double().log_softmax(-1)[text[target]])
    return total


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize(("context", "stride"), [(256, None), (16, None), (7, 3), (5, 5), (1, 1)])
def test_score_equals_the_slow_way(mixer: str, context: int, stride: int | None) -> None:
    model, tokenizer = text_model(mixer), tiny_tokenizer()
    score = evaluate(model, tokenizer, TEXTS, context=context, stride=stride, rows=3)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    nats = sum(
        nats_token_by_token(model, each, context, stride or max(1, context // 2)) for each in ids
    )
    assert score.tokens == sum(map(len, ids))
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens), rel=1e-4)


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 64])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (9, 4), (5, 5), (7, 2)])
def test_every_token_is_scored_once_with_enough_before_it(
    length: int, context: int, stride: int
) -> None:
    # different characters, backwards: no two of them are one token
    text = "".join(chr(ord("0") + i) for i in reversed(range(length)))
    model, tokenizer = text_model("aug"), tiny_tokenizer()
    score = evaluate(model, tokenizer, [text], context=context, stride=stride)
    assert score.tokens == length
    nats = nats_token_by_token(model, tokenizer(text)["input_ids"], context, stride)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / length, rel=1e-5)


@pytest.mark.parametrize("limit", [1, 5, 153, 154, 155, 160, 10_000])
def test_the_byte_limit_cuts_between_characters(limit: int) -> None:
    score = evaluate(text_model("aug"), tiny_tokenizer(), TEXTS, limit_bytes=limit)
    total = sum(len(text.encode()) for text in TEXTS)
    # byte 154 would be half of the é
    assert score.bytes == {154: 153}.get(limit, min(limit, total))


def test_half_precision_is_close() -> None:
    model = text_model("aug")
    exact = evaluate(model, tiny_tokenizer(), TEXTS)
    half = evaluate(model, tiny_tokenizer(), TEXTS, bf16=True)
    assert half.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.02)


def test_impossible_requests() -> None:
    model, tokenizer = text_model("softmax"), tiny_tokenizer()
    for settings in (
        {"context": 257},
        {"context": -1},
        {"context": 0},
        {"stride": 0, "context": 4},
        {"stride": 5, "context": 4},
        {"limit_bytes": 0},
    ):
        with pytest.raises(ConfigError):
            evaluate(model, tokenizer, TEXTS, **settings)
    for nothing in ([], [""]):
        with pytest.raises(InputError, match="no text"):
            evaluate(model, tokenizer, nothing)


def test_held_out_files_of_the_standard_library() -> None:
    found = held_out_documents(["stdlib"])
    assert len(found) > 20
    assert all(found)
