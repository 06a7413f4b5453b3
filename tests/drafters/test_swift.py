"""SWIFT: a model that drafts without some of its sub-layers, and searches them while it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bytes, mixer_config, random_tokens, randomise, tiny_config
from test_engine import decode, outputs

from linspec.checkpoints.load_quantized import quantize_model
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.skip_search import SkipSearch, evenly
from linspec.drafters.swift import Swift
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, DrafterError, LinspecError
from linspec.models.decoder import Decoder
from linspec.verifiers import LosslessVerifier

# of 16 sub-layers between the first and the last of ten layers, those that hardly matter
IDLE = (2, 7, 8, 13)
FAST = "swift:interval=1,window=12"
PROMPTS = [random_tokens(n, seed=n) for n in (2, 9, 30, 60)]


def model_with_idle_parts(kind: str = "softmax", *, prepared: bool = True) -> Decoder:
    mixers = [mixer_config("aug" if kind == "aug" and i % 2 else "softmax") for i in range(10)]
    dtype = torch.float64 if kind == "float64" else torch.float32
    model = randomise(Decoder(tiny_config(*mixers)), 1).to(dtype)
    with torch.no_grad():
        for unit in range(16):
            block = model.layers[unit // 2 + 1]
            weight = (block.mlp.down if unit % 2 else block.mixer.o).weight
            weight.mul_(0.02 if unit in IDLE else 1.0)
    if kind == "int8":
        return quantize_model(model, 8, {})
    return model.to_inference() if prepared else model


def swift_of(model: Decoder, spec: str = FAST) -> Swift:
    drafter = make_drafter(spec, DrafterContext(model, slots=4))
    assert isinstance(drafter, Swift)
    return drafter


@pytest.fixture(autouse=True)
def _no_search_of_another_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


class Watched(Swift):
    """Writes down every score, and what the engine's state is before and after a trial."""

    heard: list[tuple[float, float]]

    def try_one(self, sample: object) -> None:
        assert self.target is not None and self.target.state is not None
        state, slots = self.target.state, range(self.target.state.slots)
        before = [state.snapshot(slot) for slot in slots]
        super().try_one(sample)  # type: ignore[arg-type]
        for slot in slots:
            assert_same_bytes(state.snapshot(slot), before[slot])
        _, score = self.search._scores[-1]
        self.heard.append((score, self.search.progress.score))


def watched(model: Decoder, spec: str = FAST) -> Watched:
    made = swift_of(model, spec)
    made.__class__ = Watched
    assert isinstance(made, Watched)
    made.heard = []
    return made


@pytest.mark.crossed(4)
@pytest.mark.parametrize("kind", ["softmax", "aug", "int8", "float64", "not prepared"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.85}]
)
def test_outputs_before_during_and_after_the_search_are_plain(
    kind: str, settings: dict[str, float]
) -> None:
    """Token for token, also where the request samples, so the distribution is exact."""
    model = model_with_idle_parts(kind, prepared=kind != "not prepared")
    params = [SamplingParams(max_tokens=40, seed=i, **settings) for i in range(len(PROMPTS))]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    drafter = swift_of(model, f"{FAST},trials=20")
    assert drafter.searching
    for _ in range(3):
        assert outputs(decode(model, PROMPTS, params, drafter)) == plain
    assert 0 < drafter.search.progress.trials <= 20 and not drafter.searching
    alone = swift_of(model)
    assert outputs(decode(model, PROMPTS, params, alone, slots=1)) == plain


def test_the_best_score_never_falls_and_beats_the_first_set_and_trials_change_no_cache() -> None:
    model = model_with_idle_parts()
    drafter = watched(model, f"{FAST},trials=100")
    params = SamplingParams(max_tokens=80)
    while drafter.searching:
        decode(model, PROMPTS, params, drafter)
    best = [score for _, score in drafter.heard]
    assert best == sorted(best) and len(best) <= 100
    assert best[-1] >= best[0] + 0.05


def test_the_set_that_was_found_has_more_accepted_than_evenly_spaced_sub_layers(
    tmp_path: Path,
) -> None:
    model = model_with_idle_parts()
    drafter = swift_of(model, f"{FAST},trials=100,goal=0.95")
    params = SamplingParams(max_tokens=80)
    while drafter.searching:
        decode(model, PROMPTS, params, drafter)
    accepted = {}
    for name, chosen in (("found", drafter.search.best), ("even", evenly(16, 4))):
        fixed = swift_of(model, f"swift:trials=0,least=0,file={tmp_path / name}")
        fixed.search.progress.skipped = tuple(chosen)
        rows = decode(model, PROMPTS, params, fixed)
        accepted[name] = sum(r.stats.accepted for r in rows) / sum(r.stats.rounds for r in rows)
    assert accepted["found"] > accepted["even"]


