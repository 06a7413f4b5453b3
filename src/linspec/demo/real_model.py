"""Act one of the demo: a chat model that people know, plain beside speculative, then linearized.

act = show_real_model(RealModel("smollm2", "smollm2-aug"), budget, screen)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from linspec.bench.speed import bench
from linspec.checkpoints.packages import PACKAGES
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import Stats
from linspec.demo.budget import Budget, Clock
from linspec.demo.measure import STATE_CONTEXTS, state_bytes
from linspec.demo.screen import Screen
from linspec.errors import CheckpointError
from linspec.evaluate.lossless import divergence
from linspec.llm import LLM, Piece
from linspec.models.decoder import Decoder
from linspec.report.data import Span, token_texts

_CODE = """
def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, height) * depth

def surface(width, height, depth):
    return 2 * (area(width, height) + area(width, depth) + area(height, depth))

def density(mass, width, height, depth):
    return mass / volume(width, height, depth)
"""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the drafter that one would choose for it."""

    text: str
    drafter: str = "prompt-lookup"


QUESTIONS = (
    Question("Explain in three sentences why the sky is blue."),
    Question(
        "Summarize in two sentences: The library is open from nine until five on weekdays. On Saturdays it "
        "opens at ten and closes at noon. The reading room on the second floor is always open, and the "
        "librarians are happy to help you find the books that you are looking for."
    ),
    Question(f"Add a docstring to each function of this code and write it out again:{_CODE}"),
)


@dataclass(frozen=True, slots=True)
class RealModel:
    """What is shown: the model, its linearized form, and what it is asked."""

    model: str = "smollm2"
    linear: str = "smollm2-aug"
    questions: tuple[Question, ...] = QUESTIONS


@dataclass(frozen=True, slots=True)
class Answer:
    """One question answered twice. spans: of the speculative answer; speeds in tokens/s."""

    question: Question
    spans: tuple[Span, ...]
    plain: float
    fast: float
    tokens_per_round: float
    same: bool

    @property
    def times(self) -> float:
        """How many times as fast."""
        return self.fast / self.plain


@dataclass(frozen=True, slots=True)
class RealAct:
    """Act one: answers, the linearized model's first answer, and what both keep and how fast they are.

    state_bytes, tokens_per_s: by model and context.
    """

    shown: RealModel
    answers: tuple[Answer, ...]
    linear_text: str
    linear_speed: float
    state_bytes: dict[str, dict[int, int]]
    tokens_per_s: dict[str, dict[int, float]]

    @property
    def times(self) -> float:
        """Speed over plain decoding of all questions together, by seconds per token."""
        plain = sum(1 / each.plain for each in self.answers)
        return plain / sum(1 / each.fast for each in self.answers)


def bring(screen: Screen, shown: RealModel) -> bool:
    """Whether the real model is here or could be brought; what stands in the way is said."""
    package = PACKAGES.get(shown.model)
    try:
        if package is not None:
            package.get()
    except CheckpointError as error:
        screen.say(f"act one is left out: {error}")
        return False
    return True


def show_real_model(
    shown: RealModel, budget: Budget, screen: Screen, clock: Clock = time.monotonic
) -> RealAct:
    """Answer the questions and measure, within `budget.real` seconds or little more."""
    deadline = clock() + budget.real
    plain = LLM(shown.model, max_batch=1)
    fast = {
        drafter: LLM(plain.model, tokenizer=plain.tokenizer, drafter=drafter, max_batch=1)
        for drafter in dict.fromkeys(question.drafter for question in shown.questions)
    }
    answers = []
    for question in shown.questions:
        answers.append(_race(plain, fast[question.drafter], question, budget.answer_tokens, screen))
        if clock() > deadline:
            break
    # its changed weights are floats: in 8 bits they are read as fast as the blocks of the original
    linear = LLM(shown.linear, quantize=8, max_batch=1)
    screen.say(f"{shown.linear}, the same question:")
    first = _Runner(linear, _prompt(linear, shown.questions[0].text), budget.answer_tokens)
    while first.advance():
        screen.token(first.fresh, "default")
    screen.end()
    models = {shown.model: plain.model, shown.linear: linear.model}
    decoders = {name: model for name, model in models.items() if isinstance(model, Decoder)}
    return RealAct(
        shown=shown,
        answers=tuple(answers),
        linear_text=first.text,
        linear_speed=first.speed,
        state_bytes={name: state_bytes(model, STATE_CONTEXTS) for name, model in decoders.items()},
        tokens_per_s=_against_context(decoders, linear, budget, deadline, clock),
    )


