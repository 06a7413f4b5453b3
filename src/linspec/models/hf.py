"""linspec's own checkpoints as a transformers model: generate(), Trainer and peft work on them.

    import linspec
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/to/linearized")
    model.generate(ids, max_new_tokens=20)

Without a cache a call is the decoder's full form, parallel over time and differentiable. With one,
new tokens are a step of the decoder's inference form, committed at once. Speculation is not for
generate(): `linspec.LLM` has the drafters that linear states allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from linspec.config import DecoderConfig
from linspec.errors import CheckpointError, ConfigError, InputError, StateError
from linspec.models.decoder import Decoder
from linspec.models.hf_cache import UNCROPPABLE, LinspecCache
from linspec.models.hf_config import LinspecConfig
from linspec.models.padding import from_left, to_left
from linspec.places import Place
from linspec.state import DecoderState
from linspec.step import Feed

IGNORED_LABEL = -100


class LinspecForCausalLM(PreTrainedModel, GenerationMixin):
    """A linspec decoder with transformers' interface.

    Padding may stand at either end of a row (`attention_mask`), at the left end for generate().
    """

    config_class = LinspecConfig
    main_input_name = "input_ids"
    decoder: Decoder
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012
    _no_split_modules = ("Block",)

    def __init__(self, config: LinspecConfig) -> None:
        super().__init__(config)
        decoder = Decoder(config.decoder_config())
        # both hold the same modules by the same names: the names on disk are the decoder's, and
        # what replaces a module here (peft, resizing) replaces it there
        self._modules = decoder._modules
        self.__dict__["decoder"] = decoder
        self.post_init()

    @property
    def shape(self) -> DecoderConfig:
        """The decoder's configuration."""
        return self.decoder.config

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a tensor that is missing or unknown raises CheckpointError."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            if info[f"{kind}_keys"]:
                raise CheckpointError(
                    f"{source} has {kind} tensors: {', '.join(sorted(info[f'{kind}_keys'])[:4])}; "
                    "config.json and weights are of different models"
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but all at once; files of others in `save_directory` stay.

        Raises ConfigError for a place that may not be written, such as the directory that the model
        was loaded from, and CheckpointError where a file that linspec did not write is in the way.
        """
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        inputs = (self.name_or_path,) if self.name_or_path else ()
        place = Place(
            Path(save_directory), "save_pretrained", inputs=inputs, overwrite=True, beside=True
        )
        with place.held(), place.replaced() as aside:
            return super().save_pretrained(aside, *args, **kwargs)

    # ---- embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; the decoder's configuration follows."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.decoder = {**self.config.decoder, "vocab_size": self.config.vocab_size}
        self.decoder.config = self.config.decoder_config()
        return embeddings

    # ---- the two forms

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: LinspecCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits [B, T, vocab] of input_ids [B, T]; logits at padding mean nothing.

        past_key_values or use_cache=True: run the inference form and commit; nothing is
        differentiable then. labels: as input_ids, -100 where no loss is wanted; they need the full
        form. logits_to_keep: only the last so many positions, or those of an index tensor; 0 keeps
        all.
        """
        if past_key_values is None and use_cache:
            past_key_values = LinspecCache()
        _check_request(input_ids, past_key_values, labels, kwargs)
        real = _real(input_ids, attention_mask, past_key_values)
        _check_positions(kwargs.pop("position_ids", None), real, past_key_values)
        if past_key_values is None:
            logits = self._full(input_ids, real, logits_to_keep)
        else:
            logits = self._step(input_ids, real, past_key_values, logits_to_keep)
        loss = None if labels is None else self._loss(logits, labels, real, kwargs)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return out.to_tuple() if return_dict is False else out

    def _full(
        self, ids: torch.Tensor, real: torch.Tensor | None, keep: int | torch.Tensor
    ) -> torch.Tensor:
        if real is None:
            hidden = self.decoder.hidden(ids)
        else:
            ids, shifts = to_left(ids, real)
            hidden = from_left(self.decoder.hidden(ids), shifts)
        return self.decoder.head(hidden[:, _kept(keep)])

    def _step(
        self,
        ids: torch.Tensor,
        real: torch.Tensor | None,
        cache: LinspecCache,
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """Run and commit the real tokens of each row; their logits in the padded places."""
        state = cache.bind(self.decoder, len(ids))
        wanted = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        only_last = isinstance(keep, int) and keep == 1 and bool(wanted[:, -1].all())
        tokens = [row[mine].tolist() for row, mine in zip(ids, wanted, strict=True)]
        feeds = [Feed(i, row, all_logits=not only_last) for i, row in enumerate(tokens) if row]
        logits = _run(self.decoder, feeds, state) if feeds else None
        cache.columns += ids.shape[1]
        if only_last and logits is not None:
            return logits[:, None].clone()
        padded = self.decoder.embed.weight.new_zeros(*ids.shape, self.shape.vocab_size)
        if logits is not None:
            padded[wanted] = logits
        return padded[:, _kept(keep)]

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        real: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if real is not None:
            # logits at padding have seen the whole row, its first token included
            before = real.roll(1, dims=1)
            before[:, 0] = True
            labels = labels.masked_fill(~(real & before), IGNORED_LABEL)
        return self.loss_function(
            logits=logits, labels=labels, vocab_size=self.shape.vocab_size, **kwargs
        )

    # ---- generate()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *sizes: int,
    ) -> None:
        """Called once by generate(): refuse what cannot be done, then put an empty cache there."""
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted or getattr(generation_config, "is_assistant", False):
            raise StateError(UNCROPPABLE)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation {generation_config.cache_implementation!r} is not for "
                "linspec models, which bring their own cache; leave it out"
            )
        _check_prompts(model_kwargs.get("attention_mask"))
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinspecCache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises StateError: transformers' paged batches hold keys and values, not linear state."""
        raise StateError("linear state cannot be paged; linspec.LLM batches continuously by itself")


