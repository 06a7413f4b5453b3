"""A target small enough to know its exact distribution, and plain and speculative decoding of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import TokenTree, root_only
from linspec.verifiers import Verifier

Draft = Callable[[list[int]], TokenTree]


class TableModel:
    """Logits that depend on the last two tokens only: table [V, V, V]."""

    def __init__(self, vocab_size: int = 6, seed: int = 0, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.table = spread * torch.randn((vocab_size,) * 3, generator=generator)

    def logits(self, history: Sequence[int], tree: TokenTree) -> Tensor:
        """[N, V] of a tree whose root is the last token of `history`."""
        before = [history[-2] if p < 0 else tree.tokens[p] for p in tree.parents]
        return self.table[before, list(tree.tokens)]

    def distributions(self, params: SamplingParams) -> Tensor:
        """[V, V, V]: what a request without penalties draws from, for every pair of last tokens."""
        sampler = Sampler(params, (), self.vocab_size)
        rows = self.table.flatten(0, 1)
        return torch.stack([sampler.probabilities(row) for row in rows]).view_as(self.table)

    def random_tree(self, rng: random.Random, nodes: int, root: int) -> TokenTree:
        """A tree of up to `nodes` nodes without equal siblings."""
        tokens, parents, taken = [root], [-1], set()
        for _ in range(nodes - 1):
            edge = (rng.randrange(len(tokens)), rng.randrange(self.vocab_size))
            if edge not in taken:
                taken.add(edge)
                parents.append(edge[0])
                tokens.append(edge[1])
        return TokenTree(tuple(tokens), tuple(parents))

    def generate(
        self, verifier: Verifier, params: SamplingParams, prompt: Sequence[int], draft: Draft
    ) -> tuple[list[int], int]:
        """`max_tokens` tokens and the number of rounds they took."""
        history, rounds = list(prompt), 0
        sampler = Sampler(params, prompt, self.vocab_size)
        while len(history) < len(prompt) + params.max_tokens:
            tree = draft(history)
            emitted = verifier.accept(tree, self.logits(history, tree), sampler).emitted(tree)
            sampler.observe(emitted)
            history += emitted
            rounds += 1
        return history[len(prompt) :][: params.max_tokens], rounds

    def decode(self, params: SamplingParams, prompt: Sequence[int]) -> list[int]:
        """Plain decoding, written without verifiers."""
        history, sampler = list(prompt), Sampler(params, prompt, self.vocab_size)
        for _ in range(params.max_tokens):
            row = self.logits(history, root_only(history[-1]))[0]
            token = int(sampler.scores(row).argmax())
            if not params.greedy:
                token = sampler.draw(sampler.probabilities(row))
            sampler.observe([token])
            history.append(token)
        return history[len(prompt) :]


@pytest.fixture(scope="session")
def table_model() -> type[TableModel]:
    return TableModel
