"""Beam sampling with drafts: states, law, ends; what it is exact in and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import model_dir
from helpers import full_logits, random_tokens, tiny_model
from scipy.stats import chi2_contingency, chisquare

from linspec import LLM, SamplingParams
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.drafters.draft_model import DraftModel
from linspec.engine.engine import Engine
from linspec.engine.loops.beam_drafts import distribution
from linspec.engine.loops.dsbd import DsbdOptions
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.verifiers import LosslessVerifier
from linspec.verifiers.beam_layers import accepted_law, joint, judge_layer, layer_width


def decode(
    model: Decoder,
    small: Decoder | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    loop: str,
    *,
    slots: int = 3,
    **options: Any,
) -> list[RunningSequence]:
    """The finished sequences, in the order of their requests."""
    drafter = None if small is None else DraftModel(small, model.config, slots)
    engine = Engine(
        model, verifier=LosslessVerifier(), drafter=drafter, loop=loop, slots=slots, **options
    )
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


class Slow:
    """The same search over whole texts, without any state: every distribution by the full form."""

    def __init__(
        self, model: Decoder, small: Decoder | None, prompt: list[int], params: SamplingParams,
        options: DsbdOptions,
    ) -> None:  # fmt: skip
        self.model, self.small, self.prompt, self.options = model, small, prompt, options
        self.most = params.max_tokens
        vocab, eos = model.config.vocab_size, model.config.eos_ids
        self.sampler = Sampler(params, prompt, vocab, eos)
        self.live: list[tuple[tuple[int, ...], float, float]] = [((), 1.0, 0.0)]
        self.ended: list[tuple[tuple[int, ...], float, float]] = []
        self.steps = 0

    def rows(self, model: Decoder, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        logits = full_logits(model, [[*self.prompt, *text] for text in texts])
        pairs = zip(logits, texts, strict=True)
        return torch.stack([distribution(self.sampler, row, text) for row, text in pairs])

    def over(self) -> bool:
        if len(self.ended) >= self.options.width or not self.live:
            return True
        return len(self.live[0][0]) >= self.most

    def take(self, layer: Any = None) -> bool:
        texts, weights = [t for t, _, _ in self.live], [w for _, w, _ in self.live]
        rows = self.rows(self.model, texts)
        p = joint(weights, rows)
        vocab = p.shape[1]
        if layer is None:
            found = [self.sampler.draw(p.flatten()) for _ in range(self.options.width)]
            kept = False
        else:
            held, q, draws = layer
            q = q[[held.index(text) for text in texts]].flatten()
            numbers = [
                texts.index(held[b]) * vocab + t if held[b] in texts else None for b, t in draws
            ]
            law = accepted_law(p.flatten(), q, len(draws))
            width = layer_width(law, self.options.threshold, self.options.least)
            found, kept = judge_layer(
                p.flatten(), q, numbers, width, self.options.width, self.sampler
            )
        live, self.live = self.live, []
        for pair in dict.fromkeys(found):
            beam, token = divmod(pair, vocab)
            text, _, score = live[beam]
            child = (*text, token), float(p[beam, token]), score + math.log(rows[beam, token])
            (self.ended if token in self.sampler.ends else self.live).append(child)
        return kept

    def layers(self) -> list[Any]:
        found: list[Any] = []
        if self.small is None:
            return found
        beams = [(text, weight) for text, weight, _ in self.live]
        for _ in range(min(self.options.depth, self.most - len(self.live[0][0]) - 1)):
            if not beams:
                break
            texts = [text for text, _ in beams]
            q = joint([weight for _, weight in beams], self.rows(self.small, texts))
            draws = [
                divmod(self.sampler.draw(q.flatten()), q.shape[1])
                for _ in range(self.options.width)
            ]
            found.append((texts, q, draws))
            beams = [
                ((*texts[b], t), float(q[b, t]))
                for b, t in dict.fromkeys(draws)
                if t not in self.sampler.ends
            ]
        return found

    def run(self) -> list[int]:
        self.take()
        while not self.over():
            self.steps += 1
            layers = self.layers()
            while layers and self.take(layers[0]) and not self.over():
                layers.pop(0)
            if not layers and not self.over():
                self.take()
        return list(max((*self.ended, *self.live), key=lambda each: each[2] / len(each[0]))[0])


@pytest.mark.parametrize("mixer", ["softmax", "aug", "window", "gdn"])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_every_state_gives_what_whole_texts_give(mixer: str, drafted: bool) -> None:
    model = tiny_model(mixer)
    # close to the target, so that several layers are kept
    small = tiny_model(mixer, seed=0) if drafted else None
    if small is not None:
        with torch.no_grad():
            for weight in small.parameters():
                weight.mul_(1.02)
    ends = (3, 17) if mixer != "aug" else ()
    model.config = replace(model.config, eos_ids=ends)
    options = DsbdOptions(width=3, depth=2, least=1, threshold=0.5)
    prompts = [random_tokens(n, seed=n) for n in (1, 4, 11, 6)]
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=n, repetition_penalty=1.1, top_k=k)
        for n, t, k in ((12, 1.0, 0), (3, 0.7, 5), (17, 0.4, 0), (1, 1.0, 0))
    ]
    loop = "dsbd:width=3,depth=2,least=1,threshold=0.5"
    found = decode(model, small, prompts, params, loop, prefill_tokens=5)
    slow = [
        Slow(model, small, prompt, each, options)
        for prompt, each in zip(prompts, params, strict=True)
    ]
    assert outputs(found) == [each.run() for each in slow]
    assert [each.stats.rounds for each in found] == [each.steps for each in slow]
    if drafted:
        assert sum(each.stats.accepted for each in found) > 3


def test_company_changes_nothing() -> None:
    model, small = tiny_model("aug"), tiny_model("softmax", seed=4)
    prompts = [random_tokens(n, seed=n) for n in (3, 12, 1, 8, 5)]
    params = [SamplingParams(max_tokens=9, temperature=0.8, seed=n) for n in range(5)]
    loop = "dsbd:width=4,depth=3"
    together = outputs(decode(model, small, prompts, params, loop))
    for prompt, each, tokens in zip(prompts, params, together, strict=True):
        assert outputs(decode(model, small, [prompt], each, loop)) == [tokens]


@pytest.mark.parametrize("small", [None, "softmax"])
def test_at_temperature_0_it_is_greedy_decoding(small: str | None) -> None:
    model, drafts = tiny_model("aug"), small and tiny_model(small, seed=4)
    params = SamplingParams(max_tokens=14, repetition_penalty=1.3)
    prompts = [random_tokens(n, seed=n) for n in (3, 8)]
    wanted = outputs(decode(model, None, prompts, params, "autoregressive"))
    assert outputs(decode(model, drafts, prompts, params, "dsbd:width=3")) == wanted


ALLOWED, PROMPT = (3, 7, 11, 19), (1, 2, 3)


def exact_joint(
    model: Decoder, params: SamplingParams, length: int
) -> dict[tuple[int, ...], float]:
    texts = list(itertools.product(ALLOWED, repeat=length))
    chances = dict.fromkeys(texts, 1.0)
    for prefix in {text[:depth] for text in texts for depth in range(length)}:
        sampler = Sampler(params, PROMPT, model.config.vocab_size)
        row = sampler.probabilities(full_logits(model, [(*PROMPT, *prefix)])[0], prefix)
        for text in texts:
            if text[: len(prefix)] == prefix:
                chances[text] *= float(row[text[len(prefix)]])
    return chances


def counted(
    model: Decoder, small: Decoder | None, loop: str, count: int, length: int
) -> Counter[tuple[int, ...]]:
    params = SamplingParams(
        max_tokens=length, temperature=1.0, n=count, allowed_token_ids=ALLOWED, seed=5
    )
    return Counter(map(tuple, outputs(decode(model, small, [PROMPT], params, loop, slots=64))))


def test_a_width_of_one_has_the_law_of_the_target() -> None:
    model, small, count = tiny_model("softmax"), tiny_model("aug", seed=9), 600
    chances = exact_joint(model, SamplingParams(temperature=1.0, allowed_token_ids=ALLOWED), 3)
    counts = counted(model, small, "dsbd:width=1,depth=2", count, 3)
    due = [chances[text] * count for text in sorted(chances)]
    seen = [counts[text] for text in sorted(chances)]
    common = [place for place, each in enumerate(due) if each >= 5]
    rest = [place for place in range(len(due)) if place not in common]
    observed = [seen[c] for c in common] + [sum(seen[r] for r in rest)]
    expected = [due[c] for c in common] + [sum(due[r] for r in rest)]
    assert chisquare(observed, [e * count / sum(expected) for e in expected]).pvalue > 1e-4


@pytest.mark.slow
def test_one_drafted_layer_of_full_width_has_the_law_of_beam_sampling() -> None:
    """Asked for all its draws, a layer has as many beams whichever way it ends: nothing tells of tokens."""
    model, small = tiny_model("softmax"), tiny_model("aug", seed=9)
    plain = counted(model, None, "dsbd:width=2", 600, 3)
    drafted = counted(model, small, "dsbd:width=2,depth=1,least=2,threshold=0", 600, 3)
    cells = [text for text in {*plain, *drafted} if plain[text] + drafted[text] >= 10]
    table = [[found[text] for text in cells] for found in (plain, drafted)]
    assert chi2_contingency(table).pvalue > 1e-4
    # and it is not that of sampling one token after the other
    chances = exact_joint(model, SamplingParams(temperature=1.0, allowed_token_ids=ALLOWED), 3)
    due = [chances[text] * 600 for text in cells]
    assert chisquare(table[0], [e * sum(table[0]) / sum(due) for e in due]).pvalue < 1e-4


def test_a_copy_of_the_target_gives_several_tokens_a_step() -> None:
    model = tiny_model("aug")
    params = SamplingParams(max_tokens=25, temperature=1.0, seed=1)
    (found,) = decode(model, model, [[1, 2, 3]], params, "dsbd:width=3,depth=3")
    assert found.emitted == 25
    assert found.stats.tokens_per_round == 4.0


def test_a_draft_model_at_its_last_position_stops_drafting() -> None:
    model, small = tiny_model("aug"), tiny_model("softmax", seed=3, max_positions=12)
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=1)
    found = decode(
        model, small, [random_tokens(5), random_tokens(30)], params, "dsbd:width=2,depth=3"
    )
    assert [each.emitted for each in found] == [20, 20]
    assert found[1].stats.drafted == 0 < found[0].stats.drafted


def test_logprobs_are_the_model_s_own() -> None:
    llm = LLM(model_dir("aug"), drafter=f"draft-model:{model_dir('aug', 1)}", loop="dsbd:width=3")
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=3, logprobs=1, n=2)
    (found,) = llm.generate("the end", params)
    prompt = llm.encode("the end")
    for each in found.outputs:
        assert [entry.token for entry in each.logprobs] == list(each.token_ids)
        for place, entry in enumerate(each.logprobs):
            row = llm.model.full_logits(prompt, [each.token_ids[:place]])[0].log_softmax(-1)
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
    again = llm.generate("the end", params)[0]
    assert [each.token_ids for each in again.outputs] == [each.token_ids for each in found.outputs]


def test_what_it_cannot_do_is_refused_by_name_before_work_starts() -> None:
    with pytest.raises(ConfigError, match=r"loop 'dsbd' needs the distributions.*prompt-lookup"):
        LLM(model_dir("softmax"), loop="dsbd", drafter="prompt-lookup")
    for setting, message in (
        ("width=0", "width and depth must be 1 or more"),
        ("least=5", "least must be from 1 to width"),
        ("threshold=1.5", "threshold must be at most 1"),
        ("width=21,depth=3", r"\(width \+ 1\) \* depth must be below 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model_dir("softmax"), loop=f"dsbd:{setting}")


def test_a_broken_processor_ends_its_request_alone() -> None:
    llm = LLM(model_dir("aug"), drafter=f"draft-model:{model_dir('aug', 1)}", loop="dsbd:width=2")

    def broken(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise RuntimeError("a broken processor")
        return scores

    params = SamplingParams(max_tokens=6, temperature=0.5, seed=1)
    good, bad = llm.generate(
        ["x", "the end"],
        [params, replace(params, logits_processors=(broken,))],
        return_errors=True,
    )
    assert str(bad.error) == "a broken processor"
    assert good.token_ids == llm.generate("x", params)[0].token_ids
