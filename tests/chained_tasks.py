"""A task whose answer is a chain: running sums, each of which is the one before plus a digit of the prompt.

A prompt is eight digits and "=", and the answer their running sums modulo the base. Beside the sum before it
a place is simple; without, it takes all digits up to there. So a model learns the chain first, and says few
places of an answer at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

BASE, COUNT = 5, 8
EQUALS, END, MASK = range(BASE, BASE + 3)


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [N, 9] and their answers [N, 8]."""
    digits = torch.randint(0, BASE, (count, COUNT), generator=generator)
    return F.pad(digits, (0, 1), value=EQUALS), digits.cumsum(1) % BASE


def trained(steps: int, seed: int = 0, batch: int = 96, rate: float = 3e-3) -> MaskedDiffusion:
    """By the published loss: any number of an answer's tokens is masked, and its inverse weighs them."""
    torch.manual_seed(seed)
    model = MaskedDiffusion(
        DiffusionConfig(
            vocab_size=MASK + 1,
            mask_id=MASK,
            eos_ids=(END,),
            width=64,
            layers=3,
            heads=4,
            kv_heads=4,
            head_width=16,
            mlp_width=128,
            max_positions=64,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(steps):
        prompts, answers = draw(batch, generator)
        masks = torch.randint(1, COUNT + 1, (batch, 1), generator=generator)
        order = torch.rand(answers.shape, generator=generator).argsort(1)
        masked = order.argsort(1) < masks
        given = torch.cat((prompts, answers.masked_fill(masked, MASK)), 1)
        logits = model.predicted(given)[:, prompts.shape[1] :]
        nats = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
        loss = (nats * masked / masks).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
