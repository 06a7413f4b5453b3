"""FreeDave: the tokens that the loop decides without drafts, in the same order, in fewer forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from denoisers import PROMPTS, make, source, talker
from plain_diffusion import CONFIGS, EOS, MASK, VOCAB

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion
from linspec.diffusion.caches import DualCache
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.freedave import FreeDave, FreeDaveOptions, FreeDavePlus
from linspec.diffusion.predictions import Predictions
from linspec.engine.loops.canvas_forward import Denoising, Reading
from linspec.engine.loops.canvas_rounds import CanvasRounds
from linspec.engine.loops.masked_diffusion import MaskedDiffusionLoop
from linspec.errors import ConfigError

CACHES = ("none", "prefix", "dual")
LONG = SamplingParams(max_tokens=19, seed=7, ignore_eos=True)
# what a forward made a round of: positions and tokens of each round of a prompt
Rounds = list[list[tuple[int, int]]]


@contextmanager
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Rounds]]:
    """By the number of a sequence, what each of its rounds decided."""
    found: dict[int, Rounds] = {}
    plain = CanvasRounds.round

    def denoise(self: Any, denoising: Denoising, predictions: Any) -> Any:
        canvas, before = denoising.canvas, set(denoising.canvas.undecided)
        result = plain(self, denoising, predictions)
        new = sorted((at, canvas.tokens[at]) for at in before - canvas.undecided)
        found.setdefault(denoising.sequence.number, []).append(new)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(CanvasRounds, "round", denoise)
        yield found


def run(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spec: str,
    params: SamplingParams = LONG,
    prompts: list[list[int]] = PROMPTS,
) -> tuple[list[Rounds], list[Any]]:
    """The rounds of every prompt, and the answers."""
    with rounds(monkeypatch) as found:
        results = make(name, spec).generate(prompts, params)
    return [found[number] for number in sorted(found)], results


def assert_same(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: str, verify: str, params: Any = LONG
) -> int:
    """Same tokens in the same rounds, in no more forwards; returns how many fewer."""
    expected, plain = run(monkeypatch, name, spec, params)
    found, drafted = run(monkeypatch, name, f"{spec},verify={verify}", params)
    assert found == expected
    assert [e.token_ids for e in drafted] == [e.token_ids for e in plain]
    assert [e.finish_reason for e in drafted] == [e.finish_reason for e in plain]
    saved = [a.stats.rounds - b.stats.rounds for a, b in zip(plain, drafted, strict=True)]
    assert min(saved) >= 0
    return sum(saved)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_order_are_those_of_static(
    monkeypatch: pytest.MonkeyPatch, name: str, kept: str
) -> None:
    saved = 0
    for block in (8, 16, 32):
        spec = f"block=fixed:{block},commit=static,cache={kept}"
        expected, plain = run(monkeypatch, name, spec, prompts=PROMPTS[1:3])
        for drafts in (1, 2, 4, 8):
            verified = f"{spec},verify=freedave:{drafts}"
            found, drafted = run(monkeypatch, name, verified, prompts=PROMPTS[1:3])
            assert found == expected
            for one, other in zip(plain, drafted, strict=True):
                assert other.token_ids == one.token_ids
                assert other.stats.rounds <= one.stats.rounds <= drafts * other.stats.rounds
                saved += one.stats.rounds - other.stats.rounds
            if drafts == 1:
                assert [e.stats.computed for e in drafted] == [e.stats.computed for e in plain]
    assert saved > 0


@pytest.mark.crossed(2)
@pytest.mark.parametrize(
    "spec",
    [
        "block=fixed:8,commit=static:steps=3",
        "block=fixed:8,commit=static:order=margin",
        "block=fixed:none,commit=static:order=entropy+steps=6,cache=prefix:every=2",
        "block=fixed:8,commit=static:order=left,cache=dual:every=3",
        "block=fixed:8,commit=static:order=random,cache=dual",
        "block=fixed:8,commit=threshold:0.3,cache=dual",
        "block=fixed:8,commit=local-leap:sure=0.3+near=0.1",
        "block=fixed:8,commit=factor:1.5,stop=never",
        "block=fixed:8,commit=entropy:2.0,masks=7,cache=prefix",
        "block=fixed:8,commit=static,stop=prophet:early=2+middle=1+late=0.5",
    ],
)
def test_any_policies_decide_what_they_do_without_drafts(
    monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    for name in CONFIGS:
        assert_same(monkeypatch, name, spec, "freedave:5")


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_see_what_the_canvases_before_them_have_computed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def rows(self: DualCache, canvas: Canvas) -> list[int]:
        """All rows at times, else those that change between one forward and the next."""
        return [*range(len(canvas))] if canvas.step % 3 == 0 else canvas.open

    monkeypatch.setattr(DualCache, "rows", rows)
    spec = "block=fixed:none,commit=static,cache=dual"
    assert assert_same(monkeypatch, name, spec, "freedave:6") > 0


def test_a_cache_that_does_not_go_by_the_canvas_alone_loses_drafts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(self: DualCache, canvas: Canvas) -> list[int]:
        """As a policy that forwards tell what to compute: the true canvas knows, no draft does."""
        told = canvas is self.options.true
        return [*range(len(canvas))] if told or canvas.step == 0 else canvas.open

    plain = MaskedDiffusionLoop._forward

    def forward(self: Any, denoising: Denoising) -> Any:
        object.__setattr__(self.cache, "options", SimpleNamespace(true=denoising.canvas))
        return plain(self, denoising)

    monkeypatch.setattr(DualCache, "rows", rows)
    monkeypatch.setattr(MaskedDiffusionLoop, "_forward", forward)
    spec = "block=fixed:none,commit=static,cache=dual"
    (found,), (result,) = run(
        monkeypatch, "llada", f"{spec},verify=freedave:4", prompts=PROMPTS[:1]
    )
    (expected,), _ = run(
        monkeypatch, "llada", "block=fixed:none,commit=static", prompts=PROMPTS[:1]
    )
    assert found == expected and result.stats.rounds == 19


@pytest.mark.parametrize(
    "settings",
    [
        {"min_tokens": 9, "allowed_token_ids": (3, 4, EOS)},
        {"logit_bias": {8: 2.0, EOS: 1.0}},
        {"stop_token_ids": tuple(range(3, 20))},
        {"temperature": 0.6, "seed": 3, "ignore_eos": True},
        {"temperature": 1.5, "seed": 4, "top_k": 5, "min_tokens": 4},
    ],
    ids=str,
)
def test_settings_of_a_request_change_nothing_of_that(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=19, **settings)
    for name, kept in (("llada", "none"), ("dream", "dual")):
        spec = f"block=fixed:8,commit=static,cache={kept}"
        assert_same(monkeypatch, name, spec, "freedave:4", params)


def test_drafts_of_what_is_drawn_are_drawn_by_the_numbers_of_their_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(max_tokens=19, temperature=0.5, seed=5, ignore_eos=True)
    spec = "block=fixed:none,commit=static:order=left"
    assert assert_same(monkeypatch, "llada", spec, "freedave:4", params) > 0


def test_company_changes_nothing() -> None:
    spec = "block=fixed:5,commit=static,cache=dual,verify=freedave:3"
    asked = [
        SamplingParams(max_tokens=count, temperature=heat, seed=count, ignore_eos=True)
        for count, heat in ((13, 0.0), (6, 0.9), (20, 0.0), (1, 0.0))
    ]
    alone = make("dream", spec, max_batch=1).generate(PROMPTS, asked)
    together = make("dream", spec, max_batch=3).generate(PROMPTS, asked)
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    for one, other in zip(alone, together, strict=True):
        assert (one.stats.rounds, one.stats.computed) == (other.stats.rounds, other.stats.computed)


def test_blocks_go_out_as_they_do_without_drafts() -> None:
    spec = "block=fixed:5,commit=static,cache=prefix"
    pieces = [
        [piece.token_ids for piece in make(spec=each).stream([PROMPTS[0]], LONG)]
        for each in (spec, f"{spec},verify=freedave")
    ]
    assert pieces[0] == pieces[1] and [len(each) for each in pieces[0]] == [5, 5, 5, 4]


@pytest.fixture
def determined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward says the same of a position, so all that is drafted from one of them is right."""
    table = torch.randn(96, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predictions(self: Any, reading: Reading, logits: torch.Tensor) -> Predictions:
        return Predictions(reading.read, table[reading.read], self.config.logit_shift, MASK)

    monkeypatch.setattr(MaskedDiffusionLoop, "_predictions", predictions)


@pytest.mark.usefixtures("determined")
@pytest.mark.parametrize("name", CONFIGS)
def test_forwards_reach_the_least_of_the_closed_form(name: str) -> None:
    for block, steps in ((8, 8), (16, 8), (32, 8), (32, 32)):
        share = block // steps
        spec = f"block=fixed:{block},commit=static:steps={steps},cache=dual"
        params = SamplingParams(max_tokens=block, ignore_eos=True)
        for drafts in (1, 2, 4, 8):
            least = 1 + -(-(block - share) // (share * drafts))
            llm = make(name, f"{spec},verify=freedave:{drafts}")
            (found,) = llm.generate([PROMPTS[0]], params)
            assert found.stats.rounds == least
            assert found.stats.tokens_per_round == pytest.approx(block / least)
    # a block that one forward fills has nothing to draft
    one = make(name, "block=fixed:8,commit=static:steps=1,verify=freedave:8")
    (found,) = one.generate([PROMPTS[0]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert found.stats.rounds == 1


@pytest.mark.usefixtures("determined")
def test_what_drafts_compute_is_counted() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for kept, row in (("none", 11), ("dual", 8)):
        llm = make(spec=f"block=fixed:8,commit=static,cache={kept},verify=freedave:4")
        (found,) = llm.generate([PROMPTS[0]], params)
        # one canvas of 3 + 8 positions, then four, then the three of which the last one fills the block
        assert found.stats.computed == 3 * (11 + 4 * row + 3 * row)


@pytest.mark.parametrize("kv", ["int8", "bfloat16"])
def test_caches_of_fewer_bits_keep_branches_exactly(kv: str) -> None:
    def answers(verify: str) -> list[tuple[int, ...]]:
        loop = f"masked-diffusion:block=fixed:8,commit=static,cache=dual,verify={verify}"
        model = load_diffusion(source("dream")[0], dtype=torch.float64)
        llm = LLM(model, tokenizer=tiny_tokenizer(), kv_cache_dtype=kv, loop=loop)
        return [each.token_ids for each in llm.generate(PROMPTS, LONG)]

    assert answers("freedave:4") == answers("none")


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_as_it_is_loaded_writes_the_same(bits: int | None) -> None:
    def answers(verify: str) -> list[tuple[int, ...]]:
        loop = f"masked-diffusion:block=fixed:8,commit=static,cache=dual,verify={verify}"
        llm = LLM(talker(), quantize=bits, loop=loop)
        return [each.token_ids for each in llm.generate(["abcd", "the end"], LONG)]

    assert answers("freedave:4") == answers("none")


@pytest.mark.parametrize("name", CONFIGS)
def test_plus_is_static_where_a_round_decides_one_token(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = "block=fixed:8,commit=static,cache=dual"
    assert_same(monkeypatch, name, spec, "freedave-plus:4")


def test_plus_decides_every_mask_in_no_more_forwards_than_tokens() -> None:
    for name in CONFIGS:
        spec = "block=fixed:8,commit=threshold:0.3,cache=dual,verify=freedave-plus:4"
        for each in make(name, spec).generate(PROMPTS, LONG):
            assert len(each.token_ids) == 19 and MASK not in each.token_ids
            assert each.stats.rounds <= 19
            assert each.stats.tokens_per_round == pytest.approx(19 / each.stats.rounds)


def test_which_draft_counts() -> None:
    canvas = Canvas([1], 4, mask_id=9)
    truth = canvas.after({1: 5, 2: 6})
    lagging, equal, other = canvas.after({2: 6}), canvas.after({1: 5, 2: 6}), canvas.after({1: 4})
    exact, plus = FreeDave(FreeDaveOptions(4)), FreeDavePlus(FreeDaveOptions(4))
    beyond = equal.after({3: 7})
    for drafts, strict, loose in (
        ([], 0, 0),
        ([equal, beyond], 1, 1),
        ([lagging, equal, beyond], 0, 2),
        ([lagging], 0, 1),
        ([other, beyond], 0, 0),
    ):
        assert (exact.follows(truth, drafts), plus.follows(truth, drafts)) == (strict, loose)
    # drafts are copies: the canvas that they come from stays as it is
    assert canvas.tokens == [1, 9, 9, 9, 9] and canvas.step == 0 and truth.step == 1


def test_how_many_drafts_is_checked() -> None:
    for verify in ("freedave:0", "freedave-plus:drafts=0"):
        with pytest.raises(ConfigError, match="drafts must be 1 or more"):
            make(spec=f"verify={verify}")


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_that_are_not_likely_are_left_out_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = "block=fixed:8,commit=static,cache=dual"
    computed, saved = [], []
    for least in (0, 0.05, 0.3, 1):
        saved.append(assert_same(monkeypatch, name, spec, f"freedave:drafts=4+least={least}"))
        _, answers = run(monkeypatch, name, f"{spec},verify=freedave:drafts=4+least={least}")
        computed.append(sum(each.stats.computed for each in answers))
    assert saved == sorted(saved, reverse=True) and saved[0] > saved[-1] == 0
    _, plain = run(monkeypatch, name, spec)
    assert computed[0] > computed[-1] == sum(each.stats.computed for each in plain)


def test_what_is_drawn_is_as_likely_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=19, temperature=0.5, seed=5, ignore_eos=True)
    spec = "block=fixed:none,commit=static:order=left"
    most = assert_same(monkeypatch, "llada", spec, "freedave:4", params)
    some = assert_same(monkeypatch, "llada", spec, "freedave:drafts=4+least=0.2", params)
    assert most > some >= 0


def test_what_is_left_out_is_a_probability() -> None:
    for least in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=r"least must be in \[0, 1\]"):
            make(spec=f"verify=freedave:least={least}")
