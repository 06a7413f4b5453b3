"""A chat that grows is not read again, says so, and gets the answers that it gets without a cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import running, talker

from linspec.llm import LLM
from linspec.serve.settings import Settings


def talked(client: openai.OpenAI) -> tuple[list[str], list[int], list[int]]:
    """Three turns of a chat: the answers, tokens of the prompts, and those that were cached."""
    turns: list[Any] = []
    answers, prompts, cached = [], [], []
    for said in ("ab cd ab cd " * 9, "the end", "é"):
        turns.append({"role": "user", "content": said})
        found = client.chat.completions.create(
            model="talker",
            messages=turns,
            max_tokens=9,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        answers.append(found.choices[0].message.content or "")
        turns.append({"role": "assistant", "content": "cd"})
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        prompts.append(found.usage.prompt_tokens)
        cached.append(found.usage.prompt_tokens_details.cached_tokens or 0)
    return answers, prompts, cached


@pytest.mark.parametrize("mixer", ["aug", "softmax"])
def test_a_growing_chat_is_cached_for_its_key_alone(tmp_path: Path, mixer: str) -> None:
    keys = {name: f"the key of {name}" for name in ("alice", "bob")}
    file = tmp_path / "keys"
    file.write_text(
        "".join(f"{n}:{hashlib.sha256(k.encode()).hexdigest()}\n" for n, k in keys.items())
    )
    settings = Settings.read(None, key_file=file)
    found = {}
    for cache in (None, 2**26):
        llms = {"talker": LLM(talker(mixer, 2048), max_batch=2, prefix_cache=cache)}
        with running(llms, settings) as (address, _):
            for name, key in keys.items():
                with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                    found[cache, name] = talked(client)
    plain, alice, bob = found[None, "alice"], found[2**26, "alice"], found[2**26, "bob"]
    assert plain[2] == [0, 0, 0]
    assert plain[:2] == alice[:2] == bob[:2]
    # what one key has brought into the cache serves no other
    assert alice[2] == bob[2] and alice[2][0] == 0
    # linear states are kept at borders, of which the second turn shows where it leaves the first
    assert alice[2][2] > 40 and (mixer == "aug" or alice[2][1] > 40)
