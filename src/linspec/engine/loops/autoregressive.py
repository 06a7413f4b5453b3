"""Token by token, or several at a time: plan, propose, step, accept, commit, observe.

It does not know which drafter, verifier, policy or mixer takes part, and the sequences of a batch need
nothing in common: prompts that are still being read ride in the same step as trees that are verified.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from linspec.decoding.accepted import Accepted
from linspec.decoding.judged import Onward
from linspec.decoding.outcome import Outcome
from linspec.decoding.probes import Probes, check_probes
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import FINAL, LOGITS, StepInput, Want
from linspec.decoding.target import NodeOutput
from linspec.decoding.tree import TokenTree, root_only
from linspec.drafters.base import name_of
from linspec.engine.loops.base import LOOPS, GenerationLoop, LoopContext
from linspec.engine.loops.prompt import check_causal, keep_piece, open_prompt, prompt_piece
from linspec.engine.loops.rounds_ahead import RoundsAhead
from linspec.engine.proposals import Proposals, changed_tokens, tokens_end
from linspec.engine.scheduler import Batch
from linspec.policies.base import RoundTimes
from linspec.utils.isolation import isolated
from linspec.verifiers.base import judge_by

# of trees that a step has judged
NO_LOGITS = torch.empty(0, 0)

_log = logging.getLogger("linspec")


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence has in a step: a tree that is verified, or (None) a piece of its prompt."""

    sequence: RunningSequence
    given: StepInput
    tree: TokenTree | None
    probes: Probes | None = None

    def probed(self, node: int, logits: torch.Tensor) -> torch.Tensor | None:
        """The scores of the probes below a node of the tree."""
        if self.probes is None or self.tree is None:
            return None
        return logits[self.probes.below(node, self.tree)]