def test_two_engines_on_one_model_have_their_own_sets() -> None:
    model, params = model_with_idle_parts(), SamplingParams(max_tokens=20)
    one, other = swift_of(model, "swift:trials=0"), swift_of(model, "swift:trials=0,ratio=0.5")
    plain = outputs(decode(model, PROMPTS, params))

    def engine(drafter: Swift) -> Engine:
        return Engine(model, verifier=LosslessVerifier(), drafter=drafter, slots=4)

    engines = engine(one), engine(other)
    assert one.form is not None and other.form is not None and one.form is not other.form
    state = model.new_state()
    logits = []
    for form in (model, one.form, other.form, model):
        logits.append(form.step([StepInput(0, [1, 2, 3])], state).logits)
        state.drop(0)
    assert torch.equal(logits[0], logits[3])
    assert not torch.equal(logits[1], logits[2])
    assert len(engines) == 2 and outputs(decode(model, PROMPTS, params, other)) == plain


def test_a_search_is_kept_with_the_model_and_goes_on(tmp_path: Path) -> None:
    model, params = model_with_idle_parts(), SamplingParams(max_tokens=60)
    file = tmp_path / "search.json"
    spec = f"{FAST},trials=30,file={file}"
    first = swift_of(model, spec)
    while first.searching:
        decode(model, PROMPTS, params, first)
    second = swift_of(model, spec)
    assert second.search.best == first.search.best and not second.searching
    # by the model itself, where no file is named
    kept = [swift_of(model, f"{FAST},trials=30") for _ in range(2)]
    decode(model, PROMPTS * 3, params, kept[0])
    decode(model, PROMPTS[:1], SamplingParams(max_tokens=1), kept[1])
    assert kept[0].search.progress.trials > 0
    assert kept[1].search.progress.score == kept[0].search.progress.score


@pytest.mark.parametrize(
    "changes",
    [
        {"skipped": [1, 2, 3]},
        {"skipped": [1, 2, 3, 99]},
        {"skipped": [3, 2, 1, 0]},
        {"score": 2.0},
        {"score": "high"},
        {"more": 1},
        None,
    ],
)
def test_a_damaged_file_of_a_search_is_named(
    changes: dict[str, object] | None, tmp_path: Path
) -> None:
    file = tmp_path / "search.json"
    search = SkipSearch(16, 4)
    search.told(evenly(16, 4), 0.5)
    search.save(file)
    if changes is None:
        file.write_text("{")
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(LinspecError, match=r"search\.json"):
        swift_of(model_with_idle_parts(), f"{FAST},file={file}")
    search.resume(file)
    assert search.best == evenly(16, 4)


def test_suggestions_are_sets_of_the_size_and_the_thoughtful_ones_find_a_planted_set() -> None:
    """A sum over sub-layers is what a Gaussian process over sets learns quickly."""
    found = []
    for seed in range(3):
        search = SkipSearch(24, 6, goal=0.999, seed=seed)
        worth = [0.16 if unit < 6 else 0.02 for unit in range(24)]
        while not search.over and search.progress.trials < 400:
            candidate = search.suggest()
            assert len(set(candidate)) == 6 and candidate == tuple(sorted(candidate))
            assert set(candidate) <= set(range(24))
            search.told(candidate, sum(worth[unit] for unit in candidate))
        found.append(search.progress.score)
    draws = [SkipSearch(24, 6, seed=s) for s in range(3)]
    blind = [max(sum(worth[u] for u in each._drawn()) for _ in range(400)) for each in draws]
    assert sum(found) > sum(blind)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("swift:ratio=0", "ratio must be between 0 and 1"),
        ("swift:ratio=0.01", "is none; use a larger ratio"),
        ("swift:window=64", "window must be less than 64"),
        ("swift:interval=0", "interval must be 1 or more"),
        ("swift:goal=1.5", "goal must be between 0 and 1"),
    ],
)
def test_settings_are_checked(spec: str, message: str) -> None:
    with pytest.raises((ConfigError, DrafterError), match=message):
        swift_of(model_with_idle_parts(), spec)


def test_a_model_of_two_layers_is_refused() -> None:
    model = randomise(Decoder(tiny_config(mixer_config("softmax"), mixer_config("aug"))), 0)
    with pytest.raises(DrafterError, match="keeps the first and the last layer"):
        swift_of(model, "swift")
