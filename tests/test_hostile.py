"""What fails for one request stays with it, wherever and whenever it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import VOCAB, random_tokens, tiny_model
from hypothesis import settings
from test_engine import RandomTrees, random_heads

from linspec.decoding.accepted import Accepted
from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput, StepOutput
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.aded import Aded
from linspec.drafters.base import Drafter
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.drafters.mixed import Mixed
from linspec.drafters.suffix import Suffix
from linspec.engine.engine import Engine
from linspec.errors import DrafterError, InputError
from linspec.models.decoder import Decoder
from linspec.policies.base import Policy, RoundTimes
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

SLOTS = 3
HISTORIES = settings().max_examples * 12
# where a request may fail; "time" is about no request and may harm none
PLACES = (
    *("open", "started", "plan", "propose", "foreign", "step", "accept", "path"),
    *("policy", "drafter", "sampler", "finished", "time"),
)


class Planted(Exception):
    """What a faulty part raises."""


class Faults:
    """Raises for some requests, each at one place, from one of its visits to that place on."""

    def __init__(self, planted: dict[int, tuple[str, int]]) -> None:
        self.planted = planted
        self.visits: dict[tuple[int, str], int] = {}

    def due(self, request: int, place: str) -> bool:
        visit = self.visits[request, place] = self.visits.get((request, place), -1) + 1
        known = self.planted.get(request)
        return known is not None and known[0] == place and visit >= known[1]

    def at(self, place: str, *rows: RunningSequence) -> None:
        for row in rows:
            if self.due(row.request, place):
                raise Planted(f"request {row.request} at {place}")


class HostileDrafter(Drafter):
    """A drafter with faults before, in and after its work."""

    name = "test-hostile"

    def __init__(self, inner: Drafter, faults: Faults) -> None:
        self.inner, self.faults, self.max_nodes = inner, faults, inner.max_nodes

    def propose(
        self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = self.inner.propose(rows, budgets)
        # after the work is done: asked again, the inner drafter has to say the same
        self.faults.at("propose", *rows)
        bad = [self.faults.due(row.request, "foreign") for row in rows]
        foreign = [chain((row.root, VOCAB)) for row in rows]
        return [f if b else tree for f, b, tree in zip(foreign, bad, trees, strict=True)]

    def expected(self, budget: Budget) -> float:
        return self.inner.expected(budget)

    def observe(self, row: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        self.inner.observe(row, tree, path)
        self.faults.at("drafter", row)

    def started(self, row: RunningSequence) -> None:
        row.sampler = HostileSampler(row.params, row.tokens, VOCAB)
        row.sampler.faults, row.sampler.request = self.faults, row.request
        self.inner.started(row)
        self.faults.at("started", row)

    def finished(self, row: RunningSequence) -> None:
        self.inner.finished(row)
        if self.faults.due(row.request, "finished"):
            raise Planted("finished")


class HostilePolicy(Policy):
    """A policy that fails over single rows, and over the times of rounds."""

    name = "test-hostile"

    def __init__(self, faults: Faults, nodes: int) -> None:
        self.faults, self.nodes = faults, nodes

    def plan(self, rows: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        self.faults.at("plan", *rows)
        return Fixed(self.nodes).plan(rows, drafter)

    def observe(self, row: RunningSequence, drafted: int, accepted: int, expected: float) -> None:
        self.faults.at("policy", row)

    def observe_round(self, times: RoundTimes) -> None:
        if any(place == "time" for place, _ in self.faults.planted.values()):
            raise Planted("time")


class HostileVerifier(LosslessVerifier):
    """A verifier that raises, or returns a path that is none."""

    def __init__(self, faults: Faults, rows: Callable[[], Sequence[RunningSequence]]) -> None:
        self.faults, self.rows = faults, rows

    def accept(self, tree: TokenTree, logits: torch.Tensor, sampler: Sampler) -> Accepted:
        row = next(row for row in self.rows() if row.sampler is sampler)
        self.faults.at("accept", row)
        accepted = super().accept(tree, logits, sampler)
        if self.faults.due(row.request, "path"):
            return Accepted((0, len(tree)), 0, None)
        return accepted


class HostileModel:
    """A model whose step and whose opening fail over single requests."""

    def __init__(self, model: Decoder, faults: Faults, engine: Callable[[], Engine]) -> None:
        self.model, self.faults, self.engine = model, faults, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def _row(self, slot: int) -> RunningSequence:
        return next(row for row in self.engine().scheduler.running if row.slot == slot)

    def open(self, prompt: Sequence[int], slot: int, state: Any) -> Any:
        self.faults.at("open", self._row(slot))
        return self.model.open(prompt, slot, state)

    def step(self, inputs: Sequence[StepInput], state: Any) -> StepOutput:
        output = self.model.step(inputs, state)
        # after staging: what is staged must not be staged again
        self.faults.at("step", *(self._row(feed.slot) for feed in inputs))
        return output


class HostileSampler(Sampler):
    """A sampler that fails when it is told of tokens, in the middle of a commit."""

    faults: Faults | None = None
    request = 0

    def observe(self, tokens: Sequence[int]) -> None:
        super().observe(tokens)
        if self.faults is not None and self.faults.due(self.request, "sampler"):
            raise Planted("sampler")


DRAFTERS: dict[str, Callable[[Decoder], Drafter]] = {
    "lookup": lambda model: PromptLookup(options=LookupOptions(min_ngram=1)),
    "draft-model": lambda model: DraftModel(tiny_model("aug", seed=8), model.config, SLOTS),
    "itself": lambda model: DraftModel(model, model.config, SLOTS),
    "medusa": random_heads,
    "random": RandomTrees,
    "mix": lambda model: Mixed([Suffix(), DraftModel(model, model.config, SLOTS), Aded()]),
}
PROMPTS = [random_tokens(n, seed=n) for n in (1, 4, 9, 21)]


def some_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.choice((1, 3, 8, 14)),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        seed=rng.randrange(4),
    )


class Run:
    """One engine with its faults, and what became of each request."""

    def __init__(self, model: Decoder, name: str, faults: Faults, prefill_tokens: int) -> None:
        hostile: Any = HostileModel(model, faults, lambda: self.engine)
        self.engine = Engine(
            hostile,
            verifier=HostileVerifier(faults, lambda: self.engine.scheduler.running),
            drafter=HostileDrafter(DRAFTERS[name](model), faults),
            policy=HostilePolicy(faults, 4),
            slots=SLOTS,
            prefill_tokens=prefill_tokens,
        )
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Outcome] = {}

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.tokens[self.engine.add(Request(tuple(prompt), params))] = []

    def finish(self) -> None:
        while self.engine.busy:
            for item in self.engine.step():
                assert item.sequence.request not in self.ends
                self.tokens[item.sequence.request] += item.tokens
                if item.finished:
                    self.ends[item.sequence.request] = item


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of tiny steps: a second thread costs far more than it brings on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> dict[str, Decoder]:
    return {
        "softmax": tiny_model("softmax"),
        "aug": tiny_model("aug"),
        # in float32 a step of trees is one call into C
        "native": tiny_model("aug", dtype=torch.float32).to_inference(),
    }


Alone = dict[tuple[object, ...], list[int]]


def alone(
    known: Alone, model: Decoder, key: str, name: str, prompt: int, params: SamplingParams
) -> list[int]:
    # random trees draw on one generator; what they say never changes the output
    place = (key, name, prompt, *(getattr(params, f) for f in ("max_tokens", "temperature")))
    place = (*place, params.repetition_penalty, params.seed)
    if place not in known:
        run = Run(model, name, Faults({}), 512)
        run.submit(PROMPTS[prompt], params)
        run.finish()
        (known[place],) = run.tokens.values()
    return known[place]


def check_history(seed: int, models: dict[str, Decoder], known: Alone) -> tuple[int, int]:
    """One history; how many of its requests failed, and how many there were."""
    rng = random.Random(seed)
    key = rng.choice(tuple(models))
    name = rng.choice([n for n in DRAFTERS if key != "native" or n in ("lookup", "itself")])
    asked = [(rng.randrange(len(PROMPTS)), some_params(rng)) for _ in range(rng.randint(2, 6))]
    planted = {
        request: (rng.choice(PLACES), rng.randrange(4))
        for request in range(1, len(asked) + 1)
        if rng.random() < 0.5
    }
    faults = Faults(planted)
    run = Run(models[key], name, faults, rng.choice((3, 512)))
    for prompt, params in asked:
        run.submit(PROMPTS[prompt], params)
    run.finish()
    assert sorted(run.engine.scheduler.free) == list(range(SLOTS))
    assert not any(run.engine.state.staged(slot) for slot in range(SLOTS))
    assert sorted(run.ends) == list(range(1, len(asked) + 1))
    for request, (prompt, params) in enumerate(asked, 1):
        expected = alone(known, models[key], key, name, prompt, params)
        end, tokens = run.ends[request], run.tokens[request]
        if end.error is None:
            assert tokens == expected and end.finished in ("stop", "length")
        else:
            assert request in planted and planted[request][0] != "time"
            # what it emitted before stands
            assert end.finished == "error" and tokens == expected[: len(tokens)]
    return sum(end.error is not None for end in run.ends.values()), len(asked)


def test_failures_at_random_places_harm_nobody_else(models: dict[str, Decoder]) -> None:
    known: Alone = {}
    counts = [check_history(seed, models, known) for seed in range(HISTORIES)]
    failed, asked = map(sum, zip(*counts, strict=True))
    # the planted faults were met, and most requests were bystanders
    assert failed > HISTORIES / 2 and asked > 2 * failed


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_once_left_the_step_half_committed(
    place: str, models: dict[str, Decoder]
) -> None:
    """Rows before the failing one had advanced, and their tokens were never returned."""
    faults = Faults({2: (place, 1 if place not in ("open", "started", "finished") else 0)})
    run, params = Run(models["aug"], "itself", faults, 512), SamplingParams(max_tokens=12)
    for prompt in (1, 2, 3):
        run.submit(PROMPTS[prompt], params)
    run.finish()
    known: Alone = {}
    for request, prompt in ((1, 1), (2, 2), (3, 3)):
        expected = alone(known, models["aug"], "aug", "itself", prompt, params)
        if request != 2 or place == "time":
            assert run.tokens[request] == expected and run.ends[request].error is None
        else:
            assert run.ends[2].error is not None and run.ends[2].finished == "error"


def test_placing_that_raised_once_lost_its_slot_for_good(models: dict[str, Decoder]) -> None:
    faults = Faults(dict.fromkeys(range(1, 8), ("open", 0)))
    run, params = Run(models["aug"], "lookup", faults, 512), SamplingParams(max_tokens=3)
    for _ in range(8):
        run.submit(PROMPTS[1], params)
    run.finish()
    assert [type(run.ends[n].error) for n in range(1, 9)] == [Planted] * 7 + [type(None)]
    assert sorted(run.engine.scheduler.free) == list(range(SLOTS))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (lambda row: chain((row.root, VOCAB)), f"{VOCAB} tokens: ids go from 0"),
        (lambda row: chain((row.root, -1)), "tokens -1 to"),
        (lambda row: chain(((row.root + 1) % VOCAB, 1)), "asked"),
        (lambda row: chain((row.root, *range(20))), "20 draft tokens"),
    ],
)
def test_a_tree_that_would_harm_the_step_is_refused(
    tree: Callable[[RunningSequence], TokenTree], message: str, models: dict[str, Decoder]
) -> None:
    """Draft tokens beyond the vocabulary were once looked up in the embedding all the same."""

    class Bad(PromptLookup):
        def propose(
            self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
        ) -> list[TokenTree]:
            return [tree(row) for row in rows]

    engine = Engine(
        models["aug"], verifier=LosslessVerifier(), drafter=Bad(), policy=Fixed(4), slots=1
    )
    engine.add(Request(tuple(PROMPTS[1]), SamplingParams(max_tokens=9)))
    engine.step()
    (end,) = engine.step()
    assert isinstance(end.error, DrafterError) and message in str(end.error)


@pytest.mark.parametrize("what", ["policy", "drafter"])
def test_too_few_answers_of_a_plug_in_are_named(what: str, models: dict[str, Decoder]) -> None:
    drafter, policy = PromptLookup(), Fixed(4)
    part, method = (policy, "plan") if what == "policy" else (drafter, "propose")
    setattr(part, method, lambda *_: [])
    engine = Engine(models["aug"], verifier=LosslessVerifier(), drafter=drafter, policy=policy)
    engine.add(Request(tuple(PROMPTS[1]), SamplingParams(max_tokens=9)))
    engine.step()
    (end,) = engine.step()
    assert f"{what} '{part.name}' answered 0 times for 1 requests" in str(end.error)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_request_that_bans_everything_ends_and_the_others_go_on(
    temperature: float, models: dict[str, Decoder]
) -> None:
    """Greedy once emitted token 0 for it."""
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=1)
    bans = dict.fromkeys(range(VOCAB), float("-inf"))
    banned = SamplingParams(max_tokens=6, temperature=temperature, logit_bias=bans)
    engine = Engine(models["aug"], verifier=LosslessVerifier(), slots=2)
    good = [
        engine.add(Request(tuple(PROMPTS[2]), params)),
        engine.add(Request(tuple(PROMPTS[2]), banned)),
    ][0]
    tokens: list[int] = []
    while engine.busy:
        for item in engine.step():
            if item.sequence.request == good:
                tokens += item.tokens
            else:
                assert isinstance(item.error, InputError) and item.tokens == ()
                assert "nothing is allowed" in str(item.error)
    assert tokens == alone({}, models["aug"], "aug", "lookup", 2, params)
