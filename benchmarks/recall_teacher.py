"""A small teacher that recalls what stood up to 32,768 tokens above, on which sparse attention is judged.

    python -m benchmarks.recall_teacher --out runs/recall-teacher
    linspec calibrate runs/recall-teacher --attention lserve:budget=1024,exact=25% --context 8192

It is `embedded-softmax`, trained on. The slower half of its rotary frequencies stop turning (p-RoPE, Barbero
et al. 2024, arXiv 2410.06205), so that no angle is new at any distance. Its texts are running text with
*lines* that give a name an answer; lines of a text differ by their names only, and asked for is any of those
above (associative recall, Arora et al. 2023, arXiv 2312.04927). Most texts are short, few are long. No
sentence of the evaluation (`linspec.evaluate.needles`) is among them. The same call goes on with what is
there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from linspec.checkpoints.hub import load_model, load_tokenizer, save_model
from linspec.models.decoder import Decoder
from linspec.train.data import Windows, end_of_text, tokenize, train_and_heldout
from linspec.train.loop import TrainConfig, Trainer, log_lines
from linspec.train.objective import next_tokens
from linspec.train.pieces import IGNORED, Labels, loss_in_pieces
from linspec.train.recall_texts import word
from linspec.train.run import begun, make_accelerator, training_run
from linspec.utils.format_version import stamped
from linspec.utils.places import Place, as_path

BASE, KIND, RECORD = "embedded-softmax", "recall-teacher", "recall-teacher.json"
# tokens of running text between two lines, at most, one of these for a text of 16 times as many or more
_GAPS = (8, 32, 128, 512)
# of a line, at most: tokens ahead of its name, and between name and answer
_BEFORE, _BETWEEN = 8, 8
# how a token counts in the loss: new names and answers, running text, answers that stood above
NEW, TEXT, ANSWER = 0, 1, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecipe:
    """What the teacher is made of.

    lengths: (tokens of a text, texts of a step), in turns; the first `short` steps take the first of them
    only. plain: share of running text without lines. ask: share of lines that stood above already. turned:
    share of the features of a head that still turn.
    """

    train: TrainConfig
    lengths: tuple[tuple[int, int], ...]
    short: int
    # and room for answers
    positions: int = 32_768 + 1024
    turned: float = 0.5
    plain: float = 0.2
    ask: float = 0.6


# texts of a few lengths, ahead of a long one
_MIXED = ((512, 4), (2048, 1), (1024, 2), (4096, 1), (512, 4), (2048, 1), (1024, 2))
RECIPE = TeacherRecipe(
    train=TrainConfig(
        steps=1160,
        lr=1e-3,
        muon_lr=2e-3,
        warmup=20,
        decay=0.3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        seed=1,
        compile="off",
    ),
    lengths=(*_MIXED, (8192, 1), *_MIXED, (8192, 1), *_MIXED, (16_384, 1)),
    short=200,
)


def without_slow_turns(model: Decoder, share: float, positions: int) -> Decoder:
    """`model` of which only the fastest `share` of the rotary frequencies turn, with so many positions.

    Features that turned together stand in the halves of those that turn; the others follow, still paired.
    """
    config, width = model.config, model.config.head_width
    pairs, kept = width // 2, round(width // 2 * share)
    fast, slow = torch.arange(kept), torch.arange(kept, pairs)
    order = torch.cat((fast, fast + pairs, slow, slow + pairs))
    # the first frequencies of all, as frequencies of their own
    theta = config.rope.theta ** (kept / pairs)
    rope = replace(config.rope, theta=theta, partial_rotary_factor=share)
    made = Decoder(replace(config, rope=rope, max_positions=positions))
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("mixer.q.weight", "mixer.k.weight")):
            weights[name] = weight.unflatten(0, (-1, width))[:, order].flatten(0, 1)
    made.load_state_dict(weights)
    return made


@dataclass(frozen=True, slots=True)
class Form:
    """How the lines of a text are written: tokens ahead of a name, and between name and answer."""

    before: list[int]
    between: list[int]


class RecallTexts(Windows):
    """Windows [rows, context + 1, 2] of tokens and of how each counts; drawn from (seed, step, process)."""

    def __init__(self, windows: Windows, tokenizer: Any, recipe: TeacherRecipe) -> None:
        super().__init__(windows.stream, windows.context, windows.seed, process=windows.process)
        self.tokenizer, self.recipe = tokenizer, recipe
        self.vocabulary = len(tokenizer)

    def batch(self, step: int, rows: int, context: int | None = None) -> torch.Tensor:
        """As `Windows.batch`, most of the rows with lines in them."""
        tokens = super().batch(step, rows, context)
        made = torch.stack((tokens, torch.full_like(tokens, TEXT)), -1)
        rng = random.Random(f"lines {self.seed} {step} {self.process}")
        for row in made:
            if rng.random() >= self.recipe.plain:
                row.copy_(torch.tensor(self.text(len(row), rng)).T)
        return made

    def text(self, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Tokens and how they count: running text with lines, of which some stood above already."""
        forms = [self._form(rng) for _ in range(rng.randint(1, 2))]
        gap = rng.choice([gap for gap in _GAPS if 16 * gap <= length] or _GAPS[:1])
        at = rng.randrange(len(self.stream))
        known: list[tuple[list[int], list[int]]] = []
        tokens, counts = list[int](), list[int]()
        while len(tokens) < length:
            size = rng.randrange(gap)
            tokens += self._running(at, size)
            counts += [TEXT] * size
            at += size
            old = bool(known) and rng.random() < self.recipe.ask
            if not old:
                known.append(self._line(rng.choice(forms), rng))
            cue, answer = rng.choice(known) if old else known[-1]
            tokens += cue + answer
            counts += [NEW] * len(cue) + [ANSWER if old else NEW] * len(answer)
        return tokens[:length], counts[:length]

    def _running(self, at: int, size: int) -> list[int]:
        return np.take(self.stream, range(at, at + size), mode="wrap").tolist()

    def _form(self, rng: random.Random) -> Form:
        pieces = [
            self._running(rng.randrange(len(self.stream)), rng.randrange(most))
            for most in (_BEFORE, _BETWEEN)
        ]
        return Form(self._ids("\n") + pieces[0], pieces[1])

    def _line(self, form: Form, rng: random.Random) -> tuple[list[int], list[int]]:
        """Tokens up to an answer, and the answer."""
        return form.before + self._name(rng) + form.between, self._answer(rng)

    def _name(self, rng: random.Random) -> list[int]:
        if rng.random() < 0.5:
            return self._any(rng, 3)
        return self._ids(" " + word(rng, rng.choice((1, 2, 3))).capitalize())

    def _answer(self, rng: random.Random) -> list[int]:
        if rng.random() < 0.4:
            return self._any(rng, 4)
        return self._ids(f" {rng.randrange(10_000, 1_000_000)}")

    def _any(self, rng: random.Random, most: int) -> list[int]:
        """Tokens of the vocabulary by chance, without the one that ends a text."""
        return rng.choices(range(1, self.vocabulary), k=rng.randint(1, most))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def weighted_loss(model: Decoder, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of windows [B, T + 1, 2]; answers count most, what is new not at all."""
    states, output, labels = next_tokens(model, batch[..., 0])
    weights = batch[:, 1:, 1].to(states.dtype)
    labels = labels.masked_fill(weights == NEW, IGNORED)
    return loss_in_pieces(states, output, Labels(labels, weights / weights.sum()))


def length_at(step: int, recipe: TeacherRecipe) -> tuple[int, int]:
    """Tokens of the texts of a step, and how many there are."""
    if step < recipe.short:
        return recipe.lengths[0]
    return recipe.lengths[(step - recipe.short) % len(recipe.lengths)]


def make_teacher(out: str | Path, recipe: TeacherRecipe, data: Sequence[str] = ("stdlib",)) -> Path:
    """Train the teacher and save it in `out`, or go on with what is there; returns the directory."""
    place, accelerator = Place(as_path(out), KIND), make_accelerator()
    plan = {"recipe": asdict(recipe), "data": list(data)}
    resume = begun(place.path, RECORD)
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            _train(place, folder, recipe, data, plan, accelerator, resume)
    return place.path


def _train(
    place: Place,
    folder: Path,
    recipe: TeacherRecipe,
    data: Sequence[str],
    plan: dict[str, Any],
    accelerator: Accelerator,
    resume: bool,
) -> None:
    model = without_slow_turns(load_model(BASE), recipe.turned, recipe.positions)
    tokenizer = load_tokenizer(BASE)
    documents, _ = train_and_heldout(data)
    stream = tokenize(documents, tokenizer, end_of_text(tokenizer, model.config))
    texts = RecallTexts(Windows(stream, recipe.positions, recipe.train.seed), tokenizer, recipe)

    def batch(step: int) -> torch.Tensor:
        context, rows = length_at(step, recipe)
        return texts.batch(step, rows, context)

    loss: Callable[[torch.Tensor], torch.Tensor] = partial(weighted_loss, model.train())
    trainer = Trainer(
        model, loss, batch, recipe.train, folder / "train", label="teacher", accelerator=accelerator
    )
    log = trainer.run(resume=resume and trainer.has_state)
    record = stamped({"plan": plan, "tokens": log[-1]["tokens"]})
    files = {RECORD: json.dumps(record, indent=2) + "\n", "log.jsonl": log_lines(log)}
    save_model(model, tokenizer, place, torch.bfloat16, extra_files=files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory that is new or empty")
    parser.add_argument("--steps", type=int, default=RECIPE.train.steps, help="of the optimizer")
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="running text")
    options = parser.parse_args()
    recipe = replace(RECIPE, train=replace(RECIPE.train, steps=options.steps))
    print(make_teacher(options.out, recipe, options.data))


if __name__ == "__main__":
    main()
