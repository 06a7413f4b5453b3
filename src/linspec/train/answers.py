"""A model's own answers to prompts: what its drafter will be asked to guess, and so should learn from.

    config = AnswersConfig(prompts="questions.jsonl", tokens=128)
    asked = prompts_of(config, encoder, limit=model.config.position_limit)
    answers = make_answers("smollm2", asked, config, Path("answers.jsonl"))

The file holds one JSON object in a line, appended when an answer is finished: the number of its prompt and
its tokens. A process that is killed loses the answers under way; the next call makes those that are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linspec.bench.prompts import read_questions
from linspec.checkpoints.hub import load_any_config
from linspec.decoding.sampling import SamplingParams
from linspec.engine.encoding import TextEncoder
from linspec.errors import CheckpointError, InputError, TrainingError
from linspec.llm import LLM
from linspec.train.data import is_held_out
from linspec.utils.border import parse
from linspec.utils.files import cache_dir, disk_errors, replace_file
from linspec.utils.messages import shown
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_instance, check_positive, check_sizes

# of what decides the answers to the same prompts
_VERSION = 1
_EVERY = 2**31

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """A line of the file."""

    prompt: int
    tokens: Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersConfig:
    """Which prompts a model answers, and how.

    prompts: a file of them (see `bench/prompts.py`), questions in the chat template; None cuts them from
    texts. tokens: most tokens of an answer. temperature: 0 takes the likeliest token. prompt_tokens: of a
    prompt that is cut from a text. batch: answers that are made at once, which changes none of them.
    """

    prompts: str | Path | None = None
    tokens: int = 128
    temperature: float = 0.0
    prompt_tokens: int = 64
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts is not None:
            check_instance("prompts", self.prompts, str, Path)
        check_sizes(self, "tokens prompt_tokens batch")
        check_sizes(self, "seed", least=0)
        check_positive("temperature", self.temperature, zero=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what decides the answers to given prompts."""
        return {"tokens": self.tokens, "temperature": self.temperature, "seed": self.seed}


def prompts_of(
    config: AnswersConfig,
    encoder: TextEncoder,
    *,
    texts: Iterable[str] = (),
    most: int | None = None,
    limit: int | None = None,
) -> list[Tokens]:
    """The prompts as tokens: those of the file, or begins of pieces of the texts, in an order by the seed.

    Args:
        config: which prompts.
        encoder: of the model, with its chat template.
        texts: where there is no file.
        most: so many prompts at most.
        limit: positions of the model. Prompts that leave no room for an answer are left out, and counted.

    Raises:
        InputError: the file cannot be read, or there is no prompt.
        ConfigError: a prompt is a question, and the model has no chat template.
    """
    if config.prompts is not None:
        found = [tuple(each.ids(encoder)) for each in read_questions(config.prompts, _EVERY)]
    else:
        found = _cut(list(texts), encoder, config, most)
    fitting = [ids for ids in found if limit is None or len(ids) < limit]
    if len(fitting) < len(found):
        told = f"{len(found) - len(fitting)} of {len(found)} prompts are left out: this model has {limit}"
        print(f"{told} positions for a prompt and its answer", file=sys.stderr, flush=True)
    if not fitting:
        raise InputError(
            "no prompt is left to answer; give more text, or prompts that fit the model"
        )
    return fitting[:most]


def _cut(
    texts: Sequence[str], encoder: TextEncoder, config: AnswersConfig, most: int | None
) -> list[Tokens]:
    """Begins of pieces that are as long as a prompt with its answer; no more texts are read than needed."""
    length, piece = config.prompt_tokens, config.prompt_tokens + config.tokens
    found: list[Tokens] = []
    for i in np.random.default_rng(config.seed).permutation(len(texts)):
        if most is not None and len(found) >= most:
            break
        ids = tuple(encoder.encode(texts[i]))
        found += [ids[at : at + length] for at in range(0, len(ids) - length + 1, piece)]
    return found


def answers_key(model: str, prompts: Sequence[Tokens], config: AnswersConfig) -> str:
    """What the answers of a model, by its fingerprint, to these prompts are known by."""
    facts = json.dumps([_VERSION, model, config.to_json(), prompts])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def make_answers(
    model: str | Path,
    prompts: Sequence[Tokens],
    config: AnswersConfig,
    path: Path,
    *,
    device: str = "cpu",
) -> list[Tokens]:
    """The answers to all prompts, in their order; those that the file at `path` has are not made again.

    They are the tokens of `LLM(model).generate`, made with drafts of `suffix`.

    Raises:
        TrainingError: what is at `path` are no answers to these prompts.
        CheckpointError: the model cannot be read, or the disk refuses.
    """

    def make() -> LLM:
        return LLM(model, drafter="suffix", max_batch=config.batch, device=device)

    return answered(make, prompts, config, path, vocab=load_any_config(model).vocab_size)


