"""Claims of single policies: the task of lines, the ways that are compared, and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from checkpoints import model_dir
from denoisers import talker

from benchmarks import diffusion_claims, diffusion_lines
from benchmarks.diffusion import ways_of
from benchmarks.diffusion_claims import CLAIMS, main
from benchmarks.diffusion_lines import BREAK, END, EQUALS, NOTHING, Lines, answer_of, prompt_of
from benchmarks.diffusion_watched import ends_of_lines, settled, settled_after
from benchmarks.diffusion_work import Answer
from linspec.errors import ConfigError


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return Lines(tmp_path_factory.mktemp("lines"), 3, 1)


def test_an_answer_has_the_running_sums_of_each_group_where_the_prompt_has_its_digits() -> None:
    groups = [[1, 4, 2], [3], [2, 2]]
    assert answer_of(groups) == [1, 0, 2, BREAK, 3, BREAK, 2, 4, BREAK]
    prompt = prompt_of(groups)
    assert prompt[:9] == [1, 4, 2, BREAK, 3, BREAK, 2, 2, BREAK]
    assert set(prompt[9:-1]) == {NOTHING} and prompt[-1] == EQUALS
    rng = random.Random(1)
    assert len({len(prompt_of(diffusion_lines.draw(rng))) for _ in range(50)}) == 1


def test_answers_are_read_up_to_their_end(lines: Lines) -> None:
    right = [Answer((*answer_of(each), END, 3), "") for each in lines.asked]
    wrong = [Answer((BREAK,), "")] * 3
    assert lines.judged(right, None) == {"right": 1}
    assert lines.judged(right, right)["identical"] == 1
    assert lines.judged(wrong, right) == {"right": 0, "identical": 0}


def test_learned_rows_are_answers_with_ends_and_some_of_them_masked() -> None:
    _, real, weights = next(diffusion_lines._batches(32))
    first = len(prompt_of([[1]]))
    assert not weights[:, :first].any() and weights.any(1).all()
    # each row weighs 1 in all, and only where there is text
    assert weights.sum(1).tolist() == pytest.approx([1] * 32)
    assert not weights[~real].any()


def test_blocks_that_end_with_lines_are_counted(lines: Lines) -> None:
    way = ways_of(lines, ["masked-diffusion:block=fixed:4,commit=static,stop=never"], None)[0]
    starts = range(0, diffusion_lines.MASKS, 4)
    answers = [answer_of(each) for each in lines.asked]
    inside = [(answer, at) for answer in answers for at in starts if at < len(answer)]
    ending = sum(answer[at + 3 : at + 4] == [BREAK] for answer, at in inside)
    assert ends_of_lines(lines, way) == (ending, len(inside))


def test_an_answer_is_settled_when_no_later_forward_says_another(lines: Lines) -> None:
    assert settled([[1, 2], [1, 3], [1, 2], [1, 2]]) == 3
    assert settled([[1, 2]]) == settled([[1, 2], [1, 2]]) == 1
    way = ways_of(lines, ["masked-diffusion:block=fixed:none,commit=static,stop=never"], None)[0]
    first, forwards = settled_after(lines, way)
    assert 1 <= first <= forwards == diffusion_lines.MASKS


@pytest.mark.crossed(3)
@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_a_command(
    claim: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion_claims, "DRAFTER", str(talker()))
    monkeypatch.setattr(diffusion_claims, "LONG", 100)
    words = [claim, "--folder", str(tmp_path), "--prompts", "1", "--tokens", "4", "--steps", "1"]
    words += ["--rounds", "1", "--target", str(model_dir("softmax"))]
    main(words)
    assert f"{claim}: wanted is" in capsys.readouterr().out
    # nothing is measured again
    monkeypatch.setattr("benchmarks.diffusion._measured", None)
    main([*words, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["speed"] == 1 and {each["claim"] for each in found} == {claim}
    assert not [each for each in found if "error" in each]
    if claim in ("freedave", "specdiff", *diffusion_claims._AUTO_BASES):
        assert {each.get("agreement", 1) for each in found} == {1}


def test_no_round_measures_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounds must be 1 or more, got 0"):
        main(["dkv", "--folder", str(tmp_path), "--rounds", "0"])
