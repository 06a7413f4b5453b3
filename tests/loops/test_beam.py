"""Beam search: transformers' own, token for token, over every kind of state, alone and in a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hf_models
import pytest
import torch
from checkpoints import model_dir
from helpers import VOCAB, full_logits, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_causal_model, load_model
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.engine.engine import Engine
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.verifiers import LosslessVerifier

PENALTIES = (0.0, 1.0, -0.7, 0.4)


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    loop: str,
    **options: Any,
) -> list[RunningSequence]:
    """The finished sequence of every prompt."""
    options = {"slots": 3, **options}
    engine = Engine(model, verifier=LosslessVerifier(), loop=loop, **options)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    asked = [engine.add(Request(tuple(p), q)) for p, q in zip(prompts, each, strict=True)]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        for outcome in engine.step():
            if outcome.error is not None:
                raise outcome.error
            if outcome.finished:
                done[outcome.sequence.request] = outcome.sequence
    return [done[handle] for handle in asked]


def outputs(found: Sequence[RunningSequence]) -> list[list[int]]:
    return [each.tokens[each.prompt_length :] for each in found]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Decoder]:
    """A model of transformers and the same model of linspec."""
    folder = tmp_path_factory.mktemp("llama")
    theirs = hf_models.save("llama", folder)
    return theirs, load_model(folder, dtype=torch.float32).to_inference()


def search_of_transformers(
    model: PreTrainedModel, prompt: list[int], width: int, most: int, **settings: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=width, do_sample=False,
        max_new_tokens=most, pad_token_id=0, **settings,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


@pytest.mark.crossed(3)
@pytest.mark.parametrize("stopping", ["true", "false", "never"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_tokens_are_those_of_transformers(pair, stopping: str, penalty: float) -> None:
    theirs, ours = pair
    rng = random.Random(f"{stopping}{penalty}")
    early = {"true": True, "false": False, "never": "never"}[stopping]
    lengths = set()
    for width in (2, 3, 4):
        prompts = [[rng.randrange(3, 61) for _ in range(rng.randint(1, 9))] for _ in range(4)]
        # tokens that these hypotheses do come across
        free = [search_of_transformers(theirs, prompt, width, 12) for prompt in prompts]
        ends = sorted({rng.choice(each[1:]) for each in free})[: rng.randint(1, 3)]
        ours.config = replace(ours.config, eos_ids=tuple(ends))
        wanted = [
            search_of_transformers(
                theirs, prompt, width, 16, eos_token_id=ends, length_penalty=penalty,
                early_stopping=early,
            )
            for prompt in prompts
        ]  # fmt: skip
        loop = f"beam:width={width},length_penalty={penalty},early_stopping={stopping}"
        found = decode(ours, prompts, SamplingParams(max_tokens=16), loop)
        assert outputs(found) == wanted
        lengths |= set(map(len, wanted))
    assert len(lengths) > 1, "no hypothesis has ended"


def test_bias_bans_and_least_lengths_are_those_of_transformers(pair) -> None:
    theirs, ours = pair
    prompt = [5, 9, 30]
    (free,) = outputs(decode(ours, [prompt], SamplingParams(max_tokens=8), "beam:width=3"))
    ours.config = replace(ours.config, eos_ids=(free[2],))
    banned, raised = free[1], (free[0] + 1) % 61
    wanted = search_of_transformers(
        theirs, prompt, 3, 10, eos_token_id=[free[2]], min_new_tokens=4, bad_words_ids=[[banned]],
        sequence_bias=[[[raised], 2.5]],
    )  # fmt: skip
    params = SamplingParams(
        max_tokens=10, min_tokens=4, bad_words=((banned,),), logit_bias={raised: 2.5}
    )
    assert outputs(decode(ours, [prompt], params, "beam:width=3")) == [wanted]


def test_an_encoder_decoder_searches_as_transformers_does(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8,
    }  # fmt: skip
    theirs = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_causal_model(tmp_path, dtype=torch.float32).to_inference()
    sources = [[5, 9, 30], [4] * 11, [17]]
    params = SamplingParams(max_tokens=12, stop_token_ids=(7, 33), ignore_eos=True)
    for width in (2, 4):
        wanted = [
            theirs.generate(
                torch.tensor([source]), num_beams=width, do_sample=False, max_new_tokens=12,
                eos_token_id=[7, 33], decoder_start_token_id=0, pad_token_id=0, length_penalty=0.5,
            )[0, 1:].tolist()
            for source in sources
        ]  # fmt: skip
        loop = f"beam:width={width},length_penalty=0.5"
        assert outputs(decode(ours, sources, params, loop)) == wanted


def test_caches_in_8_bits_are_forked_as_they_are() -> None:
    model, params = tiny_model("softmax", dtype=torch.float32), SamplingParams(max_tokens=13)
    prompts = [random_tokens(n, seed=n) for n in (3, 9, 30)]
    wanted = outputs(decode(model, prompts, params, "autoregressive", kv_cache_dtype="int8"))
    found = decode(model, prompts, params, "beam:width=1", kv_cache_dtype="int8")
    assert outputs(found) == wanted
    wide = outputs(decode(model, prompts, params, "beam:width=3", kv_cache_dtype="int8"))
    for prompt, tokens in zip(prompts, wide, strict=True):
        alone = decode(model, [prompt], params, "beam:width=3", kv_cache_dtype="int8")
        assert outputs(alone) == [tokens]


MIXERS = ("softmax", "aug", "window", "gdn", "linformer")


def slow_search(model: Decoder, prompt: list[int], width: int, most: int) -> list[int]:
    """Whole texts through the full form; the likeliest of the longest, because nothing ends."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(most):
        rows = full_logits(model, [[*prompt, *tokens] for _, tokens in beams])
        ways = [
            (total + float(row[token]), [*tokens, token])
            for (total, tokens), row in zip(beams, rows.double().log_softmax(-1), strict=True)
            for token in range(VOCAB)
        ]
        beams = sorted(ways, key=lambda way: -way[0])[:width]
    return beams[0][1]


