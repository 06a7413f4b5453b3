"""What goes wrong outside: a disk that is full, a process that is killed, a thread that ends."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from api_server import running, talker
from server_process import Served

from linspec.llm import LLM

ASKED = {"prompt": "ab cd " * 20, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = {"prompt": "ab", "max_tokens": 4000, "ignore_eos": True}
COMPLETIONS = "/v1/completions"


def small_disk(folder: Path, kib: int) -> list[str]:
    """Words before a command: it sees a disk of so many KiB at `folder`, and nobody else does."""
    mount = f"mount -t tmpfs -o size={kib}k tmpfs {shlex.quote(str(folder))}"
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def no_small_disk(folder: Path) -> bool:
    """Whether this machine lets nobody make one."""
    if not shutil.which("unshare"):
        return True
    tried = subprocess.run([*small_disk(folder, 64), "true"], capture_output=True, check=False)
    return tried.returncode != 0


def test_a_server_on_a_full_disk_answers_and_says_once_what_it_could_not_keep(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    if no_small_disk(store):
        pytest.skip("a small disk needs mounts of one's own")
    model = f"mine={talker('softmax')}"
    inside = small_disk(store, 16)
    served = Served(model, "--prefix-store", store, cache=tmp_path, inside=inside)
    with httpx.Client(base_url=served.address, timeout=60) as web:
        texts = []
        for at in range(3):
            # nothing of one is kept for the next
            asked = {**ASKED, "prompt": f"{at} {ASKED['prompt']}"}
            got = [web.post(COMPLETIONS, json=asked) for _ in "ab"]
            assert [each.status_code for each in got] == [200, 200]
            texts.append([each.json()["choices"][0]["text"] for each in got])
        assert web.get("/health").status_code == 200
    served.process.send_signal(signal.SIGTERM)
    printed = served.end()
    assert served.process.returncode == 0, printed
    assert len(re.findall("No space left on device", printed)) == 1, printed
    assert all(first == second for first, second in texts)
    # the disk was that of the server alone
    assert not list(store.iterdir())


def read_and_kill(web: httpx.Client, served: Served) -> None:
    """A stream whose server is killed at its first line."""
    with web.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as got:
        for line in got.iter_lines():
            assert line != "data: [DONE]"
            served.process.kill()


@pytest.mark.slow
def test_a_server_that_was_killed_leaves_a_store_that_the_next_one_uses(tmp_path: Path) -> None:
    model, store = f"mine={talker('softmax')}", tmp_path / "store"
    served = Served(model, "--prefix-store", store, "--prefix-mib", "1", cache=tmp_path)
    with httpx.Client(base_url=served.address, timeout=60) as web:
        web.post(COMPLETIONS, json=ASKED)
        # a torn answer, never one that looks complete
        with pytest.raises(httpx.TransportError):
            read_and_kill(web, served)
    assert served.process.wait(60) == -signal.SIGKILL
    served.end()
    again = Served(model, "--prefix-store", store, "--prefix-mib", "1", cache=tmp_path)
    assert httpx.post(again.address + COMPLETIONS, json=ASKED, timeout=60).status_code == 200
    again.process.send_signal(signal.SIGTERM)
    printed = again.end()
    assert again.process.returncode == 0 and "skipped" not in printed, printed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_ends_by_itself_leaves_no_caller_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running({"talker": LLM(talker())}) as (address, workers):
        worker = workers["talker"]

        def ended() -> None:
            raise SystemExit

        with httpx.Client(base_url=address, timeout=60) as web:
            with web.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as got:
                lines = got.iter_lines()
                next(lines)
                monkeypatch.setattr(worker, "_turn", ended)
                told = "".join(lines)
            assert "the model has stopped" in told and told.endswith("data: [DONE]")
            until = time.monotonic() + 20
            while not worker.broken:
                assert time.monotonic() < until
                time.sleep(0.01)
            for path in ("/health", "/ready"):
                got = web.get(path)
                assert (got.status_code, got.json()["error"]["code"]) == (503, "stopped")
            refused = web.post(COMPLETIONS, json=ASKED)
            assert refused.status_code == 503
            assert "has to be started again" in refused.json()["error"]["message"]
        assert not worker.running and not worker.waiting
