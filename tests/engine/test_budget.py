"""Prompts are read in what a step has left: streams do not stall, newcomers do not wait, nobody starves.

Seconds are those of a virtual machine: a step costs what a curve says of its nodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import pytest
from helpers import random_tokens, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_engine import DRAFTERS

import linspec.engine.engine
from linspec import Request, SamplingParams
from linspec.decoding.sampling import Sampler
from linspec.decoding.sequence import RunningSequence
from linspec.engine.budget import LEAST, PIECE, StepTimes, TokenBudget
from linspec.engine.engine import Engine
from linspec.engine.scheduler import Scheduler
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

PARAMS = SamplingParams(max_tokens=10_000)


def sequence(number: int, length: int, *, read: bool = False) -> RunningSequence:
    tokens = [1] * length
    sampler = Sampler(PARAMS, [1], 10)
    return RunningSequence(number, sampler, tokens, length, prefilled=length if read else 0)


# ---- a virtual machine

# milliseconds of a step of so many nodes: reading the weights and computing overlap
MACHINES: dict[str, Callable[[float], float]] = {
    "bound by memory": lambda nodes: max(25.0, 0.35 * nodes) + 0.02 * nodes,
    "a little of both": lambda nodes: (8.0**3 + (0.25 * nodes) ** 3) ** (1 / 3),
    "bound by arithmetic": lambda nodes: 1.0 + 0.09 * nodes,
}


@dataclass
class Server:
    """A scheduler on a virtual machine: when each sequence got which token."""

    machine: Callable[[float], float]
    tbt_ms: float | None
    prefill_tokens: int = 512
    noise: float = 0.0
    wrong: float = 1.0
    slots: int = 8
    now: float = 0.0
    times: dict[RunningSequence, list[float]] = field(default_factory=dict)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = CostCurve({n: self.wrong * self.machine(n) / 1e3 for n in (1, 4, 16, 32, 64)})
        self.budget = TokenBudget(self.prefill_tokens, self.tbt_ms, StepTimes(known))
        self.scheduler = Scheduler(self.slots, self.budget)
        self.rng = random.Random(1)

    def submit(self, number: int, length: int, *, read: bool = False) -> RunningSequence:
        made = sequence(number, length, read=read)
        self.scheduler.submit([made])
        self.times[made] = [self.now]
        return made

    def step(self) -> None:
        self.scheduler.admit()
        batch = self.scheduler.next_batch()
        tokens = sum(count for _, count in batch.prefilling)
        seconds = self.machine(len(batch.decoding) + tokens) / 1e3
        seconds *= 1 + self.noise * self.rng.random()
        assert self.budget.times is not None
        self.budget.times.observe(len(batch.decoding), tokens, seconds)
        self.now += seconds
        self.steps.append((len(batch.decoding), tokens))
        for each, count in batch.prefilling:
            each.prefilled += count
        for each in [*batch.decoding, *(row for row, _ in batch.prefilling if not row.prefilling)]:
            each.tokens.append(1)
            self.times[each].append(self.now)

    def read(self, newcomer: RunningSequence) -> float:
        """Step until its first token; seconds since it came."""
        while newcomer.emitted == 0:
            self.step()
        return self.times[newcomer][-1] - self.times[newcomer][0]

    def intervals(self, since: float) -> list[float]:
        """Of those that decode: between two tokens, the later of which came after `since`."""
        found = []
        for times in self.times.values():
            found += [late - early for early, late in pairwise(times[1:]) if late > since]
        return found


def busy(server: Server, streams: int = 4) -> float:
    """Let some streams decode; the median of their intervals."""
    for number in range(streams):
        server.submit(number, 8, read=True)
    for _ in range(50):
        server.step()
    return median(server.intervals(0.0))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [1.0, 0.6, 1.8])
@pytest.mark.parametrize("machine", ["bound by memory", "a little of both"])
def test_streams_do_not_stall_while_a_long_prompt_is_read(
    machine: str, wrong: float, noise: float
) -> None:
    """Also where the curve was wrong at first. A whole prompt at once would stall them for 50 intervals."""
    idle = Server(MACHINES[machine], None)
    alone = idle.read(idle.submit(99, 4096))
    undisturbed = busy(Server(MACHINES[machine], None))
    server = Server(MACHINES[machine], 2e3 * undisturbed, noise=noise, wrong=wrong)
    usual = busy(server)
    began = server.now
    first = server.read(server.submit(99, 4096))
    found = server.intervals(began)
    assert max(found) <= 3 * usual
    assert quantiles(found, n=100)[-1] <= 2 * usual * (1 + noise)
    assert first <= 1.5 * alone * (1 + noise)
    whole = Server(MACHINES[machine], None, prefill_tokens=4096)
    busy(whole)
    whole.read(whole.submit(99, 4096))
    assert max(whole.intervals(began)) > 10 * usual


def test_where_a_piece_is_too_much_fewer_tokens_are_read() -> None:
    """Computing is all that a step costs here: either the streams or the newcomer pay."""
    server = Server(MACHINES["bound by arithmetic"], 3.0)
    usual = busy(server, 2)
    began = server.now
    server.read(server.submit(99, 1000))
    sizes = {tokens for decoding, tokens in server.steps if decoding and tokens}
    assert LEAST in sizes and max(sizes) < PIECE
    assert max(server.intervals(began)) <= 3 * usual


@pytest.mark.parametrize("tbt_ms", [None, 50.0])
def test_a_newcomer_on_an_idle_server_is_read_as_fast_as_it_can_be(tbt_ms: float | None) -> None:
    server = Server(MACHINES["bound by memory"], tbt_ms)
    server.read(server.submit(0, 2100))
    assert [tokens for _, tokens in server.steps] == [512] * 4 + [52]


def test_a_target_that_nothing_fits_starves_nobody() -> None:
    server = Server(MACHINES["bound by memory"], 0.001)
    busy(server)
    began = len(server.steps)
    server.read(server.submit(99, 200))
    assert len(server.steps) - began <= 2 * 200 / LEAST + 2


@pytest.mark.parametrize("each", [1.0, 4.0, 12.0])
def test_beyond_what_the_machine_can_do_newcomers_get_their_share(each: float) -> None:
    """Sixteen streams alone take twice the target; reading a slice is cheap, dear, or dearer still."""
    server = Server(lambda nodes: 100.0 + each * nodes, 50.0, slots=32)
    usual = busy(server, 16)
    began, prompt = server.now, 640
    server.read(server.submit(99, prompt))
    spent = server.now - began
    # a fifth, less what is no whole slice
    assert each * prompt / 1e3 >= 0.12 * spent
    assert max(server.intervals(began)) <= usual + 1.1 * max(0.25 * usual, each * LEAST / 1e3)


def test_the_largest_slices_are_found_where_nothing_is_known_of_them() -> None:
    """The curve ends at 64 nodes; slices grow as long as steps stay within the target."""
    machine = MACHINES["bound by memory"]
    server = Server(machine, 120.0)
    busy(server)
    server.read(server.submit(99, 20_000))
    best = max(n for n in range(0, 513, PIECE) if machine(4 + n) <= 0.9 * 120)
    assert server.steps[-5][1] in (best, best - PIECE)


def test_a_machine_that_was_slow_for_a_while_reads_as_much_as_before() -> None:
    """Large slices looked too dear then, and nobody would have tried them again."""
    server = Server(MACHINES["bound by memory"], 150.0)
    busy(server)
    server.submit(99, 10**6)
    sizes = []
    for factor in (1.0, 4.0, 1.0):
        server.machine = lambda nodes, factor=factor: factor * MACHINES["bound by memory"](nodes)  # type: ignore[misc]
        for _ in range(400):
            server.step()
        sizes.append(sum(tokens for _, tokens in server.steps[-100:]) / 100)
    assert sizes[1] < 0.5 * sizes[0]
    assert sizes[2] > 0.8 * sizes[0]


@pytest.mark.parametrize("budget", [64, 128, 512])
def test_every_step_reads_as_much_as_it_may(budget: int) -> None:
    """Sarathi-Serve's invariants B and C, for prompts of all lengths that come at any time."""
    rng = random.Random(budget)
    server = Server(MACHINES["a little of both"], None, prefill_tokens=budget)
    made = []
    for number in range(30):
        made.append(server.submit(number, rng.randrange(1, 900)))
        for _ in range(rng.randrange(4)):
            _checked_step(server, budget)
        for ended in [row for row in server.scheduler.running if row.emitted > 12]:
            server.scheduler.retire(ended)
    while any(row.prefilling for row in made):
        for ended in [row for row in server.scheduler.running if row.emitted > 12]:
            server.scheduler.retire(ended)
        _checked_step(server, budget)
    # work is conserved
    everything = sum(row.prompt_length for row in made)
    assert sum(tokens for _, tokens in server.steps) == everything


