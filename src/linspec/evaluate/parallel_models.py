"""Models for ParallelBench's tasks, a token for each item: a perfect one, and a small one that is trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from linspec.decoding.step import LOGITS, StepInput, StepOutput, Want
from linspec.errors import ConfigError
from linspec.evaluate.parallel_forms import EQUALS, MASK, VOCABULARY, Numbers
from linspec.evaluate.parallel_tasks import TASKS, Items, Question, ask
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.state.sequence_states import SequenceStates
from linspec.train.pretrain import initialize
from linspec.utils.progress import Progress

LENGTHS = (3, 4, 5, 6)
# of a token that cannot stand at a place: decoders want finite logits
_NEVER = -60.0


def task_config(width: int = 64, layers: int = 3) -> DiffusionConfig:
    """The shape of a model of the tasks; it has no token that ends a text."""
    return DiffusionConfig(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        width=width,
        layers=layers,
        heads=4,
        kv_heads=4,
        head_width=width // 4,
        mlp_width=2 * width,
        max_positions=32,
    )


class PerfectModel(MaskedDiffusion):
    """Says exactly how likely each item is at each place, given what of the answer is decided.

    So what a decoder gets wrong with it is the decoder's. It reads whole canvases, so there is nothing that
    cache policies could keep.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        super().__init__(task_config(width=8, layers=1))
        form = Numbers()
        self._accepted = {tuple(form.prompt(each)): each.accepted for each in questions}

    @torch.inference_mode()
    def step(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        found, slices = list[torch.Tensor](), list[slice]()
        for each in inputs:
            begin = sum(map(len, found))
            rows = range(len(each.tokens)) if each.logits_of is None else each.logits_of
            found.append(self._logits(each)[list(rows)])
            slices.append(slice(begin, begin + len(found[-1])))
        logits = torch.cat(found)
        return StepOutput(logits[:, :1], logits, slices)

    def _logits(self, given: StepInput) -> torch.Tensor:
        """[T, vocab] of a whole canvas."""
        tokens = tuple(given.tokens)
        begin = 1 + tokens.index(EQUALS) if EQUALS in tokens else 0
        accepted = self._accepted.get(tokens[:begin])
        if accepted is None or len(tokens) != begin + len(accepted[0]):
            raise ConfigError(
                "a perfect model reads the whole text in every forward; use the cache policy 'none'"
            )
        logits = torch.full((len(tokens), VOCABULARY), _NEVER)
        possible = _possible(accepted, tokens[begin:])
        for place in range(begin, len(tokens)):
            counts = Counter(answer[place - begin] for answer in possible)
            for item, count in counts.items():
                logits[place, item] = torch.tensor(count / len(possible)).log()
        return logits


def _possible(accepted: list[Items], decided: Items) -> list[Items]:
    """The right answers that agree with what is decided; all of them where that is wrong already."""
    places = [(at, token) for at, token in enumerate(decided) if token != MASK]
    return [each for each in accepted if all(each[at] == t for at, t in places)] or accepted


def train_task_model(
    steps: int = 3000,
    *,
    seed: int = 0,
    batch: int = 64,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = LENGTHS,
    rate: float = 3e-3,
) -> MaskedDiffusion:
    """A model of the tasks, by LLaDA's loss.

    Of an answer any number of tokens is masked, each number equally often, and its inverse weighs them.
    """
    return train_by_masks(
        MaskedDiffusion(task_config()), _batches(batch, seed, tasks, lengths), steps, seed, rate
    )


def train_by_masks(
    model: MaskedDiffusion,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    steps: int,
    seed: int = 0,
    rate: float = 3e-3,
) -> MaskedDiffusion:
    """A small model from random weights, by LLaDA's loss.

    batches: of each step texts [B, T], what of them is real, and the weight of each place that is masked, 0
    elsewhere; `masked_rows` makes them.
    """
    initialize(model, model.config.layers, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    with Progress("training on the tasks", steps) as progress:
        for step in range(1, steps + 1):
            loss = _loss(model, *next(batches))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(step, f"loss {float(loss.detach()):.3f}")
    return model.eval()


def masked_rows(
    rows: Sequence[torch.Tensor], prompt: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of texts whose first `prompt` tokens are given, of any lengths.

    Of what stands behind them any number of tokens is masked, each number equally often, and its inverse
    weighs them. Returns texts [B, T], what of them is real, and the weights.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)
    answer = (ids >= 0) & (torch.arange(ids.shape[1]) >= prompt)
    order = torch.rand(ids.shape, generator=generator).masked_fill(~answer, 2).argsort(1)
    share = torch.rand(len(rows), 1, generator=generator)
    # from 1 to all
    masks = (share * answer.sum(1, keepdim=True)).floor() + 1
    masked = order.argsort(1) < masks
    return ids.clamp_min(0), ids >= 0, masked / masks


def _batches(
    count: int, seed: int, tasks: Sequence[str], lengths: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Texts [B, T], what of them is real, and how much each place of an answer weighs where it is masked."""
    form, rng = Numbers(), random.Random(f"train {seed}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = []
        for _ in range(count):
            question = ask(rng.choice(tasks), rng.choice(lengths), rng)
            rows.append(torch.tensor([*form.prompt(question), *question.answer(rng)]))
        yield masked_rows(rows, len(form.prompt(question)), generator)


def _loss(
    model: MaskedDiffusion, ids: torch.Tensor, real: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    logits = model.predicted(ids.masked_fill(weights > 0, model.config.mask_id), real)
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (nats * weights).sum(1).mean()
