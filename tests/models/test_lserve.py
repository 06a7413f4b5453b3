"""`--attention lserve`: heads that recall select pages, the others stream; heads are looked up by hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from helpers import assert_close, full_logits, random_tokens, tiny_model

from linspec import LLM, SamplingParams
from linspec.checkpoints.attention import attending
from linspec.checkpoints.calibration import (
    FILE,
    calibrated_heads,
    calibration_folder,
    calibration_name,
)
from linspec.checkpoints.fingerprint import fingerprint, weight_fingerprint
from linspec.checkpoints.load_quantized import quantize_model
from linspec.errors import CheckpointError, ConfigError
from linspec.mixers.exact_heads import by_head_mixers
from linspec.models.decoder import Decoder
from linspec.models.lserve import lserve_options, with_lserve
from linspec.train.student import sharing

SPEC = "lserve:budget=64,exact=1,window=64,sinks=2"
HEADS = ((0,), ())
TEXT = random_tokens(300)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


def plain() -> Decoder:
    return tiny_model("softmax", taps=0, max_positions=512)


def keep(model: Decoder, folder: Path | None = None, **changes: object) -> Path:
    """A calibration of this model, in its place."""
    name, known = calibration_name(lserve_options(SPEC), 1), fingerprint(model)
    folder = folder or calibration_folder(None, name, known)
    folder.mkdir(parents=True)
    both = {"target": known, "weights": weight_fingerprint(model)}
    data = {**both, "heads": HEADS, "plan": {}, "facts": {}, **changes}
    (folder / FILE).write_text(json.dumps(data))
    return folder / FILE


def test_it_is_by_head_with_pages_and_streaming() -> None:
    model = plain()
    options = lserve_options(SPEC)
    mixers = by_head_mixers(model.config, options.streaming, HEADS, "pages:budget=64")
    made, other = with_lserve(model, SPEC, HEADS), sharing(model, mixers)
    assert made.config == other.config
    assert [mixer.name for mixer in made.config.mixers] == ["by-head", "streaming"]
    assert_close(full_logits(made, [TEXT]), full_logits(other, [TEXT]))
    assert float((full_logits(made, [TEXT]) - full_logits(model, [TEXT])).abs().max()) > 1e-4


@pytest.mark.parametrize("taps", [0, 3])
def test_a_model_in_its_inference_form_gets_it_too(taps: int) -> None:
    model = tiny_model("softmax", taps=taps, max_positions=512)
    expected = full_logits(with_lserve(model, SPEC, HEADS), [TEXT])
    made = with_lserve(model.to_inference(), SPEC, HEADS)
    assert_close(full_logits(made, [TEXT]), expected, atol=1e-4)


def test_layers_that_are_named_need_no_calibration() -> None:
    made = attending(plain(), "lserve:exact=layers:1")
    assert [mixer.name for mixer in made.config.mixers] == ["streaming", "pages"]


def test_drafts_change_nothing_of_what_it_says() -> None:
    model = plain()
    keep(model)
    params = SamplingParams(max_tokens=12)
    alone, drafted = (
        LLM(model, tokenizer=tiny_tokenizer(), attention=SPEC, drafter=drafter).generate(
            [TEXT], params
        )
        for drafter in ("none", "prompt-lookup")
    )
    assert [each.token_ids for each in alone] == [each.token_ids for each in drafted]


def test_heads_are_found_in_the_cache_and_beside_the_model(tmp_path: Path) -> None:
    model = plain()
    beside = tmp_path / "model"
    with pytest.raises(
        ConfigError, match=r"which 1 of the 4 KV heads .*`linspec calibrate m --attention"
    ):
        calibrated_heads(model, SPEC, 1, None, "m")
    keep(model)
    assert calibrated_heads(model, SPEC, 1, None) == HEADS
    (beside / "calibration").mkdir(parents=True)
    name = calibration_name(lserve_options(SPEC), 1)
    assert calibration_folder(beside, name, "x") == beside / "calibration" / name
    keep(model, beside / "calibration" / name, heads=[[], [1]])
    assert calibrated_heads(model, SPEC, 1, beside) == ((), (1,))
    # its budget is nothing that gates hang on
    assert calibrated_heads(model, SPEC.replace("budget=64", "budget=128"), 1, beside) == ((), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "0123"},
            "fingerprint 0123-.*, and this one has .*have changed. Calibrate again",
        ),
        ({"heads": [[0]]}, "does not name KV heads of 2 layers of 2"),
        ({"heads": [[0], [2]]}, "does not name KV heads of 2 layers of 2"),
        ({"heads": "all"}, "heads"),
        ({"format_version": "9.9"}, "install a newer linspec"),
    ],
)
def test_what_was_found_for_another_model_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    model = plain()
    folder = tmp_path / "model" / "calibration" / calibration_name(lserve_options(SPEC), 1)
    keep(model, folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        calibrated_heads(model, SPEC, 1, tmp_path / "model")


@pytest.mark.parametrize("form", ["plain", "inference", "int8"])
@pytest.mark.parametrize("change", ["a middle matrix", "a norm", "theta"])
def test_a_change_that_leaves_the_last_weights_alone_is_seen(
    tmp_path: Path, change: str, form: str
) -> None:
    """Calibrations of models that were fine-tuned since went unnoticed: the last layer was asked alone."""
    folder = tmp_path / "model" / "calibration" / calibration_name(lserve_options(SPEC), 1)
    keep(plain(), folder)
    model = plain()
    if change == "theta":
        config = replace(model.config, rope=replace(model.config.rope, theta=5e5))
        other = Decoder(config)
        other.load_state_dict(model.state_dict())
        model = other
    part = model.layers[0].mixer.v if change == "a middle matrix" else model.layers[0].mlp_norm
    assert calibrated_heads(plain(), SPEC, 1, tmp_path / "model") == HEADS
    with torch.no_grad():
        part.weight *= 1.5 if change != "theta" else 1.0
    if form == "inference":
        model.to_inference()
    elif form == "int8":
        model = quantize_model(model, 8, {})
    with pytest.raises(CheckpointError, match="have changed"):
        calibrated_heads(model, SPEC, 1, tmp_path / "model")


@pytest.mark.parametrize("form", ["inference", "int8"])
def test_every_form_of_a_model_finds_its_calibration(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "model" / "calibration" / calibration_name(lserve_options(SPEC), 1)
    keep(plain(), folder)
    model = plain().to_inference() if form == "inference" else quantize_model(plain(), 8, {})
    assert calibrated_heads(model, SPEC, 1, tmp_path / "model") == HEADS


def test_models_with_other_mixers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"this one has local; .*pages:budget"):
        attending(tiny_model("local"), SPEC)


@pytest.mark.parametrize("spec", ["lserve:window=100", "lserve:budget=0", "lserve:heads=3"])
def test_options_are_checked(spec: str) -> None:
    with pytest.raises(ConfigError):
        lserve_options(spec)


def test_an_attention_that_fits_no_layer_says_which_mixers_there_are() -> None:
    with pytest.raises(ConfigError, match=r"attention 'pages' .* its mixers are local"):
        attending(tiny_model("local"), "pages")


def test_an_empty_place_is_not_the_working_directory() -> None:
    """`--offload "$SCRATCH"` without that variable wrote gigabytes where the command ran."""
    with pytest.raises(ConfigError, match="offload is '', which names no directory"):
        LLM(plain(), tokenizer=tiny_tokenizer(), offload="")
