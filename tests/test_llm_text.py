"""Text that models write byte by byte, rendered chat templates, and stop strings, from end to end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizer_kinds import tokenizer_of
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import save_model
from linspec.checkpoints.tokenizer import PlainTokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.llm import LLM
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

# all its bytes differ, so each token can have one token that follows it
TEXT = "日éЖ🙂ह"
KIND = "byte-fallback"


def chain_model(tokens: list[int], vocab: int) -> Decoder:
    """A Llama that writes `tokens[i + 1]` behind `tokens[i]`: one-hot embeddings, blocks of zeros."""
    sizes = {"vocab_size": vocab, "width": vocab, "head_width": 8, "mlp_width": 8}
    shape = {"layers": 1, "heads": 2, "kv_heads": 1, "tied_embeddings": False}
    model = Decoder(DecoderConfig(**sizes, **shape, bos_id=1, eos_ids=(2,)))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embed.weight.copy_(torch.eye(vocab))
        model.head.weight.zero_()
        for token, following in pairwise(tokens):
            model.head.weight[following, token] = 1.0
    return model.eval()


def with_start() -> PreTrainedTokenizerFast:
    """The byte-fallback tokenizer with a token in front of every text, and a chat template."""
    backend = type(tokenizer_of(KIND).backend_tokenizer).from_str(
        tokenizer_of(KIND).backend_tokenizer.to_str()
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def bytes_of(text: str) -> list[int]:
    names = [f"<0x{byte:02X}>" for byte in text.encode()]
    found: list[int] = tokenizer_of(KIND).convert_tokens_to_ids(names)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = with_start()
    (first,) = tokenizer.convert_tokens_to_ids(["▁a"])
    ids = [first, *bytes_of(TEXT), *tokenizer.convert_tokens_to_ids(["<|im_end|>", "x", "</s>"])]
    assert len(set(ids)) == len(ids)
    return save_model(chain_model(ids, len(tokenizer)), tokenizer, tmp_path / "m")


@pytest.fixture(params=["plain", "transformers"])
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    given = with_start() if request.param == "transformers" else None
    made = LLM(folder, tokenizer=given)
    assert isinstance(made.tokenizer, PlainTokenizer) is (given is None)
    return made


def test_characters_of_a_byte_fallback_tokenizer_come_out_whole(llm: LLM) -> None:
    pieces = list(llm.stream("a", SamplingParams(max_tokens=30)))
    assert "".join(piece.text for piece in pieces) == TEXT + "x"
    assert pieces[-1].done is not None
    assert pieces[-1].done.text == TEXT + "x"
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_an_output_cut_inside_a_character_shows_the_whole_ones_and_what_is_left(llm: LLM) -> None:
    for count in range(1, len(bytes_of(TEXT)) + 1):
        pieces = list(llm.stream("a", SamplingParams(max_tokens=count, logprobs=0)))
        done = pieces[-1].done
        assert done is not None
        assert "".join(piece.text for piece in pieces) == done.text
        whole = TEXT.encode()[:count].decode(errors="ignore")
        assert done.text.startswith(whole)
        assert set(done.text[len(whole) :]) <= {"\ufffd"}
        assert len(done.token_ids) == len(done.logprobs or ()) == count


@pytest.mark.parametrize("cut", range(1, len(TEXT.encode())))
def test_a_prompt_may_end_inside_a_character(llm: LLM, cut: int) -> None:
    ids = bytes_of(TEXT)[:cut]
    whole = TEXT.encode()[:cut].decode(errors="ignore")
    done = llm.generate([[1, *ids]], SamplingParams(max_tokens=40))[0]
    assert done.text == (TEXT + "x")[len(whole) :]


@pytest.mark.parametrize("stop", ["<|im_end|>", "ह<|im_end|>", "<|im_end|>x", "🙂ह"])
def test_stop_strings_with_special_tokens_end_a_request(llm: LLM, stop: str) -> None:
    done = llm.generate("a", SamplingParams(max_tokens=30, stop=(stop,)))[0]
    assert done.text == (TEXT if stop.startswith("<") else TEXT[: TEXT.index(stop[0])])
    assert done.finish_reason == "stop"


def test_a_rendered_chat_template_gets_no_second_start(llm: LLM) -> None:
    messages = [{"role": "user", "content": "ab"}]
    rendered = llm.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<s>ab"
    ids = llm.encode(rendered)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert llm.encode("ab")[0] == 1
    assert llm.encode("ab").count(1) == 1
    # one that was asked for twice beside the tokenizer's own stays twice
    assert llm.encode("<s><s>ab").count(1) == 2
    assert llm.encode([1, 1, 5]) == [1, 1, 5]
