"""The engine: requests become steps, steps become rounds, rounds become tokens.

A round is: plan, propose, step, accept, commit, observe. It does not know which drafter, verifier,
policy or mixer takes part, and rows of a batch need nothing in common: prompts that are still being
read ride in the same step as trees that are being verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from linspec.drafters.base import Drafter
from linspec.errors import ContextOverflow, InputError
from linspec.kernels.cpu.threads import torch_on_one_thread
from linspec.models.backbone import Generator
from linspec.models.decoder import StepOutput
from linspec.models.memory import check_state
from linspec.policy.base import Policy, RoundTimes
from linspec.row import Row
from linspec.sampling import Sampler, SamplingParams
from linspec.scheduler import Batch, Scheduler
from linspec.step import Feed
from linspec.tree import TokenTree, root_only
from linspec.verify.base import Accepted, Verifier


@dataclass(frozen=True, slots=True)
class Emitted:
    """New tokens of one row; `finished` is None, 'stop' (end of sequence) or 'length'."""

    row: Row
    tokens: tuple[int, ...]
    accepted: Accepted
    finished: str | None


class Engine:
    """Runs requests over one model, drafter, verifier and policy.

    drafter None is plain decoding. kv: how the rows of softmax caches are kept, 'float' or 'int8'.
    `clock` returns seconds; tests pass their own.
    """

    def __init__(
        self,
        model: Generator,
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

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids; returns the number that its row carries as `request`.

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
        check_state(self.state, len(prompt))
        # made here, so that foreign tokens are refused now and not when a slot is free
        sampler = Sampler(params, prompt, self.model.config.vocab_size)

        def place(slot: int) -> Row:
            fed, source = self.model.open(prompt, slot, self.state)
            # penalties are about the output and what it goes on from; a source is neither
            own = Sampler(params, fed, self.model.config.vocab_size) if source else sampler
            return Row(request, slot, own, fed, len(fed), source=source)

        self._requests += 1
        request = self._requests
        self.scheduler.submit(place)
        return request

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return self.scheduler.busy

    def step(self) -> list[Emitted]:
        """One step for every running request; returns what each of them emitted."""
        batch = self.scheduler.next_batch()
        # torch's threads would wait on the cores that the kernels' own threads need
        with nullcontext() if self.model.native is None else torch_on_one_thread():
            return self._step(batch)

    def _step(self, batch: Batch) -> list[Emitted]:
        began = self.clock()
        trees = self._propose(batch.decoding)
        drafted = self.clock()
        feeds = [Feed.tree(row.slot, tree) for row, tree in zip(batch.decoding, trees, strict=True)]
        feeds += [self._prompt_feed(row, count) for row, count in batch.prefilling]
        order = sorted(range(len(feeds)), key=lambda i: feeds[i].slot)
        output = self.model.step([feeds[i] for i in order], self.state)
        places = {feeds[i].slot: output.rows[at] for at, i in enumerate(order)}
        stepped = self.clock()
        emitted = [
            self._round(row, tree, output, places[row.slot])
            for row, tree in zip(batch.decoding, trees, strict=True)
        ]
        for row, count in batch.prefilling:
            emitted += self._prefilled(row, count, output, places[row.slot])
        nodes = sum(len(feed.tokens) for feed in feeds)
        drafts = max((len(tree) - 1 for tree in trees), default=0)
        rest = self.clock() - stepped
        times = RoundTimes(drafted - began, stepped - drafted, nodes, drafts, rest)
        self._account(batch.decoding, batch.prefilling, times)
        for item in emitted:
            if item.finished:
                self._retire(item.row)
        return emitted

    def cancel(self) -> None:
        """Drop every request."""
        for row in self.scheduler.clear():
            self._forget(row)

    # ---- decoding

    def _propose(self, rows: list[Row]) -> list[TokenTree]:
        trees = [root_only(row.root) for row in rows]
        if self.drafter is None or self.policy is None or not rows:
            return trees
        budgets = self.policy.plan(rows, self.drafter)
        if not any(budgets):
            return trees
        budgets = [min(b, self._room(row)) for b, row in zip(budgets, rows, strict=True)]
        drafting = [i for i, budget in enumerate(budgets) if budget > 0]
        if drafting:
            proposed = self.drafter.propose(
                [rows[i] for i in drafting], [budgets[i] for i in drafting]
            )
            for i, tree in zip(drafting, proposed, strict=True):
                trees[i] = tree
        return trees

    def _room(self, row: Row) -> int:
        """Draft tokens that could still be emitted or fit the model's positions."""
        limit = self.model.config.position_limit
        places = (
            row.remaining - 1 if limit is None else min(row.remaining - 1, limit - len(row.tokens))
        )
        return 0 if places < 1 else self._nodes_for(places)

    def _nodes_for(self, places: int) -> int:
        """A tree of this many nodes is never deeper than `places`."""
        assert self.drafter is not None
        return min(places, self.drafter.max_nodes)

    def _round(self, row: Row, tree: TokenTree, output: StepOutput, at: slice) -> Emitted:
        accepted = self.verifier.accept(tree, output.logits[at], row.sampler)
        path = accepted.path
        self.state.commit(row.slot, path)
        row.stats.count(tree, path)
        if self.drafter is not None and self.policy is not None and len(tree) > 1:
            expected = self.drafter.expected(len(tree) - 1)
            self.policy.observe(row, len(tree) - 1, len(path) - 1, expected)
            self.drafter.observe(row, tree, path)
        row.hidden = output.hidden[at][path[-1]]
        return self._extend(row, tree, accepted)

    def _extend(self, row: Row, tree: TokenTree, accepted: Accepted) -> Emitted:
        """Append the round's tokens, up to the end of the sequence or the request's limit."""
        tokens, finished = accepted.emitted(tree)[: row.remaining], None
        if not row.params.ignore_eos:
            ends = [i for i, token in enumerate(tokens) if token in self.model.config.eos_ids]
            if ends:
                tokens, finished = tokens[: ends[0] + 1], "stop"
        row.tokens += tokens
        row.sampler.observe(tokens)
        limit = self.model.config.position_limit
        if finished is None and (row.remaining <= 0 or (limit and len(row.tokens) > limit)):
            finished = "length"
        return Emitted(row, tokens, accepted, finished)

    # ---- prompts

    def _prompt_feed(self, row: Row, count: int) -> Feed:
        chunk = row.tokens[row.prefilled : row.prefilled + count]
        return Feed(row.slot, chunk, all_logits=False)

    def _prefilled(self, row: Row, count: int, output: StepOutput, at: slice) -> list[Emitted]:
        self.state.commit(row.slot, range(count))
        row.prefilled += count
        if row.prefilling:
            return []
        row.hidden = output.hidden[at][-1]
        tree = root_only(row.root)
        return [self._extend(row, tree, self.verifier.accept(tree, output.logits[at], row.sampler))]

    # ---- bookkeeping

    def _account(
        self,
        decoding: Sequence[Row],
        prefilling: Sequence[tuple[Row, int]],
        times: RoundTimes,
    ) -> None:
        if self.policy is not None and decoding and not prefilling:
            self.policy.observe_round(times)
        seconds = times.draft + times.step + times.rest
        for row in decoding:
            row.stats.decode_seconds += seconds
        for row, _ in prefilling:
            row.stats.prefill_seconds += seconds

    def retire(self, row: Row) -> None:
        """End a running request early, for a stop string or a client that left."""
        if row in self.scheduler.running:
            self._retire(row)

    def _retire(self, row: Row) -> None:
        self.scheduler.retire(row)
        self._forget(row)

    def _forget(self, row: Row) -> None:
        self.state.drop(row.slot)
        if self.drafter is not None:
            self.drafter.release(row.slot)
        if self.policy is not None:
            self.policy.release(row.slot)
