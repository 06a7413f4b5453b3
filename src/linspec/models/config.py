"""The shapes of whole models: a decoder, an encoder, an encoder-decoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.utils.border import STRICT, parse
from linspec.utils.sizes import check_choice, check_positive, check_sizes

HEADS = ("none", "pooler", "masked-lm", "classifier")
NORMS = ("before", "behind", "both")
RESIDUALS = ("sequential", "parallel", "parallel-shared")
LAYER_ROPES = ("main", "local", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Everything needed to build a decoder.

    norms: of a mixer and an MLP, 'before' them, 'behind' them ahead of the residual sum, or 'both'.
    residual: 'sequential'; 'parallel', where the MLP reads what the mixer reads, by a norm of its own;
    'parallel-shared' without one. residual_scale: factor on what mixers and MLPs add. embedding_scale: on
    the embeddings of tokens; logit_scale: on the final hidden states ahead of the output layer. logit_cap:
    logits x become cap·tanh(x / cap); 0 for none. layer_ropes: for each layer
    'main' for `rope`, 'local' for `local_rope` or 'none'; empty for `rope` in all.
    """

    tied_embeddings: bool = True
    norms: str = "before"
    residual: str = "sequential"
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    layer_ropes: tuple[str, ...] = ()
    local_rope: RopeConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        for name in ("residual_scale", "embedding_scale", "logit_scale"):
            check_positive(name, getattr(self, name))
        check_positive("logit_cap", self.logit_cap, zero=True)
        check_choice("norms", self.norms, NORMS)
        check_choice("residual", self.residual, RESIDUALS)
        if self.residual != "sequential" and self.norms != "before":
            raise ConfigError(
                f"residual {self.residual!r} goes with norms 'before', got norms {self.norms!r}"
            )
        self._check_ropes()

    def _check_ropes(self) -> None:
        """Raise ConfigError unless each layer has a rope that is there."""
        for name in self.layer_ropes:
            check_choice("layer_ropes", name, LAYER_ROPES)
        if self.layer_ropes and (len(self.layer_ropes), self.positions) != (self.layers, "rope"):
            raise ConfigError(
                f"{len(self.layer_ropes)} layer_ropes for {self.layers} layers with positions "
                f"{self.positions!r}; there must be one for each layer, with positions 'rope'"
            )
        if ("local" in self.layer_ropes) != (self.local_rope is not None):
            raise ConfigError(
                "local_rope goes with layers whose layer_ropes is 'local': give both, or neither"
            )
        if self.local_rope is not None:
            self.local_rope.check_heads(self.head_width)

    @property
    def arranged(self) -> bool:
        """Whether norms or residual sums of its blocks are arranged in another way than in Llama."""
        return (self.norms, self.residual, self.residual_scale) != ("before", "sequential", 1.0)

    def check_plain(self, what: str) -> None:
        """Raise ConfigError if `what`, which has blocks of its own kind, is to be arranged in another way."""
        if self.arranged or self.layer_ropes or self.score_cap:
            raise ConfigError(
                f"norms, residual, residual_scale, layer_ropes and score_cap mean nothing to {what}; leave "
                "them out"
            )

    def token_ids(self) -> dict[str, Any]:
        """Special tokens under their Hugging Face names; a single end token is a number."""
        eos = list(self.eos_ids)
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_id,
        }

    def hub_sizes(self) -> dict[str, Any]:
        """Sizes that transformers wants to know, under its names."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied_embeddings,
        }

    def facts(self) -> dict[str, Any]:
        """What `linspec info MODEL` says of the shape."""
        named = ("width", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        mixers = ", ".join(dict.fromkeys(mixer.name for mixer in self.mixers))
        note = self.rope.note if self.positions == "rope" else None
        said = {"mixers": mixers} | ({"positions": note} if note else {})
        return {**{name: getattr(self, name) for name in named}, **said}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig(StackConfig):
    """Everything needed to build an encoder.

    post_norm: norms follow their residual sums, and the embeddings, as in BERT; else they precede
    the mixer and the MLP, and one closes the stack, as in T5. token_types: kinds of dense_groups that
    tokens can be of, 0 for none. head: 'none', 'pooler', 'masked-lm' or 'classifier', which has one
    output for each of `labels`.
    """

    post_norm: bool = True
    token_types: int = 0
    head: str = "none"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        check_sizes(self, "token_types", least=0)
        check_choice("head", self.head, HEADS)
        if (self.head == "classifier") != bool(self.labels):
            raise ConfigError(
                f"head {self.head!r} with labels {self.labels}: a classifier needs labels"
            )

    def token_ids(self) -> dict[str, Any]:
        """As those of a decoder."""
        return {"pad_token_id": self.pad_id}

    def hub_sizes(self) -> dict[str, Any]:
        """None: transformers' generate() does not run it."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What `linspec info MODEL` says beside layers and vocabulary."""
        return {}

    @property
    def causal(self) -> bool:
        """Every token sees every other one."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqConfig:
    """An encoder, and a decoder that attends to it. start_id: the token that every output begins with."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    family: str = "t5"
    start_id: int = 0
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ConfigError(f"the encoder's {name} is {ours}, the decoder's {theirs}")
        self.decoder.check_plain("the decoder of an encoder-decoder")
        check_sizes(self, "start_id", least=0)
        if self.start_id >= self.vocab_size:
            raise ConfigError(f"start_id {self.start_id} is none of {self.vocab_size} tokens")

    def token_ids(self) -> dict[str, Any]:
        """As those of a decoder."""
        return self.decoder.token_ids() | {"decoder_start_token_id": self.start_id}

    def hub_sizes(self) -> dict[str, Any]:
        """None: transformers' generate() does not run it."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What `linspec info MODEL` says beside layers and vocabulary."""
        return {}

    @property
    def vocab_size(self) -> int:
        """Tokens that both sides know."""
        return self.decoder.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return self.decoder.eos_ids

    @property
    def position_limit(self) -> int | None:
        """Longest output in tokens, or None when only memory bounds it."""
        return self.decoder.position_limit

    @property
    def layers(self) -> int:
        """Blocks of the deeper side."""
        return max(self.encoder.layers, self.decoder.layers)

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The encoder's mixers, then those of the decoder."""
        return self.encoder.mixers + self.decoder.mixers

    def with_mixers(self, mixers: tuple[MixerConfig, ...]) -> Self:
        """The same model with other mixers, in the order of `mixers`."""
        border = self.encoder.layers
        return replace(
            self,
            encoder=self.encoder.with_mixers(mixers[:border]),
            decoder=self.decoder.with_mixers(mixers[border:]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError on unknown, missing or mistyped entries."""
        return parse(cls, data, f"not a {cls.__name__}")


ModelConfig = DecoderConfig | EncoderConfig | Seq2SeqConfig
