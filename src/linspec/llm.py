"""The public way in: prompts to text.

llm = LLM("embedded-aug", drafter="medusa")
print(llm.generate("def fibonacci(n):")[0].text)
for piece in llm.stream("class Stack:"):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.checkpoints.attention import attending
from linspec.checkpoints.config_file import read_config_file
from linspec.checkpoints.dtype import cache_kind, pick_dtype
from linspec.checkpoints.hub import load_causal_model, load_decoder, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.protocols import CausalModel
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.engine.encoding import (
    Conversation,
    TextEncoder,
    as_conversations,
    check_tokenizer_type,
)
from linspec.engine.engine import Engine
from linspec.engine.grammar import Grammars
from linspec.engine.loops.choice import check_policy, choose_loop
from linspec.engine.loops.masked_diffusion import check_drafter_fits
from linspec.engine.prefix_cache import PrefixOptions
from linspec.engine.prompts import Prompt, as_prompts
from linspec.engine.results import Collector, Generation, Piece, joined
from linspec.engine.streams import EngineStreams
from linspec.errors import ConfigError, InputError, StateError, WrongType
from linspec.kernels.cpu.threads import check_fork
from linspec.kernels.device import pick_device
from linspec.models.decoder import Decoder
from linspec.models.rope_scaling import with_rope_scaling
from linspec.policies import make_policy
from linspec.policies.base import Policy
from linspec.state.registry import check_held, kv_of
from linspec.utils.messages import shown
from linspec.utils.sizes import bytes_of, check_bytes, check_positive, check_size
from linspec.verifiers import make_verifier
from linspec.verifiers.base import Verifier

__all__ = ["LLM", "Generation", "Piece"]


class LLM:
    """A model with its tokenizer, a drafter, a verifier and a policy.

    An encoder-decoder (T5) reads each prompt as its source and writes the answer.

    Args:
        model: a model directory, a GGUF file, 'embedded-softmax', 'embedded-aug', or a loaded model of
            linspec. A loaded model becomes its inference form, in place.
        tokenizer: needed with a loaded model; None takes that of the directory.
        drafter: 'none', a spec of `linspec list` such as 'prompt-lookup:max_ngram=3', or a Drafter.
        verifier: 'lossless', 'block', 'greedy', 'typical' (lossy), a spec or a Verifier.
        policy: 'auto', a fixed number of draft nodes, a spec or a Policy; for a diffusion model what its loop
            reads, such as 'commit=threshold:0.9,cache=dual'.
        max_batch: most sequences that run at once.
        prefill_tokens: most prompt tokens of one step.
        tbt_ms: milliseconds between two tokens that the others may wait for while a prompt is read: it is
            read in pieces that fit, by the measured times of steps. None reads `prefill_tokens` in each step.
        state_bytes: most bytes of the states of the sequences that run. The others wait; one that grows
            beyond it, or stands in the way of a request of higher priority, waits too and goes on later where
            it was. None for no limit.
        device: 'cpu', 'cuda' or 'auto'.
        dtype: what a model that is given by its name or path computes in: 'float32', 'bfloat16', 'float16', a
            torch.dtype, or 'auto', which is float32 on a CPU and the dtype of the weights on a GPU (bfloat16
            where they are blocks of a GGUF file). None is 'auto'. Both leave weights that a GGUF file has in
            blocks in these, on a CPU.
        quantize: 8 or 4 bits for the weights of a model that is given by its name or path, made while it
            loads (CPU only).
        kv_cache_dtype: how softmax layers keep keys and values. 'auto' takes the 16-bit floats that the
            weights are stored in (float16 for a GGUF file); if these are float32, or the model computes in
            another dtype than float32, it is what the model computes in. 'float32', 'float16', 'bfloat16';
            'int8' needs about a quarter of the memory of float32, 'int4' a sixth, and costs some quality.
        max_model_len: most tokens of a prompt and its output together; None for the model's limit.
        prefix_cache: memory for the states of earlier prompts and outputs, so that what a prompt begins with
            is not read again: bytes, or a text such as '512MB'. None keeps nothing.
        prefix_store: a directory for states that leave that memory; `engine.prefix_cache.flush()` writes the
            others there. It holds the texts too.
        attention: sparse attention in the place of softmax, a spec such as 'pages:budget=1024': each token
            reads the near ones, and what it selects of the others; 'lserve:budget=1024' does so for the heads
            that `linspec calibrate` found to recall. None reads all. Drafts stay lossless, for
            the model that reads so.
        rope_scaling: more positions than the model was trained for, such as 'yarn:4' for four times as many.
            None keeps those of the model.
        offload: a directory for a file with what need not be in memory: with attention='shadow' the values
            of what is past. The file has no name and ends with the process. None keeps all in memory.
        loop: how tokens come about, a spec of `linspec list`; 'auto' is that of the type of the model.
        kv: the old name of `kv_cache_dtype`.

    Any number of calls may be under way, in one thread or several: their sequences share the steps.

    Raises:
        CheckpointError: a file of the model is missing or damaged.
        DrafterError: the drafter does not fit the model.
        ConfigError: a setting breaks a rule. All of these come before any long work.
        WrongType: `model` is neither a name, a path nor a model of linspec.
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
        tbt_ms: float | None = None,
        state_bytes: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        quantize: int | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        prefix_cache: int | str | None = None,
        prefix_store: str | Path | None = None,
        attention: str | None = None,
        rope_scaling: str | None = None,
        offload: str | Path | None = None,
        loop: str = "auto",
        kv: str | None = None,
    ) -> None:
        check_fork()
        kept = kv_of(kv_cache_dtype, kv)
        if tokenizer is not None:
            check_tokenizer_type(tokenizer)
        check_size("max_batch", max_batch)
        check_size("prefill_tokens", prefill_tokens)
        if tbt_ms is not None:
            check_positive("tbt_ms", tbt_ms)
        if state_bytes is not None:
            check_bytes("state_bytes", state_bytes)
        prefixes = _prefixes(prefix_cache, prefix_store)
        place = pick_device(str(device) if isinstance(device, torch.device) else device)
        source = resolve(model) if isinstance(model, str | Path) else None
        if source is not None and policy != "auto":
            # ahead of the weights, which may take minutes
            check_policy(policy, diffusion=read_config_file(source).kind.loop == "masked-diffusion")
        self.model = _loaded(model, dtype, quantize, source, place)
        if rope_scaling is not None:
            self.model = with_rope_scaling(
                _causal(self.model, "rope_scaling", rope_scaling), rope_scaling
            )
        if attention is not None:
            self.model = attending(_causal(self.model, "attention", attention), attention, model)
        if tokenizer is None and isinstance(model, str | Path):
            tokenizer = load_text_tokenizer(model)
        if tokenizer is None:
            raise ConfigError("a loaded model needs its tokenizer: LLM(model, tokenizer=...)")
        check_held(kv_cache_dtype, self.model.dtype)
        self.kv_cache_dtype = cache_kind(kept, self.model)
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer, self.model.config.vocab_size)
        self.grammars = Grammars(tokenizer, self.model.config.vocab_size)
        made = make_drafter(drafter, DrafterContext(self.model, tokenizer, source, max_batch))
        check_drafter_fits(self.model, made)
        decoded_by = choose_loop(loop, policy, self.model)
        self.model.to_inference()
        self.engine = Engine(
            self.model,
            verifier=make_verifier(verifier),
            drafter=made,
            policy=make_policy(policy, self.model) if made is not None else None,
            slots=max_batch,
            prefill_tokens=prefill_tokens,
            tbt_ms=tbt_ms,
            state_bytes=state_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            offload=_directory(offload),
            max_model_len=max_model_len,
            loop=decoded_by,
            grammars=self.grammars,
            tokenizer=tokenizer,
            source=source,
            prefix_cache=prefixes,
        )
        self.streams = EngineStreams(self.engine)

    def __reduce__(self) -> Any:
        raise StateError(
            "an LLM holds states and threads, which can neither be copied nor sent to another process; make "
            "another on the same model: LLM(llm.model, tokenizer=llm.tokenizer)"
        )

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one prompt.

        Args:
            prompt: a text, or token ids, which come back checked.
            add_special_tokens: add what the tokenizer puts around a text, such as a start token.

        Raises:
            InputError: the prompt is empty, is not valid Unicode, or names a token outside the vocabulary.
            WrongType: the prompt is neither a text nor a list of whole numbers.
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
        """Answer one conversation or several; results in their order.

        Args:
            messages: dicts with 'role' and 'content', or a list of such conversations.
            params: for all conversations, or one for each; None takes the defaults.
            chat_template: a Jinja template; None takes that of the tokenizer.
            add_generation_prompt: begin the answer of the model at the end of the conversation.
            return_errors: as in `generate`.

        Raises:
            ConfigError: the tokenizer has no chat template and none was given.
            InputError: the template refuses the messages.
            WrongType: the messages are no list of dicts with a role.
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

        A request that fails changes nothing for the others.

        Args:
            prompts: one prompt or several, each a text or token ids.
            params: for all prompts, or one for each; None takes the defaults.
            return_errors: put the error of a failed request into its result (`Generation.error`). Without
                it the first error is raised when all requests have ended.

        Raises:
            InputError: a prompt cannot be used, or there is none.
            WrongType: a prompt or parameter is of a type that can never be used.
            ContextOverflow: a prompt is longer than the model or `max_model_len` allows.
            ConfigError: the numbers of prompts and parameters differ.
            StateError: the process was forked while another thread used this LLM, or the call comes from
                inside a step of this LLM, such as from a logits processor.
        """
        return joined(self.stream(prompts, params, return_errors=return_errors))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
        show_drafts: bool = False,
    ) -> Iterator[Piece]:
        """Pieces of text of all sequences, in the order in which the model decides them.

        If the loop ends early, also by Ctrl-C, the requests that still run are cancelled. The last piece of
        a sequence has `done`, which holds the error if its request failed.

        Args:
            prompts: as in `generate`.
            params: as in `generate`.
            return_errors: do not raise the first error when all requests have ended.
            show_drafts: let every piece say in `Piece.drafts` which of it were accepted drafts, who drafted
                and what was rejected.

        Raises:
            LinspecError: as in `generate`, at the first piece.
        """
        self.engine.check_process()
        collectors = self._collectors(prompts, params)
        for each in chain.from_iterable(collectors) if show_drafts else ():
            each.show_drafts()
        errors: list[Exception] = []
        with self.streams.open(each[0].request for each in collectors) as stream:
            known = dict(zip(stream.requests, collectors, strict=True))
            for outcome in stream:
                sequence = outcome.sequence
                collector = known[sequence.request][sequence.index]
                piece = stream.read(collector, outcome)
                if piece.done is not None and piece.done.error is not None:
                    errors.append(piece.done.error)
                yield piece
        if errors and not return_errors:
            raise errors[0]

    def _collectors(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[list[Collector]]:
        """What collects the sequences of each prompt; raises before any of them is queued."""
        given = as_prompts(prompts)
        if not given:
            raise InputError("no prompts were given")
        if params is not None and any(isinstance(each, Request) for each in given):
            raise ConfigError("a Request has its own sampling parameters; leave out params")
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
        requests = [
            self.request(prompt, each, f"prompt {index}")
            for index, (prompt, each) in enumerate(zip(given, params, strict=True))
        ]
        return [self.collectors(index, request) for index, request in enumerate(requests)]

    def request(
        self, prompt: Prompt, params: SamplingParams | None = None, name: str = "the prompt"
    ) -> Request:
        """What the engine is asked for: token ids, and no more new tokens than there is room for.

        Args:
            prompt: a text, token ids or a Request, which has its own parameters.
            params: None takes the defaults.
            name: what errors call the prompt.

        Raises:
            LinspecError: as in `generate`.
        """
        asked = prompt if isinstance(prompt, Request) else Request((), params or SamplingParams())
        params = asked.params
        if not isinstance(params, SamplingParams):
            raise WrongType(f"params of a Request are SamplingParams, got {shown(repr(params))}")
        if params.bad_words:
            params = replace(params, bad_words=self.encoder.spelled(params.bad_words))
        if params.grammar is not None:
            self.grammars.check(params.grammar)
        request = replace(asked, prompt=tuple(self.encode(prompt)), params=params)
        return self.engine.limits.fitted(request, name)

    def collectors(self, index: int, request: Request) -> list[Collector]:
        """What turns the outcomes of each sequence of `request` into pieces, whose `index` is this one."""
        continues = self.model.continues_prompt
        return [
            Collector((index, i), self.tokenizer, request, each, continues=continues)
            for i, each in enumerate(request.params.sequences())
        ]


def _loaded(
    model: str | Path | CausalModel,
    dtype: str | torch.dtype | None,
    quantize: int | None,
    source: Path | None,
    place: str,
) -> CausalModel:
    """The model that `LLM` was given, read from `source` where it is a name or a path."""
    computed = pick_dtype("auto" if dtype is None else dtype, source, place)
    if isinstance(model, str | Path):
        options: dict[str, Any] = {"dtype": computed, "device": place}
        if quantize is not None:
            return load_for(model, quantize, read=load_decoder, **options)
        return load_causal_model(model, keep_blocks=dtype in (None, "auto"), **options)
    if isinstance(model, nn.Module) and hasattr(model, "new_state"):
        _check_as_loaded(model, dtype, quantize)
        return model
    raise _no_model(model)


def _check_as_loaded(model: Any, dtype: str | torch.dtype | None, quantize: int | None) -> None:
    """Raise ConfigError for what is done to a model as it is loaded, where it is loaded already."""
    if quantize is not None:
        raise ConfigError(
            f"quantize={shown(repr(quantize))} turns weights into integers as they are read, and this model "
            "is loaded already; give its name or path, or leave quantize out"
        )
    if dtype not in (None, "auto") and pick_dtype(dtype, None, str(model.device)) != model.dtype:
        raise ConfigError(
            f"dtype={shown(repr(dtype))} is for a model that is read here, and this one is loaded as "
            f"{model.dtype}; give its name or path, or leave dtype out"
        )


def _causal(model: CausalModel, option: str, spec: str) -> Decoder:
    """The model as a decoder; raises ConfigError for any other one, which has no such `option`."""
    if isinstance(model, Decoder) and model.config.causal:
        return model
    raise ConfigError(
        f"{option}={shown(repr(spec))} is for decoders whose tokens see those before them; leave it out"
    )


def _no_model(given: object) -> WrongType:
    return WrongType(
        f"a model is a name, a path or a loaded model of linspec's, got {shown(repr(given))}; see "
        "linspec.load"
    )


def _directory(offload: str | Path | None) -> Path | None:
    if offload is not None and not str(offload):
        raise ConfigError(
            "offload is '', which names no directory; name one that can be written, or leave it out"
        )
    return None if offload is None else Path(offload)


def _prefixes(size: int | str | None, store: str | Path | None) -> PrefixOptions | None:
    if size is not None:
        place = None if store is None else Path(store)
        return PrefixOptions(bytes=bytes_of("prefix_cache", size), store=place)
    if store is not None:
        raise ConfigError(
            "prefix_store keeps what leaves the memory of a prefix cache, and there is none; give "
            "prefix_cache too, such as prefix_cache='512MB'"
        )
    return None
