"""The likelihood bound of masked-diffusion models: by all masks, by random ones, and behind the verb."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import talker
from helpers import randomise
from typer.testing import CliRunner

from linspec.cli import app
from linspec.errors import ConfigError, InputError
from linspec.evaluate.masked_bound import masked_bound
from linspec.evaluate.perplexity import evaluate_source
from linspec.evaluate.windows import cut
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

TEXTS = ["abcd the end of cd", "x", "the end abcd abcd " * 6]


def model(logit_shift: int = 0, block_length: int | None = None) -> MaskedDiffusion:
    vocabulary = len(tiny_tokenizer())
    shape = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 16}
    config = DiffusionConfig(
        vocab_size=vocabulary + 1,
        mask_id=vocabulary,
        logit_shift=logit_shift,
        block_length=block_length,
        eos_ids=(0,),
        **shape,
    )
    return randomise(MaskedDiffusion(config), 0).double()


@torch.inference_mode()
def enumerated(model: MaskedDiffusion, first: int, ids: list[int]) -> float:
    """Nats of the bound by every mask of a text, each number of masks equally often."""
    total, mask_id = 0.0, model.config.mask_id
    for count in range(1, len(ids) + 1):
        costs = []
        for chosen in itertools.combinations(range(len(ids)), count):
            given = [mask_id if at in chosen else token for at, token in enumerate(ids)]
            logits = model.predicted(torch.tensor([[first, *given]]))[0, 1:].log_softmax(-1)
            costs.append(-sum(float(logits[at, ids[at]]) for at in chosen))
        total += sum(costs) / len(costs) / count
    return total


@pytest.mark.parametrize("shift", [0, 1])
def test_random_masks_find_what_all_masks_say(shift: int) -> None:
    given, tokenizer = model(shift), tiny_tokenizer()
    ids = tokenizer("q7zw", add_special_tokens=False)["input_ids"]
    text = cut(tokenizer, given.config, ["q7zw"], context=32, stride=16, limit_bytes=None)
    assert text.tokens == len(ids) == 4
    exact = enumerated(given, text.windows[0].ids[0], ids) / math.log(2) / 4
    found = masked_bound(given, tokenizer, ["q7zw"], context=32, samples=4000)
    assert found.bits_per_byte == pytest.approx(exact, rel=0.02)
    assert abs(found.bits_per_byte - exact) < 4 * found.standard_error
    assert found.standard_error < 0.02 * exact


@torch.inference_mode()
def test_blocks_of_one_token_leave_nothing_to_chance() -> None:
    """A block-diffusion model sees the blocks before one as they are."""
    given, tokenizer = model(block_length=1), tiny_tokenizer()
    [window] = cut(
        tokenizer, given.config, ["q7zw"], context=32, stride=16, limit_bytes=None
    ).windows
    nats = 0.0
    for at in range(1, len(window.ids)):
        seen = torch.tensor([[*window.ids[:at], given.config.mask_id]])
        nats -= float(given.predicted(seen)[0, at].log_softmax(-1)[window.ids[at]])
    found = masked_bound(given, tokenizer, ["q7zw"], context=32)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 4, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert found.tokens == 4


def test_neither_rows_nor_padding_change_it_but_seeds_do() -> None:
    given, tokenizer = model(), tiny_tokenizer()
    alone, together = (
        masked_bound(given, tokenizer, TEXTS, context=12, samples=3, rows=rows) for rows in (1, 7)
    )
    assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-9)
    others = [masked_bound(given, tokenizer, TEXTS, context=12, seed=seed) for seed in range(1, 9)]
    values = torch.tensor([each.bits_per_byte for each in others])
    assert len(set(values.tolist())) == len(values)
    # what each seed says of its own error is how far seeds lie apart
    told = sum(each.standard_error for each in others) / len(others)
    assert told / 3 < float(values.std()) < 3 * told
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    assert {each.tokens for each in others} == {tokens}


@pytest.mark.parametrize("options", [(), ("--bf16",), ("--quantize", "8")])
def test_the_verb_tells_the_bound_and_its_error(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "text.txt").write_text("the end abcd\n" * 9)
    args = [str(talker()), "--data", str(tmp_path), "--context", "24", "--samples", "2", *options]
    result = CliRunner().invoke(app, ["eval", *args, "--seed", "5", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["samples"], said["seed"], said["is_upper_bound"]) == (2, 5, True)
    assert said["bits_per_byte"] > said["standard_error"] > 0
    assert said["bytes"] == 9 * 13
    if not options:
        found = evaluate_source(talker(), [tmp_path], context=24, samples=2, seed=5)
        assert found.to_json() == said


def test_what_has_no_meaning_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the end")
    with pytest.raises(ConfigError, match="without a cache; leave out 'int8'"):
        evaluate_source(talker(), [tmp_path], kv="int8")
    with pytest.raises(ConfigError, match="predicts the next token exactly"):
        evaluate_source("embedded-softmax", [tmp_path], samples=4)
    for wrong in ({"samples": 1}, {"context": 1}, {"seed": -1}, {"limit_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            masked_bound(model(), tiny_tokenizer(), TEXTS, **wrong)
    with pytest.raises(InputError, match="no text"):
        masked_bound(model(), tiny_tokenizer(), [])
