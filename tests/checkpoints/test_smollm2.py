"""The real model of `linspec get smollm2`: transformers' logits and tokens, and the original's token ids.

Skipped where the file is not; LINSPEC_TEST_TEXT names a file of prose, such as WikiText-2, to tokenize too.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.step import StepInput

PATH = PACKAGES["smollm2"].path
TEXT = os.environ.get("LINSPEC_TEST_TEXT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATH.is_file(), reason="no SmolLM2 here; run `linspec get smollm2`"),
]
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module", autouse=True)
def model_file() -> None:
    """The file of the user's cache in that of the tests, where all else stays apart."""
    link = PACKAGES["smollm2"].path
    if link != PATH:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(PATH)


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings(action="ignore"):
        return AutoModelForCausalLM.from_pretrained(
            PATH.parent, gguf_file=PATH.name, dtype=torch.float32
        ).eval()


def test_logits_are_those_of_transformers(theirs: Any) -> None:
    ours, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    code = inspect.getsource(random)
    for text in ("The capital of France is Paris, and the year is 1789.", code[:600], "日本語 🙂"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours(ids)
        # logits are of the order of 30: seven digits of float32 leave a few 1e-5
        assert float((expected - found).abs().max()) <= 1e-4


def test_greedy_answers_are_those_of_transformers(theirs: Any) -> None:
    llm = LLM("smollm2", dtype="float32")
    prompt = llm.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    answer = llm.generate(prompt, SamplingParams(max_tokens=40))[0]
    assert answer.text == "The capital of France is Paris." and answer.finish_reason == "stop"
    ids = torch.tensor([llm.encode(prompt)])
    expected = theirs.generate(
        ids, max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    assert expected[0, ids.shape[1] :].tolist() == list(answer.token_ids)


def test_kept_blocks_say_what_floats_say() -> None:
    """Rounded inputs cost less than 0.5% of perplexity, and few of the likeliest tokens."""
    kept, plain = load_model("smollm2", keep_blocks=True), load_model("smollm2")
    ids = load_tokenizer("smollm2")(inspect.getsource(random))["input_ids"][:1024]
    with torch.inference_mode():
        found, expected = kept(torch.tensor([ids]))[0], plain(torch.tensor([ids]))[0]
    following = torch.tensor(ids[1:])
    losses = [torch.nn.functional.cross_entropy(x[:-1], following) for x in (found, expected)]
    assert abs(float(losses[0] - losses[1])) < 0.005
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.95
    answer = LLM("smollm2").chat([QUESTION], SamplingParams(max_tokens=40))[0]
    assert answer.text == "The capital of France is Paris."


def texts() -> Iterator[str]:
    """Prose, code and random characters of all planes."""
    if TEXT:
        yield from Path(TEXT).read_text(encoding="utf-8").splitlines()[:10_000]
    for module in (random, inspect, torch.nn.modules.rnn):
        yield from inspect.getsource(module).splitlines()
    rng = random.Random(0)
    blocks = ((32, 127), (0xA0, 0x3000), (0x3000, 0xD800), (0x1F300, 0x1FA00), (0x30, 0x3A))
    for _ in range(3000):
        yield "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(20))


def test_token_ids_are_those_of_the_original() -> None:
    with warnings.catch_warnings(action="ignore"):
        original = AutoTokenizer.from_pretrained(PATH.parent, gguf_file=PATH.name)
    # transformers forgets that this tokenizer cuts numbers into digits; its own tokenizer.json does not
    original.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    whole, plain = load_tokenizer("smollm2"), load_text_tokenizer("smollm2")
    for text in texts():
        expected = original(text)["input_ids"]
        assert whole(text)["input_ids"] == expected == plain(text)["input_ids"], text


@pytest.mark.parametrize("name", ["smollm2-aug", "smollm2-aug-22"])
def test_the_deltas_answer_and_their_step_form_is_their_full_form(name: str) -> None:
    llm = LLM(name)
    prompt = llm.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert llm.generate(prompt, SamplingParams(max_tokens=40))[0].text == (
        "The capital of France is Paris."
    )
    model = load_model(name)
    ids = torch.randint(5, 49_000, (1, 700), generator=torch.Generator().manual_seed(0))
    state, seen = model.new_state(), 0
    with torch.inference_mode():
        full = model(ids)[0]
    # prefill, single tokens, a full stage, and groups that close within a step
    for count in (300, 1, 1, 40, 64, *[3] * 30, 204):
        out = model.step([StepInput(0, ids[0, seen : seen + count].tolist())], state)
        state.commit(0, range(count))
        seen += count
        # logits are of the order of 30
        assert float((out.logits[-1] - full[seen - 1]).abs().max()) <= 3e-4
    assert seen == 700
