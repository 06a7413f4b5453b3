"""The demo from end to end on a random teacher: every figure, the page, and going on after a stop."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from linspec.checkpoints.hub import save_model
from linspec.demo import DemoResult, real_model, run_demo, training
from linspec.demo import budget as budgets
from linspec.demo.budget import Budget, training_speed, training_tokens
from linspec.demo.measure import NONE, cut, pick_prompts, state_bytes
from linspec.demo.page import headline
from linspec.demo.real_model import Question, RealModel
from linspec.demo.result import STUDENT, TEACHER, Decoded
from linspec.demo.work import Work
from linspec.errors import CheckpointError, ConfigError, DrafterError, InputError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.pretrain import initialize
from linspec.train.tokenizer import train_tokenizer
from linspec.utils.files import exclusive

TINY = Budget(
    total=10,
    real=60,
    linearize=0.1,
    heads=0.1,
    evaluate=1,
    generate=1,
    speed=60,
    other=1,
    context=32,
    batch_tokens=64,
    heads_context=32,
    heads_batch_tokens=64,
    least=1280,
    most=1280,
    calibration_tokens=256,
    eval_bytes=2000,
    prompts=2,
    prompt_tokens=24,
    new_tokens=12,
    shown_tokens=12,
    shown_nodes=5,
    shown_rounds=2,
    contexts=(16, 32),
    answer_tokens=12,
    real_contexts=(16, 24),
    speed_tokens=8,
    speed_repeats=1,
)


def make_text(seed: int) -> str:
    """A module of little functions; `&` and `<` must be escaped in the page."""
    rng = random.Random(seed)
    lines = ["# <b>&amp;</b> made up\n"]
    for i in range(30):
        name, other = rng.choice("abc"), rng.choice("xyz")
        lines.append(
            f"def {name}{i}({other}):\n    if {other} < {i} & 3:\n        return {other}\n"
        )
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "QUICK", TINY)
    monkeypatch.setattr(budgets, "FULL", TINY)
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for i in range(40):
        (folder / f"{i:02}.py").write_text(make_text(i))
    return folder


@pytest.fixture(scope="session")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DecoderConfig(
        vocab_size=300,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        mlp_width=48,
        max_positions=64,
        eos_ids=(0,),
        bos_id=0,
    )
    model = Decoder(config)
    initialize(model, config.layers, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.weight.mul_(10)
    tokenizer = train_tokenizer([make_text(i) for i in range(10)], 300)
    return save_model(model.eval(), tokenizer, tmp_path_factory.mktemp("models") / "softmax")


class Page(HTMLParser):
    """Titles of the figures, number of pictures, all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path, code: Path, softmax: Path) -> Callable[..., tuple[DemoResult, list[str]]]:
    def start(**changes: Any) -> tuple[DemoResult, list[str]]:
        lines: list[str] = []
        settings: dict[str, Any] = {
            "out": tmp_path / "demo",
            "quick": True,
            "teacher": softmax,
            "student": None,
            "real": None,
            "data": (code,),
            "echo": lines.append,
        }
        return run_demo(**(settings | changes)), lines

    return start


