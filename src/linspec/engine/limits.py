"""What a model and its state have room for; asked once, before a request is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from linspec.decoding.protocols import CausalModel
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.engine.preemption import StateMemory
from linspec.errors import ConfigError, ContextOverflow, InputError, WrongType
from linspec.state.sequence_states import SequenceStates
from linspec.utils.messages import shown
from linspec.utils.sizes import check_instance, check_size


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against.

    longest: most tokens of a prompt and its output, or None. memory: of the states, None for no limit.

    Raises ConfigError for a `longest` beyond the model's positions.
    """

    model: CausalModel
    state: SequenceStates
    longest: int | None = None
    memory: StateMemory | None = None

    def __post_init__(self) -> None:
        if self.longest is None:
            return
        # a prompt and a new token
        check_size("max_model_len", self.longest, least=2)
        limit = self.model.config.position_limit
        if limit is not None and self.longest > limit:
            raise ConfigError(
                f"max_model_len must be at most {limit}, the positions of this model, got {self.longest}; "
                "lower it, or linearize the model: linear mixers have no such limit"
            )

    def fitted(self, request: Request, name: str = "the prompt") -> Request:
        """`request` with no more new tokens than there is room for.

        Raises WrongType for what is no request of token ids, InputError for an empty prompt or embeddings
        that do not fit it, ContextOverflow for one that leaves no room for a new token, StateError for one
        whose keys and values do not fit into memory.
        """
        check_instance("a request", request, Request)
        check_instance("priority", request.priority, int)
        _check_prompt(request.prompt, name)
        if not isinstance(request.params, SamplingParams):
            raise WrongType(
                f"params of a Request are SamplingParams, got {shown(repr(request.params))}"
            )
        size, limit = len(request.prompt), self.model.config.position_limit
        if not size:
            raise InputError(f"{name} has no tokens; give at least one")
        if limit is not None and size > limit:
            raise ContextOverflow(
                f"{name} has {size} tokens, this model takes {limit}; shorten it, or linearize the model: "
                "linear mixers have no such limit"
            )
        self._check_embeddings(request)
        check_instance("tenant of a Request", request.tenant, str)
        self.state.check_room(size)
        params = self._within_memory(self._within(request.params, size, name), size, name)
        return replace(request, params=params)

    def _check_embeddings(self, request: Request) -> None:
        given = request.embeddings
        if given is None:
            return
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            raise WrongType(
                f"embeddings of a Request are a tensor of floats, got {shown(repr(type(given).__name__))}"
            )
        if given.layout != torch.strided or given.is_meta:
            raise WrongType("embeddings of a Request are a dense tensor with values")
        if not self.model.continues_prompt:
            raise InputError(
                "this model reads its prompt as a source, by its own embeddings; leave out embeddings"
            )
        shape = (len(request.prompt), self.model.embed.embedding_dim)
        if tuple(given.shape) != shape:
            raise InputError(
                f"embeddings must be [tokens of the prompt, width of the model] = {list(shape)}, got "
                f"{list(given.shape)}"
            )
        if not bool(given.isfinite().all()):
            raise InputError("embeddings must be finite, these have NaN or infinity; mend them")

    def _within(self, params: SamplingParams, size: int, name: str) -> SamplingParams:
        if self.longest is None:
            return params
        room = self.longest - size
        if room < max(1, params.min_tokens):
            raise ContextOverflow(
                f"{name} has {size} tokens and asks for {max(1, params.min_tokens)} more at least; "
                f"max_model_len is {self.longest}: shorten the prompt or raise max_model_len"
            )
        return replace(params, max_tokens=min(params.max_tokens, room))

    def _within_memory(self, params: SamplingParams, size: int, name: str) -> SamplingParams:
        if self.memory is None:
            return params
        room, least = self.memory.room(size, params.max_tokens), max(1, params.min_tokens)
        if room < least:
            raise ContextOverflow(
                f"the state of {name}, {size} tokens and {least} more at least, takes "
                f"{self.memory.needed(size, least)} bytes; state_bytes is {self.memory.limit}: shorten the "
                "prompt or raise state_bytes"
            )
        return replace(params, max_tokens=room)


def _check_prompt(prompt: object, name: str) -> None:
    """Raise WrongType unless a prompt is a list of whole numbers."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        raise WrongType(
            f"{name} of a Request is a tuple of token ids, got {shown(repr(prompt))}; LLM.encode makes "
            "them of a text"
        )
    for token in prompt if {*map(type, prompt)} != {int} else ():
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise WrongType(
                f"{name} of a Request holds token ids, whole numbers from 0 on, got {shown(repr(token))}"
            )
