"""Prompts in, text out: strings, streams, several requests at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from helpers import full_logits

from linspec.decoding.sampling import SamplingParams
from linspec.errors import (
    CheckpointError,
    ConfigError,
    ContextOverflow,
    DrafterError,
    InputError,
    StateError,
    WrongType,
)
from linspec.llm import LLM
from linspec.utils.sizes import bytes_of

PROMPTS = ["ab cd end", "def f(x):", "é", "the end " * 4, "abcd" * 9]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


def make(mixer: str = "aug", drafter: str = "none", **settings: object) -> LLM:
    settings = {"policy": 5, "max_batch": 3} | settings
    return LLM(model_dir(mixer), drafter=drafter, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return make()


def test_more_prompts_than_slots_come_back_in_order(plain: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (3, 20, 7, 1, 12)]
    together = plain.generate(PROMPTS, params)
    for prompt, each, result in zip(PROMPTS, params, together, strict=True):
        alone = plain.generate(prompt, each)[0]
        assert (result.token_ids, result.text) == (alone.token_ids, alone.text)
        assert len(result.token_ids) == each.max_tokens
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(tiny_tokenizer()(prompt)["input_ids"])


@pytest.mark.parametrize("drafter", ["prompt-lookup", "draft-model", "student"])
@pytest.mark.parametrize("mixer", ["aug", "softmax"])
def test_greedy_text_is_the_same_with_every_drafter(mixer: str, drafter: str) -> None:
    where = {"draft-model": f":{model_dir('softmax', 1)}", "student": f":{model_dir('aug', 1)}"}
    params = SamplingParams(max_tokens=25)
    expected = make(mixer).generate(PROMPTS, params)
    results = make(mixer, drafter + where.get(drafter, "")).generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert [r.text for r in results] == [r.text for r in expected]


def test_the_automatic_policy_changes_no_token() -> None:
    params = SamplingParams(max_tokens=25)
    itself = f"draft-model:{model_dir('aug')}"
    results = make("aug", itself, policy="auto").generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in make().generate(PROMPTS, params)]


def test_pieces_add_up_to_the_result() -> None:
    llm = make("aug", f"draft-model:{model_dir('aug')}")
    texts, tokens, results = {}, {}, {}
    for piece in llm.stream(PROMPTS, SamplingParams(max_tokens=30)):
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        tokens[piece.index] = tokens.get(piece.index, ()) + piece.token_ids
        if piece.done:
            results[piece.index] = piece.done
    assert sorted(results) == list(range(len(PROMPTS)))
    for index, result in results.items():
        assert texts[index] == result.text
        assert tokens[index] == result.token_ids


@pytest.mark.parametrize("drafter", ["none", f"draft-model:{model_dir('aug')}"])
def test_stop_strings_across_tokens_and_drafts(drafter: str) -> None:
    llm = make("aug", drafter)
    free = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    # a stop string that begins inside one token and ends inside a later one
    stop = free.text[9:12]
    assert len(stop) == 3
    shown, result = "", None
    for piece in llm.stream(PROMPTS[0], SamplingParams(max_tokens=40, stop=(stop, "never"))):
        shown += piece.text
        assert stop not in shown
        assert free.text[: free.text.find(stop)].startswith(shown)
        result = piece.done
    assert result is not None
    assert shown == result.text == free.text[: free.text.find(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    assert len(result.token_ids) < 40
    assert not llm.engine.busy


def test_end_of_sequence_ends_the_text(plain: LLM) -> None:
    params = SamplingParams(max_tokens=30, logit_bias={0: 1000.0})
    result = plain.generate("abcd", params)[0]
    assert (result.token_ids, result.text, result.finish_reason) == ((0,), "", "stop")


def test_seeds_do_not_depend_on_the_batch() -> None:
    llm = make("softmax", f"draft-model:{model_dir('aug', 2)}")
    params = [SamplingParams(max_tokens=15, temperature=1.0, seed=s) for s in range(5)]
    together = llm.generate(PROMPTS, params)
    for prompt, each, result in zip(PROMPTS, params, together, strict=True):
        assert llm.generate(prompt, each)[0].token_ids == result.token_ids


@pytest.mark.parametrize("drafter", ["none", f"draft-model:{model_dir('aug')}"])
def test_logprobs_are_those_of_the_full_form(drafter: str) -> None:
    result = make("aug", drafter).generate("ab cd", SamplingParams(max_tokens=12, logprobs=3))[0]
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    prompt = tiny_tokenizer()("ab cd")["input_ids"]
    texts = [[*prompt, *result.token_ids[:n]] for n in range(len(result.token_ids))]
    rows = full_logits(text_model("aug"), texts).log_softmax(-1)
    for row, token, entry in zip(rows, result.token_ids, result.logprobs, strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert len(entry.top) == 3 and entry.top[0][0] == token
        values = torch.tensor([value for _, value in entry.top])
        torch.testing.assert_close(values, row.topk(3).values, rtol=0, atol=1e-4)


def test_leaving_a_stream_early_frees_the_engine(plain: LLM) -> None:
    for piece in plain.stream(PROMPTS, SamplingParams(max_tokens=30)):
        assert piece.done is None
        break
    assert not plain.engine.busy
    expected = make().generate(PROMPTS[1], SamplingParams(max_tokens=9))
    again = plain.generate(PROMPTS[1], SamplingParams(max_tokens=9))
    assert again[0].token_ids == expected[0].token_ids


def test_a_call_in_the_middle_of_a_stream_takes_nothing_from_it(plain: LLM) -> None:
    params = SamplingParams(max_tokens=5)
    alone = [each.token_ids for each in plain.generate(PROMPTS, params)]
    first = plain.stream(PROMPTS, params)
    seen = [next(first)]
    assert plain.generate(PROMPTS[0], params)[0].token_ids == alone[0]
    seen += first
    found = [[t for p in seen if p.index == i for t in p.token_ids] for i in range(len(PROMPTS))]
    assert [tuple(each) for each in found] == alone


def test_a_bad_request_among_good_ones_leaves_nothing_behind(plain: LLM) -> None:
    with pytest.raises(InputError, match="9999"):
        plain.generate([[1, 2], [9999]])
    with pytest.raises(InputError, match="logit_bias"):
        plain.generate(["ab", "cd"], [SamplingParams(), SamplingParams(logit_bias={9999: 1.0})])
    assert not plain.engine.busy


def test_prompts_that_cannot_be_used(plain: LLM) -> None:
    for prompts in ("", [], [""], [[]]):
        with pytest.raises(InputError):
            plain.generate(prompts)
    with pytest.raises(InputError, match="not valid text"):
        plain.generate("\udcff")
    with pytest.raises(ConfigError, match="2 sampling parameters for 1"):
        plain.generate("ab", [SamplingParams()] * 2)


def test_a_prompt_beyond_the_softmax_limit() -> None:
    long = [5] * 257
    with pytest.raises(ContextOverflow, match=r"257 tokens.*256.*linearize"):
        make("softmax").generate(long)
    assert len(make("aug").generate(long, SamplingParams(max_tokens=3))[0].token_ids) == 3


def test_a_decoder_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(text_model("aug"))
    llm = LLM(text_model("aug"), tokenizer=tiny_tokenizer())
    assert llm.generate("ab", SamplingParams(max_tokens=4))[0].token_ids


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"drafter": "nonsense"}, ConfigError),
        ({"drafter": "medusa"}, DrafterError),
        ({"drafter": "draft-model"}, DrafterError),
        ({"drafter": "draft-model:/nowhere"}, CheckpointError),
        ({"drafter": f"student:{model_dir('softmax')}"}, DrafterError),
        ({"verifier": "nonsense"}, ConfigError),
        ({"drafter": "prompt-lookup", "policy": "nonsense"}, ConfigError),
        ({"max_batch": 0}, ConfigError),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        make(**settings)  # type: ignore[arg-type]


def test_a_result_as_json(plain: LLM) -> None:
    data = plain.generate("ab", SamplingParams(max_tokens=4, logprobs=1))[0].to_json()
    assert {"text", "token_ids", "tokens_per_round", "tokens_per_s", "rounds"} <= set(data)
    assert (data["rounds"], data["tokens_per_round"]) == (3, 1.0)
    assert [entry["token"] for entry in data["logprobs"]] == data["token_ids"]


class Torn:
    """A tokenizer that cannot write one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __getattr__(self, name: str) -> object:
        return getattr(tiny_tokenizer(), name)

    def __call__(self, text: str, **options: object) -> object:
        return tiny_tokenizer()(text, **options)

    def decode(self, tokens: Sequence[int], **options: object) -> str:
        if self.token in tokens:
            raise RuntimeError("torn")
        return tiny_tokenizer().decode(tokens, **options)


