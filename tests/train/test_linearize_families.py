"""`linearize` takes a model of every family, and what it writes keeps the settings of the family."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from helpers import feed, random_tokens, random_tree, tree_logits
from hf_models import FAMILY_MODELS, save
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import load_config, load_model
from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig

SHORT = LinearizeConfig(
    tokens=4 * 128,
    transfer_share=0.5,
    context=32,
    batch_tokens=128,
    warmup=1,
    precision="float32",
    save_every=0.0,
)
AUG = MixerConfig(name="aug", group=8, taps=4)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", FAMILY_MODELS.values())
def test_a_model_of_the_family_is_linearized(
    name: str, tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    save(name, tmp_path / "teacher", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "teacher")
    out = linearize(
        tmp_path / "teacher", tmp_path / "student", mixer=AUG, config=SHORT, data=[corpus]
    )
    before, after = load_config(tmp_path / "teacher"), load_config(out)
    assert after == before.with_mixers((AUG,) * before.layers)
    losses = json.loads((out / "linearize.json").read_text())["losses"]
    assert all(math.isfinite(loss) for loss in losses.values())
    model = load_model(out, dtype=torch.float64)
    prompt, tree = random_tokens(14), random_tree(random.Random(1), 9)
    state = model.new_state()
    feed(model, state, prompt)
    found = model.step([StepInput.tree(0, tree)], state).logits
    torch.testing.assert_close(found, tree_logits(model, prompt, tree), rtol=0, atol=1e-9)
