"""What a request may ask of a canvas, which is filled in any order."""

from __future__ import annotations

from linspec.decoding.request import Request
from linspec.errors import ConfigError, ContextOverflow, InputError
from linspec.models.diffusion_config import DiffusionConfig

# settings that are about the tokens before one, which may not be decided yet, and what leaves them out
_IN_ORDER = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "bad_words": (),
    "logits_processors": (),
    "grammar": None,
    "logprobs": None,
    "prompt_logprobs": None,
}


def check_request(request: Request, config: DiffusionConfig) -> None:
    """Raise ConfigError, InputError or ContextOverflow for what masked diffusion cannot serve."""
    given = [name for name, none in _IN_ORDER.items() if getattr(request.params, name) != none]
    if given:
        raise ConfigError(
            f"{', '.join(given)} go by the tokens before one, which masked diffusion may decide later; leave "
            "them out. temperature, top_k, top_p, min_p, logit_bias, allowed_token_ids, min_tokens and what "
            "ends a text work"
        )
    if request.embeddings is not None:
        raise InputError("masked diffusion reads tokens; leave out embeddings")
    if config.mask_id in request.prompt:
        raise InputError(
            f"the prompt holds the mask token {config.mask_id}, and only the output has masks; leave it out"
        )
    room(len(request.prompt), request.params.max_tokens, config)


def room(size: int, wanted: int, config: DiffusionConfig) -> int:
    """Masks behind a prompt of `size` tokens: as many as are wanted and have positions, one at least."""
    limit = config.position_limit
    count = wanted if limit is None else min(wanted, limit - size)
    if count < 1:
        raise ContextOverflow(
            f"a prompt of {size} tokens leaves no position for a mask, this model has {limit}; shorten it"
        )
    return count
