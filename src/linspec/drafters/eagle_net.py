"""One layer that goes on from the target's hidden states (EAGLE-3, Li et al. 2025, arXiv 2503.01840).

Entry t of it pairs what the target computed at position t with token t + 1, which is decided when a draft
begins, and guesses token t + 2. A draft goes on from its own states: an entry for a drafted token pairs the
state of the entry that drafted it with that token. Entries of committed positions stand at the position of
the target's state, those of drafts behind them.

    states = net.fused(torch.cat([low, middle, high], -1))     # [..., D] of positions
    output = net.decoder.step([StepInput(slot, tokens, embeddings=states)], cache, want=BOTH)
    states = net.fed_back(output.hidden, output.layers[0])     # of drafts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from linspec.decoding.step import FINAL, Want
from linspec.drafters.trained import TrainedDrafter, check_drafted, read_accuracies, read_shape
from linspec.errors import ConfigError
from linspec.mixers.norms import OffsetRMSNorm
from linspec.mixers.projections import LinearFactory
from linspec.mixers.rope_config import RopeConfig
from linspec.models.block import Block
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.fused_block import BorrowedEmbedding, FusedBlock
from linspec.models.head import inference_head
from linspec.models.linear import fused_linear
from linspec.utils.border import STRICT
from linspec.utils.sizes import check_sizes

# of new weights, beside those that are copied, and of the logits: guesses two tokens on are less sure
_NOISE, _UNSURE = 0.1, 0.3
# what a step of the layer hands out
BOTH = Want((0, FINAL))


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """The shape of such a drafter.

    width, vocab_size: of the target. reads: the layers of the target whose outputs are fused, from 0.
    vocabulary: how many tokens can be drafted. heads … rope: of its one layer. own_head: its output layer is
    trained; else it has the rows of the target's. normed: states of the target are normalized before they
    are fused, and states of drafts before they are fed back (EAGLE-3.1), so that they do not grow with depth.
    """

    width: int
    vocab_size: int
    reads: tuple[int, ...]
    vocabulary: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    own_head: bool = True
    normed: bool = True
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size vocabulary heads kv_heads head_width mlp_width")
        if not self.reads or min(self.reads) < 0:
            raise ConfigError(f"a drafter reads layers numbered from 0, got {list(self.reads)}")
        if self.vocabulary > self.vocab_size:
            raise ConfigError(
                f"{self.vocabulary} tokens cannot be drafted of the {self.vocab_size} that the target has"
            )
        # says what else is wrong with the layer
        self.layer()

    def layer(self) -> DecoderConfig:
        """The one layer as a decoder, whose tokens are those that can be drafted."""
        return DecoderConfig(
            vocab_size=self.vocabulary,
            width=self.width,
            layers=1,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            mlp_width=self.mlp_width,
            norm_eps=self.norm_eps,
            rope=self.rope,
            tied_embeddings=False,
        )


def layers_to_read(layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer of a target of `layers`; fewer where it is too shallow for three.

    The last layer's output is not among them where another one is left: it is what the output layer reads.
    """
    low, middle, high = min(1, layers - 1), layers // 2 - 1, layers - 4
    if low < middle < high:
        return low, middle, high
    return tuple(sorted({0, max(0, layers // 2), max(0, layers - 2)}))


class FusedDecoder(Decoder):
    """One fused layer with an output layer; steps take states as the embeddings of their tokens."""

    def __init__(self, config: DecoderConfig, target: Decoder) -> None:
        super().__init__(config)
        self.add_module("embed", BorrowedEmbedding(target))
        # that of the target bounds a draft already
        self.position_limit = None

    def make_block(self, layer: int) -> Block:
        return FusedBlock(self.config, layer)

    def to_inference(self, linear_factory: LinearFactory = fused_linear) -> FusedDecoder:
        """As that of a decoder; `finalize_weights` is the caller's, once the target has its form."""
        self.eval().requires_grad_(False)
        for block in self.layers:
            block.to_inference(linear_factory)
        if isinstance(self.head, nn.Linear):
            self.add_module("head", inference_head(self.head, linear_factory))
        self.is_inference = True
        return self

    def embedded(
        self, ids: torch.Tensor, given: Sequence[tuple[int, torch.Tensor]]
    ) -> torch.Tensor:
        """Embeddings of tokens, each with the state that is given for it: [M, 2 D]."""
        states = torch.cat([states for _, states in given])
        return torch.cat((self.embed(ids).to(states), states), dim=-1)


class EagleNet(TrainedDrafter):
    """What fuses the target's states, and the layer that drafts.

    accuracies[d][i]: how often, in rounds on held-out text, the rank-i guess at depth d + 1 was what the
    target chose, where all before it was right. drafted: ids of the tokens that can be drafted, ascending.
    """

    kind = "eagle"
    drafted: torch.Tensor

    def __init__(
        self,
        config: EagleConfig,
        target: Decoder,
        accuracies: Sequence[Sequence[float]] = (),
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        if drafted is None:
            drafted = torch.arange(config.vocabulary, dtype=torch.int32)
        self.register_buffer("drafted", drafted)
        self._target = (target,)
        inputs, width = len(config.reads), config.width
        self.norms = nn.ModuleList(
            nn.RMSNorm(width, eps=config.norm_eps) for _ in range(inputs if config.normed else 0)
        )
        self.fuse: nn.Module = nn.Linear(inputs * width, width, bias=False)
        self.decoder = FusedDecoder(config.layer(), target)
        if not config.own_head:
            self.decoder.add_module("head", BorrowedHead(self))

    @property
    def target(self) -> Decoder:
        """The model that is drafted for."""
        return self._target[0]

    def initialize(self, generator: torch.Generator) -> None:
        """Make untrained weights ready for training: what the target has of the same shape is copied.

        A new drafter says what the target's output layer makes of the highest fused state, less surely.
        Its layer has the weights of the target's last one, but for those that would add to the state already.
        """
        width = self.config.width
        block = self.decoder.layers[0]
        with torch.no_grad():
            for weight in self.parameters():
                if weight.dim() == 2:
                    weight.normal_(0, _NOISE * weight.shape[1] ** -0.5, generator=generator)
            cast(nn.Linear, self.fuse).weight[:, -width:] += torch.eye(width)
            for name, weight in block.named_parameters():
                self._copy(weight, _last_block(self.target).get(name))
            for last in (block.mixer.o, block.mlp.down):
                nn.init.zeros_(last.get_parameter("weight"))
            norm = self.decoder.norm.get_parameter("weight")
            norm.copy_(_UNSURE * _norm_weight(self.target))
            if self.config.own_head:
                self.decoder.head.weight.copy_(self.target_rows())

    def _copy(self, weight: nn.Parameter, given: torch.Tensor | None) -> None:
        """Copy a weight of the target; what reads a token and a state has it for the state."""
        if given is None or weight.dim() != given.dim() or len(weight) != len(given):
            return
        if weight.shape == given.shape:
            weight.copy_(given)
        elif weight.shape[1] == 2 * given.shape[1]:
            weight[:, given.shape[1] :] = given

    def target_rows(self) -> torch.Tensor:
        """The rows of the target's output layer that belong to the drafted tokens [V', D]."""
        return self.target.head.weight[self.drafted.long()]

    def fused(self, states: torch.Tensor) -> torch.Tensor:
        """One state [..., D] of the target's states [..., layers · D], side by side."""
        if self.config.normed:
            parts = states.split(self.config.width, -1)
            states = torch.cat([norm(x) for norm, x in zip(self.norms, parts, strict=True)], -1)
        return self.fuse(states)

    def fed_back(self, final: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """The state that a draft goes on from, of what the layer put out: normalized, and raw."""
        return final if self.config.normed else raw

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "accuracies": self.accuracies}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> EagleNet:
        config = read_shape(EagleConfig, data, target, path)
        given = data.get("accuracies", [])
        return cls(config, target, read_accuracies(given, DEEPEST, config.vocabulary, path))

    def check_weights(self, path: Path) -> None:
        check_drafted(self.drafted, self.config.vocab_size, path)

    def to_inference(self, linear_factory: LinearFactory) -> EagleNet:
        """Turn into the form that is saved in few bits, in place; returns it."""
        if not self.decoder.is_inference:
            self.eval().requires_grad_(False)
            self.fuse = linear_factory(self.fuse)
            self.decoder.to_inference(linear_factory)
        return self

    def ready(self, linear_factory: LinearFactory) -> EagleNet:
        """Turn into the form that drafts, in place, once the target has its own form; returns it."""
        self.to_inference(linear_factory)
        if isinstance(self.decoder.head, BorrowedHead):
            self.decoder.add_module(
                "head", linear_factory(_linear(self.target_rows().to(self.decoder.dtype)))
            )
        self.decoder.finalize_weights()
        return self


# depths that are measured at most
DEEPEST = 16


class BorrowedHead(nn.Module):
    """The rows of the target's output layer that are drafted from; no weights of this drafter."""

    def __init__(self, net: EagleNet) -> None:
        super().__init__()
        self._net = (net,)

    @property
    def weight(self) -> torch.Tensor:
        """[V', D]."""
        return self._net[0].target_rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A plain layer around weights [outputs, inputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def _last_block(target: Decoder) -> dict[str, torch.Tensor]:
    """The weights of the target's last layer; norms of another kind are left out."""
    weights = dict(target.layers[-1].named_parameters())
    plain = target.config.norm == "rms" and not target.config.norm_offset
    return {name: w.detach() for name, w in weights.items() if plain or "norm" not in name}


def _norm_weight(target: Decoder) -> torch.Tensor:
    """The factors of the target's final norm, with what multiplies the states behind it."""
    weight = target.norm.get_parameter("weight").detach()
    factors = 1 + weight if isinstance(target.norm, OffsetRMSNorm) else weight
    return factors * target.config.logit_scale
