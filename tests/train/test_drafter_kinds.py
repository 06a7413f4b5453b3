"""Every kind of drafter that can be trained: trained, found beside its model, and lossless."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import save_model
from linspec.drafters import DRAFTERS
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters import TRAININGS, DrafterConfig, train_drafter
from linspec.train.drafters.joint import JointTraining
from linspec.train.pretrain import initialize

SHORT = DrafterConfig(
    tokens=6 * 128, context=32, batch_tokens=128, calibration_tokens=512, precision="float32"
)
KINDS = [
    entry.name
    for entry in TRAININGS
    if not issubclass(entry.value, JointTraining) and entry.name in DRAFTERS
]


def deep_teacher(vocab_size: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=32,
        layers=4,
        heads=2,
        kv_heads=1,
        head_width=16,
        mlp_width=48,
        max_positions=128,
        eos_ids=(0,),
        bos_id=0,
    )
    model = Decoder(config)
    initialize(model, config.layers, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.weight.mul_(10)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_drafter_is_found_and_changes_nothing(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, corpus: Path
) -> None:
    model = save_model(deep_teacher(len(tokenizer)), tokenizer, tmp_path / "model")
    assert train_drafter(model, kind=kind, data=[corpus], config=SHORT) == model / kind
    prompts, params = ["the old fox", "a red dog near my"], SamplingParams(max_tokens=12)
    plain = [each.token_ids for each in LLM(model, drafter="none").generate(prompts, params)]
    llm = LLM(model, drafter=kind, policy=12)
    found = llm.generate(prompts, params)
    assert [each.token_ids for each in found] == plain
    for seed in (1, 2):
        drawn = SamplingParams(max_tokens=12, temperature=1.0, seed=seed)
        one = LLM(model, drafter="none").generate(prompts[:1], drawn)
        assert llm.generate(prompts[:1], drawn)[0].token_ids == one[0].token_ids
