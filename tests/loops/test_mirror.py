"""Mirror speculative decoding: the verifier's output, ready windows, and the virtual clock of two devices."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import model_dir
from helpers import assert_close, full_logits, prefilled, random_tokens, remembered, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from linspec import LLM, SamplingParams
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.drafters.draft_model import DraftModel
from linspec.engine.engine import Engine
from linspec.engine.loops.mirror_clock import Costs, Verdict, hit_rate, overlapped, synchronous
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import make_verifier

PROMPTS = [random_tokens(n, seed=n) for n in (1, 3, 7, 12, 23)]


def engine_of(
    model: Decoder, small: Decoder | None, loop: str, *, slots: int = 3, window: int = 3,
    verifier: str = "lossless", **options: Any,
) -> Engine:  # fmt: skip
    drafter = None if small is None else DraftModel(small, model.config, slots)
    return Engine(
        model, verifier=make_verifier(verifier), drafter=drafter, policy=Fixed(window),
        loop=loop, slots=slots, **options,
    )  # fmt: skip


def run(engine: Engine, prompts: Sequence[Sequence[int]], params: Any) -> list[RunningSequence]:
    """The finished sequences, in the order of their requests."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for prompt, asked in zip(prompts, each, strict=True):
        engine.add(Request(tuple(prompt), asked))
    done = []
    while engine.busy:
        for outcome in engine.step():
            if outcome.error is not None:
                raise outcome.error
            if outcome.finished:
                done.append(outcome.sequence)
    return sorted(done, key=lambda sequence: sequence.number)


def outputs(found: Sequence[RunningSequence]) -> list[list[int]]:
    return [each.tokens[each.prompt_length :] for each in found]


def close_to(mixer: str, factor: float = 1.1) -> Decoder:
    """A model that agrees with `tiny_model(mixer)` now and then."""
    small = tiny_model(mixer)
    with torch.no_grad():
        for weight in small.parameters():
            weight.mul_(factor)
    return small


@pytest.mark.crossed(3)
@pytest.mark.parametrize("mixer", ["softmax", "aug", "window"])
@pytest.mark.parametrize("settings", [(3, 4), (3, 0), (2, 1), (1, 6)])
def test_greedy_output_is_plain_decoding_in_as_many_rounds_as_plain_speculation(
    mixer: str, settings: tuple[int, int]
) -> None:
    window, guesses = settings
    model, small = tiny_model(mixer), close_to(mixer)
    params = [SamplingParams(max_tokens=n) for n in (1, 2, 9, 24, 17)]
    wanted = run(engine_of(model, None, "autoregressive"), PROMPTS, params)
    synchronous = run(engine_of(model, small, "autoregressive", window=window), PROMPTS, params)
    loop = f"mirror:window={window},guesses={guesses},exit=2"
    mirror = engine_of(model, small, loop, window=window, prefill_tokens=5)
    found = run(mirror, PROMPTS, params)
    assert outputs(found) == outputs(wanted)
    for mine, theirs in zip(found, synchronous, strict=True):
        # a window that was ready is the window that would have been drafted
        assert (mine.stats.rounds, mine.stats.accepted) == (
            theirs.stats.rounds,
            theirs.stats.accepted,
        )
    ready = hit_rate(mirror.loop.rollouts.verdicts)
    assert ready == 0 if not guesses else ready > 0.5


def test_without_guesses_there_are_as_many_steps_of_both_models(monkeypatch) -> None:
    model, small = tiny_model("aug"), close_to("aug")
    counts: list[list[int]] = []
    for loop in ("autoregressive", "mirror:window=3,guesses=0"):
        steps = [0, 0]
        for place, each in enumerate((model, small)):
            step = type(each).step.__get__(each)

            def counted(*given: Any, place=place, step=step, steps=steps, **named: Any) -> Any:
                steps[place] += 1
                return step(*given, **named)

            monkeypatch.setattr(each, "step", counted)
        run(engine_of(model, small, loop), [PROMPTS[2]], SamplingParams(max_tokens=20))
        counts.append(steps)
        monkeypatch.undo()
    assert counts[1][0] == counts[0][0]
    # plain speculation reads accepted tokens by a step of its own now and then
    assert counts[1][1] <= counts[0][1]


ALLOWED, PROMPT = (3, 7, 11, 19), (1, 2, 3)


