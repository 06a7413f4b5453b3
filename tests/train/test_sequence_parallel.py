"""Processes that share a window train what one process trains: gloo groups of two and of four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shard_processes
import torch
from helpers import GROUP, assert_close, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from shard_processes import HYBRID, NAMES, PROCESSES, train, transfer

from linspec.checkpoints.hub import load_model
from linspec.errors import ConfigError
from linspec.mixers.softmax import Softmax
from linspec.models.flash import Flash
from linspec.models.flash_config import FlashConfig
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.pretrain import pretrain
from linspec.train.sequence_parallel import SequenceParallel, shard_unit, split_evenly

PASSES = [(size, name) for size, names in NAMES.items() for name in names]
Proofs = tuple[Path, list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Proofs:
    """What `PROCESSES` processes found, in the order of their ranks, and where."""
    out = tmp_path_factory.mktemp("shards")
    script = Path(shard_processes.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return out, [torch.load(out / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("size", "name"), PASSES)
def test_processes_give_what_one_gives(proofs: Proofs, size: int, name: str) -> None:
    for each in proofs[1][:size]:
        found = each[name, size]
        assert max(found["logits"], found["loss and gradients"]) < 1e-9


@pytest.mark.parametrize(("size", "name"), PASSES)
def test_a_layer_takes_one_exchange_each_way(proofs: Proofs, size: int, name: str) -> None:
    found = [each[name, size] for each in proofs[1][:size]]
    # two layers, the heads of `by-head` in two parts
    exchanges = 4 if name.startswith("by-head") else 2
    for each in found:
        assert each["gathers"] == each["gathers back"] == exchanges
        assert each["bytes"] == each["bytes back"] == found[0]["bytes"] > 0


def test_messages_arrive_in_their_dtypes(proofs: Proofs) -> None:
    dtypes = torch.bfloat16, torch.float32, torch.float64
    for found in proofs[1]:
        *messages, slopes = found["dtypes"]
        for number, message in [*enumerate(messages), (1 + 2 + 3 + 4, slopes)]:
            assert tuple(x.dtype for x in message) == dtypes
            assert all(bool((x == number).all()) for x in message)


@pytest.mark.parametrize("run", ["four", "resumed"])
def test_a_run_of_processes_is_the_run_of_one(proofs: Proofs, tmp_path: Path, run: str) -> None:
    check_runs(train(tmp_path / "one", 1, (0,)), [each[run] for each in proofs[1]])


def test_groups_of_processes_read_windows_of_their_own(proofs: Proofs, tmp_path: Path) -> None:
    # one process with the windows of both pairs
    check_runs(train(tmp_path / "one", 1, (0, 1)), [each["pairs"] for each in proofs[1]])


def test_one_process_goes_on_where_four_stopped(proofs: Proofs, tmp_path: Path) -> None:
    wanted = train(tmp_path / "one", 1, (0,))
    check_runs(wanted, [train(proofs[0] / "kept", 1, (0,))])


@pytest.mark.parametrize(
    ("precision", "loss", "share"), [("float32", 1e-4, 5e-3), ("bf16", 2e-2, 0.3)]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_in_pieces_are_shared_in_every_precision(
    proofs: Proofs, tmp_path: Path, precision: str, loss: float, share: float, parts: int
) -> None:
    readers = tuple(range(PROCESSES // parts))
    run = train(tmp_path / "one", 1, readers, precision=precision)
    wanted = run["weights"]
    before = tiny_model(*HYBRID, seed=3).float().state_dict()
    moved = sum(float((wanted[name] - before[name]).square().sum()) for name in wanted)
    for each in proofs[1]:
        found = each[precision, parts]
        assert found["loss"] == pytest.approx(run["loss"], abs=loss)
        assert all(weight.dtype == torch.float32 for weight in found["weights"].values())
        apart = (found["weights"][name] - wanted[name] for name in wanted)
        # the optimizer makes as much of a gradient that is rounding as of any other
        assert sum(float(x.square().sum()) for x in apart) < share**2 * moved


def check_runs(wanted: dict[str, Any], found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["tokens"] == wanted["tokens"]
        assert each["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
        for name, weight in wanted["weights"].items():
            assert torch.equal(each["weights"][name], found[0]["weights"][name])
            assert_close(each["weights"][name], weight, atol=1e-6)


def test_the_transfer_of_processes_is_that_of_one(
    proofs: Proofs,
) -> None:
    wanted = transfer(1)
    for each in proofs[1]:
        assert each["transfer"].keys() == wanted.keys()
        for name, value in wanted.items():
            # its errors are float32
            torch.testing.assert_close(each["transfer"][name], value, rtol=1e-4, atol=1e-6)


# ---- lengths


@given(tokens=st.integers(1, 400), parts=st.integers(1, 9), unit=st.integers(1, 70))
def test_windows_are_split_evenly_at_group_borders(tokens: int, parts: int, unit: int) -> None:
    if tokens < parts:
        with pytest.raises(ConfigError, match=f"{tokens} tokens cannot be shared among {parts}"):
            split_evenly(tokens, parts, unit)
        return
    lengths = split_evenly(tokens, parts, unit)
    assert sum(lengths) == tokens and len(lengths) == parts and min(lengths) > 0
    if tokens > unit * (parts - 1):
        assert all(border % unit == 0 for border in list(accumulate(lengths))[:-1])
        assert max(lengths) - min(lengths) < 2 * unit


# ---- what is refused


def processes(count: int) -> Any:
    return SimpleNamespace(num_processes=count, process_index=0)


def test_the_processes_must_form_groups() -> None:
    model = tiny_model("aug")
    assert SequenceParallel(processes(3), 1, [model]).exchange is None
    with pytest.raises(ConfigError, match="multiple of 2 processes, this run has 3; start it with"):
        SequenceParallel(processes(3), 2, [model])


def test_who_cannot_be_shared_is_named() -> None:
    config = FlashConfig(vocab_size=31, width=16, layers=1, mlp_width=16, eos_ids=(0,))
    with pytest.raises(ConfigError, match="type 'flash' cannot be shared"):
        shard_unit([Flash(config)])
    model = tiny_model("relu", "softmax")
    assert shard_unit([model]) == GROUP
    # as one that another package brings
    model.layers[1].mixer.__class__ = type("Nearer", (Softmax,), {"mix": Softmax.mix})
    with pytest.raises(ConfigError, match="mixer 'softmax' does not say what a shard"):
        shard_unit([model])


def test_pretraining_refuses_recipes_that_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="type 'flash' cannot be shared"):
        pretrain(tmp_path / "m", recipe="flash-aug", sequence_parallel=2)
    with pytest.raises(ConfigError, match="this run has 1; start it with torchrun"):
        pretrain(tmp_path / "m", sequence_parallel=2)
    assert not (tmp_path / "m").exists()


def test_shared_steps_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="2 processes share are not compiled"):
        LinearizeConfig(compile="on", sequence_parallel=2)
    config = LinearizeConfig(sequence_parallel=2).completed([])
    assert config.stage(1, transfer=False).compile == "off"


def test_linearization_says_what_it_needs(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="this run has 1; start it with torchrun"):
        linearize(teacher_dir, tmp_path / "s", data=[corpus], sequence_parallel=2, context=64)
    assert not (tmp_path / "s").exists()


def test_who_shares_a_window_is_no_part_of_the_plan() -> None:
    assert LinearizeConfig(sequence_parallel=4).to_json() == LinearizeConfig().to_json()


# ---- the command


@pytest.mark.slow
def test_two_processes_linearize_what_one_does(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "linspec", "linearize", str(teacher_dir), "--data", str(corpus)]
    command += ["--mixer", "aug:group=8,span=2", "--tokens", "2048", "--context", "63"]
    command += ["--batch-tokens", "256", "--transfer-share", "0.5"]
    outs = [tmp_path / "one", tmp_path / "two"]
    ways = ([], []), (launch, ["--sequence-parallel", "2"])
    for out, (launcher, more) in zip(outs, ways, strict=True):
        done = subprocess.run(
            [sys.executable, *launcher, *command, *more, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    records = [json.loads((out / "linearize.json").read_text()) for out in outs]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["plan"] == records[1]["plan"]
    weights = [load_model(path).state_dict() for path in (teacher_dir, *outs)]
    # the weights that teacher and student have
    before, one, two = (torch.cat([each[n].flatten() for n in weights[0]]) for each in weights)
    # steps in bfloat16, where the processor has it, round
    assert (two - one).norm() < 0.05 * (one - before).norm()
