"""Every kind of drafter that can be trained: trained, found beside its model, and lossless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import save_model
from linspec.drafters import DRAFTERS
from linspec.drafters.lud import Slot, SlotConfig
from linspec.drafters.saved import save_drafter
from linspec.errors import CheckpointError, DrafterError
from linspec.evaluate.files import verify_files
from linspec.evaluate.quantize import quantize
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

# a kind that is not made by its name alone
NEEDING = {"specdec-head": "draft"}

# kinds whose drafts are drawn where a request samples
SAMPLED = {"specdec-head", "specdiff"}

TRAINED = [entry.name for entry in DRAFTERS if entry.value.files is not None]


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


@pytest.fixture(scope="module")
def small(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same tokens."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return save_model(deep_teacher(len(tokenizer)), tokenizer, folder)


def spec_of(kind: str, small: Path) -> str:
    """The kind with what it has to be told: the model `small`."""
    return f"{kind}:{NEEDING[kind]}={small}" if kind in NEEDING else kind


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_drafter_is_found_and_changes_nothing(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, corpus: Path, small: Path
) -> None:
    model = save_model(deep_teacher(len(tokenizer)), tokenizer, tmp_path / "model")
    spec = spec_of(kind, small)
    assert train_drafter(model, kind=spec, data=[corpus], config=SHORT) == model / kind
    prompts, params = ["the old fox", "a red dog near my"], SamplingParams(max_tokens=12)
    plain = [each.token_ids for each in LLM(model, drafter="none").generate(prompts, params)]
    llm = LLM(model, drafter=kind, policy=12)
    found = llm.generate(prompts, params)
    assert [each.token_ids for each in found] == plain
    # its drafts are sampled, and judged by other random numbers than those of plain decoding
    for seed in () if kind in SAMPLED else (1, 2):
        drawn = SamplingParams(max_tokens=12, temperature=1.0, seed=seed)
        one = LLM(model, drafter="none").generate(prompts[:1], drawn)
        assert llm.generate(prompts[:1], drawn)[0].token_ids == one[0].token_ids


@pytest.fixture(scope="module")
def crowded(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, small: Path
) -> Path:
    """A model with a drafter of every kind inside."""
    model = deep_teacher(len(tokenizer)).requires_grad_(False)
    folder = save_model(model, tokenizer, tmp_path_factory.mktemp("crowded") / "model")
    stream = np.random.default_rng(0).integers(0, len(tokenizer), 256)
    for kind in KINDS:
        training = TRAININGS.build(spec_of(kind, small))
        drafter = training.make(model, stream, 0)
        training.measure(drafter, stream, context=32, tokens=64)
        save_drafter(drafter, model, folder / kind)
    slot = SlotConfig(width=model.config.width, vocab_size=model.config.vocab_size)
    save_drafter(Slot(slot), model, folder / "lud")
    return folder


def test_every_kind_inside_a_model_is_verified(crowded: Path, tmp_path: Path) -> None:
    report = verify_files(crowded)
    assert report.drafters == tuple(sorted(TRAINED))
    for kind in TRAINED:
        folder = tmp_path / kind
        shutil.copytree(crowded, folder)
        weights = folder / kind / "drafter.safetensors"
        tensors = load_file(weights)
        spoilt = next(name for name, given in tensors.items() if given.is_floating_point())
        tensors[spoilt].view(-1)[-1] = float("nan")
        save_file(tensors, weights)
        (folder / kind / "checksums.json").unlink()
        with pytest.raises((CheckpointError, DrafterError), match=f"{kind}.*holds NaN"):
            verify_files(folder)


def test_a_kind_that_nobody_knows_is_named_by_verify(crowded: Path, tmp_path: Path) -> None:
    shutil.copytree(crowded, tmp_path / "m")
    path = tmp_path / "m" / "lud" / "drafter.json"
    for kind in ("prompt-lookup", "strange", ["lud"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": kind}))
        with pytest.raises(DrafterError, match="none of the trained ones"):
            verify_files(tmp_path / "m")


@pytest.mark.parametrize("bits", [8, 4])
def test_drafters_are_packed_with_their_model_or_said_to_stay_behind(
    bits: int, crowded: Path, tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = tmp_path / "m" / "strange"
    shutil.copytree(crowded, tmp_path / "m")
    strange.mkdir()
    (strange / "drafter.json").write_text('{"format_version": "0.2", "kind": "strange"}')
    out, settings = tmp_path / "q", {"data": [corpus], "calibration_bytes": 0, "limit_bytes": 500}
    with caplog.at_level("WARNING", "linspec"):
        report = quantize(tmp_path / "m", out, bits=bits, **settings)
    packed = {name for name in TRAINED if DRAFTERS[name].files.pack is not None}
    assert packed == set(report.drafters) == {"medusa", "block", "eagle"}
    assert {found["kind"] for found in report.drafters.values()} == packed
    assert verify_files(out).drafters == tuple(sorted(packed))
    for kind in {*TRAINED, "strange"} - packed:
        assert f"{kind} stays behind" in caplog.text
    prompts, params = ["the old fox", "a red dog near my"], SamplingParams(max_tokens=12)
    plain = [each.token_ids for each in LLM(out, drafter="none").generate(prompts, params)]
    for kind in packed:
        data = json.loads((out / kind / "drafter.json").read_text())
        assert data["quantization"]["bits"] == bits
        found = LLM(out, drafter=kind, policy=3).generate(prompts, params)
        assert [each.token_ids for each in found] == plain
        assert sum(each.stats.drafted for each in found) > 0
