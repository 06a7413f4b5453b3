"""A masked-diffusion model that is trained in half a minute on tasks with one right answer: copy and sort.

A prompt is a task, six letters and "="; the answer is six letters and ends of text up to 8 positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

LETTERS, COUNT, ANSWER = 8, 6, 8
# letters are 0..9, then what a prompt asks for, what ends it, the end of text and the mask
COPY, SORT, EQUALS, END, MASK = range(LETTERS, LETTERS + 5)
TASKS = (COPY, SORT)
_LEAST = 1e-3


def draw(
    count: int, generator: torch.Generator, length: int = ANSWER
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [N, 8] and their answers [N, length]."""
    letters = torch.randint(0, LETTERS, (count, COUNT), generator=generator)
    task = torch.tensor(TASKS)[torch.randint(0, len(TASKS), (count, 1), generator=generator)]
    answers = torch.where(task == SORT, letters.sort(1).values, letters)
    prompts = torch.cat((task, letters, torch.full_like(task, EQUALS)), 1)
    return prompts, F.pad(answers, (0, length - COUNT), value=END)


def untrained(seed: int = 0, width: int = 64) -> MaskedDiffusion:
    torch.manual_seed(seed)
    return MaskedDiffusion(
        DiffusionConfig(
            vocab_size=MASK + 1,
            mask_id=MASK,
            eos_ids=(END,),
            width=width,
            layers=3,
            heads=4,
            kv_heads=4,
            head_width=width // 4,
            mlp_width=2 * width,
            max_positions=64,
        )
    )


def loss_of(
    model: MaskedDiffusion,
    prompts: torch.Tensor,
    answers: torch.Tensor,
    masked: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """[N]: the weighted cross entropy of what is masked, over the length of the answer."""
    given = answers.masked_fill(masked, MASK)
    logits = model.predicted(torch.cat((prompts, given), 1))[:, prompts.shape[1] :]
    nats = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
    return (nats * masked * weights).sum(1) / answers.shape[1]


def trained(
    steps: int, seed: int = 0, batch: int = 96, lengths: tuple[int, int] = (ANSWER, ANSWER)
) -> MaskedDiffusion:
    """By the published loss: each answer is masked by a share of its own, whose inverse weighs it.

    lengths: the least and the most positions of an answer, the same for a batch.
    """
    model, generator = untrained(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        prompts, answers = draw(batch, generator, length)
        share = _LEAST + (1 - _LEAST) * torch.rand(batch, 1, generator=generator)
        masked = torch.rand(answers.shape, generator=generator) < share
        loss = loss_of(model, prompts, answers, masked, 1 / share).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
