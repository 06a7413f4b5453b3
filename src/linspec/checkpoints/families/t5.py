"""T5 as Hugging Face saves it (Raffel et al. 2020): v1.0 with relu, v1.1 and Flan-T5 with gated gelu."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import (
    Family,
    Rule,
    activation_here,
    activation_there,
    read_ids,
    register,
)
from linspec.errors import UnsupportedModel
from linspec.mixers.config import RelativeConfig
from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURE = "T5ForConditionalGeneration"


def _read(hf: PreTrainedConfig) -> Seq2SeqConfig:
    task = (hf.architectures or [ARCHITECTURE])[0]
    if task != ARCHITECTURE:
        raise UnsupportedModel(
            f"{task} is not supported; linspec reads t5 checkpoints of {ARCHITECTURE}"
        )
    shared: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "width": hf.d_model,
        "heads": hf.num_heads,
        "kv_heads": hf.num_heads,
        "head_width": hf.d_kv,
        "mlp_width": hf.d_ff,
        "family": "t5",
        "norm_eps": hf.layer_norm_epsilon,
        "activation": activation_here(hf.dense_act_fn),
        "gated_mlp": hf.is_gated_act,
        "positions": "relative",
        "relative": RelativeConfig(
            buckets=hf.relative_attention_num_buckets,
            max_distance=hf.relative_attention_max_distance,
        ),
        "scaled_scores": False,
        "pad_id": hf.pad_token_id,
    }
    # only v1.0 scales what the shared embedding turns into logits
    scale = hf.d_model**-0.5 if hf.scale_decoder_outputs else 1.0
    start = getattr(hf, "decoder_start_token_id", None)
    return Seq2SeqConfig(
        encoder=EncoderConfig(**shared, layers=hf.num_layers, post_norm=False),
        decoder=DecoderConfig(
            **shared,
            layers=hf.num_decoder_layers,
            logit_scale=scale,
            eos_ids=read_ids(hf.eos_token_id),
        ),
        start_id=start if start is not None else hf.pad_token_id or 0,
    )


def _write(config: Seq2SeqConfig) -> dict[str, Any]:
    stack, relative = config.decoder, config.decoder.relative
    assert relative is not None, "a model of family t5 has a relative bias"
    scaled = stack.logit_scale != 1.0
    return {
        "is_encoder_decoder": True,
        "d_model": stack.width,
        "d_kv": stack.head_width,
        "d_ff": stack.mlp_width,
        "num_layers": config.encoder.layers,
        "num_decoder_layers": stack.layers,
        "num_heads": stack.heads,
        "relative_attention_num_buckets": relative.buckets,
        "relative_attention_max_distance": relative.max_distance,
        "layer_norm_epsilon": stack.norm_eps,
        "feed_forward_proj": _feed_forward(stack),
        "scale_decoder_outputs": scaled,
        "tie_word_embeddings": stack.tied_embeddings,
    }


def _feed_forward(stack: DecoderConfig) -> str:
    # the name "gated-gelu" means the tanh form, which T5 was trained with
    if stack.gated_mlp and stack.activation == "gelu_tanh":
        return "gated-gelu"
    return ("gated-" if stack.gated_mlp else "") + activation_there(stack, "gelu_new")


def _adapt(config: Seq2SeqConfig, names: Collection[str]) -> Seq2SeqConfig:
    """Whether the output matrix is the embedding: for v1.1 only the file tells."""
    tied = config.decoder.logit_scale != 1.0 or "lm_head.weight" not in names
    return replace(config, decoder=replace(config.decoder, tied_embeddings=tied))


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{name}", (f"{ours}.{name}",)) for name in "qkvo")


def _feed(theirs: str, ours: str, *, gated: bool) -> tuple[Rule, ...]:
    names = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    names["wo"] = "down"
    layer = f"{theirs}.DenseReluDense"
    return tuple(Rule(f"{layer}.{name}", (f"{ours}.mlp.{own}",)) for name, own in names.items())


def _feeds(config: Seq2SeqConfig) -> tuple[Rule, ...]:
    gated = config.decoder.gated_mlp
    return (
        *_feed("encoder.block.{}.layer.1", "encoder.blocks.{}", gated=gated),
        *_feed("decoder.block.{}.layer.2", "decoder.blocks.{}", gated=gated),
    )


def _side(side: str) -> tuple[Rule, ...]:
    block, ours = f"{side}.block.{{}}.layer", f"{side}.blocks.{{}}"
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
    return (
        *_attention(f"{block}.0.SelfAttention", f"{ours}.mixer"),
        Rule(f"{block}.0.layer_norm", (f"{ours}.mixer_norm",)),
        Rule(bias, (f"{side}.blocks.0.mixer.relative.table",)),
        Rule(f"{side}.final_layer_norm", (f"{side}.norm",)),
    )


T5 = register(
    Family(
        name="t5",
        architecture=ARCHITECTURE,
        prefix="",
        rules=(
            Rule("shared", ("encoder.embed",)),
            *_side("encoder"),
            Rule("encoder.block.{}.layer.1.layer_norm", ("encoder.blocks.{}.mlp_norm",)),
            *_side("decoder"),
            *_attention("decoder.block.{}.layer.1.EncDecAttention", "decoder.blocks.{}.cross"),
            Rule("decoder.block.{}.layer.1.layer_norm", ("decoder.blocks.{}.cross_norm",)),
            Rule("decoder.block.{}.layer.2.layer_norm", ("decoder.blocks.{}.mlp_norm",)),
            Rule("lm_head", ("decoder.head",)),
        ),
        read=_read,
        write=_write,
        more=_feeds,
        # copies of the shared embedding, and a table that old checkpoints have and no model reads
        ignored=(
            "coder.embed_tokens.weight",
            "EncDecAttention.relative_attention_bias.weight",
            "lm_head.weight",
        ),
        adapt=_adapt,
    )
)
