"""What a server says that it needs is what it takes: slots, copies of sequences, states of drafters."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import talker
from checkpoints import model_dir
from denoisers import talker as denoiser
from helpers import random_tokens

from linspec import LLM, SamplingParams
from linspec.errors import ContextOverflow
from linspec.serve.budget import MemoryBudget
from linspec.serve.worker import Worker
from linspec.state.kv_cache import KVCache

SLOTS = 3
DRAFTED = "masked-diffusion:block=fixed:8,cache=dual,verify=freedave:4"
LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


def budget_of(llm: LLM, limit: int | None = None) -> MemoryBudget:
    with Worker(llm) as worker:
        return MemoryBudget.of(worker, limit)


def test_a_model_alone_needs_its_slots_and_what_is_kept_of_prompts() -> None:
    found = budget_of(LLM(talker("softmax"), max_batch=SLOTS, drafter="suffix"))
    assert (found.copies, found.drafts, found.prefixes) == (0, 0, 0)
    assert found.sequence == found.state == found.kv > 0
    assert found.most == found.process + SLOTS * found.state
    kept = budget_of(LLM(talker("softmax"), max_batch=SLOTS, prefix_cache=2**20))
    assert kept.most == kept.process + SLOTS * kept.state + 2**20
    # what the settings allow bounds it
    tight = budget_of(LLM(talker("softmax"), max_batch=SLOTS), limit=5)
    assert tight.most == tight.process + 5


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the branches of a cache hold, after each step that had some."""
    seen, plain = list[int](), KVCache.open_branches

    def watched(self: KVCache, *given: Any) -> None:
        plain(self, *given)
        slots = range(len(self.lengths))
        held = [each.held for slot in slots for each in self.places.of(slot)]
        seen.append(sum(map(self.bytes_at, held)))

    monkeypatch.setattr(KVCache, "open_branches", watched)
    return seen


def test_branches_of_diffusion_drafts_are_in_the_statement(branches: list[int]) -> None:
    """A server whose drafts took four times the states that it had told of."""
    llm = LLM(denoiser(), loop=DRAFTED, max_batch=SLOTS)
    said = budget_of(llm)
    assert said.copies == 3 and "3 copies" in said.text()
    llm = LLM(denoiser(), loop=DRAFTED, max_batch=SLOTS)
    llm.generate(["abcd"] * SLOTS, LONG)
    longest = len(llm.encode("abcd")) + 30
    state = llm.engine.state.bytes_at(longest)
    assert 0 < max(branches) <= SLOTS * said.copies * state
    # some round had them all
    assert max(branches) > SLOTS * (said.copies - 1) * llm.engine.state.bytes_at(longest - 30)


@pytest.mark.parametrize("loop", [DRAFTED, "beam:width=5"])
def test_a_limit_of_states_counts_copies_too(loop: str) -> None:
    folder = denoiser() if loop == DRAFTED else model_dir("softmax")
    copies = LLM(folder, loop=loop).engine.loop.copies
    one = LLM(folder).engine.state.bytes_at(50)
    plain = LLM(folder, loop=loop, state_bytes=(1 + copies) * one)
    plain.generate([random_tokens(20)], LONG)
    less = LLM(folder, loop=loop, state_bytes=copies * one)
    with pytest.raises(ContextOverflow, match="bytes"):
        less.generate(
            [random_tokens(20)], SamplingParams(max_tokens=30, min_tokens=30, temperature=0)
        )


def test_hypotheses_of_beams_are_in_the_statement() -> None:
    llm = LLM(model_dir("softmax"), loop="beam:width=5", max_batch=SLOTS)
    found = budget_of(llm)
    assert found.copies == 5 and found.drafts == 0
    assert llm.engine.loop.beams.target.state.slots == SLOTS * found.copies  # type: ignore[attr-defined]


@pytest.mark.parametrize("loop", ["auto", "mirror", "dsbd:width=2"])
def test_states_of_a_draft_model_are_in_the_statement(loop: str) -> None:
    llm = LLM(
        talker("softmax"),
        drafter=f"draft-model:{model_dir('softmax', 1)}",
        loop=loop,
        max_batch=SLOTS,
    )
    found = budget_of(llm)
    one = SLOTS * llm.engine.drafter.state.bytes_at(found.length)  # type: ignore[union-attr]
    # the drafter's own, windows that are rolled out, prompts and beams of the draft model
    assert found.drafts == {"auto": 1, "mirror": 2, "dsbd:width=2": 4}[loop] * one
    assert found.copies == (2 if loop.startswith("dsbd") else 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["embedded-softmax", "embedded-aug", "embedded-diffusion"])
def test_a_full_server_takes_what_it_said_at_its_start(model: str, tmp_path: Path) -> None:
    slots, log = 4, tmp_path / "log"
    command = [sys.executable, "-m", "linspec", "serve", f"m={model}", "--port", "0"]
    command += ["--max-batch", str(slots), "--prefix-mib", "8"]
    with log.open("w") as output, subprocess.Popen(command, stderr=output) as server:
        try:
            while "Ctrl-C ends it" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
            said = log.read_text()
            address = re.findall(r"http://127.0.0.1:\d+", said)[0]
            size, unit = re.findall(r"with all of this ([\d.]+) (GiB|MiB)", said)[0]
            most = float(size) * {"GiB": 2**30, "MiB": 2**20}[unit]
            before = resident(server.pid)
            fill(address, slots, 900)
            after = resident(server.pid)
        finally:
            server.terminate()
    # what a step needs comes on top: rows of tokens in all layers, logits
    assert before < after < most + 64 * 2**20


def fill(address: str, slots: int, tokens: int) -> None:
    """Ask for as many texts at once, of so many tokens each."""
    prompts = [random_tokens(tokens, seed=seed) for seed in range(slots)]
    asked = {
        "model": "m",
        "prompt": prompts,
        "max_tokens": 90,
        "temperature": 0,
        "ignore_eos": True,
    }
    with httpx.Client(base_url=address, timeout=300) as client:
        client.post("/v1/completions", json=asked).raise_for_status()


def resident(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) * 1024
