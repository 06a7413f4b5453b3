"""What single claims need to know beside the answers: policies that keep what they were asked.

ending, count = ends_of_lines(work, way)        # blocks that end with a line of the right answer
settled, forwards = settled_after(work, way)    # when the answer was known, and when it was decided
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.diffusion import Way
from benchmarks.diffusion_lines import BREAK, Lines, answer_of
from benchmarks.diffusion_work import Work
from linspec.diffusion import BlockPolicy, Canvas, Predictions, StopPolicy
from linspec.engine.loops.masked_diffusion import MaskedDiffusionLoop
from linspec.llm import LLM

Prompt = tuple[int, ...]


class Recorded(BlockPolicy):
    """A block policy whose answers are kept: prompt, start and length of each block."""

    def __init__(self, policy: BlockPolicy) -> None:
        super().__init__()
        self.name, self._policy = policy.name, policy  # type: ignore[misc]  # the name of the policy
        self.blocks: list[tuple[Prompt, int, int]] = []

    def length(self, canvas: Canvas, predictions: Predictions) -> int:
        length = self._policy.length(canvas, predictions)
        self.blocks.append((_prompt(canvas), canvas.start - canvas.prompt_length, length))
        return length


class Watched(StopPolicy):
    """Goes on to the end, and keeps what every forward would have answered if it had been the last."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "watched"  # type: ignore[misc]  # registered nowhere
        self.answers: defaultdict[Prompt, list[list[int]]] = defaultdict(list)

    def fills(self, canvas: Canvas, predictions: Predictions) -> bool:
        left = sorted(canvas.undecided)
        answer = canvas.tokens[:]
        for position, token in zip(left, predictions.logits(left).argmax(-1).tolist(), strict=True):
            answer[position] = token
        self.answers[_prompt(canvas)].append(answer)
        return False


def _prompt(canvas: Canvas) -> Prompt:
    return tuple(canvas.tokens[: canvas.prompt_length])


def _loop(llm: LLM) -> MaskedDiffusionLoop:
    loop = llm.engine.loop
    assert isinstance(loop, MaskedDiffusionLoop)
    return loop


def ends_of_lines(work: Lines, way: Way) -> tuple[int, int]:
    """How many blocks that begin within the right answer end with a line of it, and how many there are."""
    llm = way.make()
    loop = _loop(llm)
    loop.block = recorded = Recorded(loop.block)
    llm.generate(list(way.prompts), work.params)
    answers = {
        tuple(p): answer_of(groups) for p, groups in zip(work.prompts, work.asked, strict=True)
    }
    found = [
        answers[prompt][start + length - 1 : start + length] == [BREAK]
        for prompt, start, length in recorded.blocks
        if start < len(answers[prompt])
    ]
    return sum(found), len(found)


def settled_after(work: Work, way: Way) -> tuple[float, float]:
    """Mean forwards of an answer until what they say of all of it never changes again, and all forwards.

    way: without a cache, so that each forward computes all masks. Their ratio is all that any policy can save
    that ends early with the same answer.
    """
    llm = way.make()
    _loop(llm).stop = watched = Watched()
    llm.generate(list(way.prompts), work.params)
    found = list(watched.answers.values())
    return _mean([settled(each) for each in found]), _mean([len(each) for each in found])


def settled(answers: Sequence[list[int]]) -> int:
    """The first forward, counted from one, from which all answers are the last."""
    changing = [at for at, answer in enumerate(answers, 1) if answer != answers[-1]]
    return 1 + (changing[-1] if changing else 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
