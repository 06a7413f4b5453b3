"""Train the filter of Learn2PD (Bao et al. 2025, arXiv 2509.25188) for a masked-diffusion model.

    result = train_filter("path/to/llada", prompts, FilterConfig(block=32, tokens=256))
    LLM("path/to/llada", loop="masked-diffusion:commit=learn2pd")

The model writes an answer to each prompt, one token a forward. Then it writes again, and each forward decides
exactly those tokens that equal the answer: the fewest forwards that any filter can reach. The filter learns
from the confidences that were seen on the way which predictions were right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linspec.checkpoints.resolve import resolve
from linspec.decoding.sampling import SamplingParams
from linspec.diffusion.base import CommitPolicy
from linspec.diffusion.candidates import Candidates
from linspec.diffusion.commits.learn2pd import Learn2PDOptions
from linspec.diffusion.filters import FOLDER, PLACE, CommitFilter, save_filter
from linspec.engine.loops.masked_diffusion import MaskedDiffusionLoop
from linspec.engine.prompts import Prompt
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.places import Place, as_path
from linspec.utils.sizes import check_positive, check_sizes

# of the prompts: learned, looked at to stop in time, kept aside to measure
_LEARNED, _WATCHED = 0.8, 0.1
_LEAST_PROMPTS = 10
_LOOK = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """How a filter is trained.

    block: positions of the blocks that it will see. tokens: of each answer. steps: most optimizer steps, each
    over all that was recorded. patience: looks without gain, each after 50 steps, that end the training.
    """

    block: int = 32
    tokens: int = 128
    steps: int = 5000
    patience: int = 10
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "block tokens steps patience")
        check_sizes(self, "seed", least=0)
        check_positive("lr", self.lr)


@dataclass(frozen=True, slots=True)
class TrainedFilter:
    """A filter, and what was measured.

    folder: where it was written; None if it was not. static, fewest: forwards of all answers one token at a
    time, and of those that decide all that is right. precision: of what the filter accepts at 0.96, of
    prompts kept aside; None where it accepts nothing. auc: how often it ranks a right prediction above a
    wrong one; None where all were of one kind.
    """

    filter: CommitFilter
    folder: Path | None
    static: int
    fewest: int
    precision: float | None
    auc: float | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A block before a forward decided some of it, each [block] with what is missing behind.

    prompt: whose it was. confidences: of the likeliest tokens. right: which of these are the answer's.
    real: which positions the block has.
    """

    prompt: tuple[int, ...]
    confidences: Tensor
    right: Tensor
    real: Tensor


class Oracle(CommitPolicy):
    """Decides what equals the answer, which it knows, and writes down what a filter would have seen."""

    name = "oracle"
    whole = True

    def __init__(
        self, texts: Mapping[tuple[int, ...], Sequence[int]], filter: CommitFilter
    ) -> None:
        """texts: prompts with their answers behind, by prompt."""
        super().__init__()
        self.texts, self.filter = texts, filter
        self.seen: list[Seen] = []

    def commit(self, candidates: Candidates) -> Tensor:
        canvas, block = candidates.canvas, candidates.canvas.block
        prompt = tuple(canvas.tokens[: canvas.prompt_length])
        wanted = torch.tensor(self.texts[prompt])
        best = candidates.predictions.logits(block).softmax(-1).max(-1)
        right = best.indices == wanted[block.start : block.stop]
        self._record(prompt, best.values, right)
        chosen = right[candidates.positions - block.start]
        if not chosen.any():
            # nothing would change any more: the answer itself goes on
            candidates.tokens[:] = wanted[candidates.positions]
            chosen[:] = True
        return chosen

    def _record(self, prompt: tuple[int, ...], confidences: Tensor, right: Tensor) -> None:
        missing, real = (0, self.filter.block - len(right)), torch.ones_like(right)
        padded = self.filter.padded(confidences)
        right, real = F.pad(right, missing, value=True), F.pad(real, missing, value=False)
        self.seen.append(Seen(prompt, padded, right, real))


