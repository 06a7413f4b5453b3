"""Outputs of a given language: always of it, the same with every drafter, and a failure is one request's."""

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_config, text_model, tiny_tokenizer
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, tokenizer_of

from linspec import DRAFTERS, LLM, Grammar, RunningSequence, SamplingParams, TokenTree
from linspec.decoding.request import Request
from linspec.decoding.sampling.params import SamplingParams as Params
from linspec.decoding.tree import Budget, root_only
from linspec.drafters.base import Drafter
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.medusa import Medusa
from linspec.drafters.ppd import PPD, PromptsConfig, PromptTokens
from linspec.engine.engine import Engine
from linspec.engine.grammar import Grammars
from linspec.errors import ConfigError, InputError, LinspecError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import LosslessVerifier

pytest.importorskip("llguidance", reason="grammars need the extra serve")

VOCAB = len(tiny_tokenizer())
RATES = [[0.5, 0.2, 0.1], [0.4, 0.2]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "kind": {"enum": ["red", "green", None, 3]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar.json_schema(SCHEMA),
    Grammar.regex("(ab|ba)+c?[0-9]{2,5}"),
    Grammar.choice(["yes", "no", "not at all"]),
    Grammar.cfg('start: item ("," item)*\nitem: /[a-c]{1,3}/ | "(" start ")"'),
    Grammar.cfg('root ::= "x" [0-9]+ "é"'),
]
PROMPTS = ["def f(a, b):", "the end of the end", "abababab 1", "(a,b),(a,b)", "x12é x13é"]


class Wild(Drafter):
    """Random trees: any shape, mostly tokens that the grammar forbids, some of them twice or ends."""

    name = "wild"

    def __init__(self, sure: bool = False, sampled: bool = False) -> None:
        super().__init__()
        self.sure, self.sampled = sure, sampled

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [self._tree(each, budget) for each, budget in zip(sequences, budgets, strict=True)]

    def _tree(self, sequence: RunningSequence, budget: Budget) -> TokenTree:
        rng = random.Random(f"{sequence.number} {len(sequence.tokens)}")
        forced = sequence.sampler.forced()
        tokens, parents = [sequence.root], [-1]
        depths = [0]
        while len(tokens) <= budget.nodes:
            parent = rng.randrange(len(tokens))
            if depths[parent] < budget.depth:
                likely = forced[depths[parent] :][:1] or tuple(b"\x01")
                tokens.append(rng.choice((*likely, rng.randrange(VOCAB), 0)))
                parents.append(parent)
                depths.append(depths[parent] + 1)
        sure = tuple(rng.random() for _ in tokens) if self.sure else None
        if not self.sampled:
            return TokenTree(tuple(tokens), tuple(parents), confidences=sure)
        # an even proposal, of which the children are draws without replacement
        order = rng.sample(range(VOCAB), budget.chain)
        even = torch.full((VOCAB,), 1 / VOCAB)
        proposals = dict.fromkeys(range(len(order)), even)
        return TokenTree((sequence.root, *order), tuple(range(-1, len(order))), proposals)

    def expected(self, budget: Budget) -> float:
        return 0.5


@cache
def model_of(mixer: str = "aug") -> Any:
    return text_model(mixer)


def heads() -> Drafter:
    model = model_of()
    shape = HeadsConfig(width=model.config.width, vocab_size=VOCAB, heads=2)
    made = MedusaHeads(shape, model, RATES)
    made.initialize(torch.Generator().manual_seed(0))
    return Medusa(made)


def prompt_tokens() -> Drafter:
    shape = PromptsConfig(width=model_of().config.width, vocab_size=VOCAB, prompts=len(RATES))
    return PPD(PromptTokens(shape, RATES).to(model_of().dtype))


MADE: dict[str, Callable[[], Drafter | str]] = {
    "medusa": heads,
    "ppd": prompt_tokens,
    "draft-model": lambda: f"draft-model:{model_dir('aug', 1)}",
    "universal": lambda: f"universal:{model_dir('softmax', 1)}",
    "grammar+prompt-lookup": lambda: "grammar+prompt-lookup",
    "wild": Wild,
    "wild and sure": lambda: Wild(sure=True),
    "wild and sampled": lambda: Wild(sampled=True),
}
# what needs a directory of its own drafts trees and chains as these do
FOUND = ("aded", "auto", "grammar", "prompt-lookup", "self-bits", "suffix")


def language(drafter: Drafter | str = "none", policy: Any = 6, **options: Any) -> LLM:
    tokenizer = tiny_tokenizer()
    return LLM(model_of(), tokenizer=tokenizer, drafter=drafter, policy=policy, **options)


def asked(temperature: float, most: int = 40) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=most, temperature=temperature, seed=5, grammar=grammar)
        for grammar in GRAMMARS
    ]


