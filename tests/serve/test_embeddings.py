"""/v1/embeddings: vectors of an encoder's directory, beside a model that writes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from api_server import running, talker
from checkpoints import scratch, tiny_tokenizer
from helpers import mixer_config, randomise

from linspec.checkpoints.hub import load_encoder, save_model
from linspec.llm import LLM
from linspec.models.bert import Bert
from linspec.models.config import EncoderConfig
from linspec.serve.embedder import Embedder
from linspec.serve.run import loaded
from linspec.serve.settings import Settings

TEXTS = ["ab cd", "the end", "é"]


@functools.cache
def encoder_dir() -> Path:
    """The directory of a tiny encoder with room for 32 tokens."""
    config = EncoderConfig(
        vocab_size=len(tiny_tokenizer()),
        width=16,
        layers=2,
        heads=2,
        kv_heads=2,
        head_width=8,
        mlp_width=16,
        mixers=(mixer_config("softmax", 0),) * 2,
        positions="learned",
        max_positions=32,
        norm="layer",
        gated_mlp=False,
        activation="gelu",
        family="bert",
        token_types=2,
    )
    return save_model(
        randomise(Bert(config), 0).float(), tiny_tokenizer(), scratch("encoder") / "tiny"
    )


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    llms = {"talker": LLM(talker())}
    with (
        running(llms, embedders={"vectors": Embedder(encoder_dir())}) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made,
    ):
        yield made


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_are_those_of_the_library(client: openai.OpenAI, form: str) -> None:
    found = client.embeddings.create(model="vectors", input=TEXTS, encoding_format=form)  # type: ignore[arg-type]
    ids = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    model = load_encoder(encoder_dir())
    with torch.inference_mode():
        alone = torch.cat([model.embed_text(torch.tensor([each])) for each in ids])
    vectors = [each.embedding for each in found.data]
    if form == "base64":
        import base64

        import numpy as np

        vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in vectors]  # type: ignore[arg-type]
    got = torch.tensor([list(map(float, each)) for each in vectors])
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)
    assert found.usage.prompt_tokens == sum(map(len, ids))
    assert [each.index for each in found.data] == [0, 1, 2]
    (single,) = client.embeddings.create(model="vectors", input=ids[0]).data
    torch.testing.assert_close(torch.tensor(single.embedding), alone[0], rtol=0, atol=1e-5)


def test_what_an_encoder_cannot_do_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input 1 has \d+ tokens, .*32"):
        client.embeddings.create(model="vectors", input=["a", "x" * 50])
    with pytest.raises(openai.BadRequestError, match="16 numbers"):
        client.embeddings.create(model="vectors", input="a", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.completions.create(model="vectors", prompt="a")
    with pytest.raises(openai.NotFoundError, match="no model other"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="talker", input="a")


def test_loading_tells_encoders_from_models() -> None:
    said: list[str] = []
    named = {"vectors": str(encoder_dir()), "talker": str(talker())}
    workers, embedders = loaded(named, Settings.read(None, state_mib=1), {}, said.append)
    for worker in workers.values():
        worker.stop(0)
    assert list(workers) == ["talker"] and list(embedders) == ["vectors"]
    assert "an encoder" in said[0] and "slots of" in said[1]
    assert "MiB are there for states" in said[1] or "8 such sequences" in said[1]