@pytest.mark.parametrize("mixer", MIXERS)
def test_hypotheses_of_every_state_are_those_of_whole_texts(mixer: str) -> None:
    model = tiny_model(mixer)
    prompts = [random_tokens(n, seed=n) for n in (1, 4, 11, 6)]
    params = [SamplingParams(max_tokens=n) for n in (9, 3, 14, 1)]
    found = outputs(decode(model, prompts, params, "beam:width=3", prefill_tokens=5))
    assert found == [
        slow_search(model, prompt, 3, each.max_tokens)
        for prompt, each in zip(prompts, params, strict=True)
    ]


@given(seed=st.integers(0, 1000), kind=st.integers(0, 4))
@settings(max_examples=12, deadline=None)
def test_a_width_of_one_is_greedy_decoding_with_every_setting(seed: int, kind: int) -> None:
    model = tiny_model("aug", seed=seed % 3)
    prompts = [random_tokens(n, seed=seed + n) for n in (2, 7)]
    settings: dict[str, Any] = [
        {},
        {"repetition_penalty": 1.7},
        {"logit_bias": {3: 2.0, 4: -float("inf")}, "frequency_penalty": 0.8},
        {"allowed_token_ids": (1, 4, 9, 16, 25), "presence_penalty": 1.1},
        {"logits_processors": (lambda output, scores: scores.roll(len(output)),)},
    ][kind]
    params = SamplingParams(max_tokens=12, logprobs=2, **settings)
    wanted = decode(model, prompts, params, "autoregressive")
    assert outputs(decode(model, prompts, params, "beam:width=1")) == outputs(wanted)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_company_changes_nothing(mixer: str) -> None:
    model = tiny_model(mixer)
    prompts = [random_tokens(n, seed=n) for n in (3, 12, 1, 8, 5)]
    params = SamplingParams(max_tokens=10, repetition_penalty=1.2)
    together = outputs(decode(model, prompts, params, "beam:width=4"))
    assert together == [outputs(decode(model, [p], params, "beam:width=4"))[0] for p in prompts]


def test_logprobs_and_texts_through_the_public_interface() -> None:
    llm = LLM(model_dir("aug"), loop="beam:width=3")
    params = SamplingParams(max_tokens=6, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    (found,) = llm.generate("the end", params)
    assert found.logprobs is not None and found.prompt_logprobs is not None
    assert [each.token for each in found.logprobs] == list(found.token_ids)
    prompt = llm.encode("the end")
    for place, entry in enumerate(found.logprobs):
        row = llm.model.full_logits(prompt, [found.token_ids[:place]])[0].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
    plain = LLM(model_dir("aug")).generate("the end", params)[0].prompt_logprobs
    assert [each and each.token for each in plain] == [
        each and each.token for each in found.prompt_logprobs
    ]
    stop = next(each for each in found.text if each.strip())
    (cut,) = llm.generate("the end", replace(params, stop=(stop,)))
    assert cut.text == found.text[: found.text.index(stop)] and cut.finish_reason == "stop"


def test_long_outputs_are_no_idle_rounds() -> None:
    model = tiny_model("window")
    found = decode(model, [[1, 2]], SamplingParams(max_tokens=1100), "beam:width=1")
    assert found[0].emitted == 1100


def test_a_softmax_model_ends_at_its_last_position() -> None:
    model = tiny_model("softmax", max_positions=20)
    found = decode(model, [random_tokens(15)], SamplingParams(max_tokens=50), "beam:width=2")
    assert found[0].emitted == 6


def test_what_it_cannot_do_is_refused_by_name_before_work_starts() -> None:
    with pytest.raises(ConfigError, match=r"loop 'beam' takes no drafter"):
        LLM(model_dir("softmax"), loop="beam", drafter="prompt-lookup")
    with pytest.raises(ConfigError, match="width must be from 1"):
        LLM(model_dir("softmax"), loop="beam:width=0")
    with pytest.raises(ConfigError, match="early_stopping must be one of true, false, never"):
        LLM(model_dir("softmax"), loop="beam:early_stopping=soon")
    llm = LLM(model_dir("softmax"), loop="beam")
    with pytest.raises(ConfigError, match=r"loop 'beam' draws nothing, got temperature 0\.7"):
        llm.generate(["x", "y"], [SamplingParams(), SamplingParams(temperature=0.7)])
    assert not llm.engine.busy


def test_a_broken_processor_ends_its_request_alone() -> None:
    llm = LLM(model_dir("aug"), loop="beam:width=2")

    def broken(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise RuntimeError("a broken processor")
        return scores

    good, bad = llm.generate(
        ["x", "the end"],
        [SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, logits_processors=(broken,))],
        return_errors=True,
    )
    assert str(bad.error) == "a broken processor"
    assert good.token_ids == llm.generate("x", SamplingParams(max_tokens=6))[0].token_ids
