"""SDAR (Cheng et al. 2025, arXiv 2510.06303): a Qwen3 whose tokens see their whole block.

Its `block_size` and `mask_token_id` are those of the released training code; checkpoints that leave them out
have blocks of 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, register
from linspec.checkpoints.families.shared import IGNORED, LLAMA_RULES, read_as, write_decoder
from linspec.errors import UnsupportedModel
from linspec.models.diffusion_config import DiffusionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _settings(**fields: Any) -> PreTrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(**{"mask_token_id": 151669, "block_size": 4, **fields})


def _read(hf: PreTrainedConfig) -> DiffusionConfig:
    if getattr(hf, "use_sliding_window", False):
        raise UnsupportedModel(
            "use_sliding_window must be false: a block-diffusion model sees all blocks before its own"
        )
    return read_as(
        DiffusionConfig,
        hf,
        family="sdar",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        mask_id=hf.mask_token_id,
        block_length=hf.block_size,
    )


def _write(config: DiffusionConfig) -> dict[str, Any]:
    return write_decoder(config) | {
        "mask_token_id": config.mask_id,
        "block_size": config.block_length,
        "attention_bias": config.qkv_bias,
        "use_sliding_window": False,
    }


SDAR = register(
    Family(
        name="sdar",
        architecture="SDARForCausalLM",
        prefix="model.",
        rules=LLAMA_RULES,
        read=_read,
        write=_write,
        ignored=IGNORED,
        settings=_settings,
    )
)
