"""How close a student is to its teacher: likelihood, next tokens, and greedy answers.

teacher's: score(teacher, windows)                     nats
student's: score(student, windows, teacher)            nats, KL, share of equal next tokens
answers = greedy(teacher, prompts, 64); equal_prefixes(student, prompts, answers)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from linspec.models.decoder import Decoder

_PIECE = 4096


@dataclass(frozen=True, slots=True)
class Agreement:
    """nats: cross-entropy of the text; kl and top1: against the teacher, whose own are 0 and 1."""

    nats: float
    kl: float = 0.0
    top1: float = 1.0

    def to_json(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def score(
    model: Decoder, windows: torch.Tensor, teacher: Decoder | None = None, rows: int = 8
) -> Agreement:
    """Means over all tokens of `windows` [N, T + 1], `rows` of them at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in windows.to(model.device).split(rows):
        hidden = model.hidden(batch[:, :-1]).flatten(0, 1)
        wanted = None if teacher is None else teacher.hidden(batch[:, :-1]).flatten(0, 1)
        sums += _sums(model, hidden, teacher, wanted, batch[:, 1:].flatten())
    nats, kl, same = (sums / windows[:, 1:].numel()).tolist()
    return Agreement(nats) if teacher is None else Agreement(nats, kl, same)


def _sums(
    model: Decoder,
    hidden: torch.Tensor,
    teacher: Decoder | None,
    wanted: torch.Tensor | None,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Nats, KL and equal next tokens, summed over all places."""
    found = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(hidden), _PIECE):
        part = slice(start, start + _PIECE)
        log_q = model.head(hidden[part]).float().log_softmax(-1)
        found[0] -= float(log_q.gather(1, labels[part, None]).double().sum())
        if teacher is not None and wanted is not None:
            log_p = teacher.head(wanted[part]).float().log_softmax(-1)
            found[1] += float((log_p.exp() * (log_p - log_q)).double().sum())
            found[2] += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return found


@torch.no_grad()
def greedy(model: Decoder, prompts: Sequence[Sequence[int]], new: int) -> torch.Tensor:
    """The `new` likeliest tokens behind each prompt, [B, new]: by the full form, for many short prompts."""
    ids, ends = _padded(prompts, new)
    ids, ends = (x.to(model.device) for x in (ids, ends))
    rows = torch.arange(len(ids), device=ids.device)
    for step in range(new):
        at = ends + step
        longest = int(at.max())
        likeliest = model.head(model.hidden(ids[:, :longest])[rows, at - 1]).argmax(-1)
        ids[rows, at] = likeliest
    return torch.stack([row[end : end + new] for row, end in zip(ids, ends.tolist(), strict=True)])


@torch.no_grad()
def equal_prefixes(
    model: Decoder, prompts: Sequence[Sequence[int]], answers: torch.Tensor
) -> torch.Tensor:
    """How many tokens of each answer [B, N] `model` would write too before the first other one: [B]."""
    new = answers.shape[1]
    ids, ends = _padded(prompts, new)
    for row, (end, answer) in enumerate(zip(ends.tolist(), answers.cpu(), strict=True)):
        ids[row, end : end + new] = answer
    ids, ends = (x.to(model.device) for x in (ids, ends))
    at = ends[:, None] + torch.arange(new, device=ids.device)
    hidden = model.hidden(ids)
    before = hidden.gather(1, (at - 1)[..., None].expand(-1, -1, hidden.shape[2]))
    same = model.head(before).argmax(-1) == ids.gather(1, at)
    return same.int().cumprod(1).sum(1).cpu()


def _padded(prompts: Sequence[Sequence[int]], new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, T] with room for `new` tokens behind each, and where each ends."""
    longest = max(map(len, prompts)) + new
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    return ids, torch.tensor([len(prompt) for prompt in prompts])
