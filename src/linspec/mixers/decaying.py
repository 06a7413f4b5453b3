"""Linear mixers whose state fades, each token as its key says."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from linspec.mixers.carry import Carry
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.decayed import Decayed, Writes, plain_writes
from linspec.mixers.ops.exact import Exact
from linspec.state.grouped import GroupedSpec

# a gate x fades the state by sigmoid(x)^(1/16) per token (Yang et al. 2024, arXiv 2312.06635)
GATE_TEMPERATURE = 16.0


def log_decay(gate: torch.Tensor) -> torch.Tensor:
    """The logarithm of the factor that a gate stands for, 0 or less."""
    return F.logsigmoid(gate) / GATE_TEMPERATURE


class DecayingMixer(LinearMixer):
    """Base of the mixers with decay.

    With the mixer's own kernel every token is read through the fading state, and groups only batch its
    updates; with another kernel the tokens within the span are read by that one alone. chunk: tokens that
    the full form takes at once.
    """

    keeps_features = False
    chunk = 16

    def gate_widths(self) -> tuple[int, int]:
        """Columns of an entry behind its key: those that are log a, and all of them."""
        raise NotImplementedError

    def writes(self) -> Writes:
        """What tokens write into the state."""
        return plain_writes

    @classmethod
    def bidirectional(cls) -> bool:
        return False

    def state_spec(self) -> GroupedSpec:
        return replace(super().state_spec(), key_width=self.head_width + self.gate_widths()[1])

    def own_exact(self) -> Exact | None:
        return None

    def make_summed(self) -> Decayed:
        return Decayed(
            groups=self.groups,
            queries=self.summed_queries,
            keys=self.summed_keys,
            width=self.head_width,
            decay_width=self.gate_widths()[0],
            chunk=self.chunk,
            through_state=not self.arranged,
            writes=self.writes(),
        )

    def carry(self) -> Carry:
        # read through the state, no token is read by itself
        return super().carry() if self.arranged else Carry(older=self.summed)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        return self.feature_map(k[..., : self.head_width])
