"""Three tasks of RULER on a model that decodes: variables, common and frequent words in long texts.

    report = evaluate_ruler("smollm2", lengths=(1024, 4096), attention="pages:budget=1024")
    for cell in report.cells:
        print(cell.task, cell.length, cell.score)

The answer is decoded greedily behind its first words, which are given; what counts are the words that it must
have (see `ruler_tasks`).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linspec.decoding.sampling import SamplingParams
from linspec.errors import ConfigError
from linspec.evaluate.perplexity import held_out_documents
from linspec.evaluate.ruler_tasks import TASKS, Question, RulerTask, check_tasks, score
from linspec.llm import LLM
from linspec.train.data import Sources, check_sources
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_lengths, check_size

LENGTHS = (1024, 2048, 4096)
# of running text, for all samples
_FILLER_WORDS = 100_000


@dataclass(frozen=True, slots=True)
class RulerCell:
    """How a model does on a task in texts of at most `length` tokens, its answer included.

    score: mean share of the wanted words in an answer, as the paper counts; exact: share of the answers that
    have them all.
    """

    task: str
    length: int
    samples: int
    score: float
    exact: float


@dataclass(frozen=True, slots=True)
class Ruler:
    """All cells; by_length: the mean score over tasks. limits: the lengths that the model cannot read."""

    cells: tuple[RulerCell, ...]
    by_length: dict[str, float]
    seed: int
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate_ruler(
    model: str | Path | LLM,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = LENGTHS,
    samples: int = 10,
    seed: int = 0,
    data: Sources = ("stdlib",),
    field: str = "text",
    attention: str | None = None,
    rope_scaling: str | None = None,
    quantize: int | None = None,
    kv: str = "auto",
    device: str = "cpu",
) -> Ruler:
    """Scores by task and length.

    data, field: running text that assignments are hidden in. Lengths beyond the positions of the model are
    left out and named in `limits`. Raises ConfigError for an unknown task, and for a length that has no room
    for the shortest text of one.
    """
    check_tasks(tasks)
    check_lengths("lengths", lengths)
    check_size("samples", samples)
    check_size("seed", seed, least=0)
    data = check_sources(data)
    if not isinstance(model, LLM):
        model = LLM(
            model,
            attention=attention,
            rope_scaling=rope_scaling,
            quantize=quantize,
            kv_cache_dtype=kv,
            device=device,
        )
    filler = " ".join(held_out_documents(data, field)).split()[:_FILLER_WORDS]
    limit = model.model.config.position_limit
    readable = [length for length in lengths if limit is None or length <= limit]
    for length in readable:
        for name in tasks:
            _check_room(model, name, length, filler)
    cells = list[RulerCell]()
    with Progress("ruler", len(readable) * len(tasks) * samples) as progress:
        for length in readable:
            for name in tasks:
                shares = []
                for sample in range(samples):
                    rng = random.Random(f"ruler {seed} {name} {length} {sample}")
                    shares.append(_asked(model, TASKS[name], length, rng, filler))
                    done = samples * len(cells) + len(shares)
                    progress.update(done, f"{name} at {length} tokens")
                exact = sum(share == 1 for share in shares) / samples
                cells.append(RulerCell(name, length, samples, statistics.mean(shares), exact))
    left_out = [length for length in lengths if length not in readable]
    told = f"the model ends at {limit} positions: no figure at {left_out}"
    if not cells:
        raise ConfigError(f"no length can be measured: {told}")
    return Ruler(tuple(cells), _by_length(cells), seed, (told,) if left_out else ())


def _by_length(cells: Sequence[RulerCell]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for cell in cells:
        found.setdefault(str(cell.length), []).append(cell.score)
    return {length: statistics.mean(scores) for length, scores in found.items()}


def _check_room(llm: LLM, name: str, length: int, filler: Sequence[str]) -> None:
    """Raise ConfigError for a length in which no text of a task has room."""
    task = TASKS[name]
    least = len(_prompt(llm, task.make(random.Random(0), task.least, filler)))
    # numbers and words of other texts may take a few tokens more
    if least + least // 20 + task.tokens > length:
        raise ConfigError(
            f"{length} tokens have no room for the shortest text of {name!r}, which has some {least}, and an "
            f"answer of {task.tokens}; give longer --lengths"
        )


def _asked(
    llm: LLM, task: RulerTask, length: int, rng: random.Random, filler: Sequence[str]
) -> float:
    """The score of one answer."""
    prompt, question = longest(llm, task, length, rng, filler)
    params = SamplingParams(max_tokens=task.tokens)
    return score(llm.generate([prompt], params)[0].text, question.wanted)


def longest(
    llm: LLM, task: RulerTask, length: int, rng: random.Random, filler: Sequence[str]
) -> tuple[list[int], Question]:
    """The tokens of the longest question that leaves room for its answer, and the question."""
    seed = rng.random()

    def made(units: int) -> tuple[list[int], Question]:
        question = task.make(random.Random(seed), units, filler)
        return _prompt(llm, question), question

    room, fits = length - task.tokens, made(task.least)
    low, high = task.least, length
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        tried = made(middle)
        if len(tried[0]) <= room:
            low, fits = middle, tried
        else:
            high = middle
    return fits


def _prompt(llm: LLM, question: Question) -> list[int]:
    """The question as a chat where the model has a template, and the beginning of its answer."""
    if getattr(llm.tokenizer, "chat_template", None):
        asked = llm.encoder.chat([{"role": "user", "content": question.text}])
        return [*asked, *llm.encode(question.begin, add_special_tokens=False)]
    return llm.encode(f"{question.text}\n{question.begin}")