@pytest.mark.crossed(2)
@pytest.mark.parametrize(("verifier", "guesses"), [("lossless", 1), ("block", 4)])
def test_sampled_output_has_the_law_of_the_target(verifier: str, guesses: int) -> None:
    model, small, count, length = tiny_model("softmax"), close_to("softmax", 1.3), 600, 4
    loop = f"mirror:window=2,guesses={guesses},exit=1"
    engine = engine_of(model, small, loop, slots=64, window=2, verifier=verifier)
    params = SamplingParams(
        max_tokens=length, temperature=1.0, n=count, allowed_token_ids=ALLOWED, seed=5
    )
    counts = Counter(map(tuple, outputs(run(engine, [PROMPT], params))))
    texts = sorted(itertools.product(ALLOWED, repeat=length))
    chances = dict.fromkeys(texts, 1.0)
    prefixes = sorted({text[:depth] for text in texts for depth in range(length)})
    logits = {
        p: row
        for depth in range(length)
        for group in [[p for p in prefixes if len(p) == depth]]
        for p, row in zip(group, full_logits(model, [(*PROMPT, *p) for p in group]), strict=True)
    }
    for prefix in prefixes:
        sampler = Sampler(replace(params, n=1), PROMPT, model.config.vocab_size)
        row = sampler.probabilities(logits[prefix], prefix)
        for text in texts:
            if text[: len(prefix)] == prefix:
                chances[text] *= float(row[text[len(prefix)]])
    due = [chances[text] * count for text in texts]
    common = [place for place, each in enumerate(due) if each >= 5]
    rest = [place for place in range(len(due)) if place not in common]
    seen = [counts[texts[c]] for c in common] + [sum(counts[texts[r]] for r in rest)]
    expected = [due[c] for c in common] + [sum(due[r] for r in rest)]
    assert chisquare(seen, [e * count / sum(expected) for e in expected]).pvalue > 1e-4
    verdicts = engine.loop.rollouts.verdicts
    assert any(each.accepted for each in verdicts)
    # with a guess for every token that is allowed, a window is always ready
    assert hit_rate(verdicts) == 1 if guesses == 4 else 0 < hit_rate(verdicts) < 1


@pytest.mark.slow
def test_more_guesses_and_later_layers_make_more_windows_ready() -> None:
    model, small = tiny_model("aug", "aug", "aug", "aug"), tiny_model("aug", seed=3)
    rates: dict[tuple[int, int], float] = {}
    for guesses, after in itertools.product((1, 4, 12), (1, 4)):
        loop = f"mirror:window=1,guesses={guesses},exit={after}"
        engine = engine_of(model, small, loop, window=1)
        run(engine, PROMPTS, SamplingParams(max_tokens=25, temperature=1.0, seed=1))
        rates[guesses, after] = hit_rate(engine.loop.rollouts.verdicts)
    for after in (1, 4):
        assert rates[1, after] < rates[4, after] < rates[12, after]
    for guesses in (1, 4, 12):
        assert rates[guesses, 1] < rates[guesses, 4]