def train_filter(
    model: str | Path | MaskedDiffusion,
    prompts: Sequence[Prompt],
    config: FilterConfig | None = None,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> TrainedFilter:
    """Train the filter of a model on its own answers and write it beside the model.

    Args:
        model: a model directory, or a model in memory, which becomes its inference form.
        prompts: different texts or token ids, 10 or more. Keep those that you measure with out of them.
        config: None takes the defaults.
        tokenizer: needed with a model in memory.
        out: where it goes; None for `learn2pd` in the directory of the model. A model in memory has none: its
            filter is returned, and `save_filter` writes it.
        overwrite: replace what was written there before.

    Raises:
        ConfigError: there are too few prompts, or `out` may not be written.
    """
    config = config or FilterConfig()
    if isinstance(model, str | Path):
        out = resolve(model) / FOLDER if out is None else out
    if out is not None:
        Place(as_path(out), PLACE, overwrite=overwrite).check()
    loop = f"masked-diffusion:block=fixed:{config.block},commit=static,stop=never"
    llm = LLM(model, tokenizer=tokenizer, loop=loop)
    trained = fit_filter(llm, prompts, config)
    if out is None:
        return trained
    facts = {"precision": trained.precision, "auc": trained.auc}
    assert isinstance(llm.model, MaskedDiffusion), "the loop takes no others"
    folder = save_filter(trained.filter, llm.model, out, facts=facts, overwrite=overwrite)
    return replace(trained, folder=folder)


def fit_filter(llm: LLM, prompts: Sequence[Prompt], config: FilterConfig) -> TrainedFilter:
    """A filter for the model of `llm`, whose loop decides one token a forward in blocks of `config.block`."""
    different = list(dict.fromkeys(tuple(llm.encode(each)) for each in prompts))
    if len(different) < _LEAST_PROMPTS:
        raise ConfigError(
            f"a filter is trained on {_LEAST_PROMPTS} different prompts or more, got {len(different)}; some "
            "are kept aside to measure it"
        )
    made = _initial(config)
    texts, static = _answers(llm, different, config)
    oracle = Oracle(texts, made)
    loop = llm.engine.loop
    assert isinstance(loop, MaskedDiffusionLoop), "a masked-diffusion model"
    before, loop.commit = loop.commit, oracle
    try:
        _, fewest = _answers(llm, different, config)
    finally:
        loop.commit = before
    learned, watched, aside = _parts(oracle.seen, different)
    _fit(made, learned, watched, config)
    precision, auc = _measured(made, aside)
    return TrainedFilter(made.eval().requires_grad_(False), None, static, fewest, precision, auc)


def _initial(config: FilterConfig) -> CommitFilter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CommitFilter(config.block)


def _answers(
    llm: LLM, prompts: Sequence[tuple[int, ...]], config: FilterConfig
) -> tuple[dict[tuple[int, ...], list[int]], int]:
    """Each prompt with its answer behind, and the forwards of all."""
    params = SamplingParams(max_tokens=config.tokens, ignore_eos=True)
    found = llm.generate([list(each) for each in prompts], params)
    texts = {p: [*p, *each.token_ids] for p, each in zip(prompts, found, strict=True)}
    return texts, sum(each.stats.rounds for each in found)


def _parts(seen: Sequence[Seen], prompts: Sequence[tuple[int, ...]]) -> list[list[Seen]]:
    """What is learned, what is looked at to stop in time, and what is kept aside; none shares a prompt."""
    ends = [int(_LEARNED * len(prompts)), int((_LEARNED + _WATCHED) * len(prompts)), len(prompts)]
    starts = [0, *ends[:2]]
    groups = [set(prompts[start:end]) for start, end in zip(starts, ends, strict=True)]
    return [[each for each in seen if each.prompt in group] for group in groups]


def _fit(
    made: CommitFilter, learned: Sequence[Seen], watched: Sequence[Seen], config: FilterConfig
) -> None:
    """Minimize the binary cross entropy, and keep the weights of the look where it was least."""
    given, aside = _stacked(learned), _stacked(watched)
    optimizer = torch.optim.AdamW(made.parameters(), lr=config.lr)
    best, kept, without = math.inf, made.state_dict(), 0
    for step in range(1, config.steps + 1):
        optimizer.zero_grad()
        _loss(made, *given).backward()
        optimizer.step()
        if step % _LOOK and step != config.steps:
            continue
        with torch.no_grad():
            found = float(_loss(made, *aside))
        if found < best:
            best, without = found, 0
            kept = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        elif (without := without + 1) == config.patience:
            break
    made.load_state_dict(kept)


def _stacked(seen: Sequence[Seen]) -> tuple[Tensor, Tensor, Tensor]:
    """Confidences, right as floats and real as booleans, each [N, block]."""
    return (
        torch.stack([each.confidences for each in seen]),
        torch.stack([each.right for each in seen]).float(),
        torch.stack([each.real for each in seen]),
    )


def _loss(made: CommitFilter, confidences: Tensor, right: Tensor, real: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(made(confidences)[real], right[real])


def _measured(made: CommitFilter, seen: Sequence[Seen]) -> tuple[float | None, float | None]:
    """The precision of what is accepted, and the area under the curve."""
    confidences, right, real = _stacked(seen)
    with torch.no_grad():
        scores, truth = made(confidences).sigmoid()[real], right[real].bool()
    accepted = truth[scores > Learn2PDOptions().least]
    precision = float(accepted.float().mean()) if len(accepted) else None
    good, bad = scores[truth], scores[~truth]
    if not len(good) or not len(bad):
        return precision, None
    # a rank is one more than how many are below, equal ones share theirs
    order = scores.double().sort().values
    below, upto = (torch.searchsorted(order, good.double(), right=side) for side in (False, True))
    ranks = (below + upto + 1).double() / 2
    count = len(good)
    return precision, float((ranks.sum() - count * (count + 1) / 2) / (count * len(bad)))
