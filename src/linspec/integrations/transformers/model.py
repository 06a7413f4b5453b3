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

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from linspec.decoding.step import StepInput, StepOutput
from linspec.errors import CheckpointError, ConfigError, StateError
from linspec.integrations.transformers.cache import UNCROPPABLE, LinspecCache
from linspec.integrations.transformers.config import LinspecConfig
from linspec.integrations.transformers.request import (
    IGNORED_LABEL,
    check_positions,
    check_prompts,
    check_request,
    real_tokens,
)
from linspec.mixers.base import Rope
from linspec.models.block import Block
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder, Through
from linspec.models.head import with_cap
from linspec.models.padding import from_left, to_left
from linspec.state.sequence_states import SequenceStates
from linspec.utils.places import Place


class LinspecForCausalLM(PreTrainedModel, GenerationMixin):
    """A linspec decoder with transformers' interface.

    Padding may stand at either end of a row (`attention_mask`), at the left end for generate().
    """

    config_class = LinspecConfig
    main_input_name = "input_ids"
    decoder: Decoder
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012
    _no_split_modules = ("Block", "ArrangedBlock")
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

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
        """Replace the head; its logits are capped if they were."""
        self.head = with_cap(value, self.shape.logit_cap) if type(value) is nn.Linear else value

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
        all. output_hidden_states: what enters each block and what leaves the last norm, [B, T, D]
        each; those at padding mean nothing.
        """
        if past_key_values is None and use_cache:
            past_key_values = LinspecCache()
        watch = check_request(self.config, input_ids, past_key_values, labels, kwargs)
        real = real_tokens(input_ids, attention_mask, past_key_values)
        check_positions(kwargs.pop("position_ids", None), real, past_key_values)
        if past_key_values is None:
            logits, states = self._full(input_ids, real, logits_to_keep, watch)
        else:
            logits, states = self._step(input_ids, real, past_key_values, logits_to_keep, watch)
        out = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, real, kwargs),
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if watch else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _full(
        self,
        ids: torch.Tensor,
        real: torch.Tensor | None,
        keep: int | torch.Tensor,
        watch: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and the hidden states if `watch`."""
        shifts = None
        if real is not None:
            ids, shifts = to_left(ids, real)
        states: list[torch.Tensor] = []
        through = self._through(states if watch else None)
        states.append(self.decoder.hidden(ids, through))
        if shifts is not None:
            states = [from_left(each, shifts) for each in states]
        return self.decoder.head(states[-1][:, _kept(keep)]), states

    def _through(self, entered: list[torch.Tensor] | None) -> Through:
        """Runs a block, notes what enters it, and recomputes it in the backward pass if that is on."""
        recomputed = self.gradient_checkpointing and self.training
        chosen = self.decoder.layers[:: self._every_layers] if recomputed else []

        def run(block: Block, x: torch.Tensor, rope: Rope) -> torch.Tensor:
            if entered is not None:
                entered.append(x)
            if any(block is each for each in chosen):
                return cast("torch.Tensor", self._recomputing(block.__call__, x, rope))
            return cast("torch.Tensor", block(x, rope))

        return run

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Called by transformers: blocks are no module that it knows how to switch."""
        self.gradient_checkpointing = enable
        self._recomputing, self._every_layers = gradient_checkpointing_func, every_n_layers

    def _step(
        self,
        ids: torch.Tensor,
        real: torch.Tensor | None,
        cache: LinspecCache,
        keep: int | torch.Tensor,
        watch: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run and commit the real tokens of each row; logits, and hidden states, in padded places."""
        state = cache.bind(self.decoder, len(ids))
        wanted = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        only_last = not watch and isinstance(keep, int) and keep == 1 and bool(wanted[:, -1].all())
        tokens = [row[mine].tolist() for row, mine in zip(ids, wanted, strict=True)]
        inputs = [
            StepInput(i, row, all_logits=not only_last) for i, row in enumerate(tokens) if row
        ]
        with _inputs_of_blocks(self.decoder, watch) as states:
            output = _run(self.decoder, inputs, state) if inputs else self._nothing()
        cache.columns += ids.shape[1]
        if only_last and inputs:
            return output.logits[:, None].clone(), []
        states = [_padded(each, wanted) for each in (*states, output.hidden) if watch]
        return _padded(output.logits, wanted)[:, _kept(keep)], states

    def _nothing(self) -> StepOutput:
        """What a step without tokens would return."""
        weight = self.decoder.embed.weight
        return StepOutput(
            weight.new_zeros(0, self.shape.width), weight.new_zeros(0, self.shape.vocab_size), []
        )

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
        check_prompts(model_kwargs.get("attention_mask"))
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinspecCache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises StateError: transformers' paged batches hold keys and values, not linear state."""
        raise StateError("linear state cannot be paged; linspec.LLM batches continuously by itself")


def _run(decoder: Decoder, inputs: list[StepInput], state: SequenceStates) -> StepOutput:
    """Step and commit whole chains; an interrupted step leaves nothing staged."""
    try:
        output = decoder.step(inputs, state)
    except BaseException:
        for step_input in inputs:
            state.drop(step_input.slot)
        raise
    for step_input in inputs:
        state.commit(step_input.slot, range(len(step_input.tokens)))
    return output


@contextlib.contextmanager
def _inputs_of_blocks(decoder: Decoder, watch: bool) -> Iterator[list[torch.Tensor]]:
    """A list that gets what enters each block of a step, [M, D]: what its first norm is called with."""
    if watch and decoder.native is not None:
        raise ConfigError(
            "this decoder was prepared: it computes a step in one call and shows no hidden states; "
            "load the model again and do not prepare it"
        )
    seen: list[torch.Tensor] = []
    hooks = [
        block.mixer_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in decoder.layers
        if watch
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _padded(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """rows [P, X] at the P places that are true in `wanted` [B, T]: [B, T, X], zero elsewhere."""
    padded = rows.new_zeros(*wanted.shape, rows.shape[1])
    padded[wanted] = rows
    return padded


def _kept(keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-keep, None) if isinstance(keep, int) else keep


AutoModelForCausalLM.register(LinspecConfig, LinspecForCausalLM, exist_ok=True)