def test_text_that_cannot_be_written_ends_its_request_alone(plain: LLM) -> None:
    """A failing tokenizer once ended every request of the call."""
    params = SamplingParams(max_tokens=12)
    whole = plain.generate(PROMPTS, params)
    seen = [
        set(tiny_tokenizer()(p)["input_ids"][-4:]) | set(r.token_ids)
        for p, r in zip(PROMPTS, whole, strict=True)
    ]
    at, token = next(
        (i, token)
        for i, result in enumerate(whole)
        for token in result.token_ids[2:]
        if not any(token in others for j, others in enumerate(seen) if j != i)
        and token not in tiny_tokenizer()(PROMPTS[i])["input_ids"]
    )
    llm = LLM(text_model("aug"), tokenizer=Torn(token), max_batch=3)
    for index, result in enumerate(llm.generate(PROMPTS, params, return_errors=True)):
        if index == at:
            assert (result.finish_reason, str(result.error)) == ("error", "torn")
            assert whole[index].text.startswith(result.text) and result.to_json()["error"] == "torn"
        else:
            assert result.error is None and result.token_ids == whole[index].token_ids
    assert sorted(llm.engine.scheduler.free) == [0, 1, 2]
    done, error = 0, None
    try:
        for piece in llm.stream(PROMPTS, params):
            done += piece.done is not None
    except RuntimeError as raised:
        error = raised
    # after the others have got all of theirs
    assert done == len(PROMPTS) and str(error) == "torn"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_may_say_nothing_says_so(plain: LLM, temperature: float) -> None:
    bans = dict.fromkeys(range(len(tiny_tokenizer())), float("-inf"))
    params = SamplingParams(temperature=temperature, logit_bias=bans)
    with pytest.raises(InputError, match="nothing is allowed"):
        plain.generate("ab", params)
    assert sorted(plain.engine.scheduler.free) == [0, 1, 2]


