"""The rows and columns of the quality grid, from the registry: attentions and arrangements.

plain  the attention alone
+conv  with the causal convolution
+grouped  exact within a group, plus its linear sum over closed groups (α is 1)
+α·grouped  the same with a learned α that starts at 0
aug  that with the convolution
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.config import DecoderConfig, EncoderConfig
from studies.linearized_llm.plan import Size
from studies.linearized_llm.variants import variant

PLAIN, CONV, BOTH, ALPHA, AUG = PARTS = ("plain", "+conv", "+grouped", "+α·grouped", "aug")
# columns of the grid, not attentions: `local` in the grouped arrangement
ARRANGEMENTS = ("grouped", "aug")
# not of the paper: what some heads of a layer have beside exact ones
BY_HEAD = ("streaming", "by-head")
# weights of tokens within the group, for attentions that bring none: those of the paper's code
GROUP_KERNEL = "relu2"

Stack = type[DecoderConfig] | type[EncoderConfig]


@dataclass(frozen=True, slots=True)
class Choice:
    """A mixer of the grid, and the variant of it that only the study has."""

    mixer: MixerConfig
    variant: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"mixer": self.mixer.recorded(), "variant": self.variant}


def attentions() -> list[str]:
    """Softmax first, then local, then every other registered attention.

    'local:softmax' is local attention that keeps the teacher's weights within the group.
    """
    # what stands in for softmax without training is no attention to train
    other = (*ARRANGEMENTS, *BY_HEAD, *(n for n in MIXERS.names() if MIXERS[n].stands_in))
    names = [n for n in MIXERS.names() if n not in other and not n.startswith("study-")]
    first = ["softmax", "local", "local:softmax"]
    return [*first, *(name for name in names if name not in first)]


def choose(row: str, part: str, size: Size, stacks: Sequence[Stack] = (DecoderConfig,)) -> Choice:
    """The mixer of one place in the grid; raises ConfigError, with the reason, if there is none.

    stacks: kinds of stacks that it must fit.
    """
    base, _, kernel = row.partition(":")
    taps = size.taps if part in (CONV, AUG) else 0
    if base in ("softmax", "window") and part not in (PLAIN, CONV):
        raise ConfigError("softmax attention has no sum over closed groups")
    if part in (PLAIN, CONV):
        window = size.group if base == "window" else 0
        mixer = make_mixer(
            base, group=size.group, span=1, kernel=kernel or "own", taps=taps, window=window
        )
        found = Choice(mixer)
    else:
        found = Choice(_arranged(base, kernel, taps, size), "both" if part == BOTH else "")
    for stack in stacks:
        made = _build(found, stack)
        if part not in (PLAIN, CONV) and not hasattr(made, "alpha"):
            raise ConfigError(f"mixer {found.mixer.name!r} has no grouped arrangement")
    return found


@torch.no_grad()
def in_one_call(mixer: dict[str, Any]) -> bool:
    """Whether the C library decodes with a mixer, given as JSON types, in one call a step."""
    return _build(Choice(MixerConfig(**mixer)), DecoderConfig).attention_plan() is not None


def _arranged(base: str, kernel: str, taps: int, size: Size) -> MixerConfig:
    if base == "global":
        raise ConfigError("its grouped arrangement is that of local")
    if base == "local":
        name, kernel = "aug" if taps else "grouped", kernel or "own"
    else:
        name, kernel = base, kernel or GROUP_KERNEL
    return make_mixer(name, group=size.group, span=1, kernel=kernel, taps=taps)


def _build(choice: Choice, stack: Stack) -> Mixer:
    """The mixer on the smallest stack; raises what building it raises."""
    with variant(choice.mixer, choice.variant) as mixer:
        shape = stack(
            vocab_size=1,
            width=8,
            layers=1,
            heads=2,
            kv_heads=1,
            head_width=4,
            mlp_width=1,
            mixers=(mixer,),
        )
        return MIXERS[mixer.name](shape, mixer)
