"""SuffixDecoding: its counts are those of a suffix tree, and repeated text decodes many tokens at a time."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from helpers import random_tokens, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from replay import agent_log, per_round, replay, running
from scipy.stats import spearmanr
from test_engine import PROMPTS, decode, outputs

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.tree import Budget
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.aded import Aded
from linspec.drafters.lookup import PromptLookup
from linspec.drafters.occurrences import SIZES, Occurrences
from linspec.drafters.suffix import Suffix, SuffixOptions
from linspec.errors import ConfigError
from linspec.policies.fixed import Fixed

DEPTH = 12
ALL = 10_000


def followers(texts: Occurrences, pattern: list[int]) -> Counter[int]:
    """How often each token follows `pattern`, by the matches of it."""
    size = max(size for size in SIZES if size <= len(pattern))
    found = texts.matches(pattern, size)
    return Counter(each.text[each.end] for each in found if each.length >= len(pattern))


def brute_followers(texts: Sequence[Sequence[int]], pattern: list[int]) -> Counter[int]:
    size = len(pattern)
    return Counter(
        text[at + size]
        for text in texts
        for at in range(len(text) - size)
        if list(text[at : at + size]) == pattern
    )


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4), st.booleans(), st.lists(st.integers(0, 2), min_size=1, max_size=9)
        ),
        max_size=30,
    )
)
def test_counts_after_appends_and_removals_are_those_of_the_texts(
    history: list[tuple[int, bool, list[int]]],
) -> None:
    texts, held = Occurrences(DEPTH, ALL), dict[int, tuple[int, list[int]]]()
    for name, goes, tokens in history:
        if goes and name in held:
            texts.remove(held.pop(name)[0])
            continue
        number, text = held.setdefault(name, (texts.open() if name not in held else 0, []))
        texts.extend(number, tokens)
        text += tokens
    left = [text for _, text in held.values()]
    assert texts.tokens == sum(map(len, left))
    patterns = {
        tuple(text[at : at + size])
        for text in (*left, [0, 1, 2, 0, 0])
        for size in range(1, DEPTH + 1)
        for at in range(len(text) - size + 1)
    }
    for pattern in patterns:
        assert followers(texts, list(pattern)) == brute_followers(left, list(pattern))


@given(st.lists(st.integers(0, 1), min_size=20, max_size=60), st.integers(2, 6))
def test_of_many_places_the_newest_are_counted(text: list[int], votes: int) -> None:
    few, all_of_them = Occurrences(DEPTH, votes), Occurrences(DEPTH, ALL)
    for texts in (few, all_of_them):
        texts.extend(texts.open(), text)
    for size in SIZES:
        ends = [each.end for each in all_of_them.matches(text, size)]
        assert [each.end for each in few.matches(text, size)] == ends[:votes]
        assert ends == sorted(ends, reverse=True)


def test_a_text_that_was_removed_leaves_nothing() -> None:
    texts = Occurrences(DEPTH, ALL)
    kept = texts.open()
    texts.extend(kept, random_tokens(40, seed=1))
    for seed in range(5):
        number = texts.open()
        texts.extend(number, random_tokens(60, seed=seed))
        texts.remove(number)
    texts.remove(kept)
    fresh = Occurrences(DEPTH, ALL)
    for _ in range(6):
        fresh.remove(fresh.open())
    assert texts.tokens == 0 and pickle.dumps(texts) == pickle.dumps(fresh)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_request_that_comes_again_takes_eight_tokens_a_round(
    mixer: str, temperature: float
) -> None:
    model, drafter = tiny_model(mixer), Suffix()
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=5)
    plain = outputs(decode(model, PROMPTS[:1], params))
    rows = [decode(model, PROMPTS[:1], params, drafter, policy=Fixed(16)) for _ in range(2)]
    assert [outputs(each) for each in rows] == [plain, plain]
    (again,) = rows[1]
    assert again.stats.tokens_per_round >= 8
    if temperature:
        assert again.stats.tokens_per_round > 2 * rows[0][0].stats.tokens_per_round


def test_random_text_drafts_less_than_a_token_a_round() -> None:
    rng = random.Random(0)
    drafter = Suffix()
    rounds = [
        each
        for _ in range(4)
        for each in replay(drafter, [0], [rng.randrange(500) for _ in range(400)])
    ]
    assert sum(each.drafted for each in rounds) < len(rounds)
    assert per_round(rounds) >= 1


def test_the_score_says_how_much_is_accepted() -> None:
    # with the short matches of the paper, which seldom come true
    drafter = Suffix(options=SuffixOptions(shortest=1))
    rounds = [
        each for request in agent_log(random.Random(1), 12) for each in replay(drafter, *request)
    ]
    drafted = [each for each in rounds if each.drafted]
    scores, found = zip(*((each.score, each.accepted) for each in drafted), strict=True)
    assert spearmanr(scores, found).statistic >= 0.5
    # not only the order: what it promises in all is what comes
    assert sum(scores) == pytest.approx(sum(found), rel=0.25)


def test_expected_is_what_trees_of_that_size_bring() -> None:
    drafter = Suffix()
    for request in agent_log(random.Random(2), 12):
        replay(drafter, *request)
    found = {
        nodes: [
            each.accepted
            for request in agent_log(random.Random(2), 12)
            for each in replay(drafter, *request, nodes=nodes)
            if each.drafted
        ]
        for nodes in (2, 16)
    }
    few, many = (drafter.expected(Budget.of(nodes)) for nodes in (2, 16))
    assert few < many <= 16
    assert few == pytest.approx(sum(found[2]) / len(found[2]), rel=0.35)
    assert drafter.expected(Budget(16, 1)) <= 1


def test_more_is_accepted_than_of_prompt_lookup() -> None:
    log = agent_log(random.Random(3), 16)
    suffix, lookup = Suffix(), PromptLookup()
    found = {
        drafter: [each for request in log for each in replay(drafter, *request)]
        for drafter in (suffix, lookup)
    }
    gains = {drafter: per_round(rounds) - 1 for drafter, rounds in found.items()}
    assert gains[suffix] >= 1.2 * gains[lookup]


def test_what_is_remembered_changes_no_output() -> None:
    """Greedy and sampled requests in ragged batches, with memories of other and of the same texts."""
    model = tiny_model("aug")
    params = [
        SamplingParams(max_tokens=20 + i, temperature=0.0 if i % 2 else 1.0, seed=i)
        for i in range(len(PROMPTS))
    ]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    drafter = Suffix(options=SuffixOptions(requests=3))
    for _ in range(3):
        assert outputs(decode(model, PROMPTS, params, drafter)) == plain
        assert outputs(decode(model, PROMPTS[::-1], params[::-1], drafter, slots=2)) == plain[::-1]


def test_every_continuation_of_a_match_is_in_the_tree_likeliest_first() -> None:
    drafter = Suffix(options=SuffixOptions(factor=4.0))
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 6, 7]
    replay(drafter, [0], text)
    (tree,) = drafter.propose([running([0, 1, 2])], [Budget.of(4)])
    assert tree.tokens[:2] == (2, 3) and 4 in tree.tokens and 6 in tree.tokens
    assert tree.tokens.index(4) < tree.tokens.index(6)
    assert tree.parents[tree.tokens.index(4)] == tree.parents[tree.tokens.index(6)] == 1


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**16))
def test_trees_keep_to_their_budget_and_come_again(nodes: int, depth: int, seed: int) -> None:
    rng, drafter = random.Random(seed), Suffix()
    sequence = running([rng.randrange(3) for _ in range(60)])
    budget = Budget(nodes, depth)
    (tree,) = drafter.propose([sequence], [budget])
    assert budget.allows(tree)
    assert drafter.propose([sequence], [budget]) == [tree]
    confidences = tree.confidences or ()
    assert all(0 < each <= 1 for each in confidences)


def test_nothing_is_drafted_behind_the_end_of_a_text() -> None:
    drafter, end = Suffix(), 7
    sequence = running([1, 2, end, 3, 4, 1, 2, end, 3, 4, 1, 2], ends=[end])
    (tree,) = drafter.propose([sequence], [Budget.of(8)])
    assert tree.tokens == (2, end)


def test_the_oldest_outputs_make_room() -> None:
    drafter = Suffix(options=SuffixOptions(requests=2))
    texts = [random_tokens(30, seed=seed) for seed in range(4)]
    for text in texts:
        replay(drafter, [0], text)
    assert known(drafter, texts) == [False, False, True, True]
    # by tokens too, and a memory of nothing keeps nothing
    for options, left in ((SuffixOptions(memory=40), 1), (SuffixOptions(requests=0), 0)):
        drafter = Suffix(options=options)
        for text in texts:
            replay(drafter, [0], text)
        assert known(drafter, texts) == [False] * (4 - left) + [True] * left


def known(drafter: Suffix, texts: Sequence[list[int]]) -> list[bool]:
    """Of which texts the drafter knows how they go on."""
    budget = [Budget.of(4)]
    drafts = [drafter.propose([running(text[:20])], budget)[0].tokens[1:] for text in texts]
    return [list(draft) == text[20:24] for draft, text in zip(drafts, texts, strict=True)]


def test_prompts_of_others_are_not_drafted_from() -> None:
    drafter, secret = Suffix(), random_tokens(30, seed=9)
    replay(drafter, secret, [1, 2, 3])
    (tree,) = drafter.propose([running(secret[:20])], [Budget.of(8)])
    assert tree.tokens[1:4] != tuple(secret[20:23])


def test_outputs_of_requests_that_still_run_are_drafted_from() -> None:
    drafter, text = Suffix(), random_tokens(30, seed=9)
    first, second = running([0]), running([0, *text[:10]])
    for sequence in (first, second):
        drafter.started(sequence)
    first.tokens += text
    drafter.propose([first], [Budget.of(1)])
    (tree,) = drafter.propose([second], [Budget.of(6)])
    assert list(tree.tokens[1:]) == text[10:16]


@pytest.mark.parametrize("kind", [Suffix, Aded])
def test_a_sequence_that_another_engine_left_is_not_taken_for_a_new_one(
    kind: type[Suffix] | type[Aded],
) -> None:
    drafter, text = kind(), random_tokens(12, seed=2)
    left, new = running(random_tokens(50, seed=1)), running(text * 3)
    new.number = left.number
    drafter.started(left)
    drafter.started(new)
    (tree,) = drafter.propose([new], [Budget.of(4)])
    assert tree.tokens[1] == text[0]


@pytest.mark.parametrize(
    "setting", ["depth=0", "min_prob=0", "factor=-1", "tokens=64", "votes=1", "requests=-1"]
)
def test_settings_that_mean_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        make_drafter(f"suffix:{setting}", DrafterContext(tiny_model("aug")))


def test_matches_shorter_than_asked_draft_nothing() -> None:
    for shortest, drafted in ((2, False), (1, True)):
        drafter = Suffix(options=SuffixOptions(shortest=shortest))
        # only the last token has come before
        rounds = list(replay(drafter, [1, 2, 3, 4, 5, 2], [3]))
        assert any(each.drafted for each in rounds) is drafted
