"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from linspec.engine.prompts import token_ids
from linspec.llm import LLM
from linspec.serve.endpoints.about import longest
from linspec.serve.failures import RESPONSES, Failure, json_response
from linspec.serve.schemas.others import (
    DetokenizedText,
    DetokenizeRequest,
    TokenizeRequest,
    TokenList,
)
from linspec.serve.served import Serving

router = APIRouter(responses=RESPONSES)


@router.post("/tokenize", responses={200: {"model": TokenList}})
async def tokenize(asked: TokenizeRequest, served: Serving) -> Any:
    """Token ids of a text or a conversation."""
    if (asked.prompt is None) == (asked.messages is None):
        raise Failure(400, "give one of prompt and messages", code="invalid_value")
    llm = served.worker(asked.model)[1].llm
    tokens = await run_in_threadpool(_tokens, llm, asked)
    found = {"count": len(tokens), "max_model_len": longest(llm), "tokens": tokens}
    return json_response(found)


def _tokens(llm: LLM, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None:
        messages = [each.to_template() for each in asked.messages]
        return llm.encoder.chat(messages, answer=asked.add_generation_prompt)
    # a text without tokens is no prompt, and a text all the same
    return llm.encode(asked.prompt, asked.add_special_tokens) if asked.prompt else []


@router.post("/detokenize", responses={200: {"model": DetokenizedText}})
async def detokenize(asked: DetokenizeRequest, served: Serving) -> Any:
    """The text of token ids."""
    llm = served.worker(asked.model)[1].llm
    return json_response({"prompt": await run_in_threadpool(_text, llm, asked.tokens)})


def _text(llm: LLM, ids: list[int]) -> str:
    text: str = llm.tokenizer.decode(token_ids(ids, llm.model.config.vocab_size))
    return text
