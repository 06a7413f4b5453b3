"""Settings, keys and doors: who gets in, with how much."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import openai
import pytest
from api_server import running, talker
from typer.testing import CliRunner

from linspec.cli import app
from linspec.cli.serve import Serving
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.serve.embedder import Embedder
from linspec.serve.keys import Keys
from linspec.serve.run import listening, named_models, serve
from linspec.serve.settings import Settings
from linspec.serve.worker import Worker


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LINSPEC_DEBUG", raising=False)


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_batch = 2\nmax_tokens = 3\nmodels = ["a=b"]\n')
    monkeypatch.setenv("LINSPEC_SERVE_PORT", "4")
    monkeypatch.setenv("LINSPEC_SERVE_MAX_BATCH", "5")
    found = Settings.read(file, port=6)
    assert (found.port, found.max_batch, found.max_tokens) == (6, 5, 3)
    assert found.models == ["a=b"] and found.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot"),
        ("port = 99999", "port"),
        ("port = ", "cannot be read"),
        ('host = "0.0.0.0"', "needs a key"),
        ('host = "192.168.1.1"', "needs a key"),
        ('host = "::"', "needs a key"),
        ('tls_cert = "a.pem"', "belong together"),
        ("max_batch = 0", "max_batch"),
        ('prefix_mib = 0\nprefix_store = "here"', "--prefix-mib, which is 0; raise that"),
    ],
)
def test_what_a_file_has_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Settings.read(file)


def test_a_public_address_with_a_key_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_SERVE_API_KEY", "a-long-enough-key")
    found = Settings.read(None, host="0.0.0.0")
    assert found.keyed and "a-long" not in repr(found)


def test_every_setting_has_a_flag_with_the_same_default() -> None:
    assert set(Settings.model_fields) == {*(each.name for each in fields(Serving)), "models"}
    hints = get_type_hints(Serving, include_extras=True)
    for name, field in Settings.model_fields.items():
        # a model's own length is no number here
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            told = get_args(hints[name])[1].show_default
            assert type(field.default)(told) == field.default, name


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_have_names_and_only_hashes_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# people\nalice:{hashed('first key')}\nbob:{hashed('clé-2')}\n\n")
    keys = Keys.read(file, "the third key")
    assert keys.name_of("Bearer first key") == "alice"
    assert keys.name_of("bearer the third key") == "default"
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        "Basic first key",
        f"Bearer {hashed('first key')}",
        "Bearer x",
    ):
        assert keys.name_of(wrong) is None
    assert not Keys.read(None) and "first key" not in repr(vars(keys))


@pytest.mark.parametrize("text", ["", "sk-plain", "alice:abc", f"a:{'0' * 64}\na:{'1' * 64}"])
def test_a_file_without_hashed_keys_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match="NAME:SHA256|holds no keys") as caught:
        Keys.read(file)
    assert "sk-plain" not in str(caught.value)
    assert "Path(" not in str(caught.value)


def test_no_key_of_a_file_is_lost_to_the_single_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"default:{hashed('the key of the file')}\n")
    with pytest.raises(ConfigError, match="names a key 'default'"):
        Keys.read(file, "a-long-enough-key")


def test_short_and_missing_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        Keys.read(None, "short")
    with pytest.raises(ConfigError, match="cannot read the keys"):
        Keys.read(tmp_path / "none")


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    settings = Settings.read(
        None, api_key="the right key", max_body_bytes=2000, cors_origins=["https://page.example"]
    )
    with running({"talker": LLM(talker())}, settings) as (address, _):
        yield address


def test_a_key_opens_what_has_no_key_stays_open(guarded: str) -> None:
    with httpx.Client(base_url=guarded) as web:
        for path in ("/health", "/ready"):
            assert web.get(path).status_code == 200
        for path in ("/v1/models", "/version", "/openapi.json", "/docs"):
            refused = web.get(path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
            right = {"authorization": "Bearer the right key"}
            assert web.get(path, headers=right).status_code == 200
    with (
        openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="unknown key"),
    ):
        client.models.list()


def test_large_bodies_are_refused_also_without_a_length(guarded: str) -> None:
    right = {"authorization": "Bearer the right key", "content-type": "application/json"}
    body = b'{"prompt": "' + b"a" * 3000 + b'"}'

    def in_parts() -> Iterator[bytes]:
        yield body[:1000]
        yield body[1000:]

    with httpx.Client(base_url=guarded, headers=right) as web:
        for content in (body, in_parts()):
            got = web.post("/v1/completions", content=content)
            assert got.status_code == 413
            assert "2000" in got.json()["error"]["message"]


def test_only_named_origins_may_ask(guarded: str) -> None:
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    with httpx.Client(base_url=guarded) as web:
        mine = web.options("/v1/completions", headers={"origin": "https://page.example", **ask})
        assert mine.headers["access-control-allow-origin"] == "https://page.example"
        other = web.options("/v1/completions", headers={"origin": "https://evil.example", **ask})
        assert "access-control-allow-origin" not in other.headers


def test_names_of_models() -> None:
    assert named_models(["smollm2", "b=dir/x", "dir/y"]) == {
        "smollm2": "smollm2",
        "b": "dir/x",
        "y": "dir/y",
    }
    with pytest.raises(ConfigError, match="two models are called"):
        named_models(["a/x", "b/x"])
    for wrong in ("=x", "x=", ""):
        with pytest.raises(ConfigError):
            named_models([wrong])
    with pytest.raises(ConfigError, match="no model is named"):
        named_models([])


def test_an_address_in_use_is_named_before_a_model_is_loaded() -> None:
    with listening("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "no-such-model", "--port", str(port)])
    assert found.exit_code == 1 and "take another --port" in found.output


def test_an_address_that_was_taken_while_models_were_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]

        def loaded(*_: object) -> tuple[dict[str, Worker], dict[str, Embedder]]:
            first.listen()
            return {}, {}

        monkeypatch.setattr("linspec.serve.run.loaded", loaded)
        with pytest.raises(ConfigError, match="take another --port"):
            serve(["a"], Settings.read(port=port))


def test_a_bad_key_is_said_before_models_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said when all weights had been read, minutes later."""

    def loaded(*_: object) -> None:
        raise AssertionError("models are loaded")

    monkeypatch.setattr("linspec.serve.run.loaded", loaded)
    with pytest.raises(ConfigError, match="at least 8 characters"):
        serve(["a"], Settings.read(port=0, api_key="short"))
    with pytest.raises(ConfigError, match="cannot read the keys"):
        serve(["a"], Settings.read(port=0, key_file=tmp_path / "nothing"))


