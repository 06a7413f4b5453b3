"""The engine's promise: rows, drafters, budgets and batches change nothing about the output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from helpers import VOCAB, full_logits, random_tokens, random_tree, randomise, tiny_model

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.aded import Aded
from linspec.drafters.base import Drafter
from linspec.drafters.chimera import Chimera
from linspec.drafters.chimera_net import ChimeraConfig, ChimeraNet
from linspec.drafters.draft_model import DraftModel, Student
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.hidden_transfer import HiddenTransfer, TransferConfig, TransferMaps
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.drafters.lud import LUD, LUDOptions, Slot, SlotConfig
from linspec.drafters.medusa import Medusa
from linspec.drafters.mixed import Mixed
from linspec.drafters.ppd import PPD, PromptsConfig, PromptTokens
from linspec.drafters.specdiff import SpecDiff, SpecDiffOptions
from linspec.drafters.suffix import Suffix
from linspec.engine.engine import Engine
from linspec.errors import ContextOverflow, InputError
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

SLOTS = 4


class RandomTrees(Drafter):
    """Trees of any shape, with the truth planted now and then so that some of it is accepted."""

    name = "test-random"

    def __init__(self, model: Decoder) -> None:
        self.model, self.rng = model, random.Random(3)

    def propose(
        self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [self._tree(row, budget) for row, budget in zip(rows, budgets, strict=True)]

    def _tree(self, row: RunningSequence, budget: Budget) -> TokenTree:
        tree = random_tree(self.rng, 1 + self.rng.randrange(budget.nodes + 1), depth=budget.depth)
        tokens = [row.root, *tree.tokens[1:]]
        for node in range(1, len(tokens)):
            if self.rng.random() < 0.5:
                before = tree.path_to(tree.parents[node])
                text = [*row.tokens, *(tokens[n] for n in before[1:])]
                tokens[node] = int(full_logits(self.model, [text])[0].argmax())
        return TokenTree(tuple(tokens), tree.parents)

    def expected(self, budget: Budget) -> float:
        return 1.0


def random_heads(model: Decoder) -> Medusa:
    config = HeadsConfig(width=model.config.width, vocab_size=VOCAB, heads=3)
    accuracies = [[0.5, 0.3], [0.4, 0.2], [0.3]]
    heads = MedusaHeads(config, model, accuracies)
    return Medusa(randomise(heads, 5).to(model.embed.weight.dtype))


def random_prompts(model: Decoder) -> PPD:
    shape = PromptsConfig(width=model.config.width, vocab_size=VOCAB, prompts=3)
    tokens = PromptTokens(shape, [[0.5, 0.3], [0.4, 0.2], [0.3]])
    return PPD(randomise(tokens, 6).to(model.dtype))


def random_maps(model: Decoder) -> HiddenTransfer:
    shape = TransferConfig(width=model.config.width, vocab_size=VOCAB, steps=3)
    maps = TransferMaps(shape, model, [[0.5, 0.3], [0.4, 0.2], [0.3]])
    return HiddenTransfer(randomise(maps, 7).to(model.dtype))


def random_chimera(model: Decoder) -> Chimera:
    shape = {"width": model.config.width, "vocab_size": VOCAB, "depth": 3, "heads": 2}
    config = ChimeraConfig(**shape, head_width=8, inner=24, window=6)
    net = ChimeraNet(config, model, [[0.5, 0.3], [0.4, 0.2], [0.3]])
    return Chimera(randomise(net, 7).to(model.dtype))


def random_slots(model: Decoder) -> LUD:
    shape = SlotConfig(width=model.config.width, vocab_size=VOCAB, slots=3)
    return LUD(randomise(Slot(shape), 8).to(model.dtype), LUDOptions(threshold=0.05))


def random_denoiser(
    vocab_size: int = VOCAB, shift: int = 1, seed: int = 11, layers: int = 2, **changes: Any
) -> MaskedDiffusion:
    """A masked-diffusion model of the tokens of the tiny ones, and a mask."""
    shape = {"width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
    config = DiffusionConfig(
        vocab_size=vocab_size + 1,
        mask_id=vocab_size,
        logit_shift=shift,
        layers=layers,
        **(shape | changes),
    )
    return cast(MaskedDiffusion, randomise(MaskedDiffusion(config), seed))


def random_specdiff(model: Decoder, options: SpecDiffOptions | None = None) -> SpecDiff:
    denoiser = random_denoiser(model.config.vocab_size).to(model.dtype).to_inference()
    return SpecDiff(denoiser, model.config, SLOTS, options)


DRAFTERS: dict[str, Callable[[Decoder], Drafter]] = {
    "lookup": lambda model: PromptLookup(options=LookupOptions(min_ngram=1)),
    "itself": lambda model: DraftModel(model, model.config, SLOTS),
    "other": lambda model: DraftModel(
        tiny_model("softmax", seed=9, dtype=model.embed.weight.dtype), model.config, SLOTS
    ),
    "student": lambda model: Student(
        tiny_model("aug", seed=8, dtype=model.embed.weight.dtype), model.config, SLOTS
    ),
    "medusa": random_heads,
    "ppd": random_prompts,
    "hidden-transfer": random_maps,
    "chimera": random_chimera,
    "lud": random_slots,
    "specdiff": random_specdiff,
    "random": RandomTrees,
    "suffix": lambda model: Suffix(),
    "aded": lambda model: Aded(),
    "mix": lambda model: Mixed([Suffix(), random_heads(model)]),
}


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    drafter: Drafter | None = None,
    *,
    policy: Policy | None = None,
    slots: int = SLOTS,
    prefill_tokens: int = 512,
) -> list[RunningSequence]:
    """The finished row of every prompt."""
    engine = Engine(
        model,
        verifier=LosslessVerifier(),
        drafter=drafter,
        policy=policy or Fixed(6),
        slots=slots,
        prefill_tokens=prefill_tokens,
    )
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    asked = [engine.add(Request(tuple(p), each)) for p, each in zip(prompts, params, strict=True)]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        for emitted in engine.step():
            if emitted.finished:
                done[emitted.sequence.request] = emitted.sequence
    return [done[request] for request in asked]


def outputs(rows: Sequence[RunningSequence]) -> list[list[int]]:
    return [row.tokens[row.prompt_length :] for row in rows]


PROMPTS = [random_tokens(n, seed=n) for n in (1, 3, 7, 12, 23)]
# the longest prompt repeats itself: something to look up
PROMPTS[-1] = PROMPTS[-1][:8] * 3
LENGTHS = (1, 2, 9, 24, 17)
GREEDY = [SamplingParams(max_tokens=n) for n in LENGTHS]


@pytest.mark.crossed(5)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_greedy_with_a_drafter_is_plain_greedy(
    drafter: str, mixer: str, dtype: torch.dtype
) -> None:
    model = tiny_model(mixer, dtype=dtype)
    if drafter != "medusa":
        model.to_inference()
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, GREEDY, strict=True)]
    assert [len(tokens) for tokens in plain] == list(LENGTHS)
    together = decode(model, PROMPTS, GREEDY, DRAFTERS[drafter](model))
    alone = DRAFTERS[drafter](model)
    assert outputs(together) == plain
    assert outputs(decode(model, PROMPTS, GREEDY, alone, slots=1)) == plain


def test_drafts_are_really_verified() -> None:
    model = tiny_model("aug")
    for name in ("itself", "random", "lookup"):
        rows = decode(model, PROMPTS, SamplingParams(max_tokens=30), DRAFTERS[name](model))
        assert sum(row.stats.accepted for row in rows) > 5, name
        assert any(row.stats.tokens_per_round > 1 for row in rows), name


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_model_that_drafts_for_itself_is_always_right(mixer: str) -> None:
    model = tiny_model(mixer)
    rows = decode(model, PROMPTS, SamplingParams(max_tokens=29), DRAFTERS["itself"](model))
    for row in rows:
        assert row.stats.acceptance == [1.0] * 6
        # 1 token of the prompt's step, then 4 rounds of 6 drafts and a bonus token
        assert row.stats.rounds == 4
        assert row.stats.tokens_per_round == 7.0


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_plain_decoding_is_one_token_a_round(mixer: str) -> None:
    for row in decode(tiny_model(mixer), PROMPTS, SamplingParams(max_tokens=12)):
        assert row.stats.tokens_per_round == 1.0
        assert (row.stats.rounds, row.stats.drafted, row.stats.acceptance) == (11, 0, [])


def test_no_draft_budget_is_plain_decoding() -> None:
    model = tiny_model("aug")
    rows = decode(model, PROMPTS, GREEDY, DRAFTERS["itself"](model), policy=Fixed(0))
    assert all(row.stats.drafted == 0 and row.stats.tokens_per_round == 1.0 for row in rows)


@pytest.mark.parametrize(
    "drafter", [None, "lookup", "itself", "other", "ppd", "hidden-transfer", "chimera", "random"]
)
def test_rows_of_different_params_equal_single_runs(drafter: str | None) -> None:
    model = tiny_model("aug", dtype=torch.float64)
    params = [
        SamplingParams(max_tokens=15),
        SamplingParams(max_tokens=9, temperature=1.0, seed=1),
        SamplingParams(max_tokens=20, temperature=0.7, top_k=5, seed=2),
        SamplingParams(max_tokens=12, temperature=1.3, top_p=0.8, seed=3, repetition_penalty=1.2),
        SamplingParams(max_tokens=18, repetition_penalty=1.5, logit_bias={3: 2.0, 4: -5.0}),
    ]

    def make() -> Drafter | None:
        return DRAFTERS[drafter](model) if drafter and drafter != "random" else None

    together = outputs(decode(model, PROMPTS, params, make(), slots=3))
    for prompt, each, tokens in zip(PROMPTS, params, together, strict=True):
        assert outputs(decode(model, [prompt], each, make(), slots=1)) == [tokens]


@pytest.mark.parametrize("drafter", ["lookup", "ppd", "random"])
def test_certain_drafts_do_not_change_what_a_seed_gives(drafter: str) -> None:
    model = tiny_model("softmax")
    params = [SamplingParams(max_tokens=20, temperature=0.9, seed=s) for s in range(5)]
    plain = outputs(decode(model, PROMPTS, params))
    assert outputs(decode(model, PROMPTS, params, DRAFTERS[drafter](model))) == plain


@pytest.mark.parametrize("drafter", ["itself", "other", "ppd", "random", "lookup"])
def test_penalty_and_bias_with_drafts(drafter: str) -> None:
    model = tiny_model("aug")
    params = SamplingParams(
        max_tokens=25, repetition_penalty=1.7, logit_bias={2: 1.5, 7: -float("inf")}
    )
    plain = outputs(decode(model, PROMPTS, params))
    assert not any(7 in tokens for tokens in plain)
    assert plain != outputs(decode(model, PROMPTS, SamplingParams(max_tokens=25)))
    assert outputs(decode(model, PROMPTS, params, DRAFTERS[drafter](model))) == plain


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_slots_and_prefill_chunks_do_not_matter(slots: int, chunk: int) -> None:
    model = tiny_model("aug")
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, GREEDY, strict=True)]
    rows = decode(
        model, PROMPTS, GREEDY, DRAFTERS["itself"](model), slots=min(slots, SLOTS),
        prefill_tokens=chunk,
    )  # fmt: skip
    assert outputs(rows) == plain


def test_a_prompt_longer_than_the_stage_is_read_in_chunks() -> None:
    model = tiny_model("aug")
    prompt = random_tokens(200, seed=4)
    whole = outputs(decode(model, [prompt], GREEDY[3]))
    for chunk in (7, 64, 65, 150):
        assert outputs(decode(model, [prompt], GREEDY[3], prefill_tokens=chunk)) == whole


def test_end_of_sequence_inside_an_accepted_path() -> None:
    model = tiny_model("softmax")
    free = outputs(decode(model, [PROMPTS[3]], SamplingParams(max_tokens=24)))[0]
    place = next(i for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    model.config = replace(model.config, eos_ids=(free[place],))
    for drafter in (None, DRAFTERS["itself"](model)):
        row = decode(model, [PROMPTS[3]], SamplingParams(max_tokens=24), drafter)[0]
        assert outputs([row])[0] == free[: place + 1]
    ignoring = SamplingParams(max_tokens=24, ignore_eos=True)
    rows = decode(model, [PROMPTS[3]], ignoring, DRAFTERS["itself"](model))
    assert outputs(rows)[0] == free


@pytest.mark.parametrize("most", range(1, 9))
def test_max_tokens_inside_a_draft(most: int) -> None:
    model = tiny_model("aug")
    free = outputs(decode(model, [PROMPTS[2]], SamplingParams(max_tokens=12)))[0]
    rows = decode(model, [PROMPTS[2]], SamplingParams(max_tokens=most), DRAFTERS["itself"](model))
    assert outputs(rows)[0] == free[:most]


@pytest.mark.parametrize("drafter", [None, "itself", "ppd", "hidden-transfer", "chimera", "random"])
def test_a_softmax_model_ends_at_its_last_position(drafter: str | None) -> None:
    model = tiny_model("softmax", max_positions=20)
    made = DRAFTERS[drafter](model) if drafter else None
    rows = decode(
        model, [random_tokens(15), random_tokens(20)], SamplingParams(max_tokens=50), made
    )
    # the last token needs no position of its own
    assert [row.emitted for row in rows] == [6, 1]
    with pytest.raises(ContextOverflow, match=r"21 tokens.*20"):
        decode(model, [random_tokens(21)], SamplingParams())


def test_a_linear_model_goes_on_beyond_its_training_positions() -> None:
    model = tiny_model("aug", max_positions=20)
    rows = decode(
        model, [random_tokens(30)], SamplingParams(max_tokens=30), DRAFTERS["itself"](model)
    )
    assert rows[0].emitted == 30


def test_cancelling_leaves_the_engine_usable() -> None:
    model = tiny_model("aug")
    drafter = DRAFTERS["itself"](model)
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=Fixed(4), slots=2)
    for prompt in PROMPTS:
        engine.add(Request(tuple(prompt), SamplingParams(max_tokens=30)))
    for _ in range(3):
        engine.step()
    engine.cancel()
    assert not engine.busy
    engine.add(Request(tuple(PROMPTS[3]), GREEDY[3]))
    tokens: list[int] = []
    while engine.busy:
        tokens += [token for emitted in engine.step() for token in emitted.tokens]
    assert [tokens] == outputs(decode(model, [PROMPTS[3]], GREEDY[3]))


def test_bad_prompts_are_refused_at_once() -> None:
    engine = Engine(tiny_model("aug"), verifier=LosslessVerifier())
    for prompt, message in (([], "no tokens"), ([VOCAB], str(VOCAB)), ([-1], "-1")):
        with pytest.raises(InputError, match=message):
            engine.add(Request(tuple(prompt), SamplingParams()))
    assert not engine.busy


def test_seconds_come_from_the_clock_that_was_given() -> None:
    ticks = iter(range(1000))
    model = tiny_model("aug")
    engine = Engine(model, verifier=LosslessVerifier(), clock=lambda: float(next(ticks)))
    engine.add(Request(tuple(PROMPTS[0]), SamplingParams(max_tokens=4)))
    rows = [emitted.sequence for _ in range(4) for emitted in engine.step()]
    assert rows[0].stats.prefill_seconds == 3.0
    assert rows[0].stats.decode_seconds == 9.0
