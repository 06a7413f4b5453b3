"""Fill the cells of a comparison, engines taking turns; go on where it was stopped.

compare(Plan(out=Path("runs/peers"), shapes=("110m",), contexts=(128,)))
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.peers.base import peer
from benchmarks.peers.cells import NODES, Cache, Cell, Plan, Result
from benchmarks.peers.client import Client, QuietMachine, WorkerError, interpreter, worker
from benchmarks.peers.shapes import EMBEDDED, SHAPES, Shape, write_checkpoint
from linspec.bench.machine import machine, read_bandwidth
from linspec.utils.places import check_workspace, mark_folder
from linspec.utils.progress import Progress

# room for what is decoded behind the context
_ROOM = 512
# thread pools spin for a while after their last work; the next engine must not pay for that
_REST = 0.2
_ROW_REPEATS = 5
_ACCEPT_NODES = (1, 2, 4, 8, 16)
_ACCEPT_ROUNDS = 8
# longer prompts would keep a shared machine for minutes: they are read, but not timed
_TIMED_PROMPT = 8192
# prompts that are read once a round
_SHORT_PROMPT = 1024

Active = dict[Cell, tuple[Client, Result]]


def compare(plan: Plan, *, prepare_only: bool = False) -> dict[str, str]:
    """Measure what of `plan` is not in its cache yet; returns the peers left out, with reasons."""
    check_workspace(plan.out, "benchmarks.peers", ("cells/*.json",))
    mark_folder(plan.out, "benchmarks.peers")
    cache = Cache(plan.out)
    skipped = _left_out(plan)
    groups = [
        [cell for cell in group if cell.peer not in skipped and (plan.again or not cache.has(cell))]
        for group in plan.groups()
    ]
    groups = [group for group in groups if group]
    with Progress("peers", len(groups)) as progress:
        for done, group in enumerate(groups):
            first = group[0]
            ready = [cell for cell in group if _prepared(plan, cell, cache)]
            if not prepare_only:
                _measure(plan, ready, cache)
            progress.update(done + 1, f"{first.shape}, context {first.context}")
    return skipped


def _left_out(plan: Plan) -> dict[str, str]:
    found = {}
    for name in plan.peers:
        python = interpreter(name, plan.pythons)
        with worker(python, plan.threads, plan.out / "logs" / f"{name}.log") as client:
            reason = client.ask("why_not", peer_name=name, convert=False)
        if reason is not None:
            found[name] = reason
    return found


def source(plan: Plan, shape: str) -> tuple[Path, Shape]:
    """The Hugging Face directory of a shape and its sizes."""
    if shape == EMBEDDED:
        from linspec.checkpoints.hub import resolve

        folder = resolve("embedded-softmax")
        return folder, Shape.read(shape, folder)
    return write_checkpoint(SHAPES[shape], plan.out / "models"), SHAPES[shape]


def _folder(plan: Plan, cell: Cell) -> Path:
    # what follows the weights, like flash attention, is an option of the engine, not another model
    return plan.out / "models" / cell.shape / f"{cell.peer}-{cell.form.partition('-')[0]}"


def _log(plan: Plan, cell: Cell) -> Path:
    return plan.out / "logs" / f"{cell.key}.log"


def _prepared(plan: Plan, cell: Cell, cache: Cache) -> bool:
    """Convert the checkpoint for an engine unless that was done; False if it refuses."""
    target = _folder(plan, cell)
    if target.exists():
        return True
    checkpoint, _ = source(plan, cell.shape)
    with worker(interpreter(cell.peer, plan.pythons), plan.threads, _log(plan, cell)) as client:
        try:
            reason = client.ask("why_not", peer_name=cell.peer, convert=True)
            if reason is None:
                client.ask(
                    "convert",
                    peer_name=cell.peer,
                    form=cell.form,
                    source=str(checkpoint),
                    target=str(target),
                )
        except WorkerError as error:
            reason = str(error)
    if reason is not None:
        cache.put(cell, Result(error=f"cannot convert: {reason}"))
    return reason is None


def _measure(plan: Plan, group: list[Cell], cache: Cache) -> None:
    """All cells of a group: every engine loads, then they take turns."""
    if not group:
        return
    active: Active = {}
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.ExitStack() as stack:
        for cell in group:
            python = interpreter(cell.peer, plan.pythons)
            client = stack.enter_context(worker(python, plan.threads, _log(plan, cell)))
            active[cell] = client, Result(machine=machine(), run=began)
        _each(active, partial(_load, plan))
        _take_turns(plan, active)
        for cell, (_, found) in active.items():
            cache.put(cell, found)


def _take_turns(plan: Plan, active: Active) -> None:
    """Everything that is timed. The machine is kept for short times only."""
    first = next(iter(active))
    short = first.context * first.batch <= _SHORT_PROMPT
    _read_prompts(plan, active, timed=not short)
    _each(active, _warm)
    with QuietMachine(plan.guard) as quiet:
        for seed in range(plan.seed, plan.seed + plan.rounds):
            if short:
                _each(active, partial(_open, plan, seed))
            _each(active, partial(_decode, plan))
            for count in NODES if first.batch == 1 else ():
                _each(active, partial(_rows, count))
            # none is always the one whose turn comes after a pause
            active = dict([*list(active.items())[1:], next(iter(active.items()))])
            quiet.breathe()
        for rate in plan.accept if first.batch == 1 else ():
            _each(active, partial(_accept, plan, rate))
            quiet.breathe()


def _warm(cell: Cell, client: Client, found: Result) -> None:
    """The peak of memory, and what engines prepare for passes over rows, OpenVINO a whole model."""
    client.ask("decode", tokens=2)
    found.peak_bytes = client.ask("peak")
    if cell.batch == 1:
        client.ask("rows", count=1, repeats=1)


def _read_prompts(plan: Plan, active: Active, *, timed: bool) -> None:
    """Before the rounds. Long prompts are read once, with the machine for each engine alone."""
    first = next(iter(active))
    timed = timed and first.context * first.batch <= _TIMED_PROMPT
    with QuietMachine(plan.guard if timed else "") as quiet:
        for cell, pair in active.items():
            # another prompt than those of the rounds: some engines know a prompt again
            _each({cell: pair}, partial(_open, plan, plan.seed + plan.rounds))
            quiet.breathe()
    if not timed:
        for _, found in active.values():
            found.prefill_s.clear()


def _each(active: Active, call: Callable[[Cell, Client, Result], None]) -> None:
    """One turn of every engine; one that fails keeps its error and has no more turns."""
    for cell, (client, found) in active.items():
        if found.error is not None:
            continue
        try:
            call(cell, client, found)
        except WorkerError as error:
            found.error = str(error)


def _load(plan: Plan, cell: Cell, client: Client, found: Result) -> None:
    found.version = client.ask(
        "load",
        peer_name=cell.peer,
        form=cell.form,
        folder=str(_folder(plan, cell)),
        context=cell.context + _ROOM,
        batch=cell.batch,
        threads=plan.threads,
    )


def _open(plan: Plan, seed: int, cell: Cell, client: Client, found: Result) -> None:
    time.sleep(_REST)
    _, shape = source(plan, cell.shape)
    found.prefill_s.append(
        client.ask("open", context=cell.context, batch=cell.batch, vocab=shape.vocab, seed=seed)
    )


def _decode(plan: Plan, _: Cell, client: Client, found: Result) -> None:
    time.sleep(_REST)
    # on a shared machine it changes from one moment to the next
    bandwidth = read_bandwidth()
    found.step_s.append(client.ask("decode", tokens=plan.tokens))
    found.bandwidth_gb_s.append(bandwidth)
    short = client.ask("decode_short", tokens=plan.tokens)
    if short is not None:
        found.short_s.append(short)


def _rows(count: int, _: Cell, client: Client, found: Result) -> None:
    time.sleep(_REST)
    seconds = client.ask("rows", count=count, repeats=_ROW_REPEATS)
    if seconds is not None:
        found.rows_s.setdefault(str(count), []).append(seconds)


def _accept(plan: Plan, rate: float, cell: Cell, client: Client, found: Result) -> None:
    if client.ask("accept", nodes=1, rate=0.0, rounds=1) is None:
        return
    _, shape = source(plan, cell.shape)
    # what was accepted before would make the context longer
    client.ask("open", context=cell.context, batch=1, vocab=shape.vocab, seed=plan.seed)
    for nodes in _ACCEPT_NODES:
        answer = client.ask("accept", nodes=nodes, rate=rate, rounds=_ACCEPT_ROUNDS)
        found.accepted.append([nodes, rate, *answer])


def engine_format(cell: Cell) -> tuple[int, float, float]:
    """Bits, bytes of a weight, bytes of a number of the cache."""
    form = peer(cell.peer).format(cell.form)
    return form.bits, form.weight_bytes, form.cache_bytes
