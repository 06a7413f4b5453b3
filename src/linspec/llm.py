"""The public way in: prompts to text.

llm = LLM("embedded-aug", drafter="medusa")
print(llm.generate("def fibonacci(n):")[0].text)
for piece in llm.stream("class Stack:"):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.checkpoints.dtype import pick_dtype
from linspec.checkpoints.hub import load_causal_model, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.protocols import CausalModel
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.engine.encoding import Conversation, TextEncoder, as_conversations
from linspec.engine.engine import FAILED, Emitted, Engine
from linspec.engine.prompts import Prompt, as_prompts
from linspec.engine.results import Collector, Generation, Piece, joined
from linspec.errors import ConfigError, ContextOverflow, InputError, WrongType
from linspec.kernels.cpu.threads import check_fork
from linspec.kernels.device import pick_device
from linspec.models.t5 import T5
from linspec.policies import check_policy, make_policy
from linspec.policies.base import Policy
from linspec.state.registry import check_held, kv_of
from linspec.utils.messages import shown
from linspec.utils.sizes import check_size
from linspec.verifiers import make_verifier
from linspec.verifiers.base import Verifier

__all__ = ["LLM", "Generation", "Piece"]


class LLM:
    """A model with its tokenizer, a drafter, a verifier and a policy.

    model: a directory, 'embedded-softmax', 'embedded-aug', or a loaded model (then give `tokenizer`).
    An encoder-decoder reads its prompts and answers them.
    drafter: 'none', NAME or NAME:key=value,… of `linspec list`, such as 'prompt-lookup:max_ngram=3',
    'medusa' or 'draft-model:DIR', or a Drafter. verifier: 'lossless' (greedy requests are verified
    greedily), 'greedy', 'typical' (lossy) or a Verifier. policy: 'auto', a number of draft nodes, or a
    Policy. max_batch: sequences that run at
    once. A loaded model is turned into its inference form, in place. quantize: 8 or 4 bits for the
    weights of a model directory, made as it is loaded (CPU only). device: 'cpu', 'cuda' or 'auto'.
    dtype: what a model directory computes in, 'float32', 'bfloat16', a torch.dtype or 'auto': float32 on
    a CPU, that of the weights on a GPU. kv_cache_dtype: 'auto' keeps the caches of softmax layers in that
    dtype, 'int8' in about a quarter of the memory; `kv` is its old name. max_model_len: most tokens of a
    prompt and its output. Raises CheckpointError, DrafterError or ConfigError before any long work.
    """

    def __init__(
        self,
        model: str | Path | CausalModel,
        *,
        tokenizer: Any = None,
        drafter: str | Drafter = "none",
        verifier: str | Verifier = "lossless",
        policy: str | int | Policy = "auto",
        max_batch: int = 8,
        prefill_tokens: int = 512,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        quantize: int | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        kv: str | None = None,
    ) -> None:
        check_fork()
        kept = kv_of(kv_cache_dtype, kv)
        check_policy(policy)
        check_size("max_batch", max_batch)
        check_size("prefill_tokens", prefill_tokens)
        place = pick_device(str(device) if isinstance(device, torch.device) else device)
        source = resolve(model) if isinstance(model, str | Path) else None
        computed = pick_dtype(dtype, source, place)
        if isinstance(model, str | Path):
            options: dict[str, Any] = {"dtype": computed, "device": place}
            self.model: CausalModel = (
                load_causal_model(model, **options)
                if quantize is None
                else load_for(model, quantize, **options)
            )
            tokenizer = tokenizer or load_text_tokenizer(model)
        elif isinstance(model, nn.Module) and hasattr(model, "new_state"):
            self.model = model
        else:
            raise WrongType(
                f"a model is a name, a path or a loaded model of linspec's, got {shown(repr(model))}; "
                "see linspec.load"
            )
        if tokenizer is None:
            raise ConfigError("a loaded model needs its tokenizer: LLM(model, tokenizer=...)")
        check_held(kv_cache_dtype, self.model.dtype)
        self.max_model_len = self._longest(max_model_len)
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer, self.model.config.vocab_size)
        made = make_drafter(drafter, DrafterContext(self.model, tokenizer, source, max_batch))
        self.model.to_inference()
        self.engine = Engine(
            self.model,
            verifier=make_verifier(verifier),
            drafter=made,
            policy=make_policy(policy, self.model) if made is not None else None,
            slots=max_batch,
            prefill_tokens=prefill_tokens,
            kv=kept,
        )

    def _longest(self, max_model_len: int | None) -> int | None:
        if max_model_len is None:
            return None
        # a prompt and a new token
        check_size("max_model_len", max_model_len, least=2)
        limit = self.model.config.position_limit
        if limit is not None and max_model_len > limit:
            raise ConfigError(
                f"max_model_len must be at most {limit}, the positions of this model, got {max_model_len}; "
                "lower it, or linearize the model: linear mixers have no such limit"
            )
        return max_model_len

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; raises InputError for an empty one or text that is not Unicode.

        add_special_tokens: put those around a text that the tokenizer puts there, such as a beginning.
        """
        return self.encoder.encode(prompt, special=add_special_tokens)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        return_errors: bool = False,
    ) -> list[Generation]:
        """Answer a conversation or several, as the chat template of the tokenizer writes them.

        messages: dicts with 'role' and 'content'. Raises ConfigError for a tokenizer without template.
        """
        prompts = [
            self.encoder.chat(each, template=chat_template, answer=add_generation_prompt)
            for each in as_conversations(messages)
        ]
        return self.generate(prompts, params, return_errors=return_errors)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> list[Generation]:
        """Finish every prompt; results in the order of the prompts.

        One that fails takes nothing from the others. When all have ended, its error is raised, or with
        `return_errors` is part of its result.
        """
        return joined(self.stream(prompts, params, return_errors=return_errors))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> Iterator[Piece]:
        """Pieces of text as they are decided, of all prompts and sequences as they come.

        Leaving the loop early (or Ctrl-C) cancels what is left. The last piece of a prompt that failed
        has a `done` with its error; when all have ended the first such error is raised, unless
        `return_errors`.
        """
        self.engine.check_process()
        requests = self._requests(prompts, params)
        self._check_idle()
        by_row: dict[int, Collector] = {}
        errors: list[Exception] = []
        try:
            for request in requests:
                by_row[self.engine.submit(request.prompt, request.params)] = request
            while self.engine.busy:
                for emitted in self.engine.step():
                    piece = self._piece(by_row[emitted.sequence.request], emitted)
                    if piece.done is not None and piece.done.error is not None:
                        errors.append(piece.done.error)
                    yield piece
        finally:
            self.engine.cancel()
        if errors and not return_errors:
            raise errors[0]

    def _piece(self, request: Collector, emitted: Emitted) -> Piece:
        """What `emitted` is for the caller; a sequence that has ended for the caller is retired."""
        try:
            piece = request.take(emitted)
        except Exception as error:
            piece = request.failed(emitted.sequence, error)
        if piece.done is None:
            return piece
        late = self.engine.retire(emitted.sequence)
        if late is None or piece.done.error is not None:
            return piece
        return replace(piece, done=replace(piece.done, finish_reason=FAILED, error=late))

    def _check_idle(self) -> None:
        if self.engine.busy:
            raise ConfigError(
                "this LLM is still streaming another call; finish or close that one first, or give "
                "all prompts in one call"
            )

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Collector]:
        given = as_prompts(prompts)
        if not given:
            raise InputError("no prompts were given")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(given)
        if not isinstance(params, Sequence) or not all(
            isinstance(p, SamplingParams) for p in params
        ):
            raise WrongType(f"params are SamplingParams, one or a list, got {shown(repr(params))}")
        if len(params) != len(given):
            raise ConfigError(
                f"{len(params)} sampling parameters for {len(given)} prompts; give one for all, or one "
                "for each"
            )
        return [
            request
            for index, (prompt, each) in enumerate(zip(given, params, strict=True))
            for request in self._sequences(index, self.encode(prompt), each)
        ]

    def _sequences(self, index: int, prompt: list[int], params: SamplingParams) -> list[Collector]:
        """The sequences of one request."""
        if params.bad_words:
            params = replace(params, bad_words=self.encoder.spelled(params.bad_words))
        params = self._within_length(index, len(prompt), params)
        continues = not isinstance(self.model, T5)
        return [
            Collector((index, i), self.tokenizer, prompt, each, continues=continues)
            for i, each in enumerate(params.sequences())
        ]

    def _within_length(self, index: int, size: int, params: SamplingParams) -> SamplingParams:
        """`params` with no more tokens than there is room for; raises ContextOverflow where none is."""
        limit = self.model.config.position_limit
        if limit is not None and size > limit:
            raise ContextOverflow(
                f"prompt {index} has {size} tokens, this model takes {limit}; shorten it, or linearize "
                "the model: linear mixers have no such limit"
            )
        if self.max_model_len is None:
            return params
        room = self.max_model_len - size
        if room < max(1, params.min_tokens):
            raise ContextOverflow(
                f"prompt {index} has {size} tokens and asks for {max(1, params.min_tokens)} more at least; "
                f"max_model_len is {self.max_model_len}: shorten the prompt or raise max_model_len"
            )
        return replace(params, max_tokens=min(params.max_tokens, room))