def test_demo_measures_and_shows_everything(
    run: Callable[..., tuple[DemoResult, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    result, lines = run()
    data = json.loads(json.dumps(result.to_json()))
    keys = ["teacher_bits_per_byte", "student_bits_per_byte", "lossless", "rows", "seconds"]
    assert set(keys) <= set(data)
    assert data["lossless"] is True
    assert [row["drafter"] for row in data["rows"]] == ["none", "prompt-lookup", "medusa"]
    assert all(row["tokens_per_s"] > 0 for row in data["rows"])
    assert data["rows"][0]["tokens_per_round"] == 1.0
    assert all(row["tokens_per_round"] >= 1.0 for row in data["rows"])
    sizes = data["state_bytes"]
    assert sizes["teacher"]["32768"] == 32 * sizes["teacher"]["1024"]
    assert sizes["student"]["32768"] == sizes["student"]["1024"]
    assert set(result.phases) == {
        "load", "linearize", "heads", "quality", "decode", "speed", "report"
    }  # fmt: skip
    assert result.seconds == pytest.approx(sum(result.phases.values()), abs=0.2)
    assert any("bits per byte" in line for line in lines)
    assert capsys.readouterr().out == ""
    check_page(result.report.read_text())


def test_act_one_races_a_real_model_against_itself(
    run: Callable[..., tuple[DemoResult, list[str]]], softmax: Path, tmp_path: Path
) -> None:
    result, lines = run()
    student = tmp_path / "demo" / "quick" / "student"
    real = RealModel(str(softmax), str(student), (Question("def a(", "prompt-lookup"),))
    result, lines = run(out=tmp_path / "both", real=real)
    assert result.lossless
    said = " ".join(lines)
    assert "speed-up" in said and str(student) in said
    page = Page(result.report.read_text())
    # two more plots than act two has
    assert page.tags.count("svg") == 10
    for text in (
        "A real chat model",
        "def a(",
        "Live: a softmax model becomes linear",
    ):
        assert text in page.text
    assert "NO" not in page.text


def test_without_the_real_model_the_demo_says_so_and_goes_on(
    run: Callable[..., tuple[DemoResult, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def get(self) -> Path:
            raise CheckpointError("pip could not download it")

    monkeypatch.setattr(real_model, "PACKAGES", {"absent": Absent()})
    result, lines = run(real=RealModel("absent"))
    assert any("act one is left out: pip could not download it" in line for line in lines)
    assert result.report.exists()


def check_page(text: str) -> None:
    page = Page(text)
    # six plots and two rounds
    assert page.tags.count("svg") == 8
    assert page.tags.count("svg") == page.tags.count("figure")
    for title in (
        "Bits per byte on held-out files",
        "Training the student",
        "Milliseconds per token against context",
        "State of one sequence",
        "Tokens per round",
        "Acceptance by depth",
        "Rounds, token by token",
        "What it wrote",
        "linspec demo --quick",
    ):
        assert title in page.text
    assert "<b>&amp;" not in text
    assert "mixers swapped" in page.text


def test_shipped_student_is_shown_beside(
    run: Callable[..., tuple[DemoResult, list[str]]], tmp_path: Path
) -> None:
    first, _ = run()
    assert first.shipped_student_bits_per_byte is None
    made = tmp_path / "demo" / "quick" / "student"
    result, _ = run(out=tmp_path / "other", student=made)
    # trained alike and measured on the same text of the same run: how much that is depends on speed
    assert result.shipped_student_bits_per_byte == pytest.approx(result.student_bits_per_byte)
    shipped = [row.drafter for row in result.comparison if row.model == "shipped student"]
    assert shipped == ["none", "prompt-lookup", "medusa"]
    assert "shipped student" in Page(result.report.read_text()).text
    foreign = tmp_path / "foreign"
    shutil.copytree(made, foreign)
    config = foreign / "medusa" / "drafter.json"
    config.write_text(config.read_text().replace('"target": "', '"target": "0'))
    with pytest.raises(DrafterError, match="another model"):
        run(out=tmp_path / "third", student=foreign)
    assert not (tmp_path / "third" / "quick").exists()


def test_pieces_of_documents_are_cut_at_random() -> None:
    documents = ["abcdefghij" * 10, "short"]
    pieces = cut(documents, 20, seed=0)
    assert [len(piece) for piece in pieces] == [20, 5]
    assert pieces[0] in documents[0] and pieces == cut(documents, 20, seed=0)


def test_interrupted_demo_goes_on(
    run: Callable[..., tuple[DemoResult, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.train_drafter

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_drafter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(training, "train_drafter", whole)
    before = training.linearize
    resumed: list[bool] = []

    def watch(*given: Any, **settings: Any) -> Path:
        resumed.append(settings["resume"])
        return before(*given, **settings)

    monkeypatch.setattr(training, "linearize", watch)
    result, lines = run()
    assert resumed == [True]
    assert any("going on" in line for line in lines)
    assert result.lossless
    assert result.phases["linearize"] > 0


def test_other_plan_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    work = Work(folder, {"seed": 0})
    work.note("linearize_tokens", 7)
    work.student.mkdir()
    again = Work(folder, {"seed": 0})
    assert again.resumed and again.recall("linearize_tokens") == 7 and again.student.is_dir()
    with pytest.raises(ConfigError, match="holds a demo with other settings"):
        Work(folder, {"seed": 1})
    assert work.student.is_dir()
    other = Work(folder, {"seed": 1}, overwrite=True)
    assert not other.resumed and other.recall("linearize_tokens") is None
    assert not other.student.exists()


def test_interrupted_phase_keeps_its_seconds(tmp_path: Path) -> None:
    times = iter((0.0, 5.0, 100.0, 103.0))
    work = Work(tmp_path, {}, clock=lambda: next(times))
    with pytest.raises(KeyboardInterrupt), work.phase("train", resumable=True):
        raise KeyboardInterrupt
    with Work(tmp_path, {}, clock=lambda: next(times)).phase("train", resumable=True):
        pass
    assert Work(tmp_path, {}).spent == pytest.approx(8.0)


def test_bad_input_is_refused_before_any_work(
    run: Callable[..., tuple[DemoResult, list[str]]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        run(student=tmp_path / "nothing")
    with pytest.raises(InputError, match="does not exist"):
        run(data=(tmp_path / "nothing",))
    with exclusive(tmp_path / "demo"), pytest.raises(CheckpointError, match="in use"):
        run()
    assert not (tmp_path / "demo" / "quick" / "student").exists()


def test_training_fits_the_time() -> None:
    budget = replace(TINY, least=100, most=10_000)
    assert training_tokens(10, 50.0, budget) == 500
    assert training_tokens(10, 1.0, budget) == 100
    assert training_tokens(10, 1e9, budget) == 10_000


def test_speed_probe_leaves_the_model_alone() -> None:
    layer = torch.nn.Embedding(10, 10)
    before = layer.weight.detach().clone()
    times = iter((0.0, 9.0, 10.0, 12.0, 20.0, 24.0, 30.0, 33.0))
    speed = training_speed(
        lambda ids: layer(ids).square().mean(), layer.parameters(), 10, 2, 8, lambda: next(times)
    )
    assert speed == pytest.approx(2 * 8 / 3.0)
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


def test_prompts_end_behind_a_signature(softmax: Path) -> None:
    from linspec.checkpoints.hub import load_tokenizer

    tokenizer = load_tokenizer(softmax)
    documents = [make_text(i) for i in range(5)]
    prompts = pick_prompts(tokenizer, documents, 3, 20)
    assert len(prompts) == 3
    assert all(len(prompt) <= 20 for prompt in prompts)
    assert all(tokenizer.decode(prompt).endswith("):\n") for prompt in prompts)
    assert pick_prompts(tokenizer, ["no functions in here"], 1, 20)


def test_state_bytes_are_those_of_a_state(softmax: Path) -> None:
    from linspec.checkpoints.hub import load_model
    from linspec.decoding.step import StepInput

    model = load_model(softmax)
    state = model.new_state(1)
    model.step([StepInput(0, [1] * 48)], state)
    state.commit(0, range(48))
    assert state_bytes(model, (48,)) == {48: state.bytes(0)}


@pytest.mark.parametrize(
    ("per_round", "told"),
    [(1.4, "1.40 tokens per round, at 2.00 times"), (1.0, "smaller than the teacher's cache.")],
)
def test_a_drafter_that_was_left_out_is_not_praised(per_round: float, told: str) -> None:
    def row(drafter: str, speed: float, tokens: float) -> Decoded:
        return Decoded(
            model=STUDENT,
            drafter=drafter,
            tokens_per_s=speed,
            tokens_per_round=tokens,
            tokens=64,
            acceptance=(),
            lossless=True,
        )

    result = DemoResult(
        teacher_bits_per_byte=1.0,
        student_bits_per_byte=1.0,
        swapped_bits_per_byte=2.0,
        shipped_student_bits_per_byte=None,
        lossless=True,
        rows=(row(NONE, 100.0, 1.0), row("medusa", 200.0, per_round)),
        comparison=(),
        state_bytes={TEACHER: {1024: 8}, STUDENT: {1024: 1}},
        linearize_tokens=1,
        heads_tokens=1,
        parameters=1,
        seconds=1.0,
        phases={},
        machine={},
        report=Path("report.html"),
    )
    assert told in headline(result)
    assert headline(result).endswith("and every token is the same.") == (per_round > 1)
