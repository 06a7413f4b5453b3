"""How an encoder is trained while it is linearized: steps, texts, rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linspec.errors import ConfigError
from linspec.train.linearize_config import FROM_NOTHING
from linspec.train.loop import TrainConfig
from linspec.utils.sizes import check_positive, check_sizes

# of the options that all linearizations have, where they are left out
_TOKENS, _BATCH_TOKENS, _CONTEXT, _TRANSFER_SHARE = 120 * 4096, 4096, 256, 0.5
_SAME = ("transfer_lr", "lr", "mixer_lr_factor", "warmup", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTraining:
    """How long and how to train.

    transfer_steps, finetune_steps: of the two stages. rows: texts of a step; context: most tokens of a
    text. mixer_lr_factor: on the rate of α, taps and what else starts at nothing and has far to go.
    """

    transfer_steps: int = 60
    finetune_steps: int = 60
    rows: int = 16
    context: int = 256
    transfer_lr: float = 1e-3
    lr: float = 3e-4
    mixer_lr_factor: float = 10.0
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "rows context")
        check_sizes(self, "transfer_steps finetune_steps warmup seed", least=0)
        for name in ("transfer_lr", "lr", "mixer_lr_factor"):
            check_positive(name, getattr(self, name))
        if self.transfer_steps + self.finetune_steps < 1:
            raise ConfigError("both stages have no steps; give one of them some")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EncoderTraining:
        """From settings of LinearizeConfig; raises ConfigError for those that an encoder has no use for.

        A step has texts of up to `context` tokens, as many as `batch_tokens` would hold.
        """
        left = dict(options)
        context = left.pop("context", _CONTEXT)
        rows = max(1, left.pop("batch_tokens", _BATCH_TOKENS) // context)
        steps = max(1, round(left.pop("tokens", _TOKENS) / (rows * context)))
        share = left.pop("transfer_share", None)
        transfer = round((_TRANSFER_SHARE if share is None else share) * steps)
        if left.pop("compile", "auto") == "on":
            left["compile"] = "on"
        same = {name: left.pop(name) for name in _SAME if left.get(name) is not None}
        strange = sorted(name for name, value in left.items() if value is not None)
        if strange:
            raise ConfigError(
                f"an encoder predicts no tokens, so its training has no {', '.join(strange)}; leave "
                "it out"
            )
        return cls(
            transfer_steps=transfer,
            finetune_steps=steps - transfer,
            rows=rows,
            context=context,
            **same,
        )

    def stage(self, steps: int, lr: float) -> TrainConfig:
        """Settings of the training loop for one stage."""
        factors = tuple((name, self.mixer_lr_factor) for name in FROM_NOTHING)
        return TrainConfig(
            steps=steps,
            lr=lr,
            warmup=self.warmup,
            lr_factors=factors,
            seed=self.seed,
            compile="off",
        )
