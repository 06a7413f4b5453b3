"""Finetune: the whole student learns from the text and from the teacher's distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from linspec.train.objective import Predictor, next_tokens
from linspec.train.pieces import Labels, Teacher, loss_in_pieces

if TYPE_CHECKING:
    from peft import PeftModel

LORA_TARGETS = ("q", "k", "v", "o")


def finetune_loss(
    student: Predictor,
    batch: torch.Tensor,
    teacher: Predictor | None = None,
    kl_weight: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy of windows [B, T + 1] plus kl_weight · KL(teacher ‖ student), in nats."""
    states, output, ids = next_tokens(student, batch)
    known = None
    if teacher is not None and kl_weight != 0:
        with torch.no_grad():
            wanted, theirs, _ = next_tokens(teacher, batch)
        known = Teacher(wanted, theirs, kl_weight)
    return loss_in_pieces(states, output, Labels(ids), known)


def add_lora(student: Predictor, rank: int, alpha: int, seed: int) -> PeftModel:
    """Low-rank adapters (Hu et al. 2021) on the projections of `student`, changed in place.

    Everything else is frozen but what You et al. 2024 train in full: the embeddings, the norms and
    the mixers' own parameters.
    """
    # peft takes seconds to import
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(student, config)
    for name, weight in adapted.named_parameters():
        if trained_in_full(name):
            weight.requires_grad_(True)
    return adapted


def trained_in_full(name: str) -> bool:
    """True for the weights that stay trainable beside the adapters."""
    *_, module, _ = ("", *name.split("."))
    # what a mixer holds itself, not in a layer of its own: α, taps, feature maps, gates
    own = module == "mixer"
    return own or "norm" in module or module.startswith("embed")


def merge_lora(adapted: PeftModel) -> Predictor:
    """The model with its adapters folded into plain weights."""
    merged: Predictor = adapted.merge_and_unload()
    return merged.requires_grad_(True)
