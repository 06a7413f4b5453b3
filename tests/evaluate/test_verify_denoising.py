"""The proof for policies of masked diffusion must pass what is lossless and must catch what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import model_dir
from denoisers import talker
from torch import Tensor
from typer.testing import CliRunner

from linspec.cli import app
from linspec.diffusion import COMMITS, Candidates, CommitPolicy
from linspec.diffusion.candidates import highest
from linspec.diffusion.kinds import kinds, lossless
from linspec.errors import ConfigError
from linspec.evaluate import lossless_denoising
from linspec.evaluate.lossless import verify
from linspec.evaluate.lossless_denoising import lossless_plans, spec_of, verify_denoising


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"abcd end {i} the end\n" * (i + 9))
    return folder


@pytest.fixture
def renamed() -> Iterator[None]:
    """A policy that says it is lossless, and is: `static` under another name."""

    @COMMITS.register("surest", summary="-", paper="-", lossless="yes")
    class Surest(CommitPolicy):
        def commit(self, candidates: Candidates) -> Tensor:
            return highest(candidates.confidence, 1)

    yield
    COMMITS.forget("surest")


def test_every_kind_of_the_loop_has_a_registry() -> None:
    assert {"block", "commit", "stop", "cache"} <= set(kinds())
    assert lossless("stop")[:2] == ["never", "end-of-text"] and "prophet" not in lossless("stop")
    assert "static" not in lossless("commit") and "threshold" not in lossless("commit")


def test_all_that_says_it_is_lossless_is_compared_and_is(data: Path, renamed: None) -> None:
    report = verify_denoising(talker(), prompts=3, tokens=9, data=[data])
    assert report.lossless and report.first_difference is None
    assert {"surest" in spec for spec in report.loops} == {True, False}
    assert len(report.loops) == len(list(lossless_plans())) and "reference" not in report.loops
    assert all(share <= 1 for share in report.forwards)
    # greedy and sampled, alone and in batches
    assert report.tokens <= 3 * 9 * 4 * len(report.loops)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_what_is_approximate_is_caught(data: Path, cache: str) -> None:
    spec = f"masked-diffusion:block=fixed:8,commit=threshold:0.01,cache={cache}"
    report = verify_denoising(talker(), spec, prompts=3, tokens=16, data=[data])
    assert not report.lossless and report.near_ties == 0
    first = report.first_difference
    assert first is not None and first.expected != first.got and first.position < 16
    assert report.forwards[0] < 0.5


def test_the_reference_keeps_blocks_and_cache(data: Path) -> None:
    spec = "masked-diffusion:block=fixed:4,commit=static:order=left,cache=dual"
    assert verify_denoising(talker(), spec, prompts=2, tokens=12, data=[data]).lossless
    # what the loop does by default is left out
    assert {spec_of(plan).count("cache") for plan in lossless_plans()} == {0}


@pytest.mark.slow
def test_rounding_is_no_difference(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lossless_denoising._Compared._run

    def rounded(self: object, llm: object, heat: float, only: int | None = None) -> object:
        """Another token in all outputs in batches, but for those in float64."""
        run = plain(self, llm, heat, only)
        if only is None and llm.engine.scheduler.slots > 1:
            run.outputs[:] = [(*each[:-1], each[-1] + 1) for each in run.outputs]
        return run

    monkeypatch.setattr(lossless_denoising._Compared, "_run", rounded)
    options = {"prompts": 2, "tokens": 5, "data": [data]}
    report = verify_denoising(talker(), **options)
    assert report.lossless and report.near_ties == 4 * len(report.loops)
    # nothing more exact to ask
    assert not verify_denoising(talker(), quantize=8, **options).lossless


def test_the_verb(data: Path) -> None:
    args = ["--prompts", "2", "--tokens", "8", "--data", str(data), "--json"]

    def run(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", *more, *args])
        return result.exit_code, result.output

    code, said = run(str(talker()))
    found = json.loads(said[said.index("{") :])
    assert code == 0 and found["lossless"] is True
    lossy = "masked-diffusion:commit=threshold:0.01"
    assert run(str(talker()), "--loop", lossy)[0] == 1
    for wrong, why in (
        ((str(talker()), "--drafter", "suffix"), "takes no drafter"),
        ((str(talker()), "--loop", "beam"), "such as masked-diffusion"),
        ((str(talker()), "--loop", "masked-diffusion:commit=nothing"), "unknown diffusion commit"),
        ((str(model_dir("softmax")), "--loop", lossy), "is verified with --drafter"),
    ):
        code, said = run(*wrong)
        assert code == 1 and why in said


def test_samples_of_a_diffusion_model_were_held_against_the_next_token() -> None:
    with pytest.raises(ConfigError, match="verify_denoising"):
        verify(talker(), prompts=2, tokens=4, policy="auto")
