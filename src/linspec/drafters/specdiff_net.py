"""A masked-diffusion model that was trained for one target (SpecDiff-2, arXiv 2511.00606).

    net = SpecDiffNet.starting_from(load_diffusion("embedded-diffusion"), places=4, vocab_size=4096)
    logits = net.logits(hidden)        # of the target's tokens

Which tokens see which is that of the served drafter: see `seen_in_rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.trained import TrainedDrafter, read_accuracies
from linspec.errors import ConfigError, DrafterError
from linspec.mixers.ops.exact import capped
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.head import make_head
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.border import parse


class TiedHead(nn.Module):
    """An output layer that has the weights of the embedding, and so none of its own in a file."""

    def __init__(self, model: MaskedDiffusion) -> None:
        super().__init__()
        # in a tuple, so that it is not registered as a part
        self._model = (model,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (model,) = self._model
        logits = F.linear(x, model.embed.weight)
        cap = model.config.logit_cap
        return capped(logits, cap) if cap else logits


class SpecDiffNet(TrainedDrafter):
    """The denoiser, how many tokens it drafts at once, and how often these were right.

    accuracies[d][k]: how often, on held-out text, the rank-k guess for the draft d + 1 was what the target
    chose, where those before it were right.
    """

    kind = "specdiff"

    def __init__(
        self,
        config: DiffusionConfig,
        vocab_size: int,
        places: int,
        accuracies: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__()
        self.vocab_size, self.places = vocab_size, places
        self.accuracies = [list(row) for row in accuracies]
        self.denoiser = MaskedDiffusion(config)
        if config.tied_embeddings:
            self.denoiser.add_module("head", TiedHead(self.denoiser))

    @classmethod
    def starting_from(cls, model: Decoder, vocab_size: int, places: int, layers: int = 0) -> Self:
        """From the weights of a diffusion model, or of an autoregressive one that gets a mask token.

        layers: how many to keep, spread evenly, the first and the last among them; 0 keeps all.
        """
        kept = layers_kept(model.config.layers, layers)
        config = diffusion_config(model.config)
        mixers = tuple(config.mixers[at] for at in kept)
        found = cls(replace(config, layers=len(kept), mixers=mixers), vocab_size, places)
        theirs, mine = model.state_dict(), found.denoiser.state_dict()
        with torch.no_grad():
            for name, tensor in mine.items():
                given = theirs[_name_in(name, kept)].to(tensor)
                tensor[: len(given)].copy_(given)
                if len(tensor) > len(given):
                    # a new mask token is like the mean of all others
                    tensor[len(given) :].copy_(given.mean(0))
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of the target's tokens; the mask is none of them."""
        return target_logits(
            self.denoiser.head(hidden), self.vocab_size, self.denoiser.config.mask_id
        )

    def model(self) -> MaskedDiffusion:
        """The denoiser as a model like any other; of no use for training afterwards."""
        model = self.denoiser
        if model.config.tied_embeddings:
            model.add_module("head", make_head(model.config))
            model.tie()
        return model

    def described(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "places": self.places,
            "accuracies": self.accuracies,
            "diffusion": self.denoiser.config.to_dict(),
        }

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        try:
            places = parse(int, data.get("places"), f"{path}: places")
            config = parse(DiffusionConfig, data.get("diffusion"), f"{path} is not a sound drafter")
        except ConfigError as error:
            raise DrafterError(str(error)) from error
        ours = target.config.vocab_size
        if places < 1 or data.get("vocab_size") != ours:
            raise DrafterError(
                f"the drafter in {path.parent} drafts {places} tokens of {data.get('vocab_size')}, and this "
                f"model has {ours} tokens; train its own: linspec train-drafter --kind specdiff"
            )
        accuracies = read_accuracies(data.get("accuracies", []), places, ours, path)
        return cls(config, ours, places, accuracies)


def layers_kept(layers: int, count: int) -> list[int]:
    """`count` of so many layers, spread evenly, the first and the last among them; 0 is all."""
    if not 0 < count < layers:
        return list(range(layers))
    return [round(at * (layers - 1) / max(1, count - 1)) for at in range(count)]


def _name_in(name: str, kept: Sequence[int]) -> str:
    """What a tensor is called in the model that some layers were taken from."""
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(kept[int(parts[1])])
    return ".".join(parts)


def diffusion_config(config: Any) -> DiffusionConfig:
    """The shape of a diffusion model; of an autoregressive one with a mask token and a logit shift."""
    if isinstance(config, DiffusionConfig):
        if config.block_length is not None:
            raise ConfigError(
                f"a model of blocks of {config.block_length} tokens cannot become a drafter of kind "
                "'specdiff', whose drafts begin anywhere; start from one that sees the whole text"
            )
        return config
    data = config.to_dict()
    data["mixers"] = [{"name": "softmax"}] * config.layers
    data |= {"vocab_size": config.vocab_size + 1, "mask_id": config.vocab_size, "logit_shift": 1}
    return DiffusionConfig.from_dict(data)


def target_logits(logits: torch.Tensor, vocab_size: int, mask_id: int) -> torch.Tensor:
    """Logits [..., V] of a diffusion model as those of its target's tokens, none of which is the mask."""
    found = logits[..., :vocab_size].float()
    missing = vocab_size - found.shape[-1]
    if missing > 0:
        found = F.pad(found, (0, missing), value=float("-inf"))
    if mask_id < vocab_size:
        mask = torch.tensor(mask_id, device=found.device)
        found = found.index_fill(-1, mask, float("-inf"))
    return found


def seen_in_rounds(ends: torch.Tensor, masks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows see which where a text is read in rounds, [N, N]; and the position of each row.

    ends [R]: the last token of each round, ascending. Rows are the tokens up to the last of these, then the
    `masks` of each round. What a round reads sees all tokens up to its end, and its own masks; these see the
    same. So the served drafter computes: once for each token, in the round that reads it.
    """
    length, rounds = int(ends[-1]) + 1, len(ends)
    text = torch.arange(length, device=ends.device)
    mask_rounds = torch.arange(rounds, device=ends.device).repeat_interleave(masks)
    of_round = torch.cat((torch.searchsorted(ends, text), mask_rounds))
    behind = torch.arange(1, masks + 1, device=ends.device).repeat(rounds)
    positions = torch.cat((text, ends[mask_rounds] + behind))
    sees_text = text <= ends[of_round][:, None]
    sees_masks = of_round[:, None] == mask_rounds
    return torch.cat((sees_text, sees_masks), 1), positions


def hidden_in_rounds(
    model: MaskedDiffusion, ids: torch.Tensor, ends: torch.Tensor, masks: int
) -> torch.Tensor:
    """Final states [B, R, P, D] that say the drafts of each round behind ids [B, T].

    P: `masks`, and with a logit shift one more, that of the newest token.
    """
    seen, positions = seen_in_rounds(ends, masks)
    length, rounds = int(ends[-1]) + 1, len(ends)
    hidden_tokens = ids.new_full((len(ids), rounds * masks), model.config.mask_id)
    x, ropes = model.enter(torch.cat((ids[:, :length], hidden_tokens), 1), positions)
    for block, rope in zip(model.layers, ropes, strict=True):
        x = x + block.mixer(block.mixer_norm(x), rope, seen[None])
        x = x + block.mlp(block.mlp_norm(x))
    x = model.leave(x)
    own = x[:, length:].unflatten(1, (rounds, masks))
    return torch.cat((x[:, ends][:, :, None], own), 2) if model.config.logit_shift else own