@LOOPS.register(
    "autoregressive",
    summary="draft, verify and commit; a prompt is read in pieces beside the others' rounds",
    paper="Leviathan et al. 2023, arXiv 2211.17192; Cai et al. 2024, arXiv 2401.10774",
)
class Autoregressive(GenerationLoop):
    """Rounds of drafts; without a drafter every round is one plain step."""

    preempts = True
    reads_in_order = True
    # whether a step may judge trees in the place of the verifier, where nothing else needs their scores, and
    # run the rounds behind them
    judged_in_step: ClassVar[bool] = True

    def __init__(self, context: LoopContext, options: Any = None) -> None:
        super().__init__(context, options)
        check_causal(context.target.model, self.name)
        self.verifier, self.clock = context.verifier, context.clock
        self.drafter, self.policy = context.drafter, context.policy
        self.want = LOGITS if self.drafter is None else self.drafter.needs
        self.limit = self.target.model.config.position_limit
        self.kept = (FINAL, *self.want.inner)
        self.ahead = RoundsAhead(self.target.state)

    def started(self, sequence: RunningSequence) -> None:
        open_prompt(self.target, sequence)
        if self.drafter is not None:
            sequence.stats.policy = name_of(self.policy)
            end = tokens_end(sequence)
            self.drafter.started(sequence)
            self._check_tokens(sequence, end)

    def round(self, batch: Batch) -> list[Outcome]:
        began = self.clock()
        decoding = self.ahead.turn(batch.decoding)
        trees = self._propose(decoding)
        drafted = self.clock()
        parts, outcomes = self._parts(replace(batch, decoding=decoding), trees)
        outputs = isolated(parts, self._step)
        stepped = self.clock()
        for part, output in zip(parts, outputs, strict=True):
            outcomes += self._judged(part, output)
        self._account(batch, parts, outcomes, (began, drafted, stepped, self.clock()))
        return outcomes

    def _propose(self, sequences: list[RunningSequence]) -> Sequence[TokenTree | Exception]:
        """A tree per sequence, or the error of the policy or the drafter about it."""
        if self.drafter is None or self.policy is None:
            return [root_only(sequence.root) for sequence in sequences]
        config = self.target.model.config
        return Proposals(self.drafter, self.policy, self.verifier, config).trees(sequences)

    def _parts(
        self, batch: Batch, trees: Sequence[TokenTree | Exception]
    ) -> tuple[list[Part], list[Outcome]]:
        """What the sequences have in the step, and the failures of those that have nothing."""
        parts, failures = [], []
        for sequence, tree in zip(batch.decoding, trees, strict=True):
            part = tree if isinstance(tree, Exception) else self._with_probes(sequence, tree)
            if isinstance(part, Exception):
                failures.append(Outcome.failure(sequence, part))
            else:
                parts.append(part)
        parts += [Part(each, prompt_piece(each, n), None) for each, n in batch.prefilling]
        return parts, failures

    def _with_probes(self, sequence: RunningSequence, tree: TokenTree) -> Part | Exception:
        """A tree and what its drafter lets ride with it, or the drafter's error."""
        drafter, model = self.drafter, self.target.model
        if drafter is not None and drafter.probing:
            try:
                probes = drafter.probes(sequence, tree)
                if probes is not None:
                    check_probes(name_of(drafter), probes, tree, model.embed.embedding_dim)
                    given = probes.beside(tree, sequence.slot, model.embed)
                    return Part(sequence, given, tree, probes)
            except Exception as error:
                return error
        judge = judge_by(self.verifier, tree, sequence.sampler) if self._judging else None
        return Part(sequence, StepInput.tree(sequence.slot, tree, judge), tree)

    @property
    def _judging(self) -> bool:
        """Whether steps may judge trees, and the model has steps that do."""
        return self.judged_in_step and getattr(self.target.model.native, "judging", False)

    def _step(self, parts: Sequence[Part]) -> list[NodeOutput]:
        trees = [(part.sequence, part.tree) for part in parts if part.tree is not None]
        judged = self.ahead.taken(trees)
        if judged is None:
            return self.target.step([part.given for part in parts], want=self._wanted(trees))
        # trees come before prompts
        prompts = [part.given for part in parts[len(trees) :]]
        read = self.target.step(prompts, want=self.want) if prompts else []
        return [*(NodeOutput(NO_LOGITS, {}, each) for each in judged), *read]

    def _wanted(self, trees: Sequence[tuple[RunningSequence, TokenTree]]) -> Want:
        """What the drafter needs of a step, and how far that may go on by itself."""
        if not self._judging:
            return self.want
        follow = None if self.drafter is None else self.drafter.follow
        # the host may find drafts for every round that a device would make without some
        by_host = self.drafter is not None and follow is None
        rounds = 1 if by_host else self.ahead.rounds(trees, self.limit)
        # who has drafts now will likely have some next
        if all(len(tree) == 1 for _, tree in trees):
            follow = None
        if follow is None and rounds == 1:
            return self.want
        return replace(self.want, onward=Onward(follow, rounds))

    def _judged(self, part: Part, output: NodeOutput | Exception) -> list[Outcome]:
        """What a part of a step has brought its sequence: tokens, nothing yet, or an error."""
        sequence = part.sequence
        try:
            if isinstance(output, Exception):
                raise output
            if part.tree is None:
                return self._read(sequence, len(part.given.tokens), output)
            outcome = self._verified(sequence, part.tree, output)
            path = outcome.accepted.path if outcome.accepted is not None else (0,)
            sequence.probed = part.probed(path[-1], output.logits)
            return [outcome]
        except Exception as error:
            return [Outcome.failure(sequence, error)]

    def _verified(self, sequence: RunningSequence, tree: TokenTree, output: NodeOutput) -> Outcome:
        accepted = self._accepted(sequence, tree, output)
        path, (tokens, finished) = accepted.path, self._ending(sequence, tree, accepted)
        # the state ends where the output does, as it would without drafts
        if output.judged is None:
            self.target.state.commit(sequence.slot, path[: len(tokens)])
        else:
            ended = finished is not None
            self.ahead.keep(sequence, tree, output.judged, len(tokens), ended=ended)
        sequence.stats.count(tree, path)
        if self.drafter is not None and self.policy is not None and len(tree) > 1:
            expected = self.drafter.score(sequence, tree)
            # what was paid for: probes too
            drafted = max(len(output.logits), len(tree)) - 1
            self.policy.observe(sequence, drafted, len(path) - 1, expected)
            end = tokens_end(sequence)
            # a drafter learns from the tree that it knows: what was cut from it is rejected
            self.drafter.observe(sequence, *tree.uncut(path))
            self._check_tokens(sequence, end)
        elif self.drafter is not None:
            self.drafter.passed(sequence)
        sequence.hidden = self._kept_of(output, path)
        sequence.follow = () if output.judged is None else output.judged.follow
        return self._extended(sequence, tree, accepted, tokens, finished)

    def _accepted(self, sequence: RunningSequence, tree: TokenTree, output: NodeOutput) -> Accepted:
        """What is accepted, by the step itself or by the verifier."""
        if output.judged is None:
            return self.verifier.accept(tree, output.logits[: len(tree)], sequence.sampler)
        accepted = output.judged.accepted()
        if not sequence.sampler.greedy:
            # one number for each token, as the verifier spends them
            sequence.sampler.spend(len(accepted.path))
        return accepted

    def _kept_of(self, output: NodeOutput, path: Sequence[int]) -> dict[int, torch.Tensor]:
        """The hidden states of the accepted nodes, by layer."""
        if output.judged is not None:
            return {n: output.judged.hidden[n] for n in self.kept}
        if len(path) == len(output.logits):
            return {n: output.hidden[n] for n in self.kept}
        # nearly always the first nodes, of which a view is enough
        kept = slice(len(path)) if path[-1] == len(path) - 1 else list(path)
        return {n: output.hidden[n][kept] for n in self.kept}

    def _check_tokens(self, sequence: RunningSequence, end: tuple[int, list[int]]) -> None:
        """Raise DrafterError if the drafter wrote to the tokens that ended so before."""
        if self.drafter is not None and tokens_end(sequence) != end:
            raise changed_tokens(self.drafter)

    def _read(self, sequence: RunningSequence, count: int, output: NodeOutput) -> list[Outcome]:
        """A piece of `count` prompt tokens is committed; the last piece emits the first token."""
        keep_piece(self.target, sequence, count, output)
        sequence.append_hidden({n: output.hidden[n] for n in self.kept})
        if sequence.prefilling:
            return []
        tree = root_only(sequence.root)
        accepted = self.verifier.accept(tree, output.logits[-1:], sequence.sampler)
        return [self._extended(sequence, tree, accepted, *self._ending(sequence, tree, accepted))]

    def _ending(
        self, sequence: RunningSequence, tree: TokenTree, accepted: Accepted
    ) -> tuple[tuple[int, ...], str | None]:
        """The round's tokens, up to the end of the sequence or the request's limit, and that end."""
        tokens = accepted.emitted(tree)[: sequence.remaining]
        ends = [i for i, token in enumerate(tokens) if token in sequence.sampler.ends]
        if ends:
            return tokens[: ends[0] + 1], "stop"
        limit = self.limit
        last = limit and len(sequence.tokens) + len(tokens) > limit
        return tokens, "length" if last or sequence.remaining <= len(tokens) else None

    def _extended(
        self,
        sequence: RunningSequence,
        tree: TokenTree,
        accepted: Accepted,
        tokens: tuple[int, ...],
        finished: str | None,
    ) -> Outcome:
        """Append what `_ending` says of the round."""
        sequence.tokens += tokens
        sequence.sampler.observe(tokens)
        if len(tree) == 1 or self.drafter is None:
            return Outcome(sequence, tokens, accepted, finished)
        judged, author = tree.without_proposals(), self.drafter.author(sequence)
        return Outcome(sequence, tokens, accepted, finished, tree=judged, drafter=author)

    def _account(
        self,
        batch: Batch,
        parts: Sequence[Part],
        outcomes: Sequence[Outcome],
        times: tuple[float, float, float, float],
    ) -> None:
        began, drafted, stepped, ended = times
        for sequence in batch.decoding:
            sequence.stats.decode_seconds += ended - began
        for sequence, _ in batch.prefilling:
            sequence.stats.prefill_seconds += ended - began
        # a round that was repeated sequence by sequence says nothing about what rounds cost
        usual = batch.decoding and not batch.prefilling and not any(e.error for e in outcomes)
        if self.policy is None or not usual:
            return
        nodes = sum(len(part.given.tokens) for part in parts)
        drafts = max(
            (len(part.given.tokens) - 1 for part in parts if part.tree is not None), default=0
        )
        cached = sum(len(sequence.tokens) for sequence in batch.decoding)
        seconds = RoundTimes(
            drafted - began, stepped - drafted, nodes, drafts, ended - stepped, cached
        )
        try:
            self.policy.observe_round(seconds)
        except Exception:
            # it is about no sequence, and decides about speed alone
            _log.warning("the policy did not take the times of a round", exc_info=True)
        if drafts:
            for sequence in batch.decoding:
                sequence.stats.draft_price = self.policy.price

    def paused(self, sequence: RunningSequence) -> Any:
        self.ahead.settle(sequence)
        try:
            return None if self.drafter is None else self.drafter.paused(sequence)
        finally:
            self._release(sequence)

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        if self.drafter is not None:
            end = tokens_end(sequence)
            self.drafter.resumed(sequence, kept)
            self._check_tokens(sequence, end)

    def finished(self, sequence: RunningSequence) -> None:
        self.ahead.forget(sequence)
        try:
            if self.drafter is not None:
                self.drafter.finished(sequence)
        finally:
            self._release(sequence)

    def _release(self, sequence: RunningSequence) -> None:
        if self.policy is not None:
            self.policy.release(sequence.slot)
