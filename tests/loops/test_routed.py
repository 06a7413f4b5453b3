"""FiRST without verification: what it computes, for each sequence, and that it is marked as lossy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, tiny_tokenizer
from helpers import mixer_config, random_tokens, randomise, tiny_config
from typer.testing import CliRunner

from linspec import LLM, Request, SamplingParams
from linspec.bench.drafters import bench_drafters
from linspec.checkpoints.hub import load_model, save_model
from linspec.cli import app
from linspec.cli.plugins import catalogue
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.drafters.routers import Routers, RoutersConfig
from linspec.drafters.saved import save_drafter
from linspec.engine.engine import Engine
from linspec.engine.loops.base import LOOPS, LoopContext
from linspec.engine.loops.first import First, FirstLoopOptions
from linspec.errors import ConfigError, DrafterError
from linspec.mixers.base import Rope
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.verifiers import LosslessVerifier

LAYERS = 8
PROMPTS = [random_tokens(n, seed=n) for n in (1, 7, 30, 90)]


def model_of(*mixers: str, dtype: torch.dtype = torch.float64) -> Decoder:
    made = [mixer_config(mixers[i % len(mixers)]) for i in range(LAYERS)]
    return randomise(Decoder(tiny_config(*made)), 1).to(dtype)


def routers_of(model: Decoder, bias: float = 0.0) -> Routers:
    """They find every other prompt to need other layers; with a great bias all need all."""
    shape = model.config
    config = RoutersConfig(width=shape.width, vocab_size=shape.vocab_size, layers=shape.layers)
    routers = Routers(config, model).to(model.dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        routers.weight.copy_(torch.randn(routers.weight.shape, generator=generator))
        routers.bias.fill_(bias)
    return routers


class Undisturbed(Engine):
    """An engine with the loop, whose routers are in memory."""

    def __init__(self, model: Decoder, routers: Routers, skip: int | None, **how: Any) -> None:
        super().__init__(model, verifier=LosslessVerifier(), **how)
        context = LoopContext(Target(model, self.state), LosslessVerifier())
        self.loop = First(context, FirstLoopOptions(skip=skip), routers)
        self.rounds.loop = self.loop


def decode(
    model: Decoder,
    routers: Routers,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    skip: int | None = None,
    **how: Any,
) -> list[RunningSequence]:
    engine = Undisturbed(model, routers, skip, **how)
    asked = [engine.add(Request(tuple(p), each)) for p, each in zip(prompts, params, strict=True)]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                done[outcome.sequence.request] = outcome.sequence
    return [done[each] for each in asked]


def outputs(rows: Sequence[RunningSequence]) -> list[list[int]]:
    return [row.tokens[row.prompt_length :] for row in rows]


def greedy(count: int = 12) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=count, ignore_eos=True) for _ in PROMPTS]


def hand_made(
    model: Decoder, skipped: frozenset[int], prompt: Sequence[int], count: int
) -> list[int]:
    """The specification: all layers for the prompt, and later tokens pass some layers by."""
    tokens = list(prompt)
    for _ in range(count):
        number = iter(range(LAYERS))

        def through(block: Block, x: torch.Tensor, rope: Rope) -> torch.Tensor:
            whole = block(x, rope)
            if next(number) in skipped:  # noqa: B023
                whole[:, len(prompt) :] = x[:, len(prompt) :]
            return whole

        with torch.no_grad():
            hidden = model.hidden(torch.tensor([tokens]), through)
            tokens.append(int(model.head(hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.crossed(4)
@pytest.mark.parametrize("mixers", [("softmax",), ("softmax", "aug"), ("aug",)], ids="-".join)
@pytest.mark.parametrize("skip", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["one call", "float64"])
def test_tokens_pass_the_layers_that_their_prompt_does_not_need(
    mixers: tuple[str, ...], skip: int | None, dtype: torch.dtype
) -> None:
    model = model_of(*mixers, dtype=dtype)
    routers = routers_of(model)
    chosen = [routers.skipped(routers.needed(model, prompt), skip) for prompt in PROMPTS]
    expected = [
        hand_made(model, skipped, prompt, 12)
        for skipped, prompt in zip(chosen, PROMPTS, strict=True)
    ]
    model.to_inference()
    rows = decode(model, routers, PROMPTS, greedy(), skip=skip)
    assert outputs(rows) == expected
    # other layers for every sequence, and a slot that another one had before
    if skip is None:
        assert len(set(chosen)) > 1
    assert outputs(decode(model, routers, PROMPTS, greedy(), skip=skip, slots=1)) == expected


def test_layers_are_chosen_once_however_the_prompt_is_read_and_whatever_is_drawn() -> None:
    model = model_of("softmax", "aug").to_inference()
    routers = routers_of(model)
    found = decode(model, routers, PROMPTS, greedy())
    assert outputs(decode(model, routers, PROMPTS, greedy(), prefill_tokens=5)) == outputs(found)
    calls: list[tuple[int, frozenset[int]]] = []
    whole = First._form

    def watched(self: First, part: Any) -> Any:
        if part.tree is not None:
            calls.append((part.sequence.number, self.forms.skipped(part.sequence)))
        return whole(self, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(First, "_form", watched)
        for seed in (1, 2):
            drawn = [
                SamplingParams(max_tokens=9, temperature=1.0, seed=seed, ignore_eos=True)
            ] * len(PROMPTS)
            decode(model, routers, PROMPTS, drawn)
    # every token but the first, which the prompt gives, is one step of one form
    assert len(calls) == 2 * len(PROMPTS) * 8 and len(set(calls)) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_that_needs_every_layer_is_decoded_plainly(temperature: float) -> None:
    model = model_of("softmax", "aug").to_inference()
    params = [SamplingParams(max_tokens=15, temperature=temperature, seed=n) for n in range(4)]
    plain = Engine(model, verifier=LosslessVerifier())
    asked = [plain.add(Request(tuple(p), each)) for p, each in zip(PROMPTS, params, strict=True)]
    done: dict[int, RunningSequence] = {}
    while plain.busy:
        done |= {o.sequence.request: o.sequence for o in plain.step() if o.finished}
    rows = decode(model, routers_of(model, 1000.0), PROMPTS, params)
    assert outputs(rows) == outputs([done[each] for each in asked])


def test_one_failing_step_ends_one_sequence_and_the_others_go_on() -> None:
    model = model_of("softmax", "aug").to_inference()
    routers = routers_of(model)
    expected = outputs(decode(model, routers, PROMPTS, greedy()))
    engine = Undisturbed(model, routers, None)
    asked = [engine.add(Request(tuple(p), each)) for p, each in zip(PROMPTS, greedy(), strict=True)]
    step, turns = Target.step, iter(range(10**6))

    def breaks(self: Target, inputs: Any, **how: Any) -> Any:
        if any(each.slot == 2 for each in inputs) and next(turns) >= 3:
            raise RuntimeError("broken")
        return step(self, inputs, **how)

    done: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "step", breaks)
        while engine.busy:
            done |= {o.sequence.request: o for o in engine.step() if o.finished}
    failed = [done[each].error is not None for each in asked]
    assert failed == [False, False, True, False]
    for each, tokens, gone in zip(asked, expected, failed, strict=True):
        assert gone or outputs([done[each].sequence]) == [tokens]


def test_a_sequence_that_leaves_its_slot_goes_on_with_its_layers() -> None:
    model = model_of("softmax", "aug").to_inference()
    routers = routers_of(model)
    expected = outputs(decode(model, routers, PROMPTS, greedy(20)))
    engine = Undisturbed(model, routers, None, slots=2)
    rng, due, scheduler = random.Random(3), [False], engine.scheduler

    def victims() -> list[RunningSequence]:
        running, due[0] = scheduler.running if due[0] else [], False
        return [each for each in running if rng.random() < 0.3]

    scheduler.victims = victims  # type: ignore[method-assign]
    asked = [
        engine.add(Request(tuple(p), each)) for p, each in zip(PROMPTS, greedy(20), strict=True)
    ]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        due[0] = True
        done |= {o.sequence.request: o.sequence for o in engine.step() if o.finished}
    assert outputs([done[each] for each in asked]) == expected
    assert sum(each.preempted for each in done.values()) > 5


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A model on disk and routers for it."""
    small = load_model(model_dir("aug")).config
    config = replace(small, layers=4, mixers=2 * small.mixers)
    model = randomise(Decoder(config), 1)
    source = save_model(model, tiny_tokenizer(), tmp_path / "model")
    model = load_model(source)
    return source, save_drafter(routers_of(model), model, tmp_path / "first", dtype=None)


