"""Processes that share sequences, and one that does not: python tests/shard_processes.py OUT.

Forks `PROCESSES` of them, since imports take longer than all they do. Each writes what it found to
OUT/RANK.pt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GROUP, MIXER_NAMES, random_tokens, tiny_model

from linspec.mixers.shards import Shard, on_shard
from linspec.models.decoder import Decoder
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.objective import next_tokens
from linspec.train.pieces import Labels, loss_in_pieces
from linspec.train.process_exchange import ProcessExchange
from linspec.train.run import make_accelerator
from linspec.train.sequence_parallel import SequenceParallel, share
from linspec.train.transfer import Transfer

PROCESSES = 4
# the first two processes are a group as well
NAMES = {2: [name for name in MIXER_NAMES if ":" not in name], 4: MIXER_NAMES}
LENGTHS = {2: (2 * GROUP + 3, 3 * GROUP), 4: (GROUP + 3, 1, 2 * GROUP, 4 * GROUP + 1)}
HYBRID = ("aug:softmax", "by-head")
CONTEXT, STEPS, HALF = 6 * GROUP + 1, 3, 2


# ---- one pass of every mixer


def one_pass(name: str, rank: int, size: int, group: Any) -> dict[str, float]:
    """How far logits, loss and gradients are from one process's; what the exchange of the pass took."""
    model, exchange, lengths = tiny_model(name), ProcessExchange(group), LENGTHS[size]
    ids = torch.tensor([random_tokens(sum(lengths) + 1, seed) for seed in (1, 2)])
    loss, logits = mean_loss(model, ids)
    wanted = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    shard = Shard(lengths, rank, exchange)
    with on_shard(model, shard):
        ours, given = mean_loss(model, ids[:, shard.start : shard.end + 1])
    forward = exchange.gathers, exchange.sent
    ours = ours * share(shard)
    ours.backward()
    slopes = [weight.grad for weight in model.parameters()]
    assert [each is None for each in slopes] == [each is None for each in wanted]
    found, whole = in_one(ours, slopes), in_one(loss, wanted)
    dist.all_reduce(found, group=group)
    return {
        "logits": largest(given - logits[:, shard.start : shard.end]),
        "loss and gradients": largest(found - whole),
        "gathers": forward[0],
        "bytes": forward[1],
        "gathers back": exchange.gathers - forward[0],
        "bytes back": exchange.sent - forward[1],
    }


def of_several_dtypes(rank: int, group: Any) -> list[list[torch.Tensor]]:
    """The messages of all, numbered, and the gradients of this one where rank r takes r + 1 times each."""
    own = [
        torch.full((count,), rank, dtype=dtype, requires_grad=True)
        for count, dtype in ((3, torch.bfloat16), (1, torch.float32), (5, torch.float64))
    ]
    anchor, messages = ProcessExchange(group)(torch.zeros(1), own)
    total = sum((rank + 1) * x.sum().double() for message in messages for x in message)
    (total + anchor.sum()).backward()
    return [[x.detach() for x in each] for each in (*messages, [x.grad for x in own])]


def in_one(loss: torch.Tensor, slopes: Iterable[torch.Tensor | None]) -> torch.Tensor:
    found = (each.flatten() for each in slopes if each is not None)
    return torch.cat((loss.detach()[None], *found))


def largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max())


def mean_loss(model: Decoder, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in float64, where the loss of training is float32, and the logits."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), logits


# ---- whole runs


def train(
    folder: Path,
    parts: int,
    readers: tuple[int, ...] = (),
    stop: int = STEPS,
    precision: str = "float64",
) -> dict[str, Any]:
    """The weights of a hybrid after `stop` of its steps, on with what is in `folder`, and its tokens.

    precision: float64 of a plain loss, or that of a loss in pieces of a few tokens.
    """
    model, accelerator = tiny_model(*HYBRID, seed=3), make_accelerator()
    exact = precision == "float64"
    model = model if exact else model.float()
    sequence = SequenceParallel(accelerator, parts, [model])
    narrow = "bf16" if precision == "bf16" else "float32"
    config = TrainConfig(
        steps=STEPS, lr=1e-2, warmup=1, precision=narrow, compile="off", log_every=1
    )

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return mean_loss(model, batch)[0] if exact else loss_of_pieces(model, batch)

    trainer = Trainer(
        model,
        sequence.loss(loss),
        partial(windows, readers=readers or (sequence.index,), stop=stop),
        config,
        folder,
        label="test",
        accelerator=accelerator,
        sequence_parallel=parts,
    )
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run(resume=trainer.has_state)
    trainer.save()
    accelerator.wait_for_everyone()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"weights": weights, "tokens": trainer.tokens, "loss": trainer.log[-1]["loss"]}


def loss_of_pieces(model: Decoder, batch: torch.Tensor) -> torch.Tensor:
    """`next_token_loss`, seven tokens at a time."""
    states, output, labels = next_tokens(model, batch)
    return loss_in_pieces(states, output, Labels(labels), piece=7)


def windows(step: int, readers: tuple[int, ...], stop: int) -> torch.Tensor:
    """The windows of a step of some groups of processes; Ctrl-C at step `stop`."""
    if step == stop:
        raise KeyboardInterrupt
    seeds = [100 * step + 10 * reader + row for reader in readers for row in (0, 1)]
    return torch.tensor([random_tokens(CONTEXT + 1, seed) for seed in seeds])


def transfer(parts: int) -> dict[str, Any]:
    """Loss and gradients of the first stage of a linearization."""
    teacher, student = tiny_model("softmax"), tiny_model("gla", seed=1)
    sequence = SequenceParallel(make_accelerator(), parts, [teacher, student])
    with Transfer(teacher, student, (0, 1), sequence.mean) as stage:
        loss = sequence.loss(stage.loss)(windows(0, (sequence.index,), STEPS)) / parts
    loss.backward()
    trained = stage.parameters()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in trained.named_parameters()}
    for each in found.values():
        if parts > 1:
            dist.all_reduce(each)
    return found


# ---- the processes


def prove(rank: int, out: Path) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in places.items()} | {
        "MASTER_ADDR": "localhost"
    }
    store = f"file://{out / 'store'}"
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=100),
    )
    found: dict[str, Any] = {}
    for size in LENGTHS:
        group = dist.new_group(range(size))
        if rank < size:
            found |= {(name, size): one_pass(name, rank, size, group) for name in NAMES[size]}
    found["dtypes"] = of_several_dtypes(rank, dist.group.WORLD)
    found["four"] = train(out / "four", 4)
    found["pairs"] = train(out / "pairs", 2)
    for precision in ("float32", "bf16"):
        for parts in (1, 2):
            folder = out / f"{precision}-{parts}"
            found[precision, parts] = train(folder, parts, precision=precision)
    train(out / "half", 4, stop=HALF)
    if not rank:
        shutil.copytree(out / "half", out / "kept")
    dist.barrier()
    found["resumed"] = train(out / "half", 4)
    found["transfer"] = transfer(4)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def main(out: Path) -> int:
    """Fork and wait for all; 1 if one of them failed."""
    torch.set_num_threads(1)
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if not child:
            code = 1
            try:
                prove(rank, out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = 0
    for _ in range(PROCESSES):
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = 1
            # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