@pytest.mark.parametrize("settings", [{"seed": 3}, {"seed": 3, "repetition_penalty": 1.3}])
def test_company_and_a_repeated_call_change_nothing(settings: dict[str, Any]) -> None:
    model, small = tiny_model("aug"), close_to("aug")
    params = SamplingParams(max_tokens=15, temperature=0.8, **settings)
    loop = "mirror:window=3,guesses=3"
    engine = engine_of(model, small, loop)
    together = outputs(run(engine, PROMPTS, params))
    assert outputs(run(engine, PROMPTS, params)) == together
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        assert outputs(run(engine_of(model, small, loop), [prompt], params)) == [tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sequence_that_leaves_its_slot_has_the_windows_that_it_would_have_had(
    temperature: float,
) -> None:
    model, small = tiny_model("aug"), close_to("aug")
    params = SamplingParams(max_tokens=25, temperature=temperature, seed=3)
    engine = engine_of(model, small, "mirror:window=3,guesses=3", slots=2)
    alone = [outputs(run(engine, [prompt], params))[0] for prompt in PROMPTS]
    for priority, prompt in enumerate(PROMPTS):
        engine.add(Request(tuple(prompt), params, priority=priority))
        engine.step()
        engine.step()
    assert engine.waiting == len(PROMPTS) - 2
    done = [each.sequence for _ in range(200) for each in engine.step() if each.finished]
    rows = sorted(done, key=lambda sequence: sequence.number)
    assert sum(row.preempted for row in rows) >= len(PROMPTS) - 2
    assert outputs(rows) == alone


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_requests_that_are_dropped_leave_no_trace(mixer: str) -> None:
    """Random cancellations; what the draft model keeps of the others is what a fresh prefill gives."""
    model, small = tiny_model(mixer), close_to(mixer)
    engine, rng = engine_of(model, small, "mirror:window=2,guesses=3"), random.Random(1)
    params = SamplingParams(max_tokens=12)
    wanted = [
        outputs(run(engine_of(model, None, "autoregressive"), [p], params))[0] for p in PROMPTS
    ]
    asked: dict[int, int] = {}
    finished = dropped = 0
    for _ in range(150):
        if len(asked) < 5:
            prompt = rng.randrange(len(PROMPTS))
            asked[engine.add(Request(tuple(PROMPTS[prompt]), params))] = prompt
        for outcome in engine.step():
            if outcome.finished:
                assert outcome.error is None
                finished += 1
                assert outputs([outcome.sequence])[0] == wanted[asked.pop(outcome.sequence.request)]
        if rng.random() < 0.3 and asked:
            handle = rng.choice(list(asked))
            engine.abort(handle)
            del asked[handle]
            dropped += 1
        states = engine.loop.rollouts.states
        for each in engine.scheduler.running:
            fed = states.fed[each.slot]
            if fed and rng.random() < 0.1:
                fresh = prefilled(small, each.tokens[:fed])
                mine = remembered(small, states.target.state, each.slot)
                assert_close(mine, remembered(small, fresh))
    assert finished > 12 and dropped > 12


def test_a_draft_model_at_its_last_position_stops_drafting() -> None:
    model = tiny_model("aug")
    small = tiny_model("softmax", seed=3, max_positions=14)
    prompts = [random_tokens(5), random_tokens(30), random_tokens(13)]
    params = SamplingParams(max_tokens=20)
    wanted = outputs(run(engine_of(model, None, "autoregressive"), prompts, params))
    found = run(engine_of(model, small, "mirror:window=3,guesses=2"), prompts, params)
    assert outputs(found) == wanted
    assert found[1].stats.drafted == 0 < found[0].stats.drafted


def test_logprobs_stops_and_ends_act_as_without_drafts() -> None:
    plain = LLM(model_dir("aug"))
    drafter = f"draft-model:{model_dir('aug', 1)}"
    mirror = LLM(model_dir("aug"), drafter=drafter, loop="mirror", policy=3)
    params = SamplingParams(
        max_tokens=14, logprobs=1, prompt_logprobs=0, frequency_penalty=0.5, logit_bias={5: 1.0},
        min_tokens=3, ignore_eos=True,
    )  # fmt: skip
    prompts = ["the end", "abcd end abcd end"]
    wanted, found = plain.generate(prompts, params), mirror.generate(prompts, params)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert [e.logprob for e in mine.logprobs] == pytest.approx(
            [e.logprob for e in theirs.logprobs], abs=1e-4
        )
        stop = next(each for each in theirs.text[2:] if each.strip())
        cut = replace(params, stop=(stop,), logprobs=None)
        prompt = prompts[found.index(mine)]
        assert mirror.generate(prompt, cut)[0].text == plain.generate(prompt, cut)[0].text


def test_what_it_cannot_do_is_refused_by_name_before_work_starts() -> None:
    for drafter in ("none", "prompt-lookup"):
        with pytest.raises(ConfigError, match=rf"loop 'mirror' rolls out a draft.*'{drafter}'"):
            LLM(model_dir("softmax"), loop="mirror", drafter=drafter)
    drafter = f"draft-model:{model_dir('aug', 1)}"
    for setting, message in (
        ("window=0", "window must be 1 or more"),
        ("window=4,guesses=4", "takes 90 draft nodes, at most 64 fit"),
        ("exit=3", "behind layer 3, and this model has 2"),
        ("exit=0", "exit of loop 'mirror'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model_dir("softmax"), loop=f"mirror:{setting}", drafter=drafter)


def test_the_clock_of_one_round_by_hand() -> None:
    costs = Costs(target=10.0, exit=0.4, draft=3.0, rollout=5.0, message=0.5)
    assert synchronous([Verdict(2, True)], costs) == 14.0
    # nothing is ready for the first round; the second one finds its window
    assert overlapped([Verdict(2, True)], costs) == 3 + 4 + 6 + 1
    assert overlapped([Verdict(2, True), Verdict(0, False)], costs) == 14 + 11
    # rollouts that take longer than the upper layers are waited for
    assert overlapped([Verdict(2, True)], replace(costs, rollout=9.0)) == 3 + 4 + 9 + 1


@given(
    ready=st.lists(st.booleans(), min_size=20, max_size=60), draft=st.floats(0.1, 5.0),
    exit=st.floats(0.1, 0.9),
)  # fmt: skip
@settings(max_examples=settings().max_examples * 3, deadline=None)
def test_what_two_devices_gain_is_what_the_hit_rate_says(ready, draft, exit) -> None:
    verdicts = [Verdict(0, each) for each in ready]
    target = 10.0
    rollout = min(draft, (1 - exit) * target)
    costs = Costs(target=target, exit=exit, draft=draft, rollout=rollout)
    gain = synchronous(verdicts, costs) / overlapped(verdicts, costs) - 1
    # the last verdict prepares a round that never comes
    rate = hit_rate(verdicts[:-1]) * (len(ready) - 1) / len(ready)
    assert gain >= rate * draft / (draft + target) * 0.9 - 1e-12
    never = [Verdict(0, False)] * len(ready)
    assert overlapped(never, costs) == pytest.approx(synchronous(never, costs))
