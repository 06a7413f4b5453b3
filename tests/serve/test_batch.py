"""Every line of a batch is answered once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.errors import InputError
from linspec.serve.batch import Reply, Summary, open_batch
from linspec.serve.batch_file import AnswerFile

WRITER = str(Path(__file__).with_name("batch_writer.py"))


async def echo(url: str, body: Mapping[str, Any]) -> Reply:
    """Says what it was asked, after others had their turn."""
    await asyncio.sleep(0)
    if body.get("prompt") == "bad":
        return Reply(400, {"error": {"code": "bad", "message": "no"}})
    said = json.dumps([url, body])
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    choice: dict[str, Any] = {"finish_reason": "stop", "text": said}
    if "messages" in body:
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    return Reply(200, {"choices": [choice] * body.get("n", 1), "usage": usage}, "req-1")


def write(path: Path, lines: list[Any]) -> Path:
    texts = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def run(source: Path, target: Path, ask: Any = echo, **options: Any) -> Summary:
    with open_batch(source, target, "m", **options) as batch:
        return asyncio.run(batch.run(ask, at_once=3))


def records(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by line; no line has two."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    found = {each["line"]: each for each in read}
    assert len(found) == len(read)
    return found


def call(custom_id: object, body: object, **changes: object) -> dict[str, object]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
    } | changes


def test_both_forms_are_asked_as_the_server_is_and_answered_in_their_own(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [
        call("a", {"prompt": "x", "seed": 1}),
        call("b", chat, url="/v1/chat/completions"),
        {"prompt": "y", "max_tokens": 3},
        {**chat, "n": 2, "custom_id": "c"},
    ]
    summary = run(write(tmp_path / "in", lines), tmp_path / "out")
    found = records(tmp_path / "out")
    assert [found[n]["custom_id"] for n in (1, 2, 3, 4)] == ["a", "b", None, "c"]
    response = found[1]["response"]
    assert (response["status_code"], response["request_id"], found[1]["error"]) == (
        200,
        "req-1",
        None,
    )
    asked = [
        json.loads(found[1]["response"]["body"]["choices"][0]["text"]),
        json.loads(found[2]["response"]["body"]["choices"][0]["message"]["content"]),
        json.loads(found[3]["text"]),
        json.loads(found[4]["text"]),
    ]
    assert asked == [
        ["/v1/completions", {"model": "m", "prompt": "x", "seed": 1}],
        ["/v1/chat/completions", {"model": "m", **chat}],
        ["/v1/completions", {"model": "m", "prompt": "y", "max_tokens": 3}],
        ["/v1/chat/completions", {"model": "m", "max_tokens": 512, **chat, "n": 2}],
    ]
    assert len(found[4]["texts"]) == 2
    assert (summary.lines, summary.resumed, summary.failed) == (4, 0, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (8, 12)


FAULTS: list[tuple[Any, str]] = [
    (b'{"prompt": "x"', "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[1, 2]", "JSON object"),
    (b"[" * 100_000, "not JSON"),
    ({"text": "x"}, "neither a prompt"),
    (call(7, {"prompt": "x"}), "custom_id"),
    (call("f", {"prompt": "x"}, method="GET"), "POST"),
    (call("g", {"prompt": "x"}, url="/v1/files"), "/v1/files"),
    (call("h", "x"), "body"),
    (call("i", {"prompt": "x", "stream": True}), "stream"),
    ({"prompt": "x", "stream": True}, "stream"),
]


@pytest.mark.parametrize(("line", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_what_is_wrong_with_a_line_stays_with_it(line: Any, said: str, tmp_path: Path) -> None:
    summary = run(
        write(tmp_path / "in", [{"prompt": "a"}, line, {"prompt": "b"}]), tmp_path / "out"
    )
    found = records(tmp_path / "out")
    assert sorted(found) == [1, 2, 3]
    assert found[1]["error"] is None and found[3]["error"] is None
    assert said in found[2]["error"]["message"] and "line 2" in found[2]["error"]["message"]
    assert summary.failed == 1


def test_errors_of_the_server_and_custom_ids_that_come_twice(tmp_path: Path) -> None:
    lines = [
        {"prompt": "bad"},
        call("a", {"prompt": "bad"}),
        call("a", {"prompt": "x"}),
        {"prompt": "x"},
    ]
    assert run(write(tmp_path / "in", lines), tmp_path / "out").failed == 3
    found = records(tmp_path / "out")
    assert found[1]["error"] == {"code": "bad", "message": "no"}
    assert found[2]["response"]["status_code"] == 400 and found[2]["error"] is None
    assert "line 2" in found[3]["error"]["message"]
    assert found[4]["error"] is None


def test_a_server_without_room_is_asked_again(tmp_path: Path) -> None:
    tried: list[str] = []

    async def ask(url: str, body: Mapping[str, Any]) -> Reply:
        tried.append(body["prompt"])
        return await echo(url, body) if tried.count(body["prompt"]) > 1 else Reply(429, {})

    assert (
        run(
            write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out", ask
        ).failed
        == 0
    )
    assert sorted(tried) == ["a", "a", "b", "b"]


def test_a_server_that_stops_leaves_lines_open_and_no_errors_in_them(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": str(n)} for n in range(9)])

    async def ask(url: str, body: Mapping[str, Any]) -> Reply:
        return Reply(503, {}) if body["prompt"] == "5" else await echo(url, body)

    with pytest.raises(InputError, match="line 6"):
        run(source, tmp_path / "out", ask)
    assert 6 not in records(tmp_path / "out")
    before = len(records(tmp_path / "out"))
    assert run(source, tmp_path / "out").resumed == before
    assert sorted(records(tmp_path / "out")) == list(range(1, 10))


@settings(max_examples=settings().max_examples * 3, deadline=None)
@given(st.lists(st.sampled_from(["a", "bad", "", "é" * 9]), max_size=8), st.floats(0, 1))
def test_an_output_that_is_torn_anywhere_is_mended(prompts: list[str], cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        # empty lines ask for nothing
        lines = [{"prompt": each, "n": 1} if each else b" " for each in prompts]
        write(source, lines)
        run(source, target)
        whole = records(target)
        content = target.read_bytes()
        kept = content[: int(cut * len(content))]
        target.write_bytes(kept)
        summary = run(source, target)
        assert records(target) == whole
        assert sorted(whole) == [n for n, each in enumerate(prompts, 1) if each]
        assert summary.resumed == kept.count(b"\n")
        # nothing is left to do then
        assert run(source, target).resumed == len(whole)


def test_killed_in_the_middle_again_and_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": str(n)} for n in range(150)])
    target, rng, hit = tmp_path / "out", random.Random(0), 0
    for attempt in range(40):
        with subprocess.Popen(
            [sys.executable, WRITER, str(source), str(target)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            if attempt < 3:
                time.sleep(rng.uniform(0.005, 0.08))
                process.kill()
            hit += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert hit == 3
    found = records(target)
    assert sorted(found) == list(range(1, 151))
    assert all(each["text"] == str(n - 1) * 2 for n, each in found.items())


def test_an_interrupt_loses_no_answer_and_says_how_to_go_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": str(n)} for n in range(2000)])
    target = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, WRITER, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        while not target.stat().st_size:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert (process.returncode, said.strip()) == (
        130,
        "interrupted: give the same command again to go on",
    )
    begun = records(target)
    assert 0 < len(begun) < 2000 and target.read_bytes().endswith(b"\n")


def test_foreign_files_are_left_as_they_are(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"
    for content in (b"notes\n", b"{}\n", b'{"line": 1}\n', b'{"line": true, "id": "x"}\n', b"[]\n"):
        target.write_bytes(content)
        with pytest.raises(InputError, match="no answer of a batch"):
            run(source, target)
        assert target.read_bytes() == content
    with pytest.raises(InputError, match="is the input"):
        run(source, source, overwrite=True)
    with pytest.raises(InputError, match="no file"):
        run(tmp_path / "none", tmp_path / "new", overwrite=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b'{"precious": 1}',
        b"notes",
        b'{"line": 1, "id": "x"}\n',
        b'{"id": "batch_req_1", "custom_id": "a", "response": {}}',
        b'{"id": "batch_req_1", "custom_id": "a", "response": {}}\n',
    ],
)
def test_a_foreign_file_without_a_newline_at_its_end_is_not_emptied(
    content: bytes, overwrite: bool, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}]), tmp_path / "out"
    target.write_bytes(content)
    with pytest.raises(InputError, match="out, line 1, is no answer of a batch"):
        run(source, target, overwrite=overwrite)
    assert target.read_bytes() == content


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_link_points_at_is_not_emptied(overwrite: bool, tmp_path: Path) -> None:
    source, own = write(tmp_path / "in", [{"prompt": "a"}]), tmp_path / "own"
    run(source, own)
    content = own.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(own)
    with pytest.raises(InputError, match="link is a symbolic link to .*own"):
        run(source, link, overwrite=overwrite)
    assert own.read_bytes() == content
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    with pytest.raises(InputError, match="symbolic link"):
        run(source, tmp_path / "dangling")
    assert not (tmp_path / "new").exists()
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "no regular file"), (".", "a directory")):
        with pytest.raises(InputError, match=f"is {what}"):
            run(source, tmp_path / name)


def test_a_torn_tail_stays_until_there_is_an_answer(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"
    run(source, target)
    torn = target.read_bytes()[:-9]
    target.write_bytes(torn)
    with open_batch(source, target, "m") as batch:
        assert batch.left == 1
    assert target.read_bytes() == torn
    assert run(source, target).resumed == 1
    assert sorted(records(target)) == [1, 2]


async def stopping(url: str, body: Mapping[str, Any]) -> Reply:
    """A server that stops before its first answer."""
    return Reply(503, {})


def test_overwrite_keeps_the_old_answers_until_the_first_new_one(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"
    run(source, target)
    content = target.read_bytes()
    other = write(tmp_path / "other", [{"prompt": "c"}])
    with pytest.raises(InputError, match="no more"):
        run(other, target, stopping, overwrite=True)
    assert target.read_bytes() == content
    assert run(other, target, overwrite=True).resumed == 0
    assert json.loads(records(target)[1]["text"])[1]["prompt"] == "c"
    # what was torn in its first line, and an empty file, are a batch's own too
    for left in (content[:40], b""):
        target.write_bytes(left)
        assert run(source, target, overwrite=True).lines == 2


def test_a_run_without_an_answer_leaves_no_file_and_no_folder(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}]), tmp_path / "new" / "deep" / "out"
    with pytest.raises(InputError, match="no more"):
        run(source, target, stopping)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    # an empty file that was there is somebody's
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="no more"):
        run(source, tmp_path / "empty", stopping)
    assert (tmp_path / "empty").exists()
    assert run(source, target).lines == 1


def test_answers_made_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"

    def made(maker: str, ask: Any, **options: Any) -> None:
        with open_batch(source, target, "m", **options) as batch:
            batch.begin(maker)
            asyncio.run(batch.run(ask, at_once=1))

    async def once(url: str, body: Mapping[str, Any]) -> Reply:
        return Reply(503, {}) if body["prompt"] == "b" else await echo(url, body)

    with pytest.raises(InputError, match="no more"):
        made("one", once)
    content = target.read_bytes()
    assert records(target)[1]["made_by"] == "one"
    with pytest.raises(InputError, match="made_by is one, now two.*--overwrite"):
        made("two", echo)
    assert target.read_bytes() == content
    made("one", echo)
    made("two", echo, overwrite=True)
    assert [each["made_by"] for each in records(target).values()] == ["two", "two"]
    # answers that do not tell what made them are gone on with
    target.write_bytes(content.replace(b', "made_by": "one"', b""))
    made("two", echo)
    assert sorted(records(target)) == [1, 2]


def test_answers_to_other_lines_or_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"
    run(source, target)
    with pytest.raises(InputError, match="line 2"):
        run(write(tmp_path / "changed", [{"prompt": "a"}, {"prompt": "c"}]), target)
    with pytest.raises(InputError, match="line 2"):
        run(write(tmp_path / "shorter", [{"prompt": "a"}]), target)
    with pytest.raises(InputError, match="another"), open_batch(source, target, "other"):
        pass
    # a longer one goes on
    assert run(write(tmp_path / "in", [{"prompt": p} for p in "abc"]), target).resumed == 2


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "a"}])
    with AnswerFile(tmp_path / "out"), pytest.raises(InputError, match="another linspec process"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out").lines == 1


def test_a_full_disk_ends_the_batch_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = (
        write(tmp_path / "in", [{"prompt": str(n)} for n in range(9)]),
        tmp_path / "out",
    )
    written, usual = [0], os.write

    def full(file: int, data: bytes) -> int:
        written[0] += len(data)
        if written[0] > 700:
            usual(file, data[:5])
            raise OSError(28, "No space left on device")
        return usual(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            run(source, target)
    assert run(source, target).resumed > 0
    assert sorted(records(target)) == list(range(1, 10))
