"""Writing aside and renaming: what is there is always whole."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

import linspec.utils.files
from linspec.errors import CheckpointError
from linspec.utils.files import exclusive, replace_dir


def write(target: Path, text: str) -> None:
    with replace_dir(target) as aside:
        (aside / "file").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_whole_and_nothing_is_left_beside_it(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(linspec.utils.files, "_exchange", lambda a, b: False)
    target = tmp_path / "model"
    for text in ("first", "second"):
        write(target, text)
        assert (target / "file").read_text() == text
        assert list(tmp_path.iterdir()) == [target]


def test_what_the_owner_alone_could_read_is_shared_as_the_directory_is(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replace_dir(target) as aside:
        (aside / "file").write_text("x")
        (aside / "file").chmod(0o600)
    assert (target / "file").stat().st_mode & 0o666 == target.stat().st_mode & 0o666


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "first")
    with contextlib.suppress(KeyboardInterrupt), replace_dir(target) as aside:
        (aside / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_who_waits_for_a_directory_gets_it_after_its_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, waiting = [], threading.Event()

    def wait() -> None:
        waiting.set()
        with exclusive(tmp_path, wait=True):
            seen.append("second")

    thread = threading.Thread(target=wait)
    with exclusive(tmp_path):
        thread.start()
        waiting.wait()
        with pytest.raises(CheckpointError, match="in use"), exclusive(tmp_path):
            pass
        while "waiting for the process" not in capsys.readouterr().err:
            time.sleep(0.001)
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]
