"""linspec's own config.json as transformers reads it, and its place among the Auto classes.

`register_when_loaded()` costs nothing where transformers is not used: the configuration is registered when
transformers' table of configurations is imported, the model when the first configuration is made,
which is always before a model is looked up.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig
from linspec.utils.format_version import CURRENT, KEY, check_format


class LinspecConfig(PreTrainedConfig):
    """Configuration of a linspec checkpoint.

    decoder: the whole shape of the model, as `DecoderConfig.to_dict` gives it. The other fields
    repeat parts of it under transformers' names and follow it when they disagree.
    """

    model_type = "linspec"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    format_version: str | None = None
    decoder: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.format_version is not None:
            check_format({KEY: self.format_version}, "config.json", ConfigError)
        # what is saved again is of this version
        self.format_version = CURRENT
        if self.decoder is not None:
            self._follow(self.decoder_config())
        # importing it registers the model class
        import linspec.integrations.transformers.model  # noqa: F401

    def decoder_config(self) -> DecoderConfig:
        """The decoder's configuration; raises ConfigError if there is none or it is not sound."""
        if self.decoder is None:
            raise ConfigError(
                "a LinspecConfig needs decoder=...: pass DecoderConfig(...).to_dict(), or read it "
                "with AutoConfig.from_pretrained from a directory that linspec saved"
            )
        return DecoderConfig.from_dict(self.decoder)

    def get_text_config(self, *args: Any, **kwargs: Any) -> LinspecConfig:
        """This configuration: its field `decoder` is not a configuration of transformers."""
        return self

    def _follow(self, shape: DecoderConfig) -> None:
        self.vocab_size = shape.vocab_size
        self.hidden_size, self.intermediate_size = shape.width, shape.mlp_width
        self.num_hidden_layers = shape.layers
        self.num_attention_heads, self.num_key_value_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.head_width
        self.max_position_embeddings = shape.max_positions
        self.tie_word_embeddings = shape.tied_embeddings
        self.bos_token_id, self.pad_token_id = shape.bos_id, shape.pad_id
        ends = list(shape.eos_ids)
        self.eos_token_id = ends[0] if len(ends) == 1 else ends or None


AutoConfig.register("linspec", LinspecConfig, exist_ok=True)
