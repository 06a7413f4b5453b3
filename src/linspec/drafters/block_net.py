"""A block drafter after DFlash and DSpark (arXiv 2602.06036, 2607.05147): what it computes.

One forward drafts a whole block. Where the newest token, the root, stands at position a, the layers read a
*context* of the target's inner states before a, and fill places 0..B-1 at positions a..a+B-1. Place k drafts
the token of position a + k + 1 (the layout `shift`; DFlash's own drafts that of a + k).

    context   c_i = RMS(W [norm(h_i^l1); norm(h_i^l2); ...]), one row for each committed token
    place k   starts as m_k + norm(embedding of the root) + c_{a-1}; each layer's keys and values come
              from the last `window` rows of context and from the whole block, in both directions
    logits    U_k + M2 M1 norm(embedding of the token before), U_k by the target's own rows (Markov head)
    sure      sigmoid(w [h_k; M1 ...] + b): how likely draft k is accepted once those before it are

Beside DSpark, places start from root and newest context, not from a mask alone, as one or two layers see
little of them otherwise; and the Markov head reads the target's embedding through a small matrix, not a table
of its own, which would be larger than the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.heads import HasHead
from linspec.drafters.trained import TrainedDrafter, check_drafted, read_shape
from linspec.errors import ConfigError, DrafterError
from linspec.kernels.rotary import rotary_factors
from linspec.mixers.rope import rotate
from linspec.models.decoder import Decoder
from linspec.utils.border import parse
from linspec.utils.messages import shown
from linspec.utils.sizes import check_positive, check_sizes

# the one layout: place k drafts the token behind its own position
LAYOUT = "shift"
# places of a block: what is drafted is verified in one step
MOST_PLACES = 32
# keys and values [..., T, kv heads, head width] of one layer
Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """The shape of a block drafter.

    width, vocab_size: of the target. read: the layers of the target whose outputs it reads. depth: its own
    layers. places: tokens of a block. window: rows of context that a block sees. vocabulary: how many tokens
    can be drafted, 0 for all. rank: of the Markov head. base: of its rotary positions.
    """

    width: int
    vocab_size: int
    read: tuple[int, ...]
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    depth: int = 1
    places: int = 4
    window: int = 128
    vocabulary: int = 0
    rank: int = 64
    base: float = 10_000.0
    eps: float = 1e-5
    layout: str = LAYOUT

    def __post_init__(self) -> None:
        check_sizes(
            self, "width vocab_size heads kv_heads head_width mlp_width depth places window rank"
        )
        check_sizes(self, "vocabulary", least=0)
        check_positive("base", self.base)
        check_positive("eps", self.eps)
        if self.layout != LAYOUT:
            raise ConfigError(f"layout must be {LAYOUT!r}, got {shown(repr(self.layout))}")
        if self.places > MOST_PLACES:
            raise ConfigError(f"a block has {MOST_PLACES} places at most, got {self.places}")
        if self.vocabulary > self.vocab_size:
            raise ConfigError(
                f"a drafter cannot draft {self.vocabulary} tokens of the {self.vocab_size} that its target "
                "has; 0 is all"
            )
        if not self.read or list(self.read) != sorted({*self.read}) or self.read[0] < 0:
            raise ConfigError(
                f"a drafter reads layers in ascending order, such as (1, 14, 26), got {self.read}"
            )
        if self.heads % self.kv_heads or self.head_width % 2:
            raise ConfigError(
                f"{self.heads} heads must be a multiple of {self.kv_heads} KV heads, and their width "
                f"{self.head_width} even"
            )

    @property
    def drafted(self) -> int:
        """How many tokens can be drafted."""
        return self.vocabulary or self.vocab_size


@dataclass(slots=True)
class Measured:
    """What rounds on held-out text said of a drafter, by place.

    acceptance: how often a draft is right once those before it are. temperatures: by which the confidence's
    logits are divided, so that confidences are shares. auc: how likely a right draft has more confidence
    than a wrong one. ece: how far confidences that all drafts up to a place are right are from shares.
    """

    acceptance: list[float] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    auc: list[float] = field(default_factory=list)
    ece: list[float] = field(default_factory=list)

    @property
    def gains(self) -> list[float]:
        """Drafts that a block cut after 0, 1, .. places will have accepted, in the mean."""
        return [0.0, *accumulate(accumulate(self.acceptance, mul))]


class BlockLayer(nn.Module):
    """Attention over context and block, and a gated MLP."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width, inner = config.width, config.heads * config.head_width
        self.config = config
        self.mixer_norm = nn.RMSNorm(width, config.eps)
        self.mlp_norm = nn.RMSNorm(width, config.eps)
        self.q_norm = nn.RMSNorm(config.head_width, config.eps)
        self.k_norm = nn.RMSNorm(config.head_width, config.eps)
        projected = (config.heads + 2 * config.kv_heads) * config.head_width
        self.qkv = nn.Linear(width, projected, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values [..., heads, head width] of normalized rows, not turned yet."""
        shape = self.config
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        parts = self.qkv(x).split([n * shape.head_width for n in heads], -1)
        q, k, v = (
            part.unflatten(-1, (n, shape.head_width)) for part, n in zip(parts, heads, strict=True)
        )
        return [self.q_norm(q), self.k_norm(k), v]

    def forward(
        self, x: torch.Tensor, turn: Rows, context: Rows, seen: torch.Tensor
    ) -> torch.Tensor:
        """Blocks x [R, A, B, D] a layer further.

        turn: cosines and sines of their positions. context: keys and values [R, T, Hkv, K]; seen [R, A, T]:
        which of them a block sees.
        """
        q, k, v = self.project(self.mixer_norm(x))
        q, k = rotate(q, *turn), rotate(k, *turn)
        x = x + self.out(_attend(q, (k, v), context, seen).flatten(-2))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + cast(torch.Tensor, self.down(F.silu(gate) * up))


def _attend(q: torch.Tensor, own: Rows, context: Rows, seen: torch.Tensor) -> torch.Tensor:
    """Softmax attention [R, A, B, H, K] of blocks over the context that they see and themselves."""
    rows, anchors, places, heads, width = q.shape
    kv = own[0].shape[-2]
    # [R, Hkv, A, g B, K]: the queries that read one KV head
    q = q.unflatten(3, (kv, -1)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4) * width**-0.5
    k, v = (part.permute(0, 3, 1, 2, 4) for part in own)
    past_k, past_v = (part.transpose(1, 2) for part in context)
    before = q.flatten(2, 3) @ past_k.mT
    before = before.unflatten(2, q.shape[2:4]).masked_fill(~seen[:, None, :, None], -torch.inf)
    weights = torch.cat((before, q @ k.mT), -1).float().softmax(-1).to(v.dtype)
    count = past_k.shape[2]
    out = weights[..., count:] @ v
    out = out + (weights[..., :count].flatten(2, 3) @ past_v).view(out.shape)
    out = out.unflatten(3, (heads // kv, places)).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(rows, anchors, places, heads, width)


class BlockNet(TrainedDrafter):
    """A block drafter of one target, whose embeddings and output rows it uses as they are."""

    kind = "block"
    drafted: torch.Tensor | None

    def __init__(
        self,
        config: BlockConfig,
        target: HasHead,
        measured: Measured | None = None,
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.measured = config, measured or Measured()
        width, rank = config.width, config.rank
        if config.vocabulary and drafted is None:
            drafted = torch.arange(config.vocabulary, dtype=torch.int32)
        self.register_buffer("drafted", drafted if config.vocabulary else None)
        self.read_norms = nn.ModuleList(nn.RMSNorm(width, config.eps) for _ in config.read)
        self.fuse = nn.Linear(len(config.read) * width, width, bias=False)
        self.context_norm = nn.RMSNorm(width, config.eps)
        self.root_norm = nn.RMSNorm(width, config.eps)
        self.masks = nn.Parameter(torch.zeros(config.places, width))
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, config.eps)
        self.markov_in = nn.Linear(width, rank, bias=False)
        self.markov_out = nn.Linear(rank, config.drafted, bias=False)
        self.sure = nn.Linear(width + rank, 1)
        # in a tuple, so that it is not registered as a part
        self._target = (target,)

    @property
    def target(self) -> HasHead:
        """The model that is drafted for."""
        return self._target[0]

    def bind(self, target: HasHead) -> None:
        """Draft for another form of the target, such as its quantized one."""
        self._target = (target,)

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), **asdict(self.measured)}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> BlockNet:
        config = read_shape(BlockConfig, data, target, path)
        if config.read[-1] >= target.config.layers:
            raise DrafterError(
                f"{path} reads layer {config.read[-1]}, and this model has {target.config.layers} layers, "
                "numbered from 0; copy the drafter again"
            )
        return cls(config, target, _measured(data, config, path))

    def check_weights(self, path: Path) -> None:
        check_drafted(self.drafted, self.config.vocab_size, path)

    def initialize(self, generator: torch.Generator, states: Sequence[torch.Tensor] = ()) -> None:
        """Make an untrained drafter ready: its layers add nothing, the context is the last layer read.

        states: [..., D] of each layer that is read, whose features are brought to one scale; some are
        hundreds of times larger than others.
        """
        width = self.config.width
        with torch.no_grad():
            for weight in (self.markov_in.weight, *self._inner()):
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
            self.fuse.weight.normal_(0.0, 0.1 * width**-0.5, generator=generator)
            for zero in (self.markov_out.weight, self.sure.weight, self.sure.bias, *self._ends()):
                zero.zero_()
            scale = torch.ones(width)
            for norm, given in zip(self._read_norms, states, strict=bool(states)):
                unit = F.rms_norm(given.float(), (width,)).flatten(0, -2)
                scale = unit.square().mean(0).sqrt().clamp(min=1e-3)
                norm.weight.copy_(1 / scale)
            self.fuse.weight[:, -width:] += torch.diag(scale)

    def _inner(self) -> list[torch.Tensor]:
        return [w for layer in self._layers for w in (layer.qkv.weight, layer.up.weight)]

    def _ends(self) -> list[torch.Tensor]:
        return [w for layer in self._layers for w in (layer.out.weight, layer.down.weight)]

    @property
    def _layers(self) -> list[BlockLayer]:
        return cast("list[BlockLayer]", list(self.layers))

    @property
    def _read_norms(self) -> list[nn.RMSNorm]:
        return cast("list[nn.RMSNorm]", list(self.read_norms))

    def context(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of context [..., D] of the states [..., D] of the layers that are read, in their order."""
        normed = [norm(given) for norm, given in zip(self._read_norms, states, strict=True)]
        return cast(torch.Tensor, self.context_norm(self.fuse(torch.cat(normed, -1))))

    def rows(self, context: torch.Tensor, positions: torch.Tensor) -> list[Rows]:
        """What each layer keeps of context [R, T, D] at `positions` [R, T]."""
        turn = self.turn(positions, context.dtype)
        found = []
        for layer in self._layers:
            _, k, v = layer.project(context)
            found.append((rotate(k, *turn), v))
        return found

    def turn(self, positions: torch.Tensor, dtype: torch.dtype) -> Rows:
        """Cosines and sines [..., 1, K] of positions [...]."""
        cos, sin = rotary_factors(self.frequencies().to(positions.device), positions)
        return cos[..., None, :].to(dtype), sin[..., None, :].to(dtype)

    def frequencies(self) -> torch.Tensor:
        """Of the rotary positions, [K / 2]."""
        width = self.config.head_width
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return self.config.base**-exponents

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Normalized embeddings [..., D] of tokens, of whatever scale the target's are."""
        weight = self.root_norm.weight
        return cast(
            torch.Tensor,
            self.root_norm(self.target.embed(ids.to(weight.device)).to(weight.dtype)),
        )

    def blocks(
        self,
        newest: torch.Tensor,
        roots: torch.Tensor,
        positions: torch.Tensor,
        context: Sequence[Rows],
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """Normalized states [R, A, B, D] of the places of blocks.

        newest [R, A, D]: the context just before each root; roots [R, A]: embedded; positions [R, A]: of
        the roots; context: of each layer, what `rows` made; seen [R, A, T]: which of it a block sees.
        """
        x = self.masks + (roots + newest)[:, :, None]
        places = torch.arange(self.config.places, device=positions.device)
        turn = self.turn(positions[..., None] + places, x.dtype)
        for layer, kept in zip(self._layers, context, strict=True):
            x = layer(x, turn, kept, seen)
        return cast(torch.Tensor, self.norm(x))

    def target_rows(self) -> torch.Tensor:
        """The rows of the target's output matrix that are drafted from."""
        weight = cast(torch.Tensor, self.target.head.weight)
        return weight if self.drafted is None else weight[self.drafted.long()]

    def unary(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of places that know nothing of the tokens before them."""
        return F.linear(states, self.target_rows().to(states.dtype))

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        """The token ids that indices of logits stand for."""
        return indices if self.drafted is None else self.drafted.long()[indices]

    def sureness(self, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Logits [...] of the confidence in a place with `states` [..., D] behind a token [..., rank]."""
        return cast(torch.Tensor, self.sure(torch.cat((states, before), -1)))[..., 0]

    def walk(
        self, states: torch.Tensor, logits: torch.Tensor, roots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest chains: indices of drafts [..., B], and logits of the confidence in each.

        states [..., B, D] with logits [..., B, V] that know nothing of the tokens before them yet; roots
        [..., D]: embedded.
        """
        before, drafts, sure = self.markov_in(roots), [], []
        for place in range(self.config.places):
            scores = logits[..., place, :] + self.markov_out(before)
            sure.append(self.sureness(states[..., place, :], before))
            drafts.append(scores.argmax(-1))
            before = self.markov_in(self.embedded(self.tokens(drafts[-1])))
        return torch.stack(drafts, -1), torch.stack(sure, -1)

    def confidences(self, sure: torch.Tensor) -> torch.Tensor:
        """Shares [..., B] of the confidence's logits."""
        given = self.measured.temperatures or [1.0] * self.config.places
        return (sure / torch.tensor(given, device=sure.device)).sigmoid()


def visible(anchors: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """[..., A, T] of T rows of context, which of them the blocks at `anchors` [..., A] see."""
    rows = torch.arange(count, device=anchors.device)
    behind = anchors[..., None] - rows
    return (behind > 0) & (behind <= window)


def _measured(data: Mapping[str, Any], config: BlockConfig, path: Path) -> Measured:
    """The measurements of drafter.json; raises DrafterError unless they can be what they are called."""
    given = {each.name: data.get(each.name, []) for each in fields(Measured)}
    try:
        found = parse(Measured, given, path)
    except ConfigError as error:
        raise DrafterError(f"{error}; {_AGAIN}") from error
    for name, numbers in asdict(found).items():
        if len(numbers) not in (0, config.places):
            raise DrafterError(
                f"{path}: {name} has {len(numbers)} entries for {config.places} places; {_AGAIN}"
            )
    if not all(0 <= share <= 1 for share in (*found.acceptance, *found.auc, *found.ece)):
        raise DrafterError(f"{path}: acceptance, auc and ece must be shares in 0..1; {_AGAIN}")
    if not all(t > 0 for t in found.temperatures):
        raise DrafterError(f"{path}: temperatures must be above 0; {_AGAIN}")
    return found


_AGAIN = "train the drafter again with linspec train-drafter"
