"""What may be written where: files of others are never lost, inputs are never outputs."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_dir

from linspec.checkpoints.hub import load_model, load_tokenizer, save_model
from linspec.demo import run_demo
from linspec.drafters.saved import save_drafter
from linspec.errors import CheckpointError, ConfigError
from linspec.evaluate.quantize import quantize
from linspec.train.drafters import train_drafter
from linspec.train.encoder import linearize_encoder
from linspec.train.into_diffusion import into_diffusion
from linspec.train.linearize import continue_training, linearize
from linspec.train.pretrain import pretrain
from linspec.utils.files import exclusive, replace_dir, replace_text, tidy
from linspec.utils.places import MARK, Place, check_text, check_workspace, mark_folder, read_mark
from studies.linearized_llm import make_plan, study

Writer = Callable[[Path, Path], Any]


def _save(model: Path, out: Path) -> Any:
    return save_model(load_model(model), load_tokenizer(model), out)


def _heads(model: Path, out: Path) -> Any:
    # refused before the heads are looked at
    return save_drafter(None, load_model(model), out)  # type: ignore[arg-type]


def _study(model: Path, out: Path) -> Any:
    return study(make_plan(out, teacher=str(model)), ["quality"])


# every function that writes a directory, with what it reads
WRITERS: dict[str, Writer] = {
    "linearize": lambda model, out: linearize(model, out),
    "continue-training": lambda model, out: continue_training(model, out),
    "linearize-encoder": lambda model, out: linearize_encoder(model, out),
    "train-drafter": lambda model, out: train_drafter(model, out),
    "quantize": lambda model, out: quantize(model, out),
    "pretrain": lambda model, out: pretrain(out, data=[str(model)]),
    "into-diffusion": lambda model, out: into_diffusion(model, out),
    "demo": lambda model, out: run_demo(out=out, quick=True, teacher=model, student=None),
    "study": _study,
    "save_model": _save,
    "save_heads": _heads,
}
READERS = [name for name in WRITERS if name not in ("save_model", "save_heads", "study")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir("softmax"), tmp_path / "models" / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_a_directory_with_files_of_others_was_deleted(
    name: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "thesis"
    (out / "chapters").mkdir(parents=True)
    (out / "chapters" / "one.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"chapters/one\.txt"):
        WRITERS[name](model, out)
    assert contents(out) == {"chapters/one.txt": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "thesis"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_became_a_directory(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt is a file, not a directory"):
        WRITERS[name](model, out)
    assert out.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"notes\.txt is a file, so .* cannot be made"):
        WRITERS[name](model, out / "below")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_was_replaced(name: str, there: bool, model: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.mkdir()
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="link is a symbolic link to .*target"):
        WRITERS[name](model, link)
    assert link.is_symlink() and target.exists() == there


@pytest.mark.parametrize("name", READERS)
def test_an_input_was_overwritten(name: str, model: Path) -> None:
    before = contents(model)
    for out in (model, model.parent):
        with pytest.raises(ConfigError, match=r"an input of this command|is the model itself"):
            WRITERS[name](model, out)
    assert contents(model) == before


@pytest.mark.parametrize(
    "name", ["linearize", "continue-training", "linearize-encoder", "quantize"]
)
def test_a_model_was_written_inside_its_source(name: str, model: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside .*, an input of this command"):
        WRITERS[name](model, model / "inner")
    assert not (model / "inner").exists()


def test_training_a_drafter_into_its_model_left_only_the_heads(model: Path) -> None:
    before = contents(model)
    with pytest.raises(ConfigError, match=r"leave out --out and they go to .*medusa"):
        train_drafter(model, model)
    assert contents(model) == before


@pytest.mark.parametrize("out", [".", "", "x/.."])
def test_the_current_directory_is_no_output(
    out: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the directory that this command runs in"):
        quantize(model, out)


def test_what_another_command_wrote_is_not_replaced(model: Path, tmp_path: Path) -> None:
    out = save_model(load_model(model), None, tmp_path / "copy")
    before = contents(out)
    with pytest.raises(ConfigError, match=r"`save_model`, and `linspec quantize` would not make"):
        quantize(model, out, overwrite=True)
    assert contents(out) == before


def test_only_the_same_command_replaces_what_it_wrote_and_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text("abcdefgh " * 200)
    options: dict[str, Any] = {"data": [text], "limit_bytes": 200}
    quantize(model, out, **options)
    mark = json.loads((out / MARK).read_text())
    assert mark["kind"] == "quantize" and set(mark["files"]) == set(contents(out))
    with pytest.raises(ConfigError, match="by `linspec quantize` before; give --overwrite"):
        quantize(model, out, bits=4, **options)
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8
    capsys.readouterr()
    quantize(model, out, bits=4, overwrite=True, **options)
    assert f"overwriting {out}" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4


def test_quantize_takes_the_lock_of_its_output(model: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "q"), pytest.raises(CheckpointError, match="in use"):
        quantize(model, tmp_path / "q")


def test_an_unfinished_run_was_started_anew_without_a_word(model: Path, tmp_path: Path) -> None:
    (tmp_path / "s" / "training").mkdir(parents=True)
    (tmp_path / "s" / "training" / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an unfinished run; give .* --resume"):
        linearize(model, tmp_path / "s")
    assert (tmp_path / "s" / "training" / "plan.json").exists()


def _write(place: Place, name: str, text: str) -> None:
    with place.replaced() as aside:
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text(text)


def test_files_that_come_while_a_run_is_under_way_stay(tmp_path: Path) -> None:
    place = Place(tmp_path / "out", "linearize", overwrite=True)
    for text in ("first", "second"):
        with place.held(), place.replaced() as aside:
            (aside / "model").write_text(text)
            if text == "second":
                (place.path / "logs").mkdir()
                (place.path / "logs" / "mine.txt").write_text("mine")
    assert (place.path / "model").read_text() == "second"
    assert (place.path / "logs" / "mine.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"logs/mine\.txt was not written by linspec"):
        _write(place, "logs/mine.txt", "theirs")
    assert (place.path / "logs" / "mine.txt").read_text() == "mine"


def test_directories_of_linspec_0_1_are_known_by_their_records(tmp_path: Path) -> None:
    out = tmp_path / "old"
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "linearize.json", "mine.txt"):
        (out / name).write_text("{}")
    mark = read_mark(out)
    assert mark is not None and mark.kind == "linearize" and "mine.txt" not in mark.files
    with pytest.raises(ConfigError, match=r"did not write: mine\.txt"):
        Place(out, "linearize", overwrite=True).check()
    (out / "mine.txt").unlink()
    with pytest.raises(ConfigError, match="give --overwrite"):
        Place(out, "linearize").check()
    Place(out, "linearize", overwrite=True).check()


# ---- folders that are filled bit by bit, and pages


def test_a_workspace_goes_on_and_is_not_taken_from_others(tmp_path: Path) -> None:
    out = tmp_path / "study"
    out.mkdir()
    for _ in range(2):
        check_workspace(out, "study", ("cells/*.json",))
        mark_folder(out, "study")
        (out / "mine.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"`linspec demo` did not write: linspec\.json, mine\.txt"
    ):
        check_workspace(out, "demo", ("*/demo.json",))
    old = tmp_path / "old"
    (old / "cells").mkdir(parents=True)
    (old / "cells" / "a.json").write_text("{}")
    check_workspace(old, "study", ("cells/*.json",))


def test_a_page_over_a_text_of_others_is_refused(tmp_path: Path, model: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    with pytest.raises(ConfigError, match=r"README\.md was not written by this command"):
        study(make_plan(tmp_path / "s", teacher=str(model)), ["quality"], page=page)
    assert page.read_text() == "# Mine\n"
    page.write_text("# Theirs\n")
    check_text(page, ("# Theirs",))
    for there in (tmp_path, tmp_path / "link"):
        if there != tmp_path:
            there.symlink_to(page)
        with pytest.raises(ConfigError, match="name a file that is new"):
            check_text(there, ("# Theirs",))


# ---- the disk


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_could_be_read_by_their_owner_alone(
    umask: int, model: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        out = save_model(load_model(model), load_tokenizer(model), tmp_path / "copy")
        with replace_dir(tmp_path / "state") as aside:
            shutil.copy(out / "model.safetensors", aside / "state.safetensors")
            (aside / "state.safetensors").chmod(0o600)
        replace_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and model not in path.parents]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


LEFT = "writing-" + "0" * 32


def test_leftovers_of_killed_processes_are_cleared_and_those_of_others_are_not(
    tmp_path: Path,
) -> None:
    target = tmp_path / "model"
    for name in (f".model.{LEFT}", ".model.writing-12", ".model2." + LEFT, ".other." + LEFT):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with replace_dir(target) as running:
        # a second writer tidies while the first one is at work
        with replace_dir(target):
            pass
        assert running.is_dir()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", ".model.writing-12", ".model2." + LEFT, ".other." + LEFT}


def test_what_was_taken_away_is_put_back_after_a_kill_between_two_renames(
    model: Path, tmp_path: Path
) -> None:
    model.rename(model.with_name(".model.old-" + "1" * 32))
    load_model(model)
    assert [path.name for path in model.parent.iterdir()] == ["model"]
    # where the new one got there, the old one goes
    shutil.copytree(model, model.with_name(".model.old-" + "2" * 32))
    tidy(model)
    assert [path.name for path in model.parent.iterdir()] == ["model"]


TWO = """
import sys
from pathlib import Path
from linspec.utils.places import Place
place = Place(Path(sys.argv[1]), "test", overwrite=True)
print("ready", flush=True)
sys.stdin.readline()
for n in range(100):
    try:
        with place.held(), place.replaced() as aside:
            for name in "ab":
                (aside / name).write_text(f"{sys.argv[2]} {n}")
    except Exception as error:
        assert "in use" in str(error), error
"""


def test_two_processes_write_one_place_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", TWO, str(out)]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    writers = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=100)
        assert writer.returncode == 0, errors
    assert (out / "a").read_text() == (out / "b").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", MARK]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_another_process_writes_is_in_use_and_no_unfinished_run(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with exclusive(out):
        (out / "training").mkdir()
        mark_folder(out / "training", "linearize")
        # of this process, which is as good as another one for the lock
        with pytest.raises(CheckpointError, match="in use by another linspec process; wait"):
            Place(out, "linearize").check()
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        Place(out, "linearize").check()
