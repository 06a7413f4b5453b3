"""Several drafters at once: no output changes, each part hears of its own trees, the best one drafts."""

from __future__ import annotations

import copy
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir, text_model
from helpers import VOCAB, full_logits, random_tokens, tiny_model
from replay import accepted, agent_log, per_round, replay, running
from scipy.stats import chisquare
from test_engine import PROMPTS, decode, outputs, random_heads

from linspec import DRAFTERS, LLM, ChainDrafter, RunningSequence, SamplingParams, TokenTree
from linspec.decoding.sampling import Sampler
from linspec.decoding.tree import Budget
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.aded import Aded
from linspec.drafters.base import Drafter
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.lookup import PromptLookup
from linspec.drafters.mixed import Mixed
from linspec.drafters.saved import save_drafter
from linspec.drafters.suffix import Suffix
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed

SLOTS = 4


def near(model: Decoder, amount: float) -> Decoder:
    """A model that mostly says what `model` says."""
    generator, other = torch.Generator().manual_seed(3), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += amount * noise * parameter.abs().mean()
    return other


def draft_model(model: Decoder, amount: float = 0.0) -> DraftModel:
    return DraftModel(near(model, amount), model.config, SLOTS)


MIXES: dict[str, Callable[[Decoder], list[Drafter]]] = {
    "suffix+medusa": lambda model: [Suffix(), random_heads(model)],
    "suffix+draft-model": lambda model: [Suffix(), draft_model(model, 0.3)],
    "lookup+aded+suffix": lambda model: [PromptLookup(), Aded(), Suffix()],
    "medusa+suffix+itself": lambda model: [random_heads(model), Suffix(), draft_model(model)],
}
PARAMS = [
    SamplingParams(max_tokens=20 + i, temperature=0.0 if i % 2 else 1.0, seed=i)
    for i in range(len(PROMPTS))
]


@pytest.mark.parametrize("mix", MIXES)
def test_the_output_is_that_without_drafts(mix: str) -> None:
    """In ragged batches as alone; drafts that were sampled change samples, and no greedy output."""
    model = tiny_model("aug")
    drafter = Mixed(MIXES[mix](model))
    params = PARAMS
    if any(isinstance(part.drafter, DraftModel) for part in drafter.parts):
        params = [SamplingParams(max_tokens=each.max_tokens) for each in PARAMS]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    for _ in range(2):
        rows = decode(model, PROMPTS, params, drafter, policy=Fixed(8))
        assert outputs(rows) == plain
        assert sum(row.stats.accepted for row in rows) > 0
        assert outputs(decode(model, PROMPTS[::-1], params[::-1], drafter, slots=2)) == plain[::-1]


def test_samples_keep_their_distribution() -> None:
    """Drafts that were sampled beside drafts from memory, which has seen every sample so far."""
    model, prompt, count = tiny_model("aug"), [3, 1, 4], 600
    drafter = Mixed([Suffix(), draft_model(model, 0.3)])
    params = [SamplingParams(max_tokens=3, temperature=1.0, seed=seed) for seed in range(count)]
    rows = decode(model, [prompt] * count, params, drafter, policy=Fixed(4))
    firsts = full_logits(model, [prompt])[0].softmax(-1)
    seconds = full_logits(model, [[*prompt, first] for first in range(VOCAB)]).softmax(-1)
    expected = (firsts @ seconds * count).double()
    found = Counter(tokens[1] for tokens in outputs(rows))
    often = [token for token in range(VOCAB) if expected[token] >= 5]
    rest = [count - sum(each) for each in ([found[t] for t in often], expected[often].tolist())]
    chances = chisquare(
        [*(found[token] for token in often), rest[0]], [*expected[often].tolist(), rest[1]]
    )
    assert chances.pvalue > 1e-4


