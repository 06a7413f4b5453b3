"""How a student is trained: budget, stages, rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from linspec.mixers.config import MixerConfig
from linspec.train.compiled import check_choice
from linspec.train.loop import TrainConfig
from linspec.train.precision import check_precision
from linspec.train.sequence_parallel import uncompiled
from linspec.utils.sizes import check_positive, check_share, check_sizes

# measured in docs/results/core.md
CLOSE_LR = 3e-4
FAR_LR, FAR_TRANSFER = 2e-3, 0.4
# weights that start where they say nothing and have far to go
FROM_NOTHING = ("alpha", "taps", "gamma", "gate_bias", "gate_map")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearizeConfig:
    """How long and how to train.

    tokens: of both stages together; transfer_share: of them for stage 1, None for what the mixers
    need. context: tokens of a window; batch_tokens: tokens of a step. lr: of finetuning, likewise;
    transfer_lr: of stage 1; muon_lr: when set, the blocks' matrices use Muon in finetuning.
    mixer_lr_factor: on the rate of α, taps and gates, which start at nothing and have far to go.
    kl_weight: of KL(teacher ‖ student) beside the cross-entropy. lora_rank: 0 trains all weights,
    else adapters of this rank. recall_share: of the windows, how many are texts that ask for what
    stood above (see `RecallWindows`), for a teacher that was trained on such. compile: see TrainConfig.
    sequence_parallel: so many processes share each window (see `SequenceParallel`); decoders only, and steps
    are not compiled.
    """

    tokens: int = 2_200_000
    transfer_share: float | None = None
    context: int = 1024
    batch_tokens: int = 4096
    lr: float | None = None
    transfer_lr: float = 5e-3
    muon_lr: float | None = None
    mixer_lr_factor: float = 10.0
    warmup: int = 10
    kl_weight: float = 1.0
    lora_rank: int = 0
    lora_alpha: int = 16
    precision: str = "auto"
    compile: str = "auto"
    save_every: float = 120.0
    seed: int = 0
    recall_share: float = 0.0
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        check_choice(self.compile)
        check_sizes(self, "tokens context batch_tokens sequence_parallel")
        uncompiled(self.compile, self.sequence_parallel)
        check_precision(self.precision)
        check_sizes(self, "warmup lora_rank lora_alpha seed", least=0)
        for name in ("lr", "transfer_lr", "muon_lr", "mixer_lr_factor"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.transfer_share is not None:
            check_share("transfer_share", self.transfer_share)
        check_share("recall_share", self.recall_share)
        check_positive("kl_weight", self.kl_weight, zero=True)
        check_positive("save_every", self.save_every, zero=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what decides the result; without a recall_share of 0, as before there was one."""
        kept = asdict(self)
        # a compiled run is the same run, and so is one that several processes share
        del kept["compile"], kept["sequence_parallel"]
        return {k: v for k, v in kept.items() if k != "recall_share" or v}

    def chosen(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != each.default
        }

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return max(1, self.batch_tokens // self.context)

    @property
    def steps(self) -> int:
        """Optimizer steps of both stages."""
        return max(1, round(self.tokens / (self.rows * self.context)))

    def completed(self, changed: Iterable[MixerConfig]) -> LinearizeConfig:
        """With a share and a rate that suit these mixers, where none was given.

        Mixers that keep the teacher's weights for the tokens within reach start next to it: a
        transfer would be time lost and a high rate would only move them away.
        """
        close = all(mixer.kernel == "softmax" for mixer in changed)
        share, lr = (0.0, CLOSE_LR) if close else (FAR_TRANSFER, FAR_LR)
        return replace(
            self,
            transfer_share=share if self.transfer_share is None else self.transfer_share,
            lr=lr if self.lr is None else self.lr,
        )

    def stage(self, steps: int, *, transfer: bool) -> TrainConfig:
        """Settings of the training loop for one stage of a completed configuration."""
        assert self.lr is not None
        return TrainConfig(
            steps=steps,
            lr=self.transfer_lr if transfer else self.lr,
            muon_lr=None if transfer or self.lora_rank else self.muon_lr,
            warmup=self.warmup,
            lr_factors=tuple((name, self.mixer_lr_factor) for name in FROM_NOTHING),
            precision=self.precision,
            compile=uncompiled(self.compile, self.sequence_parallel),
            save_every=self.save_every,
            seed=self.seed,
        )