class _Runner:
    """An answer as it comes, timed by a clock that runs only while it is worked on.

    fresh: the text of the last step. seconds: since the prompt was read.
    """

    def __init__(self, llm: LLM, prompt: Sequence[int], tokens: int) -> None:
        self.llm, self.seconds, self.fresh = llm, 0.0, ""
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.spans: list[Span] = []
        self.stats = Stats()
        params = SamplingParams(max_tokens=tokens)
        self._stream: Iterator[Piece] = llm.stream([list(prompt)], params)

    def advance(self) -> bool:
        """One step; False when the answer is complete."""
        began = time.perf_counter()
        piece = next(self._stream, None)
        if piece is None:
            return False
        if self.spans:
            self.seconds += time.perf_counter() - began
        ends = self.llm.model.config.eos_ids
        shown = [token for token in piece.token_ids if token not in ends]
        texts = token_texts(self.llm.tokenizer, shown, self.tokens)
        last, number = len(piece.token_ids) - 1, self.spans[-1].round + 1 if self.spans else 0
        new = [Span(text, at < last, number) for at, text in enumerate(texts)]
        self.spans += new
        self.tokens += piece.token_ids
        self.fresh = "".join(span.text for span in new)
        if piece.done is not None:
            self.stats = piece.done.stats
        return True

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The answer."""
        return tuple(self.tokens[self.prompt_length :])

    @property
    def text(self) -> str:
        """The answer as text."""
        return "".join(span.text for span in self.spans)

    @property
    def speed(self) -> float:
        """Tokens per second, the first not counted: it came with the prompt."""
        return max(1, len(self.new_tokens) - 1) / max(self.seconds, 1e-9)


def _prompt(llm: LLM, question: str) -> list[int]:
    """The question in the chat template, or as it is for a model without one."""
    if getattr(llm.tokenizer, "chat_template", None):
        return llm.encoder.chat([{"role": "user", "content": question}])
    return llm.encode(question)


def _race(plain: LLM, fast: LLM, question: Question, tokens: int, screen: Screen) -> Answer:
    """Both answers side by side: whichever clock is behind makes the next step."""
    prompt = _prompt(plain, question.text)
    slow, quick = (_Runner(llm, prompt, tokens) for llm in (plain, fast))
    running = [slow, quick]
    with screen.side_by_side(question.text, "plain", question.drafter.partition(":")[0]) as columns:
        while running:
            runner = min(running, key=lambda each: each.seconds)
            if not runner.advance():
                running.remove(runner)
                continue
            columns.add(0 if runner is slow else 1, runner.spans, runner.seconds)
    found = divergence(
        plain.model, 0, prompt, slow.new_tokens, quick.new_tokens, plain.kv_cache_dtype
    )
    return Answer(
        question=question,
        spans=tuple(quick.spans),
        plain=round(slow.speed, 2),
        fast=round(quick.speed, 2),
        tokens_per_round=round(quick.stats.tokens_per_round, 3),
        same=found is None or found.near_tie,
    )


def _against_context(
    models: dict[str, Decoder], llm: LLM, budget: Budget, deadline: float, clock: Clock
) -> dict[str, dict[int, float]]:
    """Tokens per second of plain decoding, as far as the time allows."""
    speeds: dict[str, dict[int, float]] = {name: {} for name in models}
    for context in budget.real_contexts:
        for name, model in models.items():
            began = clock()
            found = bench(
                model, [context], tokenizer=llm.tokenizer, tokens=budget.speed_tokens, repeats=1
            )
            speeds[name].update({row.context: row.tokens_per_s for row in found.rows})
            # the next context is longer, and reading it costs more than it grows
            if clock() + 4 * (clock() - began) > deadline:
                return speeds
    return speeds