def test_closed_streams_give_their_slots_back(plain: LLM) -> None:
    for pieces in range(1, 6):
        stream = plain.stream(PROMPTS, SamplingParams(max_tokens=30))
        for _ in range(pieces):
            next(stream)
        stream.close()
        assert sorted(plain.engine.scheduler.free) == [0, 1, 2]
        assert not any(plain.engine.state.staged(slot) for slot in range(3))


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_the_next_turn_of_a_text_is_read_from_its_end(mixer: str, tmp_path: Path) -> None:
    llm, plain = make(mixer, prefix_cache="20MB", prefix_store=tmp_path / "store"), make(mixer)
    params, prompt = SamplingParams(max_tokens=9), "def f(x): return the end " * 3
    first = llm.generate(prompt, params)[0]
    assert first.cached_tokens == 0 and "cached_tokens" not in first.to_json()
    turn = [*llm.encode(prompt), *first.token_ids, *llm.encode("the end")]
    again = llm.generate(turn, params)[0]
    assert again.cached_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert again.to_json()["cached_tokens"] == again.cached_tokens
    assert again.token_ids == plain.generate(turn, params)[0].token_ids


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"prefix_cache": 0}, r"prefix_cache must be a number of bytes above 0.*got 0"),
        ({"prefix_cache": "much"}, "prefix_cache must be a number of bytes .*'much'"),
        ({"prefix_cache": True}, "prefix_cache must be a number of bytes"),
        ({"prefix_cache": "1.2.3MB"}, "prefix_cache must be a number of bytes"),
        (
            {"prefix_store": "here"},
            "prefix_store keeps what leaves the memory.*give prefix_cache too",
        ),
    ],
)
def test_a_prefix_cache_has_a_size(settings: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        make(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MB", 512 * 10**6), ("2GiB", 2**31), ("1.5 KB", 1500), ("77", 77), (5, 5), ("3B", 3)],
)
def test_sizes_in_bytes(text: object, expected: int) -> None:
    assert bytes_of("size", text) == expected


def test_two_models_of_one_decoder_in_two_threads_do_not_read_each_others_states() -> None:
    one = LLM("embedded-softmax", max_batch=1)
    other = LLM(one.model, tokenizer=one.tokenizer, max_batch=1)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [list(range(5, 5 + count)) for count in (2, 40, 90)]
    expected = [each.token_ids for each in one.generate(prompts, params)]

    def run(llm: LLM) -> list[list[list[int]]]:
        return [[each.token_ids for each in llm.generate(prompts, params)] for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (one, other)))
    assert found == [[expected] * 3] * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": 4}, "quantize=4 turns weights into integers as they are read"),
        ({"quantize": 99}, "quantize=99 turns weights"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is for a model that is read here"),
    ],
)
def test_what_is_done_to_a_model_as_it_loads_is_refused_for_a_loaded_one(
    settings: dict[str, Any], said: str
) -> None:
    """`LLM(model, quantize=4)` ignored it, so a measurement of 4 bits was one of floats."""
    with pytest.raises(ConfigError, match=said):
        LLM(text_model("softmax"), tokenizer=tiny_tokenizer(), **settings)
    LLM(text_model("softmax"), tokenizer=tiny_tokenizer(), dtype="float32")


def test_prompts_in_a_set_have_no_order_and_are_refused() -> None:
    llm = LLM(text_model("softmax"), tokenizer=tiny_tokenizer())
    with pytest.raises(WrongType, match="a prompt is a text or a list"):
        llm.generate({"one", "two"})  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_llm_that_is_copied_says_what_to_make_instead(copied: Callable[[Any], Any]) -> None:
    """It was an error about pointers of ctypes."""
    with pytest.raises(StateError, match=r"another on the same model: LLM\(llm.model"):
        copied(LLM(text_model("softmax"), tokenizer=tiny_tokenizer()))
