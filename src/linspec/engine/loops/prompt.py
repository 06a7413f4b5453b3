"""Prompts are read in pieces, in the same way by every loop whose output goes on from them."""

from __future__ import annotations

from linspec.decoding.protocols import CausalModel
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.target import NodeOutput, Target
from linspec.engine.prompt_logprobs import refuse_source, score_prompt
from linspec.errors import ConfigError
from linspec.models.masked_diffusion import MaskedDiffusion


def check_causal(model: CausalModel, loop: str) -> None:
    """Raise ConfigError for a model whose tokens do not come one behind the other, which `loop` needs."""
    if isinstance(model, MaskedDiffusion):
        raise ConfigError(
            f"loop {loop!r} writes one token behind the other, and this is a diffusion model, which fills "
            "masks; use the loop 'auto'"
        )


def open_prompt(target: Target, sequence: RunningSequence) -> None:
    """Make the slot of `sequence` ready: the tokens that it is fed, and the source that was read, if any."""
    fed, source = target.model.open(sequence.tokens, sequence.slot, target.state)
    sequence.tokens, sequence.prompt_length, sequence.source = fed, len(fed), source
    if source:
        # penalties are about the output and what it goes on from; a source is neither
        sequence.sampler = sequence.sampler.restarted(fed)
        refuse_source(sequence)


def prompt_piece(sequence: RunningSequence, count: int) -> StepInput:
    """The next `count` tokens of a prompt."""
    piece = slice(sequence.prefilled, sequence.prefilled + count)
    given = None if sequence.embeddings is None else sequence.embeddings[piece]
    every = sequence.params.prompt_logprobs is not None
    return StepInput(sequence.slot, sequence.tokens[piece], all_logits=every, embeddings=given)


def keep_piece(target: Target, sequence: RunningSequence, count: int, output: NodeOutput) -> None:
    """Commit a piece of `count` tokens that was stepped; `sequence.prefilled` counts it."""
    target.state.commit(sequence.slot, range(count))
    if sequence.params.prompt_logprobs is not None:
        score_prompt(sequence, output.logits)
    sequence.prefilled += count
