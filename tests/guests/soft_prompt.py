"""A guest: a request whose prompt is embeddings, such as a trained prompt before a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linspec import LLM, Request, SamplingParams


def with_soft_prompt(
    llm: LLM, prompt: Sequence[int], before: torch.Tensor, params: SamplingParams
) -> Request:
    """`prompt` behind the embeddings `before` [P, D]; in penalties and n-grams token 0 stands for these."""
    text = llm.model.embed.weight[list(prompt)]
    embeddings = torch.cat((before.to(text), text)).detach()
    return Request((*(0,) * len(before), *prompt), params, embeddings)
