"""What plug-ins answer and write to, requests and handles: held to their rules, naming who broke one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model

from linspec import DRAFTERS, LOOPS, POLICIES, ChainDrafter, DrafterContext, SamplingParams
from linspec.decoding.outcome import Outcome
from linspec.decoding.request import Request
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree
from linspec.drafters import make_drafter
from linspec.drafters.grammar import ForcedTokens
from linspec.drafters.lookup import PromptLookup
from linspec.drafters.mixed import Mixed
from linspec.engine.engine import Engine
from linspec.engine.loops import GenerationLoop
from linspec.errors import ConfigError, DrafterError, InputError, StateError, WrongType
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.utils.registry import Registry
from linspec.verifiers import LosslessVerifier

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = tuple(random_tokens(9))
Change = Callable[[RunningSequence], Any]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model("aug").to_inference()


def failure(model: Decoder, drafter: Any, policy: Any = None) -> str:
    """What ends the request that a faulty plug-in was asked about, while plain decoding would go on."""
    engine = Engine(
        model, verifier=LosslessVerifier(), drafter=drafter, policy=policy or Fixed(3), slots=2
    )
    engine.add(Request(PROMPT, PARAMS))
    ends: list[Outcome] = []
    while engine.busy:
        ends += [outcome for outcome in engine.step() if outcome.finished]
    (end,) = ends
    assert isinstance(end.error, DrafterError)
    return str(end.error)


CHANGES: dict[str, Change] = {
    "grown": lambda sequence: sequence.tokens.append(1),
    "shorter": lambda sequence: sequence.tokens.pop(),
    "another": lambda sequence: sequence.tokens.__setitem__(-1, 1 + sequence.root % 7),
    "emptied": lambda sequence: sequence.tokens.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("hook", ["started", "propose", "observe"])
def test_a_drafter_that_wrote_to_the_tokens_changed_the_output(
    hook: str, change: str, model: Decoder
) -> None:
    class Writer(PromptLookup):
        name = "writer"

        def draft(self, sequences: Any, lengths: Any) -> list[list[int]]:
            drafts = [[1] for _ in sequences]
            if hook == "propose":
                CHANGES[change](sequences[0])
            return drafts

        def started(self, sequence: RunningSequence) -> None:
            if hook == "started":
                CHANGES[change](sequence)

        def observe(self, sequence: RunningSequence, tree: Any, path: Any) -> None:
            if hook == "observe":
                CHANGES[change](sequence)

    said = failure(model, Writer())
    assert "drafter 'writer' changed sequence.tokens" in said and "list(sequence.tokens)" in said


def with_confidence(sure: Any) -> TokenTree:
    return TokenTree((1, 2), TREE, confidences=(1.0, sure))


TREE = (-1, 0)
ANSWERS: list[tuple[str, Any, str]] = [
    ("propose", None, "answered None; the answer is a list with a TokenTree for each request"),
    ("propose", [], "answered 0 times for 1 requests"),
    ("propose", [None], "proposed None; a proposal is a TokenTree"),
    ("propose", [[1, 2]], r"proposed [1, 2]; a proposal is a TokenTree"),
    ("propose", [TokenTree((1.0, 2), TREE)], "token ids are whole numbers"),  # type: ignore[arg-type]
    *(
        ("propose", [with_confidence(sure)], f"the confidence {sure!r}; a confidence is a number")
        for sure in (math.nan, math.inf, -0.5, None, "1")
    ),
    ("draft", None, "answered None; the answer is a list with a list of token ids for each"),
    ("draft", [], "answered 0 times for 1 requests"),
    ("draft", [None], "drafted None; a draft is a list of token ids, empty for none"),
    ("draft", ["ab"], "drafted 'ab'; a draft is a list of token ids"),
    ("draft", [[1.0]], "token ids are whole numbers"),
    ("draft", [["1"]], "token ids are whole numbers"),
    ("draft", [[True]], "token ids are whole numbers"),
]


@pytest.mark.parametrize(("method", "answer", "message"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_of_a_drafter_failed_without_its_name(
    method: str, answer: Any, message: str, model: Decoder
) -> None:
    drafter = PromptLookup()
    setattr(drafter, method, lambda *_: answer)
    said = failure(model, drafter)
    assert said.startswith("drafter 'prompt-lookup' ") and message in said


@pytest.mark.parametrize("free", [True, False])
def test_confidences_that_are_no_numbers_unlearned_a_mix(free: bool, model: Decoder) -> None:
    part = PromptLookup()
    part.model_free = free
    for answer in (None, with_confidence(math.nan)):
        part.propose = lambda rows, _, it=answer: [it for _ in rows]  # type: ignore
        said = failure(model, Mixed([ForcedTokens(), part]))
        assert said.startswith("drafter 'prompt-lookup' proposed ")


def test_drafts_that_were_sampled_by_a_model_free_drafter_were_cut_by_what_was_drawn(
    model: Decoder,
) -> None:
    share = torch.full((model.config.vocab_size,), 1 / model.config.vocab_size)
    drafter = PromptLookup()
    drafter.propose = lambda rows, _: [  # type: ignore[method-assign]
        TokenTree((row.root, 1), TREE, {0: share}) for row in rows
    ]
    assert "said to be model_free and sampled its drafts" in failure(model, drafter)


@pytest.mark.parametrize("answer", [None, [None], [4], []], ids=str)
def test_answers_of_a_policy_failed_without_its_name(answer: Any, model: Decoder) -> None:
    policy = Fixed(3)
    policy.plan = lambda *_: answer  # type: ignore[method-assign]
    said = failure(model, PromptLookup(), policy)
    assert said.startswith("policy 'fixed' ") and "a Budget" in said


class Plain:
    """Derives from nothing."""

    def __init__(self, *_: object) -> None:
        pass


class Undrafted(ChainDrafter):
    """Has no draft."""


class Unstarted(GenerationLoop):
    """Has neither started nor round."""


WRONG: list[tuple[Registry[Any], type[Any], str]] = [
    (
        DRAFTERS,
        Plain,
        "drafter 'wrong' is a Plain, which is no Drafter and lacks expected, propose",
    ),
    (POLICIES, Plain, "policy 'wrong' is a Plain, which is no Policy and lacks .*plan"),
    (
        LOOPS,
        Plain,
        "generation loop 'wrong' is a Plain, .*lacks round, started, .*finished",
    ),
    (
        LOOPS,
        Unstarted,
        "generation loop 'wrong' lacks round, started; write them in its class Unst",
    ),
]


def test_a_mixer_of_another_kind_failed_without_its_name() -> None:
    MIXERS.register("wrong", summary="-", paper="-")(type("Plain", (Plain,), {}))
    try:
        with pytest.raises(ConfigError, match="mixer 'wrong' is a Plain, which .* lacks attend, "):
            tiny_model(MixerConfig(name="wrong"))
    finally:
        MIXERS.forget("wrong")


@pytest.fixture
def wrong(request: pytest.FixtureRequest) -> Iterator[Registry[Any]]:
    registry, kind, _ = request.param
    registry.register("wrong", summary="-", paper="-")(type(kind.__name__, (kind,), {}))
    yield registry
    registry.forget("wrong")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(each, each[2]) for each in WRONG],
    indirect=["wrong"],
    ids=range(len(WRONG)),
)
def test_a_class_of_another_kind_failed_far_from_its_name(
    wrong: Registry[Any], message: str, model: Decoder
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong.build("wrong", DrafterContext(model))


def test_a_chain_drafter_without_draft_ended_every_request(model: Decoder) -> None:
    with pytest.raises(ConfigError, match="drafter 'Undrafted' lacks draft; write it in its class"):
        Engine(model, verifier=LosslessVerifier(), drafter=Undrafted(), policy=Fixed(3))


def test_an_unknown_name_did_not_say_that_a_plug_in_may_be_missing() -> None:
    with pytest.raises(
        ConfigError, match="unknown mixer 'elus'; .*import or install its package; did"
    ):
        MIXERS["elus"]


def test_no_drafter_was_none_without_the_way_out(model: Decoder) -> None:
    nothing: Any = None
    with pytest.raises(WrongType, match="got None; use 'none' for plain decoding"):
        make_drafter(nothing, DrafterContext(model))


REQUESTS: list[tuple[Any, str]] = [
    (None, "a request must be of type Request, got None"),
    ((5, 6), "a request must be of type Request, got .5, 6."),
    (Request("abc", PARAMS), "a tuple of token ids, got 'abc'; LLM.encode"),  # type: ignore[arg-type]
    (Request(5, PARAMS), "a tuple of token ids, got 5"),  # type: ignore[arg-type]
    (Request((True,), PARAMS), "whole numbers from 0 on, got True"),
    (Request((5, 1.0), PARAMS), "whole numbers from 0 on, got 1.0"),  # type: ignore[arg-type]
    (Request(("5",), PARAMS), "whole numbers from 0 on, got '5'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("request_", "message"), REQUESTS, ids=range(len(REQUESTS)))
def test_a_request_of_a_wrong_type_failed_in_a_step(
    request_: Any, message: str, model: Decoder
) -> None:
    engine = Engine(model, verifier=LosslessVerifier())
    with pytest.raises(WrongType, match=message):
        engine.add(request_)
    assert not engine.busy


def test_a_handle_that_nobody_reserved_or_that_has_its_request_is_refused(model: Decoder) -> None:
    engine, request = Engine(model, verifier=LosslessVerifier()), Request(PROMPT, PARAMS)
    wrong: Any = "x"
    for use in (lambda handle: engine.add(request, handle), engine.abort):
        with pytest.raises(WrongType, match="a handle is a number from add.* got 'x'"):
            use(wrong)
        with pytest.raises(StateError, match="gave out no handle 999"):
            use(999)
    handle = engine.reserve()
    with pytest.raises(InputError):
        engine.add(Request((999,), PARAMS), handle)
    assert engine.add(request, handle) == handle
    with pytest.raises(StateError, match=f"handle {handle} has had its request"):
        engine.add(request, handle)
    engine.abort(handle)
    # one that has ended is dropped already
    engine.abort(handle)
    assert not engine.busy
    dropped = engine.reserve()
    engine.abort(dropped)
    with pytest.raises(StateError, match="has had its request"):
        engine.add(request, dropped)