def _checked_step(server: Server, budget: int) -> None:
    server.scheduler.admit()
    before = {
        row: (row.emitted, row.prompt_length - row.prefilled) for row in server.scheduler.running
    }
    server.step()
    tokens = server.steps[-1][1] if before else 0
    left = sum(row.prompt_length - row.prefilled for row in before)
    assert tokens <= budget
    assert not left or tokens > budget - PIECE
    for row, (emitted, unread) in before.items():
        if not unread:
            assert row.emitted == emitted + 1


LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 600))
def test_prompts_share_a_budget_and_nobody_waits_for_long(
    lengths: Sequence[int], tokens: int
) -> None:
    """Whoever gets nothing has a turn once the others have had one."""
    budget = TokenBudget(tokens)
    prompts = [sequence(i, length) for i, length in enumerate(lengths)]
    silent = dict.fromkeys(prompts, 0)
    while waiting := [each for each in prompts if each.prefilling]:
        shares = dict(budget.shares(waiting, 3))
        assert 0 < sum(shares.values()) <= tokens
        assert all(
            0 < count <= each.prompt_length - each.prefilled for each, count in shares.items()
        )
        unit = min(tokens, PIECE if tokens >= PIECE else LEAST)
        for each, count in shares.items():
            each.prefilled += count
            assert not each.prefilling or each.prefilled % unit == 0
        for each in waiting:
            silent[each] = 0 if each in shares else silent[each] + 1
            assert silent[each] < len(prompts)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    for tokens in (64, 512):
        server = Server(MACHINES["bound by memory"], None, prefill_tokens=tokens)
        server.submit(0, 100_000)
        for _ in range(5):
            server.step()
        began = len(server.steps)
        server.read(server.submit(1, 50))
        assert len(server.steps) - began <= 2


