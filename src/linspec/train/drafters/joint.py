"""Drafters whose training changes the target too: what comes out is a model with its drafter inside.

The model learns by low-rank adapters on its projections, which are folded in at the end. It is another model
than the one it began as: with an exact verifier its drafter is lossless for the new one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from linspec.drafters.trained import TrainedDrafter
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import DrafterConfig, DrafterTraining
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.finetune import add_lora, merge_lora
from linspec.train.loop import BatchFn, Trainer
from linspec.utils.places import Place, as_path

if TYPE_CHECKING:
    from peft import PeftModel

D = TypeVar("D", bound=TrainedDrafter)


class JointTraining(DrafterTraining[D]):
    """A kind that trains the target and the drafter together; its options have the `rank` of the adapters.

    Attributes:
        drafter: name of the drafter that uses what is trained, and of its folder inside the model.
        target_lr: factor on the learning rate for the adapters.
    """

    drafter: ClassVar[str]
    target_lr: ClassVar[float] = 0.25

    @property
    def warmup(self) -> float:
        """Share of the steps in which the drafter learns alone, by `loss`, before both do."""
        return 0.0

    @abstractmethod
    def joint_loss(self, drafter: D, target: PeftModel, batch: torch.Tensor) -> torch.Tensor:
        """What is made small, of windows of ids [B, T + 1], with gradients for both.

        `target.get_base_model()` is the decoder; inside `target.disable_adapter()` it is what it was.
        """

    def loss(self, drafter: D, states: TargetStates) -> torch.Tensor:
        raise NotImplementedError("both learn: see joint_loss")


def joint_place(
    out: str | Path | None, folder: Path, kind: str, data: Sequence[str | Path], overwrite: bool
) -> Place:
    """Where the new model goes; raises ConfigError unless that was said and is not the old one."""
    if out is None or Path(out).resolve() == folder.resolve():
        raise ConfigError(
            f"training of kind {kind!r} changes the model; give the directory of the new one with --out: "
            f"{folder} stays as it is"
        )
    return Place(as_path(out), "train-drafter", holders=(folder, *data), overwrite=overwrite)


def train_joint(
    training: JointTraining[Any],
    target: Decoder,
    drafter: TrainedDrafter,
    batches: BatchFn,
    config: DrafterConfig,
    folder: Path,
    accelerator: Accelerator,
    resume: bool,
) -> tuple[Decoder, list[dict[str, float]]]:
    """Train both, the drafter in place; returns the model that `target` has become, and the log."""
    whole = config.training(training.lr)
    alone = min(round(training.warmup * whole.steps), whole.steps - 1)
    if alone:
        first = Trainer(
            drafter,
            lambda batch: training.loss(drafter, states_of(target, batch)),
            batches,
            replace(whole, steps=alone),
            folder / "drafter",
            label=f"train {training.drafter} alone",
            accelerator=accelerator,
        )
        first.run(resume=resume and first.has_state)
    adapted = _with_adapters(target, training.options.rank, config.seed)
    adapted.to(accelerator.device)
    names = ("lora_A.default.weight", "lora_B.default.weight")
    slower = tuple((name, training.target_lr) for name in names)
    trainer = Trainer(
        nn.ModuleDict({"target": adapted, "drafter": drafter}),
        lambda batch: training.joint_loss(drafter, adapted, batch),
        lambda step: batches(alone + step),
        replace(whole, steps=whole.steps - alone, lr_factors=slower),
        folder / "joint",
        label=f"train {training.name}",
        accelerator=accelerator,
    )
    log = trainer.run(resume=resume and trainer.has_state)
    model = merge_lora(adapted)
    assert model is target, "the drafter draws on the weights of its target"
    return target.requires_grad_(False), log


def _with_adapters(target: Decoder, rank: int, seed: int) -> PeftModel:
    """`target` with low-rank adapters on its projections, changed in place; they alone can learn."""
    adapted = add_lora(target, rank, max(1, rank // 2), seed)
    for name, weight in adapted.named_parameters():
        weight.requires_grad_("lora_" in name)
    return adapted
