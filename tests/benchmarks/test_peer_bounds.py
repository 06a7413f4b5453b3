"""What the page says of a measured folder: ratios within rounds, the state of every demand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.peers import page
from benchmarks.peers.bounds import BOUNDS, verdicts
from benchmarks.peers.cells import Cell, Plan, Result
from benchmarks.peers.ctranslate2 import Paced
from benchmarks.peers.llama_cpp import padded
from benchmarks.peers.own import OwnSession
from benchmarks.peers.rows import Row, ratios, row_of, times_faster
from benchmarks.peers.shapes import SHAPES, write_checkpoint
from linspec.checkpoints.hub import load_model


def row(peer: str, steps: list[float], run: str = "a", **result: object) -> Row:
    cell = Cell(shape="1b", context=128, batch=1, peer=peer, form="int8")
    found = Result(
        prefill_s=[1.0],
        step_s=[[step] for step in steps],
        bandwidth_gb_s=[20.0] * len(steps),
        run=run,
        **result,  # type: ignore[arg-type]  # of different types
    )
    return row_of(SHAPES["1b"], cell, found)


def test_ratios_are_within_rounds_and_runs() -> None:
    # the machine became slower in the second round: both engines did
    own, other = row("linspec", [0.1, 0.2, 0.1]), row("openvino", [0.2, 0.4, 0.3])
    assert times_faster(own, other) == pytest.approx(2)
    assert [each["decode ÷ best"] for each in ratios([own, other])] == pytest.approx([2])
    assert ratios([own, row("openvino", [0.2, 0.4, 0.3], run="b")]) == []


def test_nodes_and_acceptance() -> None:
    found = row(
        "linspec",
        [0.1, 0.1],
        rows_s={"1": [[0.1], [0.2]], "8": [[0.12], [0.24]]},
        accepted=[[1, 0.5, 8, 0.8], [8, 0.5, 16, 1.0], [2, 0.5, 12, 1.0]],
    )
    assert found.nodes == {1: pytest.approx(1), 8: pytest.approx(1.2)}
    assert found.accepted == {0.5: pytest.approx(1.6)}


def test_every_demand_is_answered() -> None:
    read = SHAPES["1b"].read_parameters / 20e9
    own = row("linspec", [read / 0.93] * 3, rows_s={"1": [[0.1]], "8": [[0.119]], "16": [[0.2]]})
    found = {(each.what, each.bits): each for each in verdicts([own, row("openvino", [1.0] * 3)])}
    states = {what: each.state for (what, bits), each in found.items() if bits == 8}
    assert states["1.1B, plain decoding, share of the read bandwidth"] == "aim met"
    assert states["1.1B, step of 8 nodes ÷ 1 node"] == "met"
    assert states["1.1B, step of 16 nodes ÷ 1 node"] == "not met"
    assert states["110M softmax at 8K, tokens/s ÷ the best peer"] == "not measured"
    beside = found["1.1B softmax at 128, tokens/s ÷ the best peer", 8]
    assert beside.beside == "openvino int8" and beside.state == "aim met"
    # a demand that is not met says why
    assert all(bool(each.why) == (each.state == "not met") for each in found.values())
    assert len(found) == sum(len(bound.least) for bound in BOUNDS)


def test_the_page_names_the_command_and_the_sizes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = Plan(out=tmp_path, shapes=("toy",), rounds=2, tokens=3)
    written = page.write_page(plan, {}).read_text()
    assert "python -m benchmarks.peers --tokens 3 --rounds 2 --threads 1 --out DIR" in written


def test_padding_changes_no_product() -> None:
    draw = np.random.default_rng(0)
    up, down, x = draw.normal(size=(43, 8)), draw.normal(size=(8, 43)), draw.normal(size=8)
    wide, narrow = padded(up, outputs=True), padded(down, outputs=False)
    assert wide.shape == (64, 8) and narrow.shape == (8, 64)
    np.testing.assert_allclose(narrow @ (wide @ x), down @ (up @ x))


def test_a_generation_waits_between_rounds() -> None:
    class Step:
        step = 0

    pace, seen = Paced(), []

    def generate() -> None:
        for Step.step in range(3):
            for _row in range(2):
                if pace.note(Step):
                    return
            seen.append(Step.step)

    import threading

    thread = threading.Thread(target=generate)
    thread.start()
    pace.answered.acquire()
    assert seen == []
    assert pace.seconds() > 0 and seen == [0]
    pace.stopping = True
    pace.asked.release()
    thread.join(timeout=60)
    assert not thread.is_alive() and seen == [0]


def test_a_short_sequence_beside_a_long_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(write_checkpoint(SHAPES["toy"], tmp_path)).to_inference()
    session = OwnSession(model)
    session.open([[5 + i % 9 for i in range(160)]])
    steps = session.decode_short(2)
    assert steps is not None and len(steps) == 2
    assert session.state.length(0) == 160 and session.short is not None
    assert session.short.state.length(0) == 130
    session.open([[5, 6, 7]])
    assert session.decode_short(2) is None


def test_an_int8_cache_reads_its_own_prompt(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(write_checkpoint(SHAPES["toy"], tmp_path)).to_inference()
    prompt = [5 + i % 9 for i in range(300)]
    session = OwnSession(model, "int8")
    session.open([prompt])
    assert session.state.parts[0].keys.dtype == torch.int8
    assert session.tokens[0] < SHAPES["toy"].vocab