@cache
def plain(temperature: float) -> list[tuple[tuple[int, ...], str]]:
    found = language().generate(PROMPTS, asked(temperature))
    return [(each.token_ids, each.finish_reason) for each in found]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", [*FOUND, *MADE])
def test_every_drafter_leaves_an_output_with_a_grammar_as_it_is(
    name: str, temperature: float
) -> None:
    drafter = MADE[name]() if name in MADE else name
    found = language(drafter).generate(PROMPTS, asked(temperature))
    exact = temperature == 0 or name not in ("wild and sampled", "draft-model", "universal")
    if exact:
        assert [(each.token_ids, each.finish_reason) for each in found] == plain(temperature)
    for each, grammar in zip(found, GRAMMARS, strict=True):
        assert each.finish_reason == "length" or matches(grammar, each.text)


def matches(grammar: Grammar, text: str) -> bool:
    if grammar == GRAMMARS[0]:
        return valid(json.loads(text), SCHEMA)
    if grammar.kind == "regex":
        return re.fullmatch(grammar.text, text) is not None
    patterns = ["yes|no|not at all", r"[abc(),]+", "x[0-9]+é"]
    return re.fullmatch(patterns[GRAMMARS.index(grammar) - 2], text) is not None


def test_the_drafters_here_are_all_that_need_no_training_and_few_layers() -> None:
    trained = {"block", "chimera", "eagle", "first", "hidden-transfer", "lud", "student"}
    trained |= {"specdec-head", "specdiff"}
    rest = {"mixed", "self-pages", "self-window", "swift"}
    known = {*FOUND, *MADE} | trained | rest
    # other tests register drafters of their own
    ours = {name for name in DRAFTERS.names() if DRAFTERS[name].__module__.startswith("linspec.")}
    assert ours <= known


@pytest.mark.parametrize("verifier", ["block", "typical", "trusting:threshold=0.3"])
def test_other_verifiers_keep_to_the_grammar_too(verifier: str) -> None:
    for drafter in (Wild(), Wild(sure=True), Wild(sampled=True)):
        llm = language(drafter, verifier=verifier)
        found = llm.generate(PROMPTS, asked(1.2))
        for each, grammar in zip(found, GRAMMARS, strict=True):
            assert each.error is None
            assert each.finish_reason == "length" or matches(grammar, each.text)


def test_forbidden_drafts_are_not_verified_and_forced_ones_are_right() -> None:
    params = SamplingParams(max_tokens=60, grammar=Grammar.json_schema(SCHEMA))
    drafter = Wild()
    seen: list[TokenTree] = []
    drafter.observe = lambda sequence, tree, path: seen.append(tree)  # type: ignore[method-assign]
    wild = language(drafter, policy=20).generate("a", params)[0]
    assert seen and all(tree.cut is None for tree in seen)
    assert wild.stats.drafted < sum(len(tree) - 1 for tree in seen) / 2
    forced = language("grammar").generate("a", params)[0]
    assert forced.token_ids == wild.token_ids
    assert forced.stats.drafted and forced.stats.tokens_per_round > 1.2


schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -3, "maximum": 12},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 3},
            {"enum": ["a", 1, None, "é\n"]},
            {"const": {"k": [1]}},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda item, most: {"type": "array", "items": item, "maxItems": most},
            inner,
            st.integers(0, 2),
        ),
        st.builds(lambda left, right: {"anyOf": [left, right]}, inner, inner),
        st.builds(
            lambda fields, needed: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", 'c"']), inner, max_size=2),
            st.integers(0, 2),
        ),
    ),
    max_leaves=4,
)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a schema of the kinds above allows a value."""
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if "anyOf" in schema:
        return any(valid(value, each) for each in schema["anyOf"])
    if schema["type"] == "object":
        fields = schema["properties"]
        return (
            isinstance(value, dict)
            and {*schema["required"]} <= {*value} <= {*fields}
            and all(valid(each, fields[name]) for name, each in value.items())
        )
    if schema["type"] == "array":
        items = isinstance(value, list) and len(value) <= schema["maxItems"]
        return items and all(valid(each, schema["items"]) for each in value)
    kinds = {"boolean": bool, "null": type(None), "string": str, "integer": int}
    if type(value) is not kinds[schema["type"]]:
        return False
    if schema["type"] == "integer":
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return schema["type"] != "string" or len(value) <= schema["maxLength"]


WILD = language(Wild(), max_batch=2)


@given(schemas, st.integers(0, 99))
@settings(max_examples=settings().max_examples * 25 // 20, deadline=None)
def test_json_always_parses_and_is_valid(schema: dict[str, Any], seed: int) -> None:
    grammar = Grammar.json_schema(schema)
    params = [
        SamplingParams(max_tokens=120, grammar=grammar),
        SamplingParams(max_tokens=120, temperature=1.3, seed=seed, grammar=grammar),
    ]
    for each in WILD.generate(["a", "b"], params):
        assert each.finish_reason == "length" or valid(json.loads(each.text), schema)


pieces = st.recursive(
    st.sampled_from(["a", "[b-d]", "é", "日?", "[0-9]{1,3}", r"\."]),
    lambda inner: st.one_of(
        st.builds("({}|{})".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        st.builds("({}){{0,2}}".format, inner),
    ),
    max_leaves=5,
)


@given(pieces, st.integers(0, 99))
@settings(max_examples=settings().max_examples * 25 // 20, deadline=None)
def test_a_regular_expression_always_matches(expression: str, seed: int) -> None:
    grammar = Grammar.regex(expression)
    params = SamplingParams(max_tokens=80, temperature=1.0, seed=seed, grammar=grammar)
    found = WILD.generate("a", params)[0]
    assert found.finish_reason == "stop" and re.fullmatch(expression, found.text)


def test_an_output_may_end_exactly_where_the_grammar_is_complete() -> None:
    rule = Grammars(tiny_tokenizer(), VOCAB)(Grammar.regex("ab?"), (0, 7))
    a, b = (tiny_tokenizer().encode(letter)[0] for letter in "ab")
    flat = torch.zeros(VOCAB)
    allowed = [
        (rule.apply(flat, drafts) == 0).nonzero().flatten().tolist()
        for drafts in [(), (a,), (a, b)]
    ]
    ab = tiny_tokenizer().encode("ab")
    first = sorted({a, *ab[:1]})
    assert allowed == [first, sorted([0, 7, b]), [0, 7]]
    # behind what never comes, nothing is said
    assert torch.equal(rule.apply(flat, (b, b)), flat) and torch.equal(
        rule.apply(flat, (0, b)), flat
    )
    assert rule.possible(TokenTree((9, 0, a, 0, b, 7, 7, b), (-1, 0, 0, 2, 2, 3, 4, 6))) == (
        0,
        2,
        3,
        4,
        6,
    )
    rule.observe((a,))
    rule.observe((b, 0))
    assert torch.equal(rule.apply(flat, ()), flat) and rule.forced() == ()
    assert rule.possible(TokenTree((0, b), (-1, 0))) == (0,)
    with pytest.raises(InputError, match=f"left its grammar at token {b}"):
        Grammars(tiny_tokenizer(), VOCAB)(Grammar.regex("ab?"), (0,)).observe((b,))


@pytest.mark.parametrize("drafter", ["none", "grammar", "wild"])
def test_a_request_that_bans_every_token_ends_alone(drafter: str) -> None:
    """What was emitted before stands, as without drafts."""
    digits = [tiny_tokenizer().encode(str(digit))[0] for digit in range(10)]
    banned = SamplingParams(
        grammar=Grammar.regex("(abcab)[0-9]x"), bad_words=[(d,) for d in digits]
    )
    fine = SamplingParams(grammar=Grammar.choice(["yes", "no"]))
    llm = language(Wild() if drafter == "wild" else drafter)
    found = llm.generate(["a", "b", "c"], [fine, banned, fine], return_errors=True)
    assert [each.finish_reason for each in found] == ["stop", "error", "stop"]
    assert found[1].text == "abcab"
    assert isinstance(found[1].error, InputError)
    assert "bad_words and grammar ban every token" in str(found[1].error)
    assert {found[0].text, found[2].text} <= {"yes", "no"}
    least = SamplingParams(grammar=Grammar.choice(["ab"]), min_tokens=9)
    with pytest.raises(InputError, match="min_tokens and grammar ban every token"):
        llm.generate("a", least)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grammar("yaml", "a"), "one of json_schema, regex, cfg, got 'yaml'"),
        (lambda: Grammar.regex(""), "needs a text, got ''"),
        (lambda: Grammar.regex(3), "is a text, got 3"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema("{"), "a JSON schema is JSON, got {"),
        (lambda: Grammar.json_schema("[" * 100_000), "a JSON schema is JSON"),
        (lambda: Grammar.json_schema([1]), "a JSON schema is an object, got .1."),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"a": {1, 2}}), "holds what JSON can say"),
        (lambda: Grammar.choice([]), "a choice is between non-empty texts"),
        (lambda: Grammar.choice("yes"), "a choice is between non-empty texts"),
        (lambda: SamplingParams(grammar="[0-9]"), "grammar must be a Grammar, got '.0-9.'"),  # type: ignore[arg-type]
        (
            lambda: SamplingParams(grammar=Grammar.json_object(), ignore_eos=True),
            "ignore_eos must be False",
        ),
    ],
)
def test_what_is_no_grammar_is_refused_when_it_is_written_down(
    make: Callable[[], object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.json_schema({"type": 3}), "type must be a string"),
        (Grammar.json_schema({"not": {"type": "string"}}), "Unimplemented keys"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable schema"),
        (Grammar.json_schema({"$ref": "http://localhost:1/x"}), "does not fetch resources"),
        (Grammar.regex("[a"), "unclosed character class"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.regex("(" * 5000), "cannot be used"),
        (Grammar.regex(r"[^\s\S]"), "no text matches it"),
        (Grammar.cfg("start: other"), "other"),
        (Grammar.cfg("root ::= other ::= ["), "cannot be used"),
    ],
)
def test_what_the_library_refuses_is_said_before_anything_is_queued(
    grammar: Grammar, said: str
) -> None:
    llm = WILD
    with pytest.raises(
        ConfigError, match=f"the grammar .*cannot be used: .*{said}|{said}"
    ) as caught:
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(grammar=grammar)])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert not llm.engine.busy


def test_without_the_library_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("llguidance"):
            raise ModuleNotFoundError("No module named 'llguidance'", name="llguidance")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    llm = language()
    assert llm.generate("a", SamplingParams(max_tokens=2))
    with pytest.raises(
        ConfigError, match=r"llguidance is not installed: pip install 'linspec\[serve\]'"
    ):
        llm.generate("a", SamplingParams(grammar=Grammar.json_object()))


def test_an_engine_without_a_tokenizer_and_a_model_without_an_end_refuse_grammars() -> None:
    model = model_of()
    params = Params(grammar=Grammar.regex("a"))
    with pytest.raises(ConfigError, match="only a tokenizer can spell"):
        Engine(model, verifier=LosslessVerifier()).add(Request((1,), params))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Grammars(tiny_tokenizer(), VOCAB)(params.grammar, ())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="library tokenizers"):
        Grammars(object(), VOCAB).check(Grammar.regex("a"))


def test_several_sequences_and_beams_have_grammars_of_their_own() -> None:
    grammar = Grammar.regex("[a-z]{2,4}")
    params = SamplingParams(n=4, temperature=2.0, seed=1, grammar=grammar)
    outputs = language().generate("a", params)[0].outputs
    texts = [each.text for each in outputs]
    assert all(re.fullmatch(grammar.text, text) for text in texts) and len({*texts}) > 1
    beams = language(loop="beam:width=3")
    found = beams.generate("a", SamplingParams(grammar=grammar, max_tokens=12))[0]
    assert re.fullmatch(grammar.text, found.text)


@given(st.integers(0, 10**6))
@settings(max_examples=settings().max_examples * 30 // 20, deadline=None)
def test_a_part_of_a_tree_knows_its_place_in_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(2, 12)
    parents = (-1, *(rng.randrange(node) for node in range(1, count)))
    whole = TokenTree(
        tuple(range(count)), parents, confidences=tuple(rng.random() for _ in parents)
    )
    kept = [0]
    for node in range(1, count):
        if parents[node] in kept and rng.random() < 0.7:
            kept.append(node)
    part = whole.part(kept)
    again = part.part(range(len(part))).first(rng.randrange(1, len(part) + 1))
    for tree in (part, again):
        node = rng.randrange(len(tree))
        known, path = tree.uncut(tree.path_to(node))
        assert known == whole.first(kept[len(tree) - 1] + 1)
        assert path == whole.path_to(kept[node])
        assert tree.confidences == tuple(whole.confidences[n] for n in kept[: len(tree)])  # type: ignore[index]
    assert root_only(3).uncut((0,)) == (root_only(3), (0,))


UNSPELLED = ("WordPiece", "word ends")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNSPELLED])
@pytest.mark.parametrize("drafter", ["none", "grammar"])
def test_grammars_are_spelled_by_every_kind_of_tokenizer(kind: str, drafter: str) -> None:
    """A piece of SentencePiece that begins with a space was taken for the character of its mark."""
    tokenizer = tokenizer_of(kind)
    end = tokenizer.convert_tokens_to_ids("</s>")
    shape = text_config("aug").to_dict() | {"vocab_size": len(tokenizer) + 3, "eos_ids": (end,)}
    model = randomise(Decoder(DecoderConfig.from_dict(shape)), 0).float()
    llm = LLM(model, tokenizer=tokenizer, drafter=drafter, policy=4)
    for expression in ("(ab|an) (end|x,) ?b", "[a-e]{3} é", "a ?the"):
        params = SamplingParams(grammar=Grammar.regex(expression), temperature=1.0, seed=1)
        text = llm.generate("ab an", params)[0].text
        assert re.fullmatch(expression, text), (expression, text)


@pytest.mark.parametrize("kind", UNSPELLED)
def test_a_tokenizer_that_cannot_spell_a_grammar_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot spell a grammar.*byte-level"):
        Grammars(tokenizer_of(kind), 99).check(Grammar.regex("a"))


def test_company_changes_no_output() -> None:
    llm = language("grammar+suffix", max_batch=3)
    together = llm.generate(PROMPTS * 2, [*asked(0.0, 30), *asked(1.1, 30)])
    for prompt, params, each in zip(
        PROMPTS * 2, asked(0.0, 30) + asked(1.1, 30), together, strict=True
    ):
        assert language().generate(prompt, params)[0].token_ids == each.token_ids


def test_who_has_to_leave_comes_back_to_its_grammar() -> None:
    model = text_model("softmax").to_inference()
    grammar = Grammar.regex("(ab|cd|e){60,80}x")
    sampled: dict[str, Any] = {"temperature": 1.0, "grammar": grammar}
    requests = [
        Request((5, 6 + i), Params(max_tokens=150, seed=i, **sampled), priority=i) for i in range(4)
    ]

    def run(**options: Any) -> list[RunningSequence]:
        grammars = Grammars(tiny_tokenizer(), VOCAB)
        parts = {"drafter": Wild(), "policy": Fixed(4), "slots": 4}
        engine = Engine(model, verifier=LosslessVerifier(), grammars=grammars, **parts, **options)
        waiting, ended = list(requests), list[RunningSequence]()
        while waiting or engine.busy:
            if waiting:
                engine.add(waiting.pop(0))
            ended += [each.sequence for _ in range(4) for each in engine.step() if each.finished]
        return sorted(ended, key=lambda sequence: sequence.request)

    free, crowded = run(), run(state_bytes=2 * model.new_state().bytes_at(200))
    assert sum(sequence.preempted for sequence in crowded) >= 1
    assert [each.tokens for each in free] == [each.tokens for each in crowded]
    for sequence in crowded:
        assert re.fullmatch(grammar.text, tiny_tokenizer().decode(sequence.tokens[2:-1]))


def test_a_compiled_grammar_serves_all_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, made = language(), []
    compiled = llm.grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda *given: made.append(given) or compiled(given[1])
    )
    llm = language()
    params = SamplingParams(grammar=Grammar.regex("a[b]c"), max_tokens=9)
    texts = [each.text for each in llm.generate(["a", "b", "c"], params)]
    assert texts == ["abc"] * 3 and len(made) == 1
    with pytest.raises(LinspecError):
        llm.generate("a", SamplingParams(grammar=Grammar.regex("(")))