class Told(ChainDrafter):
    """Drafts the same token again and writes down what it hears; `hope` is what it expects."""

    name = "told"

    def __init__(self, hope: float, *, free: bool = False) -> None:
        super().__init__()
        self.hope, self.free = hope, free
        self.heard: list[tuple[str, int]] = []
        self.drafted: list[TokenTree] = []

    @property
    def model_free(self) -> bool:  # type: ignore[override]  # it differs between objects here
        return self.free

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = super().propose(sequences, budgets)
        self.drafted += trees
        return trees

    def draft(self, rows: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        return [[row.root] * length for row, length in zip(rows, lengths, strict=True)]

    def expected(self, budget: Budget) -> float:
        return self.hope

    def started(self, row: RunningSequence) -> None:
        self.heard.append(("started", row.number))

    def observe(self, row: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        assert any(tree is each for each in self.drafted)
        self.heard.append(("observed", row.number))

    def finished(self, row: RunningSequence) -> None:
        self.heard.append(("finished", row.number))


def drafters_of(mix: Mixed, rounds: int = 1) -> list[list[tuple[str, int]]]:
    """What each part of a mix hears of a request whose drafts are all accepted."""
    row = running([1, 2])
    mix.started(row)
    for _ in range(rounds):
        (tree,) = mix.propose([row], [Budget.of(3)])
        mix.observe(row, tree, range(len(tree)))
        row.tokens += tree.tokens[1:]
    mix.finished(row)
    return [[what for what, _ in part.drafter.heard] for part in mix.parts]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("free", "other", "drafts"),
    [(2.0, 1.0, 0), (1.0, 2.0, 1), (1.0, 1.0, 0)],
    ids=["memory promises more", "the model promises more", "a tie saves the model"],
)
def test_the_one_that_promises_more_drafts_and_hears_of_it(
    free: float, other: float, drafts: int
) -> None:
    mix = Mixed([Told(free, free=True), Told(other)])
    heard = drafters_of(mix)
    assert heard[drafts] == ["started", "observed", "finished"]
    assert heard[1 - drafts] == ["started", "finished"]
    # drafting that is not needed is not done
    assert len(mix.parts[1].drafter.drafted) == drafts  # type: ignore[attr-defined]


def test_promises_that_are_not_kept_are_believed_less() -> None:
    boaster, honest = Told(3.0), Told(1.5)
    mix, row = Mixed([boaster, honest]), running([1, 2])
    for _ in range(12):
        (tree,) = mix.propose([row], [Budget.of(3)])
        mix.observe(row, tree, [0, 1, 2] if any(tree is t for t in honest.drafted) else [0])
    assert [what for what, _ in boaster.heard] == ["observed"] * len(boaster.heard)
    assert len(boaster.heard) <= 3 and len(honest.heard) >= 9
    assert mix.expected(Budget.of(3)) < 2.5


def test_memory_that_was_not_asked_is_chosen_once_it_would_have_been_right() -> None:
    """A sequence begins to repeat itself, while the model goes on to have one token accepted a round."""

    class OneRight(Told):
        def draft(self, rows: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
            return [
                [row.root, *[99] * (length - 1)] for row, length in zip(rows, lengths, strict=True)
            ]

    memory, model = Told(0.5, free=True), OneRight(1.0)
    mix, row = Mixed([memory, model]), running([1, 2])
    found = []
    for _ in range(10):
        (tree,) = mix.propose([row], [Budget.of(3)])
        path = accepted(tree, [row.root] * 4)
        mix.observe(row, tree, path)
        row.tokens += [row.root] * len(path)
        found.append(len(path) - 1)
    assert found[0] == 1 and found[-1] == 3
    # and nobody heard of trees that were not verified
    assert len(memory.heard) + len(model.heard) == 10


def test_each_sequence_of_a_round_has_its_own_drafter() -> None:
    text = random_tokens(30, seed=4)
    suffix = Suffix()
    replay(suffix, [0], text)
    mix = Mixed([suffix, Told(0.9)])
    rows = [running([0, *text[:20]]), running([7, 8])]
    known, unknown = mix.propose(rows, [Budget.of(4)] * 2)
    assert list(known.tokens[1:]) == text[20:24] and unknown.tokens == (8,) * 5
    for row, tree in zip(rows, (known, unknown), strict=True):
        mix.observe(row, tree, [0])


def test_a_draft_model_that_was_skipped_catches_up() -> None:
    """It is the target itself, so whatever it drafts comes true: nothing that it missed is missing."""
    model = tiny_model("aug")
    sizes: list[tuple[int, int]] = []

    class Moody(DraftModel):
        """Drafts in every second round or so."""

        def expected(self, budget: Budget) -> float:
            return rng.choice((0.0, 9.0))

        def observe(self, row: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
            sizes.append((len(tree), len(path)))
            super().observe(row, tree, path)

    rng, text = random.Random(1), random_tokens(12, seed=1)
    mix = Mixed([Suffix(), Moody(model, model.config, SLOTS)])
    prompts = [text * 3, text[:5], text * 2]
    rows = decode(model, prompts, SamplingParams(max_tokens=60), mix, policy=Fixed(4))
    assert sizes and all(tree == path for tree, path in sizes)
    assert sum(row.stats.rounds for row in rows) > len(sizes) + 10
    assert outputs(rows) == outputs(decode(model, prompts, SamplingParams(max_tokens=60)))


@pytest.mark.crossed(2)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mix_is_as_good_as_the_better_of_its_parts(temperature: float) -> None:
    """Requests that come again, between requests that do not."""
    model = tiny_model("aug")
    params = [
        SamplingParams(max_tokens=40, temperature=temperature, seed=i % 3 if i > 2 else 10 + i)
        for i in range(9)
    ]
    prompts = [random_tokens(6, seed=each.seed or 0) for each in params]
    makers: dict[str, Callable[[], Drafter]] = {
        "suffix": Suffix,
        "model": lambda: draft_model(model, 0.3),
        "mix": lambda: Mixed([Suffix(), draft_model(model, 0.3)]),
    }
    found = {}
    for name, make in makers.items():
        drafter, rows = make(), []
        for prompt, each in zip(prompts, params, strict=True):
            rows += decode(model, [prompt], each, drafter, policy=Fixed(6))
        stats = [row.stats for row in rows]
        found[name] = 1 + sum(s.accepted for s in stats) / sum(s.rounds for s in stats)
    assert found["mix"] >= max(found["suffix"], found["model"])
    assert min(found["suffix"], found["model"]) > 1.2


def test_a_mix_without_models_is_as_good_as_the_better_of_its_parts() -> None:
    log = agent_log(random.Random(5), 8) * 2
    found = {}
    for name in ("prompt-lookup", "aded", "suffix", "prompt-lookup+aded+suffix"):
        drafter = make_drafter(name, DrafterContext(tiny_model("aug")))
        assert drafter is not None
        found[name] = per_round([each for request in log for each in replay(drafter, *request)])
    mix = found.pop("prompt-lookup+aded+suffix")
    assert mix >= max(found.values())


def test_every_part_hears_of_every_request_even_if_one_fails() -> None:
    class Failing(Told):
        def started(self, row: RunningSequence) -> None:
            super().started(row)
            raise RuntimeError("no place for it")

        def finished(self, row: RunningSequence) -> None:
            super().finished(row)
            raise RuntimeError("nor an end")

    parts = [Failing(1.0), Told(1.0)]
    mix, row = Mixed(parts), running([1, 2])
    for hook in (mix.started, mix.finished):
        with pytest.raises(RuntimeError):
            hook(row)
    assert [part.heard for part in parts] == [
        [("started", row.number), ("finished", row.number)]
    ] * 2


def test_a_sampled_draft_is_not_chosen_by_its_tokens() -> None:
    class Sampled(DraftModel):
        model_free = True

    model = tiny_model("aug")
    mix = Mixed([Sampled(model, model.config, SLOTS), Suffix()])
    rows = decode(model, PROMPTS[1:2], SamplingParams(max_tokens=4), mix)
    assert rows[0].emitted == 4
    row = running(PROMPTS[1], VOCAB)
    row.sampler = Sampler(SamplingParams(temperature=1.0, seed=1), row.tokens, VOCAB)
    with pytest.raises(DrafterError, match="said to be model_free and sampled its drafts"):
        mix.propose([row], [Budget.of(3)])


CONTEXT = DrafterContext(tiny_model("aug"))


def test_specs_are_joined_by_plus_each_with_its_options() -> None:
    spec = "suffix:depth=24,factor=3+prompt-lookup:max_ngram=3,tokens=8"
    for each in (spec, f"mixed:{spec}", f"mixed:parts={spec}"):
        made = make_drafter(each, CONTEXT)
        assert isinstance(made, Mixed)
        suffix, lookup = (part.drafter for part in made.parts)
        assert isinstance(suffix, Suffix) and isinstance(lookup, PromptLookup)
        assert (suffix.options.depth, suffix.options.factor) == (24, 3.0)
        assert (lookup.max_ngram, lookup.max_nodes) == (3, 8)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a+b", ["a", "b"]),
        ("medusa:/models/a+b/heads", ["medusa:/models/a+b/heads"]),
        ("medusa:/a+b+suffix", ["medusa:/a+b", "suffix"]),
        ("suffix + aded:x+y", ["suffix ", " aded:x+y"]),
        ("mixed:suffix+aded", ["mixed:suffix+aded"]),
        ("suffix+", ["suffix", ""]),
    ],
)
def test_a_plus_in_a_path_joins_nothing(spec: str, parts: list[str]) -> None:
    assert DRAFTERS.parts(spec) == parts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("suffix+medsua", "unknown drafter 'medsua'.*did you mean 'medusa'"),
        ("suffix+", "two or more drafters with . between them.*'suffix.'"),
        ("mixed:suffix", "two or more drafters"),
        ("mixed", "needs parts.*mixed:PARTS"),
        ("suffix+none", "'none' is no part of a mix"),
        ("auto+aded", "'auto' is no part of a mix"),
        ("suffix+aded+suffix", "'suffix' is mixed with itself"),
        ("suffix:dept=3+aded", "drafter 'suffix' has no option 'dept'"),
        ("suffix:depth=3+adde", "depth must be a whole number.*'3.adde'"),
    ],
)
def test_what_cannot_be_mixed_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_drafter(spec, CONTEXT)


