"""Drafters on texts that are known beforehand: what a target that wrote them would accept, without one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import Drafter

_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Round:
    """Draft nodes of one round, how many were accepted, and how many its drafter expected to be."""

    drafted: int
    accepted: int
    score: float


def running(
    prompt: Sequence[int], vocabulary: int = 1000, ends: Sequence[int] = ()
) -> RunningSequence:
    """A sequence whose prompt has been read."""
    params = SamplingParams(stop_token_ids=tuple(ends), max_tokens=100_000)
    sampler = Sampler(params, tuple(prompt), vocabulary, ())
    return RunningSequence(next(_NUMBERS), sampler, list(prompt), len(prompt), slot=0)


def accepted(tree: TokenTree, tokens: Sequence[int]) -> list[int]:
    """The path of `tree` that `tokens` take, root included."""
    path = [0]
    for token in tokens:
        child = next((c for c in tree.children[path[-1]] if tree.tokens[c] == token), None)
        if child is None:
            break
        path.append(child)
    return path


def replay(
    drafter: Drafter, prompt: Sequence[int], output: Sequence[int], nodes: int = 16
) -> list[Round]:
    """The rounds of one request whose output is `output`."""
    sequence, rounds = running(prompt), list[Round]()
    drafter.started(sequence)
    while output:
        (tree,) = drafter.propose([sequence], [Budget.of(min(nodes, drafter.max_nodes))])
        path = accepted(tree, output)
        rounds.append(Round(len(tree) - 1, len(path) - 1, drafter.score(sequence, tree)))
        if len(tree) > 1:
            drafter.observe(sequence, tree, path)
        sequence.tokens += output[: len(path)]
        output = output[len(path) :]
    drafter.finished(sequence)
    return rounds


def per_round(rounds: Sequence[Round]) -> float:
    """Tokens per round, the bonus token included."""
    return 1 + sum(each.accepted for each in rounds) / len(rounds)


def agent_log(
    rng: random.Random, requests: int, vocabulary: int = 200
) -> list[tuple[list[int], list[int]]]:
    """Prompts and outputs of an agent: templates that come again and again, with free text between them."""
    templates = [[rng.randrange(vocabulary) for _ in range(24)] for _ in range(6)]

    def text(parts: int) -> list[int]:
        pieces = []
        for _ in range(parts):
            pieces += rng.choice(templates)
            pieces += [rng.randrange(vocabulary) for _ in range(rng.randrange(8))]
        return pieces

    return [(text(3), text(5)) for _ in range(requests)]