def test_of_equals_the_first_is_read_first() -> None:
    budget = TokenBudget(512)
    prompts = [sequence(i, 200) for i in range(4)]
    assert budget.shares(prompts, 0) == [(prompts[0], 200), (prompts[1], 200), (prompts[2], 64)]


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), "fast", True])
def test_a_target_is_a_number_above_0(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="tbt_ms must be"):
        TokenBudget(512, wrong)


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 700), st.floats(1e-7, 1e3))))
def test_no_times_make_a_budget_that_is_none(seen: list[tuple[int, int, float]]) -> None:
    times = StepTimes(CostCurve({1: 0.001, 64: 0.02}))
    budget = TokenBudget(512, 30.0, times)
    for decoding, tokens, seconds in seen:
        if decoding or tokens:
            times.observe(decoding, tokens, seconds)
    prompt = sequence(1, 10_000)
    counts = [sum(count for _, count in budget.shares([prompt], 4)) for _ in range(4)]
    assert all(0 <= count <= 512 and count % LEAST == 0 for count in counts)
    assert sum(counts) > 0


# ---- the engine itself


class Ticking:
    """A model whose steps let a virtual clock run."""

    def __init__(self, model: Decoder, machine: Callable[[float], float]) -> None:
        self._model, self._machine, self.now = model, machine, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, inputs: Sequence[Any], state: Any, **special: Any) -> Any:
        self.now += self._machine(sum(len(each.tokens) for each in inputs)) / 1e3
        return self._model.step(inputs, state, **special)


@pytest.mark.parametrize("drafter", [None, "lookup"])
def test_an_engine_keeps_its_target_and_the_outputs(
    drafter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = MACHINES["bound by memory"]
    known = CostCurve({n: machine(n) / 1e3 for n in (1, 16, 64)})
    monkeypatch.setattr(linspec.engine.engine, "load_or_measure", lambda model: known)
    model = tiny_model("softmax", "aug").to_inference()
    short = SamplingParams(max_tokens=120, ignore_eos=True)
    found = []
    for tbt_ms in (None, 60.0):
        ticking: Any = Ticking(model, machine)
        engine = Engine(
            ticking,
            verifier=LosslessVerifier(),
            drafter=DRAFTERS[drafter](model) if drafter else None,
            policy=Fixed(3),
            tbt_ms=tbt_ms,
            clock=lambda ticking=ticking: ticking.now,  # type: ignore[misc]
        )
        for seed in range(3):
            engine.add(Request(tuple(random_tokens(9, seed=seed)), short))
        longest, rows = 0.0, dict[int, list[int]]()
        for step in range(400):
            if step == 20:
                engine.add(Request(tuple(random_tokens(1500)), SamplingParams(max_tokens=3)))
            began = ticking.now
            for outcome in engine.step():
                rows.setdefault(outcome.sequence.number, []).extend(outcome.tokens)
            longest = max(longest, ticking.now - began)
            if not engine.busy:
                break
        found.append((rows, longest))
    assert found[0][0] == found[1][0]
    assert found[1][1] <= 0.060 < 0.15 < found[0][1]
