"""Dream: a Qwen2 without its causal mask, whose logits still stand one position ahead of their token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, register
from linspec.checkpoints.families.shared import IGNORED, LLAMA_RULES, read_as, write_decoder
from linspec.errors import UnsupportedModel
from linspec.models.diffusion_config import DiffusionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _settings(**fields: Any) -> PreTrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**{"mask_token_id": 151666, "pad_token_id": 151643, **fields})


def _read(hf: PreTrainedConfig) -> DiffusionConfig:
    if getattr(hf, "use_sliding_window", False):
        raise UnsupportedModel(
            "use_sliding_window must be false: a masked-diffusion model sees the whole text"
        )
    own = {"family": "Dream", "qkv_bias": True, "mask_id": hf.mask_token_id, "logit_shift": 1}
    return read_as(DiffusionConfig, hf, **own)


def _write(config: DiffusionConfig) -> dict[str, Any]:
    return write_decoder(config) | {"mask_token_id": config.mask_id, "use_sliding_window": False}


DREAM = register(
    Family(
        name="Dream",
        architecture="DreamModel",
        prefix="model.",
        rules=LLAMA_RULES,
        read=_read,
        write=_write,
        ignored=IGNORED,
        settings=_settings,
    )
)
