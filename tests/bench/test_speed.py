from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import model_dir

from linspec.bench.speed import bench
from linspec.decoding.sequence import RunningSequence
from linspec.errors import ConfigError, LinspecError
from linspec.evaluate.lossless import Divergence


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("abcd end the end\n" * 5)
    return file


def test_rows_of_every_mode_and_context(data: Path) -> None:
    itself = f"draft-model:{model_dir('aug')}"
    result = bench(
        model_dir("aug"), [10, 300], ["prompt-lookup", itself, "none"], tokens=8, repeats=2,
        policy=3, data=[data],
    )  # fmt: skip
    found = [(row.context, row.mode) for row in result.rows]
    assert found == [(c, m) for c in (10, 300) for m in ("plain", "prompt-lookup", itself)]
    assert result.skipped == ()
    for row in result.rows:
        assert row.tokens_per_s == pytest.approx(1000 / row.ms_per_token, rel=0.01)
        assert row.spread >= 0
        assert row.tokens_per_round == {"plain": 1.0, itself: 4.0}.get(
            row.mode, row.tokens_per_round
        )
    # a linear state does not grow with the context
    assert len({row.state_bytes for row in result.rows}) == 1
    assert {"machine", "settings", "rows", "skipped"} <= set(result.to_json())
    settings = result.settings
    assert settings["kv_cache_dtype"] == settings["kv"] == "float"


def test_time_is_that_of_the_decoding_steps(data: Path) -> None:
    ticks = iter(range(10_000))
    result = bench(
        model_dir("softmax"),
        [16],
        tokens=8,
        repeats=3,
        data=[data],
        clock=lambda: float(next(ticks)),
    )
    assert [row.ms_per_token for row in result.rows] == [125.0]
    assert [row.spread for row in result.rows] == [0.0]


def test_contexts_beyond_a_softmax_model_are_skipped_by_name(data: Path) -> None:
    result = bench(model_dir("softmax"), [16, 250, 4000], tokens=8, repeats=1, data=[data])
    assert [row.context for row in result.rows] == [16]
    assert [left["context"] for left in result.skipped] == [250, 4000]
    assert "256 positions" in result.skipped[0]["reason"]


def test_a_softmax_state_grows(data: Path) -> None:
    result = bench(model_dir("softmax"), [16, 32], tokens=8, repeats=1, data=[data])
    assert result.rows[1].state_bytes == 2 * result.rows[0].state_bytes


def test_a_mode_with_another_output_is_not_timed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    real = RunningSequence.__init__

    def spoiled(self: RunningSequence, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        # runs of both modes take turns: every second one starts elsewhere
        if next(count) % 2:
            self.tokens[-1] = (self.tokens[-1] + 1) % 200

    monkeypatch.setattr(RunningSequence, "__init__", spoiled)
    monkeypatch.setattr(
        "linspec.bench.speed.divergence", lambda *_: Divergence(0, 2, 5, 6, logit_gap=1.0)
    )
    with pytest.raises(LinspecError, match=r"instead of 5.*means nothing"):
        bench(model_dir("aug"), [16], ["prompt-lookup"], tokens=8, repeats=1, data=[data])


@pytest.mark.parametrize(
    ("contexts", "settings"), [([], {}), ([0], {}), ([8], {"tokens": 2}), ([8], {"repeats": 0})]
)
def test_impossible_sizes(contexts: list[int], settings: dict[str, int], data: Path) -> None:
    with pytest.raises(ConfigError):
        bench(model_dir("aug"), contexts, data=[data], **settings)  # type: ignore[arg-type]