def test_no_drafter_is_called_like_a_mix() -> None:
    with pytest.raises(ConfigError, match="without .$"):
        DRAFTERS.register("left+right", summary="s", paper="-")


def with_heads(folder: Path, accuracy: float) -> Path:
    """A model directory with Medusa heads in it."""
    shutil.copytree(model_dir("aug"), folder)
    model = text_model("aug")
    config = HeadsConfig(width=model.config.width, vocab_size=model.config.vocab_size, heads=2)
    heads = MedusaHeads(config, model, [[accuracy, 0.1], [accuracy / 2]])
    save_drafter(heads, model, folder / "medusa")
    return folder


def test_auto_takes_what_was_trained_for_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linspec.drafters.auto._LEAST_BYTES", 0)
    prompts, params = ["abcd abcd abcd", "the end"], SamplingParams(max_tokens=12)
    folder = with_heads(tmp_path / "model", 0.6)
    plain = [each.token_ids for each in LLM(folder).generate(prompts, params)]
    for source, message in ((folder, "suffix and medusa"), (model_dir("aug"), "suffix alone")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "linspec"):
            llm = LLM(source, drafter="auto", policy=4)
        assert len([m for m in caplog.messages if m.startswith(f"drafter auto: {message}")]) == 1
        assert [each.token_ids for each in llm.generate(prompts, params)] == plain


def test_auto_leaves_out_what_would_cost_a_small_model_too_much(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_heads(tmp_path / "model", 0.6)
    with caplog.at_level(logging.INFO, "linspec"):
        LLM(folder, drafter="auto", policy=4)
    assert any("suffix alone, because drafts of a trained" in each for each in caplog.messages)


def test_auto_goes_on_without_heads_of_another_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linspec.drafters.auto._LEAST_BYTES", 0)
    folder = with_heads(tmp_path / "model", 0.6)
    (folder / "medusa" / "drafter.json").write_text("{}")
    with caplog.at_level(logging.INFO, "linspec"):
        llm = LLM(folder, drafter="auto", policy=4)
    assert any("drafter auto goes on without medusa" in message for message in caplog.messages)
    assert llm.generate(["abcd"], SamplingParams(max_tokens=3))[0].token_ids
