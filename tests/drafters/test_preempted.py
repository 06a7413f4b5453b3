"""Every registered drafter goes on where a sequence leaves its slot and comes back, maybe to another one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_drafters import make_net, make_target
from checkpoints import scratch
from helpers import mixer_config, random_tokens, randomise, tiny_config
from test_eagle import random_eagle
from test_engine import (
    random_chimera,
    random_heads,
    random_maps,
    random_prompts,
    random_slots,
    random_specdiff,
)
from test_first import random_routers
from test_universal import model_of
from tokenizer_kinds import tokenizer_of

from linspec import DRAFTERS, Request, SamplingParams
from linspec.checkpoints.hub import save_model
from linspec.decoding.sequence import RunningSequence
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.acceptance_head import AcceptanceConfig, AcceptanceHead
from linspec.drafters.base import Drafter
from linspec.drafters.block import Block
from linspec.drafters.draft_model import DraftModel, Student
from linspec.drafters.first import First, FirstOptions
from linspec.drafters.specdec_head import SpecDecHead
from linspec.engine.engine import Engine
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

SLOTS = 3
PROMPTS = [random_tokens(n, seed=n) for n in (5, 24, 1, 70, 13)]
PROMPTS[1] = PROMPTS[1][:8] * 3


def decoder(layers: int = 3) -> Decoder:
    mixers = [mixer_config("aug" if i == 1 else "softmax") for i in range(layers)]
    return randomise(Decoder(tiny_config(*mixers)), 1).double()


def other(model: Decoder, kind: type[DraftModel], mixer: str) -> Drafter:
    draft = randomise(Decoder(tiny_config(mixer_config(mixer))), 7).double()
    return kind(draft, model.config, SLOTS)


def headed(model: Decoder) -> Drafter:
    draft = randomise(Decoder(tiny_config(mixer_config("aug"))), 7).double()
    shape = AcceptanceConfig(
        width=draft.config.width,
        vocab_size=draft.config.vocab_size,
        draft="",
        draft_fingerprint="",
    )
    head = randomise(AcceptanceHead(shape), 2)
    return SpecDecHead(draft, model.config, SLOTS, head)


def universal(model: Decoder) -> Drafter:
    folder = scratch("preempted") / "draft"
    if not folder.exists():
        save_model(model_of("Unigram", "aug", seed=1), tokenizer_of("Unigram"), folder)
    context = DrafterContext(model, tokenizer_of("byte-level"), slots=SLOTS)
    return named(f"universal:{folder}", model, context)


def named(spec: str, model: Decoder, context: DrafterContext | None = None) -> Drafter:
    made = make_drafter(spec, context or DrafterContext(model, slots=SLOTS))
    assert made is not None
    return made


MADE: dict[str, Callable[[Decoder], Drafter]] = {
    "medusa": random_heads,
    "chimera": random_chimera,
    "hidden-transfer": random_maps,
    "ppd": random_prompts,
    "lud": random_slots,
    "eagle": random_eagle,
    "specdiff": random_specdiff,
    "block": lambda model: Block(make_net(model)),
    "draft-model": lambda model: other(model, DraftModel, "softmax"),
    "student": lambda model: other(model, Student, "aug"),
    "specdec-head": headed,
    "first": lambda model: First(
        DrafterContext(model, slots=SLOTS), FirstOptions(), random_routers(model)
    ),
    "universal": universal,
    "mixed": lambda model: named("suffix+prompt-lookup", model),
    "swift": lambda model: named("swift:interval=1,window=8,trials=4,ratio=0.5", model),
    "self-pages": lambda model: named("self-pages:budget=4,group=4,least=0", model),
    "self-window": lambda model: named("self-window:window=4,sinks=0,least=0", model),
    "prompt-lookup": lambda model: named("prompt-lookup:min_ngram=1", model),
}
TARGETS: dict[str, Callable[[], Decoder]] = {
    "block": make_target,
    "universal": lambda: model_of("byte-level").double(),
    "first": lambda: decoder(8),
    "self-bits": lambda: decoder().float(),
    "swift": lambda: decoder(6),
}


class Unsettled:
    """An engine in which any sequence may have to leave its slot before any step."""

    def __init__(self, model: Decoder, drafter: Drafter | None, seed: int | None) -> None:
        self.engine = Engine(
            model,
            verifier=LosslessVerifier(),
            drafter=drafter,
            policy=Fixed(4),
            slots=SLOTS,
            prefill_tokens=16,
        )
        self.rng = random.Random(seed)
        self.due = False
        if seed is not None:
            scheduler: Any = self.engine.scheduler
            scheduler.victims = self.victims

    def victims(self) -> list[RunningSequence]:
        running = self.engine.scheduler.running if self.due else []
        self.due = False
        chosen = [each for each in running if self.rng.random() < 0.3]
        # the others move up to the slots that are free first
        self.rng.shuffle(chosen)
        return chosen

    def run(self, params: SamplingParams) -> list[RunningSequence]:
        engine, done = self.engine, dict[int, RunningSequence]()
        for prompt in PROMPTS:
            engine.add(Request(tuple(prompt), params))
        while engine.busy:
            self.due = True
            for outcome in engine.step():
                assert outcome.error is None
                if outcome.finished:
                    done[outcome.sequence.request] = outcome.sequence
        return [done[request] for request in sorted(done)]


def outputs(rows: list[RunningSequence]) -> list[list[int]]:
    return [row.tokens[row.prompt_length :] for row in rows]


@pytest.fixture(autouse=True)
def _no_search_of_another_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


@pytest.mark.crossed(11)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", sorted(DRAFTERS.names()))
def test_a_pre_empted_sequence_gets_what_it_would_have_got(name: str, temperature: float) -> None:
    """Token for token, drafts that are sampled included, and it goes on having drafts."""
    model = TARGETS.get(name, decoder)().to_inference()
    make = MADE.get(name, lambda model: named(name, model))
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=5, ignore_eos=True)
    undisturbed = Unsettled(model, make(model), None).run(params)
    run = Unsettled(model, make(model), seed=3)
    rows = run.run(params)
    assert outputs(rows) == outputs(undisturbed)
    if temperature == 0:
        assert outputs(rows) == outputs(Unsettled(model, None, None).run(params))
    assert sum(row.preempted for row in rows) > 10
    assert all(row.parked is None for row in rows)
    drafted = [sum(row.stats.drafted for row in each) for each in (rows, undisturbed)]
    # no request here has a grammar that forces a token
    assert drafted[0] >= 0.9 * drafted[1] and (drafted[1] > 0 or name == "grammar")
    assert run.engine.scheduler.free == list(range(SLOTS)) and not run.engine.waiting


def test_random_numbers_of_sampled_drafts_go_with_their_sequence() -> None:
    """Began anew, they would be drawn again: the drafts of the same place, for other text."""
    model = decoder().to_inference()
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    drafted = []
    for seed in (None, 1, 2):
        run = Unsettled(model, other(model, DraftModel, "softmax"), seed)
        rows = run.run(params)
        drafted.append([(row.stats.rounds, row.stats.accepted) for row in rows])
    assert drafted[0] == drafted[1] == drafted[2]


def test_an_output_that_was_interrupted_counts_once_in_the_memory_of_outputs() -> None:
    model = decoder().to_inference()
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    kept = []
    for seed in (None, 3):
        drafter: Any = named("suffix", model)
        Unsettled(model, drafter, seed).run(params)
        kept.append((drafter._outputs.tokens, len(drafter._kept), len(drafter._own)))
    assert kept[0] == kept[1] == (40 * len(PROMPTS), len(PROMPTS), 0)


def test_trigrams_of_an_interrupted_text_are_learned_once() -> None:
    model = decoder().to_inference()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    weights = []
    for seed in (None, 3):
        drafter: Any = named("aded", model)
        Unsettled(model, drafter, seed).run(params)
        pairs = list(zip(PROMPTS[3], PROMPTS[3][1:], strict=False))
        weights.append([drafter.table.weight(pair) for pair in pairs])
    torch.testing.assert_close(torch.tensor(weights[0]), torch.tensor(weights[1]))