def test_the_body_of_an_answer_does_not_wait_for_the_client_to_confirm_its_head() -> None:
    with listening("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_without_its_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    found = CliRunner().invoke(app, ["serve", "embedded-aug"])
    assert found.exit_code == 1
    assert "pip install 'linspec[serve]'" in found.output


def test_the_openapi_page_has_all_endpoints_and_their_errors(guarded: str) -> None:
    right = {"authorization": "Bearer the right key"}
    page: dict[str, Any] = httpx.get(f"{guarded}/openapi.json", headers=right).json()
    posts = {path for path, methods in page["paths"].items() if "post" in methods}
    assert posts >= {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
        *("/tokenize", "/detokenize"),
    }
    for path in posts:
        answers = page["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(answers)
        # what breaks a schema is a 400 here
        assert "422" not in answers


@pytest.mark.parametrize("verb", ["serve", "batch"])
def test_without_ray_the_extra_is_named(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = tmp_path / "in"
    source.write_text('{"prompt": "x"}\n')
    given = {
        "serve": ["serve", str(talker()), "--port", "0"],
        "batch": ["batch", str(source), str(tmp_path / "out"), "--model", str(talker())],
    }[verb]
    for more, said in ((["--replicas", "2"], "--ray"), (["--ray"], "linspec[serve,ray]")):
        result = CliRunner().invoke(app, given + more)
        assert result.exit_code == 1 and said in result.output
