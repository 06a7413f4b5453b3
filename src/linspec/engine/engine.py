"""The engine: requests become steps, steps become rounds, rounds become tokens.

A round is: plan, propose, step, accept, commit, observe. It does not know which drafter, verifier,
policy or mixer takes part, and sequences of a batch need nothing in common: prompts that are still being
read ride in the same step as trees that are being verified.

What goes wrong for one sequence ends that sequence with its error; the others get what they would have got.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from linspec.decoding.accepted import Accepted
from linspec.decoding.protocols import CausalModel
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree, root_only
from linspec.drafters.base import Drafter
from linspec.engine.prompt_logprobs import refuse_source, score_prompt
from linspec.engine.proposals import Proposals
from linspec.engine.scheduler import Batch, Scheduler
from linspec.errors import ContextOverflow, InputError, StateError
from linspec.kernels.cpu.threads import check_fork, outlived_fork, torch_on_one_thread
from linspec.policies.acceptance import expected_of
from linspec.policies.base import Policy, RoundTimes
from linspec.utils.isolation import isolated
from linspec.verifiers.base import Verifier

# `Emitted.finished` of a sequence that failed
FAILED = "error"

_log = logging.getLogger("linspec")


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a step brought to one sequence.

    finished: None, 'stop' (end of sequence), 'length', or 'error', which `error` explains. accepted is
    None where the sequence failed before a verifier had its say.
    """

    sequence: RunningSequence
    tokens: tuple[int, ...]
    accepted: Accepted | None
    finished: str | None
    error: Exception | None = None

    @classmethod
    def failure(cls, sequence: RunningSequence, error: Exception) -> Emitted:
        """The end of a sequence that failed; what it emitted in earlier steps stands."""
        return cls(sequence, (), None, FAILED, error)


def raise_first(emitted: Iterable[Emitted]) -> None:
    """Raise the error of the first sequence that failed, for who cannot go on without it."""
    for item in emitted:
        if item.error is not None:
            raise item.error


@dataclass(frozen=True, slots=True)
class _Part:
    """What one sequence has in a step: a tree that is verified, or (None) a piece of its prompt."""

    sequence: RunningSequence
    step_input: StepInput
    tree: TokenTree | None


