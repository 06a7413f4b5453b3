"""The worked example of docs/adding-a-family.md is a real family, and the tables of the docs are true."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import feed, random_tokens, random_tree, tree_logits
from hf_models import FAMILY_MODELS, SIZES, assert_close, make_of, tokens
from transformers import AutoModelForCausalLM

from linspec.checkpoints.families.base import FAMILIES
from linspec.checkpoints.gguf.architectures import ARCHITECTURES
from linspec.checkpoints.hub import load_model, save_model
from linspec.decoding.step import StepInput
from linspec.mixers.rope_config import ROPE_KINDS
from linspec.models.config import DecoderConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE, TABLE = DOCS / "adding-a-family.md", DOCS / "families.md"
# not decoders, or such as transformers does not know
OTHERS = {"bert", "t5", "llada", "Dream", "sdar"}


@pytest.fixture
def example() -> Iterator[str]:
    """The family that the page's block registers, as long as a test lasts."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    before = set(FAMILIES)
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), {"__name__": "worked_example"})
    (name,) = set(FAMILIES) - before
    yield name
    del FAMILIES[name]


@torch.no_grad()
def test_the_worked_example_is_a_family(example: str, tmp_path: Path) -> None:
    theirs = make_of(example, SIZES | {"head_dim": 12})
    theirs.save_pretrained(tmp_path / "theirs")
    model, ids = load_model(tmp_path / "theirs"), tokens()
    assert_close(model(ids), theirs(ids).logits)
    save_model(model, None, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    wide = load_model(tmp_path / "ours", dtype=torch.float64)
    prompt, tree = random_tokens(9), random_tree(random.Random(2), 9)
    state = wide.new_state()
    feed(wide, state, prompt)
    found = wide.step([StepInput.tree(0, tree)], state).logits
    torch.testing.assert_close(found, tree_logits(wide, prompt, tree), rtol=0, atol=1e-9)


def rows(page: Path, columns: int) -> list[list[str]]:
    """Cells of the rows of all tables with so many columns, without their headings."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == columns and cells[1] != "logits":
            found.append(cells)
    return found


def test_the_table_of_families_is_what_is_tested() -> None:
    architectures = {arch: arch for arch in ARCHITECTURES}
    architectures |= {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}
    expected = [
        [f"`{name}`", "yes", "yes", "yes", "yes", f"`{architectures[name]}`"]
        for name in sorted(FAMILIES.keys() - OTHERS)
    ]
    assert rows(TABLE, 6) == expected
    # what the tests of logits, steps, batches and linearization run over
    assert FAMILY_MODELS.keys() == FAMILIES.keys() - OTHERS
    assert {cells[5].strip("`") for cells in expected} == ARCHITECTURES.keys()


def test_the_table_of_scalings_has_every_kind() -> None:
    assert {cells[0].strip("`") for cells in rows(TABLE, 2)} - {"kind"} == set(ROPE_KINDS)


def test_the_table_of_settings_names_settings() -> None:
    named = {name for cells in rows(PAGE, 2) for name in re.findall(r"`(\w+)`", cells[0])}
    assert named - {"setting"} <= {each.name for each in fields(DecoderConfig)}