def test_it_is_registered_as_lossy_and_bench_drafters_shows_how_far_it_agrees(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    source, routers = trained
    entry = next(each for each in catalogue()["loops"] if each["name"] == "first")
    assert entry["lossless"] == "no" and not LOOPS["first"].lossless
    assert all(each.value.lossless for each in LOOPS if each.name != "first")
    (tmp_path / "a.txt").write_text("abcd end the end\n" * 200)
    how: dict[str, Any] = {"data": [tmp_path / "a.txt"], "tokens": 8, "per_family": 2}
    found = bench_drafters(source, loops=[f"first:{routers},skip=1"], **how)
    first = next(row for row in found.rows if row.drafter.startswith("loop first"))
    assert first.lossy and first.agreement is not None and 0 <= first.agreement <= 1
    assert first.tokens_per_round == 1.0
    assert [row.lossy for row in found.rows] == [False, True, False]
    both = bench_drafters(source, ["prompt-lookup"], loops=[f"first:{routers},skip=1"], **how)
    assert [row.lossy for row in both.rows] == [False, False, True, False]
    verb = ("bench", "drafters", source, "--loop", f"first:{routers},skip=1", "--tokens", 8)
    told = CliRunner().invoke(app, [*map(str, verb), "--data", str(tmp_path / "a.txt")])
    assert told.exit_code == 0, told.output
    assert "is lossy: " in told.stderr


def test_a_model_by_name_and_what_does_not_go_together(trained: tuple[Path, Path]) -> None:
    source, routers = trained
    llm = LLM(source, loop=f"first:{routers},skip=1", prefix_cache="1MB")
    assert llm.engine.prefix_cache is None
    assert len(llm.generate("the end", SamplingParams(max_tokens=5))[0].token_ids) <= 5
    with pytest.raises(ConfigError, match="needs trained routers: first:DIR"):
        LLM(source, loop="first")
    with pytest.raises(ConfigError, match="'prompt-lookup' has no place in it"):
        LLM(source, loop=f"first:{routers}", drafter="prompt-lookup")
    with pytest.raises(DrafterError, match="loop 'first' cannot leave out 60 layers"):
        LLM(source, loop=f"first:{routers},skip=60")
    with pytest.raises(ConfigError, match="skip must be 1 or more"):
        FirstLoopOptions(skip=0)