class Engine:
    """Runs requests over one model, drafter, verifier and policy.

    drafter None is plain decoding. kv: how the sequences of softmax caches are kept, 'float' or 'int8'.
    `clock` returns seconds; tests pass their own.
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
        kv: str = "float",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.verifier = model, verifier
        self.drafter, self.policy = drafter, policy
        self.scheduler = Scheduler(slots, prefill_tokens)
        self.state = model.new_state(slots, kv)
        self.clock = clock
        self._requests = 0
        self._driver = (os.getpid(), threading.get_ident())

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids; returns the number that its sequence carries as `request`.

        Raises InputError for an empty prompt or foreign token ids, ContextOverflow for a prompt
        that leaves no room for one new token, StateError for one whose keys and values do not fit into
        memory.
        """
        if not prompt:
            raise InputError("the prompt has no tokens; give at least one")
        limit = self.model.config.position_limit
        if limit is not None and len(prompt) > limit:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens, this model takes {limit}; shorten it, or "
                "linearize the model: linear mixers have no such limit"
            )
        self.state.check_room(len(prompt))
        self.check_process()
        self._requests += 1
        # made here, so that foreign tokens are refused now and not when a slot is free
        config = self.model.config
        sampler = Sampler(params, prompt, config.vocab_size, config.eos_ids)
        self.scheduler.submit(RunningSequence(self._requests, sampler, list(prompt), len(prompt)))
        return self._requests

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return self.scheduler.busy

    def step(self) -> list[Emitted]:
        """One step for every running request; returns what each of them emitted.

        A request that cannot go on ends with finished 'error'; it takes nothing from the others.
        """
        self.check_process()
        emitted = self._admit()
        batch = self.scheduler.next_batch()
        if batch.decoding or batch.prefilling:
            # torch's threads would wait on the cores that the kernels' own threads need
            with nullcontext() if self.model.native is None else torch_on_one_thread():
                found = self._step(batch)
            emitted += [self._closed(item) for item in found]
        return emitted

    def check_process(self) -> None:
        """Raise StateError or ConfigError in a forked process that has not all that this engine needs."""
        check_fork()
        if self.busy and not outlived_fork(*self._driver):
            raise StateError(
                "this process was forked while another thread of its parent generated with this engine, "
                "which may have stopped anywhere; make another on the same model: LLM(llm.model, "
                "tokenizer=llm.tokenizer)"
            )
        self._driver = (os.getpid(), threading.get_ident())

    def _admit(self) -> list[Emitted]:
        """Let waiting requests in; returns those that cannot begin, whose slots are free again."""
        refused: list[Emitted] = []
        while admitted := self.scheduler.admit():
            for sequence in admitted:
                try:
                    self._open(sequence)
                    if self.drafter is not None:
                        self.drafter.started(sequence)
                except Exception as error:
                    refused.append(self._closed(Emitted.failure(sequence, error)))
        return refused

    def _open(self, sequence: RunningSequence) -> None:
        fed, source = self.model.open(sequence.tokens, sequence.slot, self.state)
        sequence.tokens, sequence.prompt_length, sequence.source = fed, len(fed), source
        if source:
            # penalties are about the output and what it goes on from; a source is neither
            sequence.sampler = sequence.sampler.restarted(fed)
            refuse_source(sequence)

    def _step(self, batch: Batch) -> list[Emitted]:
        began = self.clock()
        trees = self._propose(batch.decoding)
        drafted = self.clock()
        parts, emitted = self._parts(batch, trees)
        outputs = isolated(parts, self._forward)
        stepped = self.clock()
        for part, output in zip(parts, outputs, strict=True):
            if isinstance(output, Exception):
                emitted.append(Emitted.failure(part.sequence, output))
            else:
                emitted += self._judged(part, *output)
        nodes = sum(len(part.step_input.tokens) for part in parts)
        drafts = max((len(part.tree) - 1 for part in parts if part.tree is not None), default=0)
        rest = self.clock() - stepped
        times = RoundTimes(drafted - began, stepped - drafted, nodes, drafts, rest)
        # a round that was repeated sequence by sequence says nothing about what rounds cost
        usual = bool(batch.decoding) and not batch.prefilling and not any(e.error for e in emitted)
        self._account(batch, times, usual)
        return emitted

    def _parts(
        self, batch: Batch, trees: Sequence[TokenTree | Exception]
    ) -> tuple[list[_Part], list[Emitted]]:
        """What the sequences have in the step, and the failures of those that have nothing."""
        parts, failures = [], []
        for sequence, tree in zip(batch.decoding, trees, strict=True):
            if isinstance(tree, Exception):
                failures.append(Emitted.failure(sequence, tree))
            else:
                parts.append(_Part(sequence, StepInput.tree(sequence.slot, tree), tree))
        parts += [
            _Part(sequence, self._prompt_feed(sequence, n), None)
            for sequence, n in batch.prefilling
        ]
        return parts, failures

    def _forward(self, parts: Sequence[_Part]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states and logits of each part; where it raises, nothing is staged."""
        order = sorted(range(len(parts)), key=lambda i: parts[i].step_input.slot)
        try:
            output = self.model.step([parts[i].step_input for i in order], self.state)
        except Exception:
            for part in parts:
                self.state.drop(part.step_input.slot)
            raise
        places = dict(zip(order, output.slices, strict=True))
        return [(output.hidden[places[i]], output.logits[places[i]]) for i in range(len(parts))]

    def _judged(self, part: _Part, hidden: torch.Tensor, logits: torch.Tensor) -> list[Emitted]:
        """What a part of a step has brought its sequence: tokens, nothing yet, or an error."""
        try:
            if part.tree is None:
                return self._prefilled(part.sequence, len(part.step_input.tokens), hidden, logits)
            return [self._round(part.sequence, part.tree, hidden, logits)]
        except Exception as error:
            return [Emitted.failure(part.sequence, error)]

    def cancel(self) -> None:
        """Drop every request."""
        for sequence in self.scheduler.clear():
            error = self._forget(sequence)
            if error is not None:
                _log.warning(
                    "request %d was dropped, but not by all", sequence.request, exc_info=error
                )

    # ---- decoding

    def _propose(self, sequences: list[RunningSequence]) -> Sequence[TokenTree | Exception]:
        """A tree per sequence, or the error of the policy or the drafter about it."""
        if self.drafter is None or self.policy is None:
            return [root_only(sequence.root) for sequence in sequences]
        config = self.model.config
        return Proposals(self.drafter, self.policy, self.verifier, config).trees(sequences)

    def _round(
        self, sequence: RunningSequence, tree: TokenTree, hidden: torch.Tensor, logits: torch.Tensor
    ) -> Emitted:
        accepted = self.verifier.accept(tree, logits, sequence.sampler)
        path = accepted.path
        self.state.commit(sequence.slot, path)
        sequence.stats.count(tree, path)
        if self.drafter is not None and self.policy is not None and len(tree) > 1:
            expected = expected_of(tree, self.drafter)
            self.policy.observe(sequence, len(tree) - 1, len(path) - 1, expected)
            self.drafter.observe(sequence, tree, path)
        sequence.hidden = hidden[path[-1]]
        return self._extend(sequence, tree, accepted)

    def _extend(self, sequence: RunningSequence, tree: TokenTree, accepted: Accepted) -> Emitted:
        """Append the round's tokens, up to the end of the sequence or the request's limit."""
        tokens, finished = accepted.emitted(tree)[: sequence.remaining], None
        ends = [i for i, token in enumerate(tokens) if token in sequence.sampler.ends]
        if ends:
            tokens, finished = tokens[: ends[0] + 1], "stop"
        sequence.tokens += tokens
        sequence.sampler.observe(tokens)
        limit = self.model.config.position_limit
        if finished is None and (
            sequence.remaining <= 0 or (limit and len(sequence.tokens) > limit)
        ):
            finished = "length"
        return Emitted(sequence, tokens, accepted, finished)

    # ---- prompts

    def _prompt_feed(self, sequence: RunningSequence, count: int) -> StepInput:
        chunk = sequence.tokens[sequence.prefilled : sequence.prefilled + count]
        return StepInput(
            sequence.slot, chunk, all_logits=sequence.params.prompt_logprobs is not None
        )

    def _prefilled(
        self, sequence: RunningSequence, count: int, hidden: torch.Tensor, logits: torch.Tensor
    ) -> list[Emitted]:
        self.state.commit(sequence.slot, range(count))
        if sequence.params.prompt_logprobs is not None:
            score_prompt(sequence, logits)
        sequence.prefilled += count
        if sequence.prefilling:
            return []
        sequence.hidden = hidden[-1]
        tree = root_only(sequence.root)
        return [
            self._extend(sequence, tree, self.verifier.accept(tree, logits[-1:], sequence.sampler))
        ]

    # ---- bookkeeping

    def _account(self, batch: Batch, times: RoundTimes, usual: bool) -> None:
        seconds = times.draft + times.step + times.rest
        for sequence in batch.decoding:
            sequence.stats.decode_seconds += seconds
        for sequence, _ in batch.prefilling:
            sequence.stats.prefill_seconds += seconds
        if self.policy is None or not usual:
            return
        try:
            self.policy.observe_round(times)
        except Exception:
            # it is about no sequence, and decides about speed alone
            _log.warning("the policy did not take the times of a round", exc_info=True)

    def retire(self, sequence: RunningSequence) -> Exception | None:
        """End a running request early, for a stop string or a client that left.

        Its slot is free then; returns the error of a plug-in that could not let go of it.
        """
        return self._retire(sequence) if sequence in self.scheduler.running else None

    def _closed(self, item: Emitted) -> Emitted:
        """Free what a finished sequence held; a plug-in that cannot let go of it has failed the sequence."""
        error = self._retire(item.sequence) if item.finished else None
        if error is None or item.error is not None:
            return item
        return replace(item, finished=FAILED, error=error)

    def _retire(self, sequence: RunningSequence) -> Exception | None:
        self.scheduler.retire(sequence)
        return self._forget(sequence)

    def _forget(self, sequence: RunningSequence) -> Exception | None:
        """Forget a sequence everywhere; returns the first error, which kept nobody else from forgetting."""
        forget: list[Callable[[], None]] = [partial(self.state.drop, sequence.slot)]
        if self.drafter is not None:
            forget.append(partial(self.drafter.finished, sequence))
        if self.policy is not None:
            forget.append(partial(self.policy.release, sequence.slot))
        errors = []
        for each in forget:
            try:
                each()
            except Exception as error:
                errors.append(error)
        return errors[0] if errors else None
