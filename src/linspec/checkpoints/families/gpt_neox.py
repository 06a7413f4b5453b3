"""GPT-NeoX and Pythia: parallel residuals, q, k and v fused head by head, a part of each head turned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, Rule, register
from linspec.checkpoints.families.ropes import read_rope
from linspec.checkpoints.families.shared import read_decoder, write_decoder
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMES = {"norm_eps": "layer_norm_eps", "activation": "hidden_act"}


def _read(hf: PreTrainedConfig) -> DecoderConfig:
    return read_decoder(
        hf,
        NAMES,
        norm="layer",
        gated_mlp=False,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=True,
        residual="parallel" if hf.use_parallel_residual else "sequential",
        rope=read_rope(hf, partial=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    share = config.rope.partial_rotary_factor
    found = write_decoder(config, NAMES) | {
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.residual == "parallel",
        # under the names of older readers, and always: they are 0.25 and 10000 where they are left out
        "rotary_pct": share,
        "rotary_emb_base": config.rope.theta,
    }
    found["rope_parameters"]["partial_rotary_factor"] = share
    return found


_LAYER, _BLOCK = "gpt_neox.layers.{}.", "blocks.{}."
GPT_NEOX = register(
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        rules=(
            Rule("gpt_neox.embed_in", ("embed",)),
            Rule(f"{_LAYER}input_layernorm", (f"{_BLOCK}mixer_norm",)),
            Rule(
                f"{_LAYER}attention.query_key_value",
                (f"{_BLOCK}mixer.q", f"{_BLOCK}mixer.k", f"{_BLOCK}mixer.v"),
                by_head=True,
            ),
            Rule(f"{_LAYER}attention.dense", (f"{_BLOCK}mixer.o",)),
            Rule(f"{_LAYER}post_attention_layernorm", (f"{_BLOCK}mlp_norm",)),
            Rule(f"{_LAYER}mlp.dense_h_to_4h", (f"{_BLOCK}mlp.up",)),
            Rule(f"{_LAYER}mlp.dense_4h_to_h", (f"{_BLOCK}mlp.down",)),
            Rule("gpt_neox.final_layer_norm", ("norm",)),
            Rule("embed_out", ("head",)),
        ),
        read=_read,
        write=_write,
        # constants that old checkpoints carry, and the copy of a tied embedding
        ignored=(
            ".rotary_emb.inv_freq",
            ".attention.bias",
            ".attention.masked_bias",
            "embed_out.weight",
        ),
    )
)
