"""https with a certificate of one's own; files that are none are named before a model is loaded."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from api_server import running, talker
from typer.testing import CliRunner

from linspec.cli import app
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.serve.run import serve
from linspec.serve.settings import Settings

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="the program openssl makes the certificate")
Files = tuple[Path, Path]


def certificate(folder: Path, name: str, *more: str) -> Files:
    """A certificate of the loopback address that signs itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-days", "2", "-subj", "/CN=linspec", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(cert), *(more or ["-nodes"])]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return certificate(tmp_path_factory.mktemp("tls"), "mine")


@pytest.fixture(scope="module")
def address(files: Files) -> Iterator[str]:
    settings = Settings.read(None, tls_cert=files[0], tls_key=files[1])
    with running({"talker": LLM(talker())}, settings) as (started, _):
        assert started.startswith("https://")
        yield started


@pytest.fixture
def trusting(files: Files) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(files[0]))


def test_the_official_client_reads_answers_and_streams_over_https(
    address: str, trusting: ssl.SSLContext
) -> None:
    with (
        httpx.Client(verify=trusting, timeout=20) as web,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key="any", http_client=web, max_retries=0
        ) as client,
    ):
        asked = {"model": "talker", "prompt": "ab", "max_tokens": 20, "seed": 1}
        whole = client.completions.create(**asked)  # type: ignore[call-overload]
        stream = client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_who_does_not_know_the_certificate_is_told_by_its_own_client(address: str) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate verify failed|self-signed"):
        httpx.get(f"{address}/health")


def test_plain_http_at_an_https_port_ends_and_the_server_is_well(
    address: str, trusting: ssl.SSLContext
) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address.replace('https', 'http')}/health")
    assert httpx.get(f"{address}/health", verify=trusting).status_code == 200


def wrong_files(kind: str, files: Files, folder: Path) -> tuple[Files, str]:
    cert, key = files
    if kind == "missing":
        return (cert, folder / "none.key"), "no such file"
    if kind == "directory":
        return (folder, key), "it is a directory"
    if kind == "no pem":
        other = folder / "text.pem"
        other.write_text("not a certificate")
        return (other, key), "text.pem.*no certificate"
    if kind == "swapped":
        return (key, cert), "no certificate and its key"
    if kind == "password":
        return certificate(folder, "locked", "-passout", "pass:secret"), "without a password"
    return (cert, certificate(folder, "other")[1]), "belong together"


KINDS = ["missing", "directory", "no pem", "swapped", "password", "of another"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_certificate_are_named_before_a_model_is_loaded(
    kind: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cert, key), said = wrong_files(kind, files, tmp_path)
    loads: list[object] = []
    monkeypatch.setattr("linspec.serve.run.loaded", lambda *given: loads.append(given))
    with pytest.raises(ConfigError, match=said):
        serve(["a"], Settings.read(None, port=0, tls_cert=cert, tls_key=key))
    assert not loads


def test_the_command_ends_with_the_reason(files: Files) -> None:
    given = ["serve", "no-such-model", "--port", "0"]
    found = CliRunner().invoke(app, [*given, "--tls-cert", str(files[0]), "--tls-key", "none.key"])
    assert found.exit_code == 1 and "none.key" in found.output and "Traceback" not in found.output
    alone = CliRunner().invoke(app, [*given, "--tls-cert", str(files[0])])
    assert alone.exit_code == 1 and "belong together" in alone.output
