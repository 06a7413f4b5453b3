"""A draft model with another tokenizer: the same text in other tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, scratch, text_model, tiny_tokenizer
from helpers import mixer_config, randomise, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_draft_model import other_tokenizer
from tokenizer_kinds import KINDS, tokenizer_of

from linspec.checkpoints.hub import save_model
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.spelling import PARTIAL, Said, backend_of, spelled
from linspec.drafters.universal import Universal
from linspec.errors import ConfigError, DrafterError
from linspec.llm import LLM
from linspec.models.decoder import Decoder

TEXTS = ("the end", "ab abn, 日本 é🙂 the end.", "a", "end " * 30)
LETTERS = st.text(alphabet="abcdefghinox., '日é🙂本Ж\n", max_size=40)


def model_of(kind: str, mixer: str = "softmax", seed: int = 0, **changes: Any) -> Decoder:
    """A random decoder over the tokenizer of one kind."""
    shape = tiny_config(mixer_config(mixer), mixer_config(mixer), max_positions=512)
    size = len(tokenizer_of(kind))
    config = replace(shape, vocab_size=size, eos_ids=(2,), bos_id=1, **changes)
    return randomise(Decoder(config), seed).float()


_FOLDERS: dict[str, Path] = {}


def folder_of(kind: str) -> Path:
    if kind not in _FOLDERS:
        where = scratch("universal") / kind.replace(" ", "-")
        _FOLDERS[kind] = save_model(model_of(kind, "aug", seed=1), tokenizer_of(kind), where)
    return _FOLDERS[kind]


# each kind drafts for the next one, and for byte-level tokenizers
PAIRS = [*zip(KINDS, [*KINDS][1:] + [*KINDS][:1], strict=True), *((k, "byte-level") for k in KINDS)]


@pytest.mark.crossed(6)
@pytest.mark.parametrize(("draft", "target"), PAIRS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_are_plain_between_any_two_kinds_of_tokenizers(
    draft: str, target: str, temperature: float
) -> None:
    model, tokenizer = model_of(target), tokenizer_of(target)
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=1, ignore_eos=True)
    plain = [
        each.token_ids for each in LLM(model, tokenizer=tokenizer).generate(list(TEXTS), params)
    ]
    for slots in (1, 4):
        drafter = f"universal:{folder_of(draft)}"
        llm = LLM(model, tokenizer=tokenizer, drafter=drafter, policy=4, max_batch=slots)
        for _ in range(2):
            assert [each.token_ids for each in llm.generate(list(TEXTS), params)] == plain


def untied(seed: int = 0, mixer: str = "softmax") -> Decoder:
    """A model over the tiny tokenizer that writes printable ASCII only."""
    base = text_model(mixer, seed=seed)
    model = randomise(Decoder(replace(base.config, tied_embeddings=False, eos_ids=())), seed)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if token == 0 or not (text.isascii() and text.isprintable()):
                model.head.weight[token] = 0
    return model.float()


def renumbered(model: Decoder, theirs: Any) -> Decoder:
    """`model` under the vocabulary of another tokenizer of the same tokens."""
    ours = tiny_tokenizer().get_vocab()
    order = torch.tensor(
        [ours[text] for text, _ in sorted(theirs.get_vocab().items(), key=lambda e: e[1])]
    )
    made = Decoder(model.config)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("embed", "head"):
            weight = getattr(made, name).weight
            weight.copy_(getattr(model, name).weight[order])
    return made.eval()


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("realign", [1, 8])
def test_the_same_model_under_a_renumbered_vocabulary_is_nearly_always_right(
    mixer: str, realign: int, tmp_path: Path
) -> None:
    model, theirs = untied(mixer=mixer), other_tokenizer(turned=True)
    folder = save_model(renumbered(model, theirs), theirs, tmp_path / "turned")
    drafter = f"universal:{folder},realign={realign}"
    llm = LLM(model, tokenizer=tiny_tokenizer(), drafter=drafter, policy=4)
    params = SamplingParams(max_tokens=40)
    found = llm.generate(["abcd end the", "def f(x):", "x" * 90], params)
    plain = LLM(model, tokenizer=tiny_tokenizer()).generate(
        ["abcd end the", "def f(x):", "x" * 90], params
    )
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert min(each.stats.tokens_per_round for each in found) > 2.5


def test_what_came_true_is_not_read_again(tmp_path: Path) -> None:
    """The draft model reads the prompt once, and then a few tokens a round at any context."""
    model, theirs = untied(), other_tokenizer(turned=True)
    folder = save_model(renumbered(model, theirs), theirs, tmp_path / "turned")
    tokenizer = tiny_tokenizer()
    drafter = make_drafter(f"universal:{folder},realign=4", DrafterContext(model, tokenizer))
    assert isinstance(drafter, Universal)
    fed: list[int] = []
    step = drafter.model.step

    def counted(inputs: Any, state: Any, **more: Any) -> Any:
        fed.extend(len(each.tokens) for each in inputs)
        return step(inputs, state, **more)

    drafter.model.step = counted  # type: ignore[method-assign]
    llm = LLM(model, tokenizer=tokenizer, drafter=drafter, policy=4, max_batch=1)
    llm.generate("x" * 150, SamplingParams(max_tokens=60))
    assert fed[0] > 100 and max(fed[1:]) <= 4 + 4 + 2


@given(LETTERS, LETTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_behind_another_one_is_spelled_so_that_it_reads_the_same(
    kind: str, before: str, text: str
) -> None:
    backend = backend_of(tokenizer_of(kind), "a test")
    found = spelled(backend, before, text)
    assert len(found.tokens) == len(found.ends) == len(found.whole)
    assert found.ends == sorted(found.ends) and (not found.ends or found.ends[-1] <= len(text))
    if kind == "byte-level":
        assert tokenizer_of(kind).decode(found.tokens) == text
        for count in range(len(found.tokens) + 1):
            if count and found.whole[count - 1]:
                assert (
                    tokenizer_of(kind).decode(found.tokens[:count]) == text[: found.ends[count - 1]]
                )


@given(LETTERS, st.data())
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "Unigram with bytes"])
def test_text_grows_by_whole_characters_however_tokens_come(
    kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    said, end = Said(tokenizer), 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        said.read(tokens[:end])
        assert PARTIAL not in said.text
    assert said.whole and said.text == tokenizer.decode(tokens)


def test_marks_that_the_draft_model_does_not_know_are_not_read_as_letters() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer("<s>ab<|im_end|>", add_special_tokens=False)["input_ids"]
    shown, hiding = Said(tokenizer), Said(tokenizer, {1, 3})
    shown.read(ids), hiding.read(ids)
    assert (shown.text, hiding.text) == ("<s>ab<|im_end|>", "ab")


def test_a_draft_model_that_ends_its_text_drafts_the_end_of_the_target(tmp_path: Path) -> None:
    target, draft = model_of("byte-level"), model_of("WordPiece", tied_embeddings=False)
    with torch.no_grad():
        # whatever it reads, it ends
        for parameter in draft.parameters():
            parameter.zero_()
        draft.embed.weight.fill_(1), draft.norm.weight.fill_(1)
        draft.head.weight[2] = 1
    folder = save_model(draft, tokenizer_of("WordPiece"), tmp_path / "ends")
    drafter = make_drafter(
        f"universal:{folder}", DrafterContext(target, tokenizer_of("byte-level"))
    )
    assert drafter is not None
    trees = []
    observe = drafter.observe
    drafter.observe = lambda row, tree, path: (trees.append(tree), observe(row, tree, path))  # type: ignore[method-assign]
    llm = LLM(target, tokenizer=tokenizer_of("byte-level"), drafter=drafter, policy=4)
    llm.generate("ab", SamplingParams(max_tokens=20, ignore_eos=True))
    assert trees and {tree.tokens[1:] for tree in trees} == {(2,)}


def test_a_draft_model_at_its_last_position_drafts_no_more(tmp_path: Path) -> None:
    theirs = other_tokenizer(turned=True)
    model = untied()
    small = renumbered(model, theirs)
    made = Decoder(replace(small.config, max_positions=40))
    made.load_state_dict(small.state_dict())
    folder = save_model(made, theirs, tmp_path / "short")
    params = SamplingParams(max_tokens=60)
    texts = ["abcd", "x" * 30, "x" * 60]
    plain = LLM(model, tokenizer=tiny_tokenizer()).generate(texts, params)
    llm = LLM(model, tokenizer=tiny_tokenizer(), drafter=f"universal:{folder}", policy=4)
    found = llm.generate(texts, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert found[0].stats.drafted > found[2].stats.drafted == 0


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("universal", DrafterError, "needs a model directory"),
        ("universal:realign=0", ConfigError, "realign must be 1 or more"),
        ("universal:tokens=60,realign=8", ConfigError, "at most 64 together"),
    ],
)
def test_what_is_missing_is_named(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_drafter(spec, DrafterContext(text_model("aug"), tiny_tokenizer()))


def test_tokenizers_that_say_nothing_about_places_are_refused() -> None:
    spec = f"universal:{model_dir('aug')}"
    with pytest.raises(DrafterError, match="needs the target's tokenizer"):
        make_drafter(spec, DrafterContext(text_model("aug")))
    with pytest.raises(DrafterError, match="tokenizer of the target is a object"):
        make_drafter(spec, DrafterContext(text_model("aug"), object()))
