"""The engine: requests become sequences, a generation loop turns them into tokens, round by round.

    handle = engine.add(Request((5, 6, 7), SamplingParams(max_tokens=9)))
    while engine.busy:
        for outcome in engine.step(): ...

It knows who runs and who waits; how tokens come about is the loop's. What goes wrong for one sequence ends
that sequence with its error; the others get what they would have got. Any thread may call it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from linspec.decoding.outcome import FAILED, Outcome
from linspec.decoding.protocols import CausalModel
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler
from linspec.decoding.sampling.rules import GrammarRules
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.drafters.base import Drafter, check_drafter
from linspec.engine.budget import StepTimes, TokenBudget
from linspec.engine.limits import Limits
from linspec.engine.loops import LOOPS, LoopContext
from linspec.engine.preemption import Parked, StateMemory
from linspec.engine.prefix_cache import PrefixCache, PrefixOptions
from linspec.engine.prefix_store import model_key
from linspec.engine.rounds import Rounds
from linspec.engine.scheduler import Batch, Scheduler
from linspec.engine.shared_prompts import begin_prompt, keep_prompt, share_prompt
from linspec.errors import StateError, WrongType
from linspec.kernels.cpu.threads import check_fork, outlived_fork, torch_on_one_thread
from linspec.policies.base import Policy
from linspec.policies.costs import load_or_measure
from linspec.utils.messages import shown
from linspec.utils.sizes import check_size
from linspec.verifiers.base import Verifier

_log = logging.getLogger("linspec")


class Engine:
    """Runs requests over one model, drafter, verifier and policy.

    drafter None is plain decoding. kv_cache_dtype: how the entries of softmax caches are kept, 'float' or
    'int8'. offload: a directory for what states can have in files. max_model_len: most tokens of a prompt and
    its output. loop: NAME or NAME:key=value,… of a generation loop. tbt_ms: milliseconds of a step in which
    sequences decode and prompts are read; None reads `prefill_tokens` in every step. state_bytes: most bytes
    of the states of running sequences, None for no limit. prefix_cache: keep states of texts for prompts that
    begin with them; None keeps nothing. `clock`
    returns seconds. grammars: makes rules of grammars. tokenizer, source: of the model, see `Target`.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        verifier: Verifier,
        drafter: Drafter | None = None,
        policy: Policy | None = None,
        slots: int = 8,
        prefill_tokens: int = 512,
        kv_cache_dtype: str = "float",
        offload: Path | None = None,
        max_model_len: int | None = None,
        loop: str = "autoregressive",
        tbt_ms: float | None = None,
        state_bytes: int | None = None,
        prefix_cache: PrefixOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
        grammars: GrammarRules | None = None,
        tokenizer: Any = None,
        source: Path | None = None,
    ) -> None:
        self.model, self.drafter, self.grammars, self.clock = model, drafter, grammars, clock
        check_size("max_batch", slots)
        budget = TokenBudget(prefill_tokens, tbt_ms)
        self.state = model.new_state(slots, kv_cache_dtype, offload=offload)
        target = Target(model, self.state, tokenizer, source)
        if drafter is not None:
            check_drafter(drafter, len(self.state.layers))
            drafter.attached(target)
        self.loop = LOOPS.build(loop, LoopContext(target, verifier, drafter, policy, clock))
        if tbt_ms is not None and self.loop.takes_pieces:
            budget.times = StepTimes(load_or_measure(model))
        memory = self._memory(state_bytes)
        self.limits = Limits(model, self.state, max_model_len, memory)
        self.scheduler = Scheduler(slots, budget, memory)
        self.rounds = Rounds(self.loop, model.config.vocab_size)
        self.prefix_cache: PrefixCache | None = None
        # another loop may make of a slot what its tokens do not say
        if prefix_cache is not None and self.loop.reads_in_order:
            stored = prefix_cache.store is not None
            key = model_key(model, self.state, kv_cache_dtype) if stored else None
            self.prefix_cache = PrefixCache(self.state, prefix_cache, key)
        self._requests = self._sequences = 0
        # handles that no request has yet
        self._reserved: set[int] = set()
        # the thread that stepped last, and the one that is inside a step
        self._process = os.getpid()
        self._driver = (self._process, threading.get_ident())
        self._inside: tuple[int, int] | None = None
        self._lock = threading.RLock()

    def _memory(self, limit: int | None) -> StateMemory | None:
        if limit is None:
            return None
        return StateMemory(
            self.state,
            limit,
            whole=not self.loop.preempts,
            reads_source=not self.model.continues_prompt,
            copies=self.loop.copies,
        )

    def reserve(self) -> int:
        """A handle for a request that `add` gets next: who has it can drop the request at any moment."""
        with self._lock:
            self._requests += 1
            self._reserved.add(self._requests)
            return self._requests

    def add(self, request: Request, handle: int | None = None) -> int:
        """Queue a request; returns its handle, the number that its sequences carry as `request`.

        handle: from `reserve`, once; None takes a new one. Raises what `Limits.fitted` and the loop's
        `check_request` raise, InputError for foreign token ids, and StateError for a handle that was not
        reserved or has its request. If this is interrupted, nothing is queued.
        """
        request, samplers = self._checked(request)
        self.check_process()
        handle = self._claimed(self.reserve() if handle is None else handle)
        try:
            with self._lock:
                sequences = [self._sequence(request, handle, *each) for each in enumerate(samplers)]
                # another loop, or an encoder, may make of a slot what its tokens do not say
                if self.loop.reads_in_order and self.model.continues_prompt:
                    share_prompt(sequences, self.state)
                self.scheduler.submit(sequences)
            return handle
        except BaseException:
            self.abort(handle)
            raise

    def check(self, request: Request) -> Request:
        """`request` as `add` would queue it; raises what `add` raises, and waits for no step."""
        return self._checked(request)[0]

    def _checked(self, request: Request) -> tuple[Request, list[Sampler]]:
        request = self.limits.fitted(request)
        self.loop.check_request(request)
        config = self.model.config
        # made here, so that foreign tokens are refused now and not when a slot is free
        return request, [
            Sampler(params, request.prompt, config.vocab_size, config.eos_ids, self.grammars)
            for params in request.params.sequences()
        ]

    def _claimed(self, handle: int) -> int:
        """A reserved handle, which is nobody else's from now on."""
        self._check_handle(handle)
        with self._lock:
            if handle not in self._reserved:
                raise StateError(
                    f"handle {handle} has had its request; reserve() gives another one"
                )
            self._reserved.remove(handle)
        return handle

    def _check_handle(self, handle: object) -> None:
        """Raise WrongType or StateError for what is no handle of this engine."""
        if type(handle) is not int:
            raise WrongType(
                f"a handle is a number from add() or reserve(), got {shown(repr(handle))}"
            )
        if not 1 <= handle <= self._requests:
            raise StateError(
                f"this engine gave out no handle {shown(handle)}; handles come from add() and reserve()"
            )

    def _sequence(
        self, request: Request, handle: int, index: int, sampler: Sampler
    ) -> RunningSequence:
        self._sequences += 1
        return RunningSequence(
            self._sequences,
            sampler,
            list(request.prompt),
            len(request.prompt),
            request=handle,
            index=index,
            embeddings=request.embeddings,
            priority=request.priority,
            tenant=request.tenant,
        )

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return self.scheduler.busy

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot, those included that had to leave one."""
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self.scheduler.running)

    def step(self) -> list[Outcome]:
        """One round of all running sequences; what it did to each of them.

        A sequence that cannot go on ends with finished 'error'; it takes nothing from the others. An
        interrupt drops every request: it may have stopped the step anywhere.
        """
        self.check_process()
        owed = False
        try:
            with self._lock:
                if self._inside is not None:
                    raise StateError(
                        "a step was asked for inside a step of the same engine, such as by a logits "
                        "processor; use another LLM there: LLM(llm.model, tokenizer=llm.tokenizer)"
                    )
                owed = True
                try:
                    self._driver = self._inside = (os.getpid(), threading.get_ident())
                    return self._step()
                except BaseException:
                    self._interrupted()
                    owed = False
                    raise
                finally:
                    self._inside = None
        except BaseException:
            # an interrupt may also come while the lock is given back: what was found is lost then
            if owed:
                self._interrupted()
            raise

    def _interrupted(self) -> None:
        """Drop all that a step which may have stopped anywhere has touched."""
        self.cancel()
        if self.prefix_cache is not None:
            with self._lock:
                self.prefix_cache.clear()

    def _step(self) -> list[Outcome]:
        outcomes = self._admit()
        batch = self.scheduler.next_batch()
        if batch.decoding or batch.prefilling:
            # torch's threads would wait on the cores that the kernels' own threads need
            with nullcontext() if self.model.native is None else torch_on_one_thread():
                found = self._round(batch)
            self._keep_prompts(batch, found)
            outcomes += [self._closed(outcome) for outcome in found]
        return outcomes

    def _round(self, batch: Batch) -> list[Outcome]:
        """A round, whose seconds the budget of prompt tokens learns from."""
        budget = self.scheduler.budget
        if budget.times is None:
            return self.rounds.next(batch)
        began = self.clock()
        found = self.rounds.next(batch)
        # a round that was repeated sequence by sequence says nothing about what steps cost
        if not any(outcome.error for outcome in found):
            tokens = sum(count for _, count in batch.prefilling)
            budget.times.observe(len(batch.decoding), tokens, self.clock() - began)
        return found

    def _keep_prompts(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Let others have prompts as far as this step has read them."""
        failed = {outcome.sequence for outcome in outcomes if outcome.error is not None}
        for sequence, _ in batch.prefilling:
            if sequence not in failed:
                keep_prompt(sequence, self.state, self.prefix_cache)

    def abort(self, handle: int) -> None:
        """Drop what waits and runs of the request of `handle`; one that has ended is dropped already.

        Raises WrongType or StateError for what `add` and `reserve` never gave out.
        """
        self._check_handle(handle)
        with self._lock:
            self._reserved.discard(handle)
            self._drop(lambda sequence: sequence.request == handle)

    def cancel(self) -> None:
        """Drop every request."""
        with self._lock:
            self._drop(lambda sequence: True)

    def retire(self, sequence: RunningSequence) -> Exception | None:
        """End a running sequence early, for a stop string.

        Its slot is free then; returns the error of a plug-in that could not let go of it. One that had to
        leave its slot to others does not come back.
        """
        with self._lock:
            if not self.scheduler.withdraw(lambda each: each is sequence):
                return None
            self._keep(sequence)
            return self._retire(sequence)

    def _keep(self, sequence: RunningSequence) -> None:
        """Let the prefix cache keep a sequence that has ended well."""
        if self.prefix_cache is not None:
            self.prefix_cache.keep(sequence)

    def check_process(self) -> None:
        """Raise StateError or ConfigError in a forked process that has not all that this engine needs."""
        check_fork()
        stopped = self._inside is not None and not outlived_fork(*self._inside)
        if self._process != os.getpid():
            # a thread that is gone may have held it
            self._lock, self._process = threading.RLock(), os.getpid()
        if stopped or (self.busy and not outlived_fork(*self._driver)):
            raise StateError(
                "this process was forked while another thread of its parent generated with this engine, "
                "which may have stopped anywhere; make another on the same model: LLM(llm.model, "
                "tokenizer=llm.tokenizer)"
            )

    def _admit(self) -> list[Outcome]:
        """Let waiting sequences in; returns those that cannot begin, whose slots are free again."""
        refused = self._make_room()
        while admitted := self.scheduler.admit():
            for sequence in admitted:
                try:
                    self._begin(sequence)
                except Exception as error:
                    refused.append(self._closed(Outcome.failure(sequence, error)))
            refused += self._make_room()
        return refused

    def _begin(self, sequence: RunningSequence) -> None:
        """Let a sequence begin in its slot, or go on where it had to leave another one."""
        parked = sequence.parked
        if parked is None:
            self.loop.started(sequence)
            begin_prompt(sequence, self.state, self.prefix_cache)
            return
        self.state.restore(sequence.slot, parked.state)
        self.loop.resumed(sequence, parked.loop)
        sequence.parked = None

    def _make_room(self) -> list[Outcome]:
        """Pre-empt who has to make room for others; returns those that cannot leave, which have failed."""
        failed = []
        for sequence in self.scheduler.victims() if self.loop.preempts else ():
            try:
                # the loop first: it may hold back what it has not committed
                kept = self.loop.paused(sequence)
                parked = Parked(self.state.snapshot(sequence.slot), kept)
                self.scheduler.preempt(sequence, parked)
            except Exception as error:
                failed.append(self._closed(Outcome.failure(sequence, error)))
        return failed

    def _closed(self, outcome: Outcome) -> Outcome:
        """Free what a finished sequence held; a plug-in that cannot let go of it has failed it."""
        if outcome.finished and outcome.error is None:
            self._keep(outcome.sequence)
        error = self._retire(outcome.sequence) if outcome.finished else None
        if error is None or outcome.error is not None:
            return outcome
        return replace(outcome, finished=FAILED, error=error)

    def _retire(self, sequence: RunningSequence) -> Exception | None:
        # it has its slot until all have forgotten it, so that nobody gets the slot after an interrupt
        error = self._forget(sequence)
        if sequence.shared is not None:
            sequence.shared.left(sequence)
        self.scheduler.retire(sequence)
        return error

    def _drop(self, unwanted: Callable[[RunningSequence], bool]) -> None:
        for sequence in self.scheduler.withdraw(unwanted):
            error = self._retire(sequence)
            if error is not None:
                _log.warning(
                    "request %d was dropped, but not by all", sequence.request, exc_info=error
                )

    def _forget(self, sequence: RunningSequence) -> Exception | None:
        """Forget a sequence everywhere; returns the first error, which kept nobody else from forgetting."""
        errors = []
        for forget in (
            partial(self.state.drop, sequence.slot),
            partial(self.loop.finished, sequence),
        ):
            try:
                forget()
            except Exception as error:
                errors.append(error)
        return errors[0] if errors else None
