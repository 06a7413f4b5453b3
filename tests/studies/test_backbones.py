"""Cells of the other backbones, really measured, as small as they can be."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir, tiny_tokenizer
from helpers import randomise
from test_study import SIZE

from linspec.checkpoints.hub import load_seq2seq, save_model
from linspec.errors import ConfigError, InputError
from linspec.evaluate.continuations import evaluate_continuations
from linspec.models.bert import Bert
from linspec.models.config import EncoderConfig
from linspec.models.t5 import T5
from linspec.train.pretrain import initialize
from studies.linearized_llm import Plan, make_plan, study
from studies.linearized_llm.attentions import AUG, PLAIN, attentions
from studies.linearized_llm.encoders import Encoders
from studies.linearized_llm.flash import FromNothing
from studies.linearized_llm.paper import comparison
from studies.linearized_llm.seq2seq import Seq2Seq, tiny_t5
from studies.linearized_llm.table import Results

SMALL = replace(SIZE, encoder_tokens=64, encoder_texts=4, t5_tokens=64, flash_tokens=64)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    shape = EncoderConfig(
        vocab_size=len(tiny_tokenizer()),
        width=16,
        layers=2,
        heads=4,
        kv_heads=4,
        head_width=4,
        mlp_width=16,
        family="bert",
        norm="layer",
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        max_positions=20,
        token_types=2,
    )
    return str(save_model(randomise(Bert(shape), 0), tiny_tokenizer(), tmp_path / "bert"))  # type: ignore[arg-type]


@pytest.fixture
def plan(tmp_path: Path, encoder: str) -> Plan:
    rng, book = random.Random(0), tmp_path / "book.txt"
    words = [rng.choice(("ab", "cd", "end", "the")) for _ in range(3000)]
    book.write_text("\n".join(" ".join(words[i : i + 30]) for i in range(0, 3000, 30)))
    return make_plan(
        tmp_path / "out",
        teacher=str(model_dir("softmax")),
        data=[str(book)],
        size=SMALL,
        rows=["local"],
        encoder=encoder,
    )


def test_an_encoder_is_compared_with_its_original(plan: Plan) -> None:
    found = study(plan, ["encoders"])
    rows = {(r["row"], r["column"]): r for r in found.to_json()["tables"]["encoders"]["rows"]}
    assert set(rows) == {("softmax", PLAIN), ("local", PLAIN), ("local", AUG)}
    assert rows["softmax", PLAIN]["cosine"] == pytest.approx(1)
    assert rows["softmax", PLAIN]["spearman"] == pytest.approx(1)
    # 4 texts of more tokens than the encoder has positions are cut off there
    assert rows["local", AUG]["texts"] == 4 and rows["local", AUG]["tokens"] == 20
    assert rows["local", PLAIN]["cosine"] < 1 - 1e-6
    assert f"{rows['local', AUG]['cosine']:.3f}" in found.page.read_text()
    assert not list(plan.out.glob("models/*/model"))


def test_another_encoder_is_another_cell(plan: Plan, tmp_path: Path) -> None:
    before = {cell.key for cell in Encoders(plan).cells() if not cell.undefined}
    model = Bert(replace(Encoders(plan)._original.config, width=8))
    other = save_model(model, tiny_tokenizer(), tmp_path / "other")
    after = {cell.key for cell in Encoders(replace(plan, encoder=str(other))).cells()}
    assert not before & after


@pytest.mark.parametrize("table", [Encoders, Seq2Seq])
def test_every_attention_is_a_cell_or_says_why_not(
    plan: Plan, table: type[Encoders] | type[Seq2Seq]
) -> None:
    cells = table(replace(plan, rows=())).cells()
    assert {(c.row, c.column) for c in cells} == {
        (r, p) for r in attentions() for p in (PLAIN, AUG)
    }
    undefined = {(c.row, c.column): c.undefined for c in cells if c.undefined}
    assert {row for row, part in undefined if part == PLAIN} == {"gla", "gdn"}
    assert "no bidirectional form" in undefined["gla", PLAIN]


def test_without_an_encoder_its_table_says_what_to_install(plan: Plan) -> None:
    bare = replace(plan, encoder="")
    cells = Encoders(bare).cells()
    assert all(cell.undefined for cell in cells)
    text = Encoders(bare).section(Results([])).text
    assert "pip install 'linspec[encoders]'" in text


def test_encoders_are_trained_on_prose_where_there_is_some(plan: Plan) -> None:
    assert plan.prose == "book"
    assert replace(plan, domains={"stdlib": ("stdlib",), "wikitext2": ("w",)}).prose == "wikitext2"


def test_a_t5_is_trained_once_and_linearized_on_both_sides(plan: Plan) -> None:
    found = study(plan, ["t5"])
    rows = {(r["row"], r["column"]): r for r in found.to_json()["tables"]["t5"]["rows"]}
    assert set(rows) == {("softmax", PLAIN), ("local", PLAIN), ("local", AUG)}
    assert all(0 < row["bits_per_byte"] < 20 for row in rows.values())
    (teacher,) = (plan.out / "teachers").glob("t5-*")
    assert isinstance(load_seq2seq(teacher), T5)
    page = found.page.read_text()
    assert f"{rows['local', AUG]['bits_per_byte']:.3f}" in page
    assert "T3, T5, GLUE error" in page


def test_flash_is_trained_from_nothing(plan: Plan) -> None:
    found = study(replace(plan, rows=()), ["flash"]).to_json()["tables"]["flash"]["rows"]
    rows = {row["row"]: row for row in found}
    assert list(rows) == ["quadratic", "local", "grouped", "aug"]
    assert rows["aug"]["parameters"] > rows["quadratic"]["parameters"]
    told = [line for line in comparison(Results(_done(plan, rows))).splitlines() if "FLASH" in line]
    assert any(f"{rows['aug']['perplexity']:.4g}" in line for line in told)


def _done(plan: Plan, rows: dict[str, dict[str, float]]) -> list:
    return [(cell, rows[cell.row]) for cell in FromNothing(plan).cells()]


# ---- the score of an encoder-decoder


def t5() -> T5:
    model = T5(tiny_t5(len(tiny_tokenizer()), 0)).eval()
    initialize(model, 3, torch.Generator().manual_seed(0))
    return model


def test_continuations_are_scored_as_the_model_gives_them() -> None:
    model, tokenizer = t5(), tiny_tokenizer()
    texts = ["ab the cd é end ab", "ab"]
    ids = tokenizer(texts[0])["input_ids"]
    # windows of 8: half is read, half is scored; the short text has no second half
    nats, scored = 0.0, 0
    for start in range(0, len(ids) - 4, 8):
        source, target = ids[start : start + 4], ids[start + 4 : start + 8]
        with torch.no_grad():
            logits = model(torch.tensor([source]), torch.tensor([[0, *target[:-1]]]))[0]
        wanted = logits.log_softmax(-1)[range(len(target)), target]
        nats, scored = nats - float(wanted.sum()), scored + len(target)
    found = evaluate_continuations(model, tokenizer, texts, context=8)
    assert found.tokens == scored > 4
    assert found.perplexity == pytest.approx(math.exp(nats / scored), rel=1e-5)
    assert found.bits_per_byte * found.bytes == pytest.approx(nats / math.log(2), rel=1e-5)
    assert 4 <= found.bytes < len(texts[0].encode())


def test_what_cannot_be_scored_is_named() -> None:
    model, tokenizer = t5(), tiny_tokenizer()
    with pytest.raises(InputError, match="more than 8 tokens, half a window"):
        evaluate_continuations(model, tokenizer, ["ab ab"], context=16)
    with pytest.raises(ConfigError, match="context must be 2 or more tokens, got 1"):
        evaluate_continuations(model, tokenizer, ["ab ab"], context=1)
    with pytest.raises(ConfigError, match="limit_bytes must be 1 or more, got 0"):
        evaluate_continuations(model, tokenizer, ["ab ab"], limit_bytes=0)
