"""What the configurations of most families of decoders say alike, and the names of Llama's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from linspec.checkpoints.families.base import Rule, activation_here, activation_there, read_ids
from linspec.checkpoints.families.ropes import read_rope, write_rope
from linspec.errors import UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

C = TypeVar("C", bound=DecoderConfig)
LAYER_TYPES = {"softmax": "full_attention", "window": "sliding_attention"}
# where configurations keep what is not called the same in all families
NAMES = {"norm_eps": "rms_norm_eps", "activation": "hidden_act"}


def read_decoder(
    hf: PreTrainedConfig, names: Mapping[str, str] = NAMES, **own: Any
) -> DecoderConfig:
    """The decoder of a configuration with Llama's names; `own` is what the family adds or says otherwise.

    names: their names of `norm_eps` and `activation`.
    """
    return read_as(DecoderConfig, hf, names, **own)


def read_as(kind: type[C], hf: PreTrainedConfig, names: Mapping[str, str] = NAMES, **own: Any) -> C:
    """`read_decoder` for a configuration of another `kind`."""
    heads = hf.num_attention_heads
    shared = {
        "vocab_size": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(hf, "num_key_value_heads", heads),
        "head_width": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "mlp_width": hf.intermediate_size,
        "family": hf.model_type,
        "norm_eps": getattr(hf, names["norm_eps"]),
        "activation": activation_here(getattr(hf, names["activation"])),
        "tied_embeddings": hf.tie_word_embeddings,
        "max_positions": hf.max_position_embeddings,
        "bos_id": hf.bos_token_id,
        "eos_ids": read_ids(hf.eos_token_id),
        "pad_id": hf.pad_token_id,
    }
    if "rope" not in own:
        shared["rope"] = read_rope(hf)
    return kind(**shared | own)


def write_decoder(config: DecoderConfig, names: Mapping[str, str] = NAMES) -> dict[str, Any]:
    """The inverse of `read_decoder` without what is the family's own."""
    return {
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        names["activation"]: activation_there(config, "gelu_pytorch_tanh"),
        names["norm_eps"]: config.norm_eps,
        "max_position_embeddings": config.max_positions,
        **write_rope(config.rope),
    }


def window_of(config: DecoderConfig) -> int | None:
    """The widest window of its layers; None without one."""
    return max((m.window for m in config.mixers if m.name == "window"), default=None)


def same_windows(hf: PreTrainedConfig) -> tuple[MixerConfig, ...]:
    """Mixers of a family in which all layers have the window `sliding_window`, or none has."""
    if hf.sliding_window is None:
        return ()
    return (MixerConfig(name="window", window=hf.sliding_window),) * hf.num_hidden_layers


def layer_types(hf: PreTrainedConfig) -> tuple[MixerConfig, ...]:
    """Mixers of a family that says for each layer what it is."""
    mixers = {"full_attention": MixerConfig()}
    if hf.sliding_window is not None:
        mixers["sliding_attention"] = MixerConfig(name="window", window=hf.sliding_window)
    unknown = set(hf.layer_types) - set(mixers)
    if unknown:
        raise UnsupportedModel(
            f"layer types {sorted(unknown)} are not supported; supported: full_attention, and "
            "sliding_attention with use_sliding_window and a sliding_window"
        )
    return tuple(mixers[kind] for kind in hf.layer_types)


def written_layer_types(config: DecoderConfig) -> list[str]:
    """The inverse of `layer_types`."""
    return [LAYER_TYPES[mixer.name] for mixer in config.mixers]


_LAYER, _BLOCK = "model.layers.{}.", "blocks.{}."
PROJECTION_RULES = tuple(
    Rule(f"{_LAYER}self_attn.{name}_proj", (f"{_BLOCK}mixer.{name}",)) for name in "qkvo"
)
ATTENTION_RULES = (
    *PROJECTION_RULES,
    Rule(f"{_LAYER}self_attn.q_norm", (f"{_BLOCK}mixer.q_norm",)),
    Rule(f"{_LAYER}self_attn.k_norm", (f"{_BLOCK}mixer.k_norm",)),
)
GATED_RULES = tuple(
    Rule(f"{_LAYER}mlp.{name}_proj", (f"{_BLOCK}mlp.{name}",)) for name in ("gate", "up", "down")
)
OUTER_RULES = (
    Rule("model.embed_tokens", ("embed",)),
    Rule("model.norm", ("norm",)),
    Rule("lm_head", ("head",)),
)
NORM_RULES = (
    Rule(f"{_LAYER}input_layernorm", (f"{_BLOCK}mixer_norm",)),
    Rule(f"{_LAYER}post_attention_layernorm", (f"{_BLOCK}mlp_norm",)),
)
LLAMA_RULES = (*OUTER_RULES, *NORM_RULES, *ATTENTION_RULES, *GATED_RULES)
# constants that old checkpoints carry, and the copy of a tied embedding
IGNORED = (".rotary_emb.inv_freq", "lm_head.weight")
