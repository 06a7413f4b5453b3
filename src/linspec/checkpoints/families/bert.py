"""BERT as Hugging Face saves it (Devlin et al. 2019): the bare model and its heads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import (
    Family,
    Rule,
    activation_here,
    activation_there,
    register,
)
from linspec.errors import UnsupportedModel
from linspec.models.config import EncoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEADS = {
    "BertModel": "pooler",
    "BertForMaskedLM": "masked-lm",
    "BertForPreTraining": "masked-lm",
    "BertForSequenceClassification": "classifier",
}
ARCHITECTURES = {
    "none": "BertModel",
    "pooler": "BertModel",
    "masked-lm": "BertForMaskedLM",
    "classifier": "BertForSequenceClassification",
}


def _read(hf: PreTrainedConfig) -> EncoderConfig:
    task = (hf.architectures or ["BertModel"])[0]
    if task not in HEADS:
        raise UnsupportedModel(
            f"{task} is not supported; supported: {', '.join(HEADS)}. For embeddings, save its "
            "encoder as a BertModel with transformers"
        )
    positions = getattr(hf, "position_embedding_type", "absolute")
    if hf.is_decoder or positions != "absolute":
        raise UnsupportedModel(
            f"this bert has is_decoder={hf.is_decoder} and {positions} positions; linspec supports "
            "bidirectional bert with absolute positions"
        )
    head = HEADS[task]
    if head == "masked-lm" and not hf.tie_word_embeddings:
        raise UnsupportedModel(
            "this bert has an output matrix of its own (tie_word_embeddings is false); linspec "
            "supports masked-LM heads that share the embedding"
        )
    return EncoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_attention_heads,
        head_width=hf.hidden_size // hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        family="bert",
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        activation=activation_here(hf.hidden_act),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        max_positions=hf.max_position_embeddings,
        pad_id=hf.pad_token_id,
        token_types=hf.type_vocab_size,
        head=head,
        labels=tuple(hf.id2label[i] for i in range(hf.num_labels)) if head == "classifier" else (),
    )


def _write(config: EncoderConfig) -> dict[str, Any]:
    written = {
        "architectures": [ARCHITECTURES[config.head]],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": activation_there(config, "gelu_new"),
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
    }
    if config.labels:
        written["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        written["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return written


def _adapt(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """A BertModel may have been saved without its pooler; config.json does not say so."""
    if config.head == "pooler" and not any(name.endswith("pooler.dense.weight") for name in names):
        return replace(config, head="none")
    return config


_LAYER = "bert.encoder.layer.{}."
BERT = register(
    Family(
        name="bert",
        architecture="BertModel",
        prefix="bert.",
        rules=(
            Rule("bert.embeddings.word_embeddings", ("encoder.embed",)),
            Rule("bert.embeddings.position_embeddings", ("encoder.embed_positions",)),
            Rule("bert.embeddings.token_type_embeddings", ("encoder.embed_types",)),
            Rule("bert.embeddings.LayerNorm", ("encoder.norm",)),
            Rule(_LAYER + "attention.self.query", ("encoder.blocks.{}.mixer.q",)),
            Rule(_LAYER + "attention.self.key", ("encoder.blocks.{}.mixer.k",)),
            Rule(_LAYER + "attention.self.value", ("encoder.blocks.{}.mixer.v",)),
            Rule(_LAYER + "attention.output.dense", ("encoder.blocks.{}.mixer.o",)),
            Rule(_LAYER + "attention.output.LayerNorm", ("encoder.blocks.{}.mixer_norm",)),
            Rule(_LAYER + "intermediate.dense", ("encoder.blocks.{}.mlp.up",)),
            Rule(_LAYER + "output.dense", ("encoder.blocks.{}.mlp.down",)),
            Rule(_LAYER + "output.LayerNorm", ("encoder.blocks.{}.mlp_norm",)),
            Rule("bert.pooler.dense", ("pooler",)),
            Rule("classifier", ("classifier",)),
            Rule("cls.predictions.transform.dense", ("masked_lm.dense",)),
            Rule("cls.predictions.transform.LayerNorm", ("masked_lm.norm",)),
            Rule("cls.predictions", ("masked_lm.out",)),
        ),
        read=_read,
        write=_write,
        # constants, copies of what is tied, and parts that the checkpoint's own task leaves unused
        ignored=(
            "embeddings.position_ids",
            "cls.predictions.decoder.weight",
            "cls.predictions.decoder.bias",
            "cls.seq_relationship.weight",
            "cls.seq_relationship.bias",
            "pooler.dense.weight",
            "pooler.dense.bias",
        ),
        renamed=((".gamma", ".weight"), (".beta", ".bias")),
        bare=lambda config: config.head in ("none", "pooler"),
        adapt=_adapt,
    )
)
