"""Guests that make tokens in another way: beams, masked diffusion, embeddings, clients at the same time."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from checkpoints import model_dir

from guests import beam, client, diffusion, soft_prompt  # noqa: F401
from linspec import LLM, Request, SamplingParams
from linspec.errors import InputError, StateError, WrongType

PROMPTS = ("abcd end abcd end", "the end", "cd the abcd the", "x")
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("loop", ["guest-beam:width=1", "guest-diffusion"])
@pytest.mark.parametrize("mixer", ["aug", "softmax"])
def test_another_loop_that_takes_the_likeliest_token_is_greedy(loop: str, mixer: str) -> None:
    expected = [each.token_ids for each in LLM(model_dir(mixer)).generate(PROMPTS, GREEDY)]
    llm = LLM(model_dir(mixer), loop=loop, max_batch=3)
    assert [each.token_ids for each in llm.generate(PROMPTS, GREEDY)] == expected
    assert [each.token_ids for each in llm.generate(PROMPTS, GREEDY)] == expected


def test_beams_are_those_of_a_search_over_whole_texts() -> None:
    llm = LLM(model_dir("aug"), loop="guest-beam:width=3")
    (found,) = llm.generate("the end", SamplingParams(max_tokens=5, ignore_eos=True))
    prompt = llm.encode("the end")
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(5):
        scores = llm.model.full_logits(prompt, [tokens for _, tokens in beams])
        ways = [
            (total + float(row[token]), [*tokens, token])
            for (total, tokens), row in zip(beams, scores.double().log_softmax(-1), strict=True)
            for token in row.topk(3).indices.tolist()
        ]
        beams = sorted(ways, key=lambda way: -way[0])[:3]
    assert list(found.token_ids) == beams[0][1]


def test_a_beam_that_is_too_large_ends_with_its_error_alone() -> None:
    llm = LLM(model_dir("aug"), loop="guest-beam:width=4")
    asked = [GREEDY, SamplingParams(max_tokens=17, ignore_eos=True)]
    good, bad = llm.generate(PROMPTS[:2], asked, return_errors=True)
    assert good.error is None and len(good.token_ids) == 12
    assert "17 tokens are more than 64 nodes" in str(bad.error)


def test_diffusion_by_confidence_decides_every_mask_once() -> None:
    llm = LLM(model_dir("softmax"), loop="guest-diffusion:order=confidence,tokens=3")
    whole: list[int] = []
    for piece in llm.stream("abcd", GREEDY):
        whole += piece.token_ids
    assert len(whole) == 12


def test_embeddings_of_the_prompt_are_the_prompt() -> None:
    for mixer, drafter in (("aug", "none"), ("softmax", "prompt-lookup")):
        llm = LLM(model_dir(mixer), drafter=drafter, policy=3 if drafter != "none" else "auto")
        prompt = llm.encode("the end abcd the")
        (expected,) = llm.generate([prompt], GREEDY)
        rows = llm.model.embed.weight[prompt].detach()
        request = Request(tuple(prompt), GREEDY, rows)
        other = Request(tuple(prompt), GREEDY, rows.flip(0))
        found, flipped = llm.generate([request, other])
        assert found.token_ids == expected.token_ids
        (reversed_,) = llm.generate([prompt[::-1]], GREEDY)
        assert flipped.token_ids == reversed_.token_ids


def test_a_soft_prompt_stands_before_a_text_and_a_wrong_one_is_refused() -> None:
    llm = LLM(model_dir("aug"))
    prompt = llm.encode("the end")
    before = llm.model.embed.weight[llm.encode("abcd")].detach()
    (expected,) = llm.generate([[*llm.encode("abcd"), *prompt]], GREEDY)
    (found,) = llm.generate(soft_prompt.with_soft_prompt(llm, prompt, before, GREEDY))
    assert found.token_ids == expected.token_ids
    with pytest.raises(InputError, match="width of the model"):
        llm.generate(Request((1, 2), GREEDY, torch.zeros(3, 5)))


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_clients_at_the_same_time_get_what_they_would_get_alone(drafter: str) -> None:
    alone = [each.text for each in LLM(model_dir("aug")).generate(PROMPTS, GREEDY)]
    llm = LLM(model_dir("aug"), drafter=drafter, policy=3, max_batch=3)
    for patience in (None, 1, 4):
        clients = [client.Client(prompt) for prompt in PROMPTS]
        clients += [client.Client(prompt, patience) for prompt in PROMPTS]
        client.serve(llm, clients, GREEDY)
        for each, text in zip(clients, alone * 2, strict=True):
            assert text.startswith(each.text)
            assert each.done == (each.text == text) or each.patience is not None
        assert [each.text for each in clients[:4]] == alone
        assert not llm.engine.busy
        assert sorted(llm.engine.scheduler.free) == [0, 1, 2]


def test_streams_of_one_thread_can_be_read_in_turns() -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    alone = [each.text for each in llm.generate(PROMPTS[:3], GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
    texts = ["", "", ""]
    for _ in range(13):
        for place, stream in enumerate(streams):
            texts[place] += getattr(next(stream, None), "text", "")
    assert texts == alone
    assert not llm.engine.busy


def test_an_interrupted_step_ends_the_other_streams_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    first, second = (llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2])
    next(first)
    next(second)
    step = llm.engine.loop.round

    def interrupted(batch: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.loop, "round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(first)
    with pytest.raises(Exception, match="another caller of this engine was interrupted"):
        list(second)
    monkeypatch.setattr(llm.engine.loop, "round", step)
    assert not llm.engine.busy
    assert llm.generate("x", GREEDY)[0].error is None


def test_a_stream_that_is_closed_in_the_middle_of_a_step_ends_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    first, second = (llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2])
    expected = llm.generate(PROMPTS[1], GREEDY)[0].text
    next(first)
    step = llm.engine.loop.round

    def closing(batch: object) -> object:
        # as the garbage collector does with a stream that nobody holds
        first.close()
        return step(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.engine.loop, "round", closing)
    assert "".join(piece.text for piece in second) == expected
    assert not llm.engine.busy


def test_an_interrupt_while_outcomes_are_handed_out_ends_the_other_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    waiting = llm.stream(PROMPTS[0], GREEDY)
    next(waiting)
    hand_out = llm.streams.hand_out

    def interrupted(outcome: object) -> None:
        monkeypatch.setattr(llm.streams, "hand_out", hand_out)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.streams, "hand_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[1], GREEDY)
    with pytest.raises(StateError, match="interrupted in the middle of a step"):
        list(waiting)
    assert not llm.engine.busy


def test_a_call_from_inside_a_step_is_refused_and_ends_only_its_own_request() -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    alone = llm.generate(PROMPTS[0], GREEDY)[0].text

    def nested(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        llm.generate(PROMPTS[1], GREEDY)
        return scores

    bad = SamplingParams(max_tokens=5, logits_processors=(nested,))
    good, failed = llm.generate(PROMPTS[:2], [GREEDY, bad], return_errors=True)
    assert good.text == alone
    assert isinstance(failed.error, StateError)
    assert "inside one of its own steps" in str(failed.error)


def test_a_loop_that_raises_ends_the_sequences_of_its_round_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(model_dir("aug"), max_batch=2)

    def broken(batch: object) -> object:
        raise RuntimeError("a broken loop")

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.loop, "round", broken)
        found = llm.generate(PROMPTS[:2], GREEDY, return_errors=True)
    assert [str(each.error) for each in found] == ["a broken loop"] * 2
    assert llm.generate(PROMPTS[0], GREEDY)[0].error is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_beside_a_busy_thread_after_a_refused_call_is_refused_in_the_child() -> None:
    llm = LLM(model_dir("aug"), max_batch=2)
    inside, go = threading.Event(), threading.Event()

    def slow(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        go.wait(60)
        return scores

    params = SamplingParams(max_tokens=2, logits_processors=(slow,))
    thread = threading.Thread(target=llm.generate, args=(PROMPTS[0], params))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(InputError):
        llm.generate("", GREEDY)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            llm.generate("x", GREEDY)
        except StateError:
            os._exit(7)
        os._exit(1)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    "embeddings",
    [[[0.0]], torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 32, device="meta")],
    ids=["list", "whole numbers", "meta"],
)
def test_embeddings_of_wrong_types_are_refused_by_name(embeddings: object) -> None:
    llm = LLM(model_dir("aug"))
    with pytest.raises(WrongType, match="Request"):
        llm.generate(Request((1, 2), GREEDY, embeddings))  # type: ignore[arg-type]
    with pytest.raises(WrongType, match="SamplingParams"):
        llm.generate(Request((1, 2), None))  # type: ignore[arg-type]
    with pytest.raises(WrongType, match="linspec list"):
        LLM(model_dir("aug"), loop=5)  # type: ignore[arg-type]
