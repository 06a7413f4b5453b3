"""Prompts that a benchmark answers: a file of them by family, or pieces of held-out text.

    prompts = read_prompts("spec_bench.jsonl", llm.encoder, per_family=5)
    for prompt in prompts:
        print(prompt.family, len(prompt.ids))

A line of the file is a JSON object with `turns` (of a user, of which the first is asked) or `prompt` (a text
to go on with), and may name its `category`, as the files of Spec-Bench do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.engine.encoding import TextEncoder
from linspec.errors import InputError
from linspec.evaluate.lossless import sample_prompts
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.train.data import Sources
from linspec.utils.messages import because, shown

# Spec-Bench counts the eight categories of MT-Bench as one family
_CONVERSATION = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
_LONGEST_FILE = 2**28


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """Token ids, and the family whose figures they count for."""

    family: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as text. asked: it is the turn of a user, and not a text to go on with."""

    family: str
    text: str
    asked: bool

    def ids(self, encoder: TextEncoder) -> Sequence[int]:
        """Its tokens, in the chat template where it is asked."""
        if self.asked:
            return encoder.chat([{"role": "user", "content": self.text}])
        return encoder.encode(self.text)


def read_prompts(path: str | Path, encoder: TextEncoder, per_family: int) -> list[BenchPrompt]:
    """The prompts of `read_questions` as tokens.

    Raises what that raises, and ConfigError where one is a question and the model has no chat template.
    """
    return [
        BenchPrompt(each.family, tuple(each.ids(encoder)))
        for each in read_questions(path, per_family)
    ]


def read_questions(path: str | Path, per_family: int) -> list[Question]:
    """The first `per_family` prompts of each family of a file, families in turn.

    Raises InputError where the file cannot be read, a line is no prompt, or there is none.
    """
    found: dict[str, list[Question]] = {}
    for place, record in _records(Path(path)):
        family = _family(record, place)
        taken = found.setdefault(family, [])
        if len(taken) < per_family:
            taken.append(_question(family, record, place))
    if not found:
        raise InputError(f"{path} holds no prompt; give a file with one JSON object in a line")
    longest = max(map(len, found.values()))
    return [each[i] for i in range(longest) for each in found.values() if i < len(each)]


def held_out_prompts(llm: LLM, data: Sources, count: int, tokens: int) -> list[BenchPrompt]:
    """`count` pieces of held-out text with room for `tokens` more."""
    texts = sample_prompts(llm, held_out_documents(data), count, tokens, 0)
    return [BenchPrompt("held-out text", tuple(ids)) for ids in texts]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with a name for messages."""
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise InputError(f"{path} is larger than {_LONGEST_FILE:,} bytes; give fewer prompts")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read prompts: {because(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); give a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON ({error}); mend the line") from error
        if not isinstance(record, dict):
            raise InputError(f"{place} is no JSON object; a prompt has 'turns' or 'prompt'")
        yield place, record


def _family(record: dict[str, Any], place: str) -> str:
    category = record.get("category", "prompts")
    if not isinstance(category, str) or not category:
        raise InputError(f"{place}: 'category' is a text, got {shown(repr(category))}")
    return "conversation" if category in _CONVERSATION else category


def _question(family: str, record: dict[str, Any], place: str) -> Question:
    turns, text = record.get("turns"), record.get("prompt")
    if isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0]:
        return Question(family, turns[0], asked=True)
    if isinstance(text, str) and text:
        return Question(family, text, asked=False)
    raise InputError(f"{place} has neither 'turns', a list of texts, nor 'prompt', a text")
