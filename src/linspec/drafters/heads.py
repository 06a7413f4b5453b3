"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): what they compute, how they lie on disk.

Head k (1-based) sees the final normalised hidden state at position t, whose next token t+1 is the
model's own business, and guesses token t+1+k. A drafter directory holds `drafter.json` (shape,
fingerprint of the target, accuracies on held-out text) and `drafter.safetensors`.

    heads = load_heads("model/medusa", model)
    logits = heads(hidden)     # [..., D] -> [..., heads, vocab]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from linspec.errors import CheckpointError, ConfigError, DrafterError
from linspec.files import replace_dir
from linspec.models.block import Block
from linspec.models.decoder import Decoder

CONFIG_FILE, WEIGHTS_FILE = "drafter.json", "drafter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """The shape of a set of heads.

    width, vocab_size: of the target. blocks: residual blocks of each head. hidden: 0 for the
    paper's block x + silu(Wx + b), else the inner width of a block x + W2 silu(W1 x + b).
    shared_head: reuse the target's output matrix instead of a trained copy for each head.
    """

    width: int
    vocab_size: int
    heads: int = 4
    blocks: int = 1
    hidden: int = 0
    shared_head: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "vocab_size", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.hidden < 0:
            raise ConfigError(f"hidden must be 0 or more, got {self.hidden}")


class HeadBlock(nn.Module):
    """One residual block of every head at once: [..., heads, D] -> [..., heads, D]."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        heads, width, inner = config.heads, config.width, config.hidden or config.width
        self.weight = nn.Parameter(torch.zeros(heads, width, inner))
        self.bias = nn.Parameter(torch.zeros(heads, inner))
        if config.hidden:
            self.out = nn.Parameter(torch.zeros(heads, inner, width))
        else:
            self.register_parameter("out", None)

    def initialize(self, generator: torch.Generator) -> None:
        """Small weights where zeros would block the gradient; the block stays the identity."""
        if self.out is not None:
            std = self.weight.shape[1] ** -0.5
            with torch.no_grad():
                self.weight.normal_(0.0, std, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(torch.einsum("...kd,kde->...ke", x, self.weight) + self.bias)
        if self.out is not None:
            inner = torch.einsum("...ke,ked->...kd", inner, self.out)
        return x + inner


class MedusaHeads(nn.Module):
    """All heads of one target. Untrained, every head repeats the target's own next-token guess.

    head: the target's output layer, which shared heads use as it is (it is not part of this
    module's weights). accuracies[k][i]: how often, on held-out text, the rank-i guess of head k+1
    was what the target chose.
    """

    def __init__(
        self, config: HeadsConfig, head: nn.Module, accuracies: Sequence[Sequence[float]] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        self.blocks = nn.ModuleList(HeadBlock(config) for _ in range(config.blocks))
        # in a tuple, so that the target's weights are not registered as this module's
        self._target = (head,)
        if not config.shared_head:
            copies = head.get_parameter("weight").detach()[None].repeat(config.heads, 1, 1)
            self.out = nn.Parameter(copies)

    def bind(self, head: nn.Module) -> None:
        """Use `head` as the target's output layer, such as its prepared form."""
        self._target = (head,)

    def initialize(self, generator: torch.Generator) -> None:
        """Make untrained heads ready for training."""
        for block in self.blocks:
            assert isinstance(block, HeadBlock)
            block.initialize(generator)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """What each head multiplies with its output matrix: [..., D] -> [..., heads, D]."""
        x = hidden[..., None, :].expand(*hidden.shape[:-1], self.config.heads, hidden.shape[-1])
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """Logits [..., vocab] of one head (0-based) from its features [..., D]."""
        if self.config.shared_head:
            return self._target[0](features)
        return F.linear(features, self.out[head])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all heads: hidden [..., D] -> [..., heads, vocab]."""
        features = self.features(hidden)
        if self.config.shared_head:
            return self._target[0](features)
        return torch.einsum("...kd,kvd->...kv", features, self.out)


def fingerprint(model: Decoder) -> str:
    """A short hash of the model's shape and last weights, the same in every dtype and place."""
    if model.identity is not None:
        return model.identity
    config = model.config
    shape = [config.vocab_size, config.width, config.layers, config.heads, config.kv_heads]
    mixers = [mixer.chosen() for mixer in config.mixers]
    digest = hashlib.sha256(json.dumps([shape, mixers]).encode())
    last = model.blocks[-1]
    assert isinstance(last, Block)
    parts: list[nn.Module] = [model.head, model.norm, last.mlp.down]
    for weight in (part.get_parameter("weight") for part in parts):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_heads(
    heads: MedusaHeads,
    model: Decoder,
    out: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Replace the drafter directory `out` by these heads; returns it.

    `dtype` converts the weights, None keeps them; `facts` are added to drafter.json. Raises
    CheckpointError when the disk refuses; `out` then stays as it was.
    """
    out = Path(out)
    config = {
        "kind": "medusa",
        **asdict(heads.config),
        "target": fingerprint(model),
        "accuracies": heads.accuracies,
        **(facts or {}),
    }
    tensors = {
        name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in heads.state_dict().items()
    }
    with replace_dir(out) as aside:
        try:
            save_file(tensors, aside / WEIGHTS_FILE)
        except SafetensorError as error:
            raise CheckpointError(f"could not write {out}: {error}") from error
        (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def load_heads(source: str | Path, model: Decoder) -> MedusaHeads:
    """The heads in `source`, bound to `model`, in its dtype and on its device.

    Raises DrafterError when they were made for another model or are damaged.
    """
    folder = Path(source)
    data = _read_config(folder)
    config = _heads_config(data, folder)
    _check_target(config, data, model, folder)
    accuracies = data.get("accuracies", [])
    if len(accuracies) > config.heads:
        raise DrafterError(
            f"{folder} is calibrated for drafts {len(accuracies)} tokens deep but has only "
            f"{config.heads} heads; calibrate it again with linspec train-drafter"
        )
    heads = MedusaHeads(config, model.head, accuracies)
    try:
        heads.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DrafterError(f"{folder / WEIGHTS_FILE} is missing or damaged: {error}") from error
    return heads.to(model.embed.weight.device, model.dtype).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DrafterError(
            f"no drafter in {folder}: {CONFIG_FILE} is missing; train one: linspec train-drafter"
        ) from error
    except (OSError, ValueError) as error:
        raise DrafterError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != "medusa":
        kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise DrafterError(f"{path} describes a drafter of kind {kind!r}, expected 'medusa'")
    return data


def _heads_config(data: Mapping[str, Any], folder: Path) -> HeadsConfig:
    known = {field.name for field in fields(HeadsConfig)}
    try:
        return HeadsConfig(**{key: value for key, value in data.items() if key in known})
    except (TypeError, ConfigError) as error:
        raise DrafterError(f"{folder / CONFIG_FILE} is not a sound drafter: {error}") from error


def _check_target(
    config: HeadsConfig, data: Mapping[str, Any], model: Decoder, folder: Path
) -> None:
    made, given = (config.width, config.vocab_size), (model.config.width, model.config.vocab_size)
    if made != given:
        raise DrafterError(
            f"the drafter in {folder} was trained for another model: width {made[0]} and "
            f"vocabulary {made[1]}, this model has width {given[0]} and vocabulary {given[1]}"
        )
    ours = fingerprint(model)
    if data.get("target") != ours:
        raise DrafterError(
            f"the drafter in {folder} was trained for another model: fingerprint "
            f"{data.get('target')}, this model has {ours}; train its own: linspec train-drafter"
        )
