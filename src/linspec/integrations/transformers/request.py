"""What a call of a linspec model under transformers may ask: everything else raises, nothing is ignored."""

from __future__ import annotations

from typing import Any

import torch

from linspec.errors import ConfigError, InputError, StateError
from linspec.integrations.transformers.cache import LinspecCache
from linspec.integrations.transformers.config import LinspecConfig

IGNORED_LABEL = -100


def check_request(
    config: LinspecConfig,
    ids: Any,
    cache: Any,
    labels: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Raise for what would otherwise be ignored in silence; returns whether to give hidden states."""
    if kwargs.pop("inputs_embeds", None) is not None or ids is None:
        raise ConfigError("linspec models take input_ids, not inputs_embeds")
    if ids.dim() != 2 or not ids.shape[1]:
        raise InputError(f"input_ids must be [rows, tokens], got shape {tuple(ids.shape)}")
    _check_ids("input_ids", ids, config)
    if _asked("output_attentions", config, kwargs):
        raise ConfigError(
            "linspec models compute no attention weights that could be returned; leave "
            "output_attentions out of the call and of the configuration"
        )
    if cache is not None and not isinstance(cache, LinspecCache):
        raise StateError(
            f"a linspec model cannot use a {type(cache).__name__}; leave past_key_values out, or "
            "pass linspec.integrations.transformers.model.LinspecCache()"
        )
    if labels is not None:
        _check_labels(ids, labels, cache, config)
    return _asked("output_hidden_states", config, kwargs)


def _asked(name: str, config: LinspecConfig, kwargs: dict[str, Any]) -> bool:
    """An option of the call or, where that says nothing, of the configuration."""
    given = kwargs.pop(name, None)
    return bool(getattr(config, name) if given is None else given)


def _check_ids(name: str, ids: torch.Tensor, config: LinspecConfig) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{name} must be whole numbers, got a tensor of {ids.dtype}")
    size = config.vocab_size or 0
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise InputError(
            f"{name} hold token {int(wrong[0])}, the model knows 0 to {size - 1}; use "
            "the tokenizer that belongs to the model"
        )


def _check_labels(
    ids: torch.Tensor, labels: torch.Tensor, cache: Any, config: LinspecConfig
) -> None:
    if cache is not None:
        raise ConfigError("labels need the differentiable form; leave use_cache and the cache out")
    if labels.shape != ids.shape:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(ids.shape)}; "
            "they must be equal: each label is the token at its own place"
        )
    _check_ids("labels", labels[labels != IGNORED_LABEL], config)


def real_tokens(
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


def check_positions(
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


def check_prompts(mask: torch.Tensor | None) -> None:
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
