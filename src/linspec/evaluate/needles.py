"""Recall in a chat: which of the numbers that a user's message holds can a model still say?

    asked = questions(tokenizer, stream, lengths=(512, 2048), keys=(1, 6), items=100)
    right = {cell: recalled(model, needles) for cell, needles in asked.items()}

One of `keys` sentences in running text is asked for; none stands within reach of a short window. All digits
of the answer must be the likeliest token, given those before them: what greedy decoding would write, in one
forward. The wording is used nowhere in training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from linspec.models.decoder import Decoder
from linspec.train.needles import Needles, NeedleWriter, Wording

WORDING = Wording(
    "The locker of {name} opens with the number {value}.",
    "Which number opens the locker of {name}?",
    "The locker of {name} opens with the number",
)
# further ones, for texts whose needles are not to be mistaken for each other
WORDINGS = (
    WORDING,
    Wording(
        "The ferry to {name} carries {value} crates today.",
        "How many crates does the ferry to {name} carry today?",
        "The ferry to {name} carries",
    ),
    Wording(
        "In chess club, {name} has a rating of {value} points.",
        "Which rating does {name} have in chess club?",
        "In chess club, {name} has a rating of",
    ),
    Wording(
        "Asteroid {name} was seen by telescope {value} first.",
        "Which telescope saw asteroid {name} first?",
        "Asteroid {name} was seen by telescope",
    ),
    Wording(
        "Grandfather paid {name} the sum of {value} crowns.",
        "Which sum did grandfather pay {name}?",
        "Grandfather paid {name} the sum of",
    ),
)
NAMES = (
    *("Anna", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hassan", "Ingrid", "Jonas"),
    *("Karin", "Louis", "Maria", "Nils", "Olga", "Pablo", "Quentin", "Rosa", "Stefan", "Tara"),
    *("Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zoe"),
)
# no needle so near the questions: two groups of the usual window
CLEAR = 128
_DEPTHS = 10
_BATCH_TOKENS = 32_768

# tokens of a text, needles in it
Cell = tuple[int, int]


def questions(
    tokenizer: Any,
    stream: np.ndarray,
    *,
    lengths: Sequence[int],
    keys: Sequence[int] = (1,),
    items: int = 100,
    seed: int = 0,
) -> dict[Cell, Needles]:
    """`items` texts of each length and number of needles, the needle at ten depths in turn."""
    writer = NeedleWriter(tokenizer, stream, (WORDING,), NAMES, clear=CLEAR)
    found = {}
    for length in lengths:
        for count in keys:
            rng = random.Random(f"ask {seed} {length} {count}")
            made = [
                writer.batch(
                    1, length, keys=count, asked=1, rng=rng, depth=(item % _DEPTHS + 0.5) / _DEPTHS
                )
                for item in range(items)
            ]
            found[length, count] = Needles(
                torch.cat([each.tokens for each in made]), torch.cat([each.places for each in made])
            )
    return found


@torch.no_grad()
def recalled(model: Decoder, needles: Needles, batch_tokens: int = _BATCH_TOKENS) -> torch.Tensor:
    """Which texts' answers are right in every digit: [B] on the CPU."""
    device, length = model.device, needles.tokens.shape[1]
    rows = max(1, batch_tokens // length)
    found = []
    for tokens, places in zip(needles.tokens.split(rows), needles.places.split(rows), strict=True):
        tokens, places = tokens.to(device), places.to(device)
        hidden = model.hidden(tokens)
        before = hidden.gather(1, (places - 1)[..., None].expand(-1, -1, hidden.shape[2]))
        likeliest = model.head(before).argmax(-1)
        found.append((likeliest == tokens.gather(1, places)).all(1).cpu())
    return torch.cat(found)
