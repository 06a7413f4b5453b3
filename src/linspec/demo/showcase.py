"""One generation to look at: streamed token by token, its trees kept for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.tree import TokenTree
from linspec.demo.budget import Budget
from linspec.demo.screen import Screen
from linspec.llm import LLM
from linspec.report.data import Round, Sample, Span, make_round, token_texts
from linspec.verifiers import make_verifier
from linspec.verifiers.base import Verifier


class Recorder:
    """A verifier that keeps what it was shown and what it decided."""

    name: ClassVar[str] = "recorder"
    lossless: ClassVar[bool] = True
    # whatever the rule inside does
    divides: ClassVar[bool] = True
    # it is shown every tree
    matches: ClassVar[Literal["", "greedy", "all"]] = ""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.seen: list[tuple[TokenTree, Accepted]] = []

    def accept(self, tree: TokenTree, logits: Tensor, sampler: Sampler) -> Accepted:
        """Judge as the verifier inside does."""
        accepted = self.verifier.accept(tree, logits, sampler)
        self.seen.append((tree, accepted))
        return accepted


@dataclass(frozen=True, slots=True)
class Showcase:
    """A coloured text, the trees of some of its rounds, its acceptance by depth."""

    sample: Sample
    rounds: tuple[Round, ...]
    acceptance: tuple[float, ...]


def show(student: Path, prompt: Sequence[int], budget: Budget, screen: Screen) -> Showcase:
    """Generate behind `prompt` with trees of a fixed size, on the screen as it comes."""
    recorder = Recorder(make_verifier("lossless"))
    llm = LLM(student, drafter="medusa", policy=budget.shown_nodes, verifier=recorder, max_batch=1)
    params = SamplingParams(max_tokens=budget.shown_tokens, ignore_eos=True)
    text = llm.tokenizer.decode(list(prompt))
    screen.prompt(text)
    spans: list[Span] = []
    tokens = list(prompt)
    acceptance: tuple[float, ...] = ()
    for number, piece in enumerate(llm.stream([list(prompt)], params)):
        _, accepted = recorder.seen[-1]
        texts = token_texts(llm.tokenizer, piece.token_ids, tokens)
        for at, part in enumerate(texts):
            drafted = at < len(accepted.path) - 1
            spans.append(Span(part, drafted, number))
            screen.drafted(part, accepted=drafted)
        tokens += piece.token_ids
        if piece.done is not None:
            acceptance = tuple(piece.done.stats.acceptance)
    screen.end()
    caption = (
        f"{len(tokens) - len(prompt)} tokens in {len(recorder.seen)} steps of the model, greedy, "
        f"trees of {budget.shown_nodes} drafts by the heads trained in this run."
    )
    rounds = _pick_rounds(llm, recorder, budget.shown_rounds)
    return Showcase(Sample(text.lstrip("\n"), tuple(spans), caption), rounds, acceptance)


def _pick_rounds(llm: LLM, recorder: Recorder, count: int) -> tuple[Round, ...]:
    """The best rounds and one of the worst, in their order."""
    # the last trees of a request are cut to the tokens that are left
    full = max(len(tree) for tree, _ in recorder.seen)
    drafted = [i for i, (tree, _) in enumerate(recorder.seen) if 1 < len(tree) == full]
    ranked = sorted(drafted, key=lambda i: len(recorder.seen[i][1].path), reverse=True)
    if len(ranked) > count:
        ranked = [*ranked[: count - 1], ranked[-1]]
    found = []
    for i in sorted(set(ranked)):
        tree, accepted = recorder.seen[i]
        kept = len(accepted.path) - 1
        caption = (
            f"Round {i}: {len(tree) - 1} drafts, {kept} accepted; with the bonus token "
            f"{kept + 1} {'token' if kept == 0 else 'tokens'} in one step."
        )
        found.append(make_round(llm.tokenizer, tree, accepted, caption))
    return tuple(found)
