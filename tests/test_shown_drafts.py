"""Which text came of drafts, who drafted, and what was rejected."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from checkpoints import model_dir
from helpers import random_tree
from hypothesis import given
from hypothesis import strategies as st

from linspec.decoding.accepted import Accepted
from linspec.decoding.outcome import Outcome
from linspec.decoding.sampling import SamplingParams
from linspec.engine.drafts import DraftedText, rejected
from linspec.engine.results import Piece
from linspec.engine.rounds import _fault
from linspec.llm import LLM

PROMPTS = ["ab cd end ab cd end ab", "é the the the", "abcd" * 9]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


def pieces(drafter: str, params: SamplingParams, show_drafts: bool = True) -> list[Piece]:
    llm = LLM(model_dir("aug"), drafter=drafter, policy=5, max_batch=3)
    return list(llm.stream(PROMPTS, params, show_drafts=show_drafts))


SPECS = {
    "none": set[str](),
    "prompt-lookup": {"prompt-lookup"},
    "prompt-lookup+draft-model": {"prompt-lookup", "draft-model"},
    "auto": {"suffix"},
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_shown_adds_up_to_what_the_rounds_counted(spec: str, temperature: float) -> None:
    drafter = spec.replace("draft-model", f"draft-model:{model_dir('aug')}")
    found = pieces(drafter, SamplingParams(max_tokens=30, temperature=temperature, seed=1))
    names = set()
    for index in range(len(PROMPTS)):
        own = [piece for piece in found if piece.index == index]
        shown = [piece.drafts for piece in own if piece.drafts is not None]
        done = own[-1].done
        assert done is not None and len(shown) == len(own)
        assert "".join(text for each in shown for text, _ in each.parts) == done.text
        assert all(piece.text == "".join(t for t, _ in piece.drafts.parts) for piece in own)  # type: ignore[union-attr]
        # the end of the output may cut accepted drafts off
        counted = sum(each.drafted for each in shown)
        assert done.stats.accepted - 5 <= counted <= done.stats.accepted
        names |= {each.drafter for each in shown if each.drafter}
        assert all(each.drafter or not (each.drafted or each.rejected) for each in shown)
    assert names <= SPECS[spec]
    # a random model repeats nothing that a look-up could find when it samples
    assert names or spec == "none" or temperature


def test_text_is_coloured_only_where_a_draft_was_accepted() -> None:
    for piece in pieces(f"draft-model:{model_dir('aug')}", SamplingParams(max_tokens=20)):
        assert piece.drafts is not None
        if not piece.drafts.drafted:
            assert not any(author for _, author in piece.drafts.parts)


def test_who_does_not_ask_gets_nothing() -> None:
    found = pieces("prompt-lookup", SamplingParams(max_tokens=9), show_drafts=False)
    assert all(piece.drafts is None for piece in found)


def test_asking_changes_no_token_and_stop_strings_still_hold() -> None:
    drafter = f"draft-model:{model_dir('aug')}"
    free = pieces(drafter, SamplingParams(max_tokens=30, ignore_eos=True), show_drafts=False)
    text = next(p.done.text for p in free if p.done and p.index == 0)
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop=(text[9:12],))
    with_drafts = pieces(drafter, params)
    without = pieces(drafter, params, show_drafts=False)
    assert [(p.text, p.token_ids) for p in with_drafts] == [(p.text, p.token_ids) for p in without]
    parts = [p.drafts.parts for p in with_drafts if p.index == 0 and p.drafts]
    assert "".join(text for each in parts for text, _ in each) == text[: text.find(text[9:12])]


@given(st.integers(1, 20), st.integers(0, 1000), st.integers(0, 19))
def test_branches_and_the_accepted_path_are_the_whole_tree(size: int, seed: int, end: int) -> None:
    tree = random_tree(random.Random(seed), size)
    path = tree.path_to(end % size)
    outcome = Outcome(None, (), Accepted(path, 0, None), None, tree=tree)  # type: ignore[arg-type]
    found = rejected(outcome)
    left = [node for node in range(size) if node not in path]
    assert bool(left) == bool(found)
    assert {t for each in found for t in each.tokens} == {tree.tokens[node] for node in left}
    assert all(0 <= each.behind < len(path) for each in found)
    assert [each.behind for each in found] == sorted(each.behind for each in found)


@given(
    st.lists(st.tuples(st.text("xy", max_size=3), st.sampled_from("ab")), max_size=12), st.data()
)
def test_parts_are_the_text_whenever_it_is_shown(
    grown: list[tuple[str, str]], data: st.DataObject
) -> None:
    authors, full, shown, parts = DraftedText(), "", 0, list[tuple[str, str]]()
    for text, author in grown:
        full += text
        authors.grew(len(full), author)
        end = data.draw(st.integers(shown, len(full)))
        parts += authors.show(full[shown:end])
        shown = end
    parts += authors.show(full[shown:])
    assert "".join(text for text, _ in parts) == full
    assert all(text for text, _ in parts)
    by_letter = [author for text, author in parts for _ in text]
    assert by_letter == [author for text, author in grown for _ in text]


def test_a_loop_that_hands_out_a_foreign_tree_is_told_so() -> None:
    class Sequence:
        tokens = (1,)
        remaining = 1

    fault = _fault(Outcome(Sequence(), (1,), None, None, tree="tree"), 5)  # type: ignore[arg-type]
    assert fault is not None and "TokenTree" in fault