def _run(decoder: Decoder, feeds: list[Feed], state: DecoderState) -> torch.Tensor:
    """Step and commit whole chains; an interrupted step leaves nothing staged."""
    try:
        logits = decoder.step(feeds, state).logits
    except BaseException:
        for feed in feeds:
            state.drop(feed.slot)
        raise
    for feed in feeds:
        state.commit(feed.slot, range(len(feed.tokens)))
    return logits


def _kept(keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-keep, None) if isinstance(keep, int) else keep


def _check_request(
    ids: Any, cache: Any, labels: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raise for what would otherwise be ignored in silence."""
    if kwargs.pop("inputs_embeds", None) is not None or ids is None:
        raise ConfigError("linspec models take input_ids, not inputs_embeds")
    if ids.dim() != 2 or not ids.shape[1]:
        raise InputError(f"input_ids must be [rows, tokens], got shape {tuple(ids.shape)}")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise ConfigError(
                f"linspec models have no {name.removeprefix('output_')} to return; leave {name} "
                "out, or use the decoder itself: linspec.load_model(...)"
            )
    if cache is not None and not isinstance(cache, LinspecCache):
        raise StateError(
            f"a linspec model cannot use a {type(cache).__name__}; leave past_key_values out, or "
            "pass linspec.models.hf.LinspecCache()"
        )
    if cache is not None and labels is not None:
        raise ConfigError("labels need the differentiable form; leave use_cache and the cache out")


def _real(
    ids: torch.Tensor, mask: torch.Tensor | None, cache: LinspecCache | None
) -> torch.Tensor | None:
    """Which of the new ids are real, [B, T]; None for all. The mask may cover the cache, too."""
    if mask is None:
        return None
    past = 0 if cache is None else cache.columns
    if (
        mask.dim() != 2
        or len(mask) != len(ids)
        or mask.shape[1]
        not in (
            ids.shape[1],
            past + ids.shape[1],
        )
    ):
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}"
            f" after {past} columns; it must have one column for each"
        )
    real = mask[:, -ids.shape[1] :].bool()
    return None if bool(real.all()) else real


def _check_positions(
    positions: torch.Tensor | None, real: torch.Tensor | None, cache: LinspecCache | None
) -> None:
    """Raise InputError unless `positions` are what the decoder counts itself."""
    if positions is None:
        return
    rows = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    counted = rows.long().cumsum(1) - 1
    if cache is not None and cache.state is not None:
        starts = [cache.state.length(slot) for slot in range(cache.state.slots)]
        counted = counted + torch.tensor(starts, device=counted.device)[:, None]
    if bool(((positions != counted) & rows).any()):
        raise InputError(
            "position_ids must count the real tokens of each row from 0; several texts packed into "
            "one row would see each other, so give each its own row"
        )


def _check_prompts(mask: torch.Tensor | None) -> None:
    """Raise InputError for prompts that generate() could not continue."""
    if mask is None:
        return
    real = mask.bool()
    if not bool(real.any(1).all()):
        raise InputError("a prompt is all padding; give it at least one token")
    if not bool(real[:, -1].all()):
        raise InputError(
            "prompts are padded on the right, where new tokens would go; set padding_side='left'"
        )


AutoModelForCausalLM.register(LinspecConfig, LinspecForCausalLM, exist_ok=True)