def answered(
    make: Callable[[], LLM],
    prompts: Sequence[Tokens],
    config: AnswersConfig,
    path: Path,
    *,
    vocab: int,
) -> list[Tokens]:
    """As `make_answers`, by a model of `vocab` tokens that is made where an answer is missing."""
    known = _read(path, len(prompts), vocab)
    missing = [i for i in range(len(prompts)) if i not in known]
    if missing:
        llm = make()
        with Progress("answers of the model", len(prompts), start=len(known)) as progress:
            for i, answer in _answered(llm, prompts, missing, config, path):
                known[i] = answer
                progress.update(len(known), f"{sum(map(len, known.values())):,} tokens")
    return [known[i] for i in range(len(prompts))]


def _answered(
    llm: LLM, prompts: Sequence[Tokens], missing: Sequence[int], config: AnswersConfig, path: Path
) -> Iterable[tuple[int, Tokens]]:
    """The missing answers as they are finished, each written before it is handed out."""
    params = [
        SamplingParams(
            max_tokens=config.tokens, temperature=config.temperature, seed=_seed(config.seed, i)
        )
        for i in missing
    ]
    with disk_errors(path), path.open("ab", buffering=0) as file:
        for piece in llm.stream([list(prompts[i]) for i in missing], params):
            if piece.done is not None and piece.done.error is None:
                i, answer = missing[piece.index], piece.done.token_ids
                file.write(json.dumps({"prompt": i, "tokens": answer}).encode() + b"\n")
                yield i, answer


def _seed(seed: int, prompt: int) -> int:
    return (seed * 1_000_003 + prompt) % 2**64


def _read(path: Path, count: int, vocab: int) -> dict[int, Tokens]:
    """The whole answers in a file, which a record that was cut short is removed from."""
    if not path.exists():
        return {}
    with disk_errors(path), path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
    found = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = parse(_Record, json.loads(line), "an answer")
        except (ValueError, RecursionError) as error:
            raise _no_answers(path, number, shown(repr(line))) from error
        if not 0 <= record.prompt < count:
            raise _no_answers(path, number, f"prompt {record.prompt} of {count}")
        if strange := [token for token in record.tokens if not 0 <= token < vocab]:
            raise _no_answers(path, number, f"token {shown(strange[0])} of {vocab}")
        found[record.prompt] = record.tokens
    return found


def _no_answers(path: Path, line: int, found: str) -> TrainingError:
    return TrainingError(
        f"{path}, line {line}: {found} is no answer to one of these prompts; remove the file, and the "
        "answers are made again"
    )


def kept_answers(
    model: str | Path,
    prompts: Sequence[Tokens],
    config: AnswersConfig,
    key: str,
    folder: Path,
    *,
    device: str = "cpu",
) -> list[Tokens]:
    """`make_answers` in the folder of a run; linspec's cache keeps the complete ones for every later run."""
    cached = cache_dir() / "answers" / f"{key}.jsonl"
    if cached.exists():
        return make_answers(model, prompts, config, cached, device=device)
    path = folder / "answers.jsonl"
    found = make_answers(model, prompts, config, path, device=device)
    # the cache only saves time: a full or read-only disk must not stop the work
    with contextlib.suppress(CheckpointError), replace_file(cached) as file:
        file.write(path.read_bytes())
    return found


def streams_of(
    prompts: Sequence[Tokens], answers: Sequence[Tokens], eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with answers as streams of tokens: to train on, and held out by the hash of the prompt."""
    parts: tuple[list[Tokens], list[Tokens]] = ([], [])
    for prompt, answer in zip(prompts, answers, strict=True):
        ends = () if answer[-1:] == (eos_id,) else (eos_id,)
        parts[is_held_out(json.dumps(prompt).encode())].append((*prompt, *answer, *ends))
    if not parts[1]:
        parts[1].append(parts[0].pop())
    if not parts[0]:
        raise InputError(
            f"{len(prompts)} prompts are too few to train on and to measure; give two or more"
        )
    train, heldout = (np.asarray([t for text in part for t in text], np.int32) for part in parts)
    return train, heldout
