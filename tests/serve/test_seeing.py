"""Drafts in streams, metrics and the page, as a server has them; batches through the same server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import running, talker
from checkpoints import model_dir
from typer.testing import CliRunner

from linspec.cli import app as command
from linspec.decoding.sampling import SamplingParams
from linspec.llm import LLM
from linspec.serve.batch import open_batch
from linspec.serve.batch_model import answer_with
from linspec.serve.settings import Settings

KEY = "a-key-for-tests"


def made() -> LLM:
    return LLM(talker(), drafter=f"draft-model:{model_dir('aug')}", policy=4, max_batch=2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running({"tiny": made()}) as (found, _):
        yield found


def chunks(address: str, path: str, body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    asked = {
        "model": "tiny",
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    asked |= body | ({"stream_options": options} if options else {})
    with httpx.stream("POST", f"{address}{path}", json=asked, timeout=30) as answer:
        assert answer.status_code == 200
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab cd"}]}),
    ("/v1/completions", {"prompt": "ab cd"}),
]


@pytest.mark.parametrize(("path", "body"), CALLS, ids=["chat", "completions"])
@pytest.mark.parametrize("n", [1, 2])
def test_streams_say_what_they_owe_to_drafts(
    address: str, path: str, body: dict[str, Any], n: int
) -> None:
    body = body | {"n": n, "temperature": 0.7, "seed": 1} if n > 1 else body
    shown = chunks(address, path, body, include_drafts=True)
    plain = chunks(address, path, body)
    for index in range(n):
        own = [c["choices"][0] for c in shown if c["choices"][0]["index"] == index]
        objects = [each["linspec"] for each in own if "linspec" in each]
        said = "".join(
            each.get("text") or each.get("delta", {}).get("content") or "" for each in own
        )
        assert "".join(part["text"] for each in objects for part in each["parts"]) == said
        assert sum(each["tokens"] for each in objects) == 12
        assert [("totals" in each) for each in objects] == [False] * (len(objects) - 1) + [True]
        assert objects[-1]["totals"]["rounds"] <= 11
        usual = [c["choices"][0] for c in plain if c["choices"][0]["index"] == index]
        assert not any("linspec" in each for each in usual)
        assert said == "".join(
            e.get("text") or e.get("delta", {}).get("content") or "" for e in usual
        )
    assert any(
        each["linspec"]["drafted"] for c in shown for each in c["choices"] if "linspec" in each
    )


def test_metrics_figures_and_the_page_are_there(address: str) -> None:
    text = httpx.get(f"{address}/metrics").text
    assert 'linspec:num_requests_running{model_name="tiny"} 0.0' in text
    figures = httpx.get(f"{address}/linspec/loads").json()["models"]["tiny"]
    assert (figures["chat"], figures["slots"]) == (True, 2)
    assert "<title>linspec</title>" in httpx.get(address).text
    with httpx.stream("GET", f"{address}/linspec/live", timeout=10) as answer:
        first = next(line for line in answer.iter_lines() if line.startswith("data: "))
    assert json.loads(first[6:])["models"]["tiny"]["slots"] == 2


def test_a_key_is_for_figures_and_not_for_the_page() -> None:
    with running({"tiny": made()}, Settings.read(port=0, api_key=KEY)) as (address, _):
        for path in ("/metrics", "/linspec/loads", "/linspec/live"):
            assert httpx.get(f"{address}{path}").status_code == 401
        keyed = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/metrics", headers=keyed).status_code == 200
        assert httpx.get(address).status_code == 200
        assert httpx.get(f"{address}/page/app.js").status_code == 200


def batch_file(folder: Path) -> Path:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 5}
    lines = [{"prompt": "ab cd" * n, "max_tokens": 3 + n, "temperature": 0} for n in range(1, 9)]
    lines += [{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat}]
    lines += [{"prompt": "ab", "temperature": -1}]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_answers_as_the_model_does_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a server needs is nothing to a batch
    monkeypatch.setenv("LINSPEC_SERVE_API_KEY", KEY)
    monkeypatch.setenv("LINSPEC_SERVE_MAX_TOKENS", "1")
    with open_batch(batch_file(tmp_path), tmp_path / "out", "tiny") as batch:
        answer_with(batch, str(talker()), max_batch=2, drafter="prompt-lookup")
        assert batch.left == 0
    found = {
        each["line"]: each for each in map(json.loads, (tmp_path / "out").read_text().splitlines())
    }
    assert sorted(found) == list(range(1, 11))
    llm = made()
    for n in range(1, 9):
        alone = llm.generate("ab cd" * n, SamplingParams(max_tokens=3 + n))[0]
        assert found[n]["text"] == alone.text
    assert found[9]["response"]["status_code"] == 200
    assert "temperature" in found[10]["error"]["message"]


def test_the_verb_goes_on_and_says_what_it_did(tmp_path: Path) -> None:
    source, target = batch_file(tmp_path), tmp_path / "out.jsonl"
    arguments = [
        "batch",
        str(source),
        str(target),
        "--model",
        str(talker()),
        "--name",
        "tiny",
        "--json",
    ]
    first = json.loads(CliRunner().invoke(command, arguments).stdout)
    assert (first["lines"], first["resumed"], first["failed"]) == (10, 0, 1)
    whole = target.read_text()
    target.write_text(whole[: len(whole) // 2])
    second = json.loads(CliRunner().invoke(command, arguments).stdout)
    assert second["resumed"] == whole[: len(whole) // 2].count("\n")
    numbers = [json.loads(line)["line"] for line in target.read_text().splitlines()]
    assert sorted(numbers) == list(range(1, 11))
    # nothing is loaded where nothing is left
    done = [each if each != str(talker()) else "no/such/model" for each in arguments]
    assert json.loads(CliRunner().invoke(command, done).stdout)["resumed"] == 10


def test_a_batch_goes_on_with_the_model_and_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    source, target = batch_file(tmp_path), tmp_path / "out.jsonl"

    def verb(*more: str, model: Path | None = None) -> Any:
        loaded = str(model or talker("softmax"))
        asked = ["batch", str(source), str(target), "--model", loaded, "--name", "tiny"]
        return CliRunner().invoke(command, [*asked, "--json", *more])

    assert verb(model=tmp_path / "no" / "model").exit_code != 0
    assert not target.exists()
    assert verb().exit_code == 0
    half = b"".join(target.read_bytes().splitlines(keepends=True)[:5])
    target.write_bytes(half)
    others = "--max-tokens 5,--rope-scaling yarn:2,--quantize 8,--kv-cache-dtype int8"
    for more in (*others.split(","), "--attention pages:budget=64", "--verifier typical"):
        refused = verb(*more.split())
        assert refused.exit_code != 0 and "other settings" in refused.output, more
        assert target.read_bytes() == half
    refused = verb(model=talker())
    assert refused.exit_code != 0 and "another model" in refused.output
    assert target.read_bytes() == half
    # drafts change no answer
    assert verb("--drafter", "prompt-lookup", "--max-batch", "2").exit_code == 0
