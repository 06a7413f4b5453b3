"""A diffusion model behind the API: texts, chats, streams by block, and errors that name what is asked."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from api_server import quiet, running
from denoisers import talker

from linspec import LLM, SamplingParams

LOOP = "masked-diffusion:block=fixed:8,cache=dual"


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with running({"talker": LLM(talker(), loop=LOOP, max_batch=2)}) as (address, workers):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made:
            yield made
        assert quiet(workers["talker"])


def test_texts_chats_and_streams_are_those_of_the_library(client: openai.OpenAI) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3)
    llm = LLM(talker(), loop=LOOP)
    asked = {"model": "talker", "max_tokens": 20, "temperature": 0.8, "seed": 3}
    alone = llm.generate(["abcd", "the end", "x"], params)
    found = client.completions.create(prompt=["abcd", "the end", "x"], **asked)
    assert [each.text for each in found.choices] == [each.text for each in alone]
    pieces = client.completions.create(prompt="abcd", stream=True, **asked)
    texts = [each.choices[0].text for each in pieces if each.choices]
    assert "".join(texts) == alone[0].text
    said = client.chat.completions.create(messages=[{"role": "user", "content": "abcd"}], **asked)
    talk = llm.chat([{"role": "user", "content": "abcd"}], params)[0]
    assert said.choices[0].message.content == talk.text


def test_what_cannot_be_served_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="frequency_penalty go by the tokens before"):
        client.completions.create(model="talker", prompt="abcd", frequency_penalty=0.5)
    assert client.completions.create(model="talker", prompt="abcd", max_tokens=3).choices
