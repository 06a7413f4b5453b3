"""Cells that are really measured, as small as they can be."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir
from helpers import random_tokens, tiny_config
from test_study import SIZE

from linspec.evaluate.recall import Recall, RecallCell
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from studies.linearized_llm import make_plan, study
from studies.linearized_llm.recipes import Recipes
from studies.linearized_llm.speculation import TREE_NODES, _tree
from studies.linearized_llm.table import Results
from studies.linearized_llm.training import stop_leaking
from studies.linearized_llm.variants import variant

AUG = MixerConfig(name="aug", group=4, taps=3)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))


def decoder(mixer: MixerConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(tiny_config(mixer)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model


@torch.no_grad()
def test_the_unmasked_convolution_sees_the_future_until_it_is_told_not_to() -> None:
    ids = torch.tensor([random_tokens(11)])
    with variant(AUG, "unmasked") as mixer:
        leaking = decoder(mixer)
        changed = ids.clone()
        changed[0, 6] = (changed[0, 6] + 1) % 31
        before, after = leaking(ids), leaking(changed)
        assert not torch.equal(before[:, 5], after[:, 5])
        # two taps ahead at most
        assert torch.equal(before[:, :4], after[:, :4])
        stop_leaking(leaking)
        assert torch.equal(leaking(ids)[:, :6], leaking(changed)[:, :6])
        masked = Decoder(tiny_config(AUG)).double()
        masked.load_state_dict(leaking.state_dict(), strict=False)
        torch.testing.assert_close(leaking(ids), masked(ids), rtol=0, atol=1e-12)
    assert not [name for name in MIXERS.names() if name.startswith("study-")]


def test_alpha_of_the_variants() -> None:
    for kind, learned in (("alpha=1", True), ("both", False)):
        with variant(AUG, kind) as mixer:
            made = MIXERS[mixer.name](tiny_config(mixer), mixer)
            assert ("alpha" in dict(made.named_parameters())) is learned
            assert made.state_dict()["alpha"].item() == 1.0


def test_tables_of_trained_cells(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    rng = random.Random(0)
    book.write_text(" ".join(rng.choice(("ab", "cd", "end", "the")) for _ in range(900)))
    teacher = str(model_dir("softmax"))
    data = [str(book)]
    plan = make_plan(tmp_path / "out", teacher=teacher, data=data, size=SIZE, rows=["local"])
    found = study(plan, ["quality", "design"]).to_json()
    assert found["remaining"] == 0
    quality, design = (found["tables"][name] for name in ("quality", "design"))
    keys = {"row", "column", "seed", "key", "bits_per_byte", "perplexity", "train_loss"}
    assert all(keys <= set(row) for row in quality["rows"] + design["rows"])
    aug = next(r for r in quality["rows"] if (r["row"], r["column"]) == ("local", "aug"))
    same = next(r for r in design["rows"] if r["row"] == "α from 0")
    # the same measurement stands in both tables and was made once
    assert aug["key"] == same["key"]
    leak = next(r for r in design["rows"] if r["row"].startswith("conv unmasked"))
    assert leak["leaking_bits_per_byte"] != leak["bits_per_byte"]
    page = (tmp_path / "out" / "paper.md").read_text()
    assert f"{aug['bits_per_byte']:.3f}" in page
    assert "<svg" in next((tmp_path / "out" / "paper").glob("*.svg")).read_text()


def test_tables_of_speed(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    rng = random.Random(0)
    book.write_text(" ".join(rng.choice(("ab", "cd", "end", "the")) for _ in range(900)))
    teacher = str(model_dir("softmax"))
    plan = make_plan(tmp_path / "out", teacher=teacher, data=[str(book)], size=SIZE, rows=["local"])
    found = study(plan, ["latency", "speculation"]).to_json()
    assert found["remaining"] == 0
    latency, speculation = (found["tables"][name]["rows"] for name in ("latency", "speculation"))
    for row in latency:
        for model in ("softmax", "aug"):
            assert row[model]["prefill_ms"] > 0 and row[model]["decode_ms"] > 0
            assert sum(row[model]["prefill_shares"].values()) == pytest.approx(1)
    # a cache grows with the context, a state does not
    assert latency[0]["softmax"]["state_bytes"] < latency[1]["softmax"]["state_bytes"]
    assert latency[0]["aug"]["state_bytes"] == latency[1]["aug"]["state_bytes"]
    assert [row["row"] for row in speculation] == ["softmax, plain", "local, plain", "local, aug"]
    for row in speculation:
        assert "error" not in row
        assert {"plain_tokens_per_s", "medusa_tokens_per_s", "tree_ms", "candidates_ms"} <= set(row)


def test_the_tree_and_its_paths_are_the_same_candidates() -> None:
    tree, paths = _tree(random.Random(0), 4096)
    assert len(tree) == TREE_NODES
    assert {node for path in paths for node in path} == set(range(TREE_NODES))
    assert max(map(len, paths)) <= 5 and all(path[0] == 0 for path in paths)


def test_a_recipe_is_trained_scored_and_shown(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    rng = random.Random(0)
    book.write_text(" ".join(rng.choice(("ab", "cd", "end", "the")) for _ in range(900)))
    plan = make_plan(
        tmp_path / "out", teacher=str(model_dir("softmax")), data=[str(book)], size=SIZE
    )
    table = Recipes(plan)
    cells = table.cells()
    assert len({cell.key for cell in cells}) == len(cells) == len(table.recipes) * plan.seeds
    control, ours = cells[0], next(cell for cell in cells if cell.row == "linspec")
    done = [(cell, table.measure(cell, tmp_path / cell.key)) for cell in (control, ours)]
    assert done[1][1]["state_bytes"] > done[0][1]["state_bytes"] == 0
    shown = table.section(Results(done)).grids[0]
    assert next(line for line in shown.rows if line[0] == control.row)[2] == "+0.0%"
    assert next(line for line in shown.rows if line[0].startswith("Liger"))[1] == "–"


def test_recall_is_measured_as_far_as_the_teacher_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("the end " * 400)
    asked: list[int] = []

    def measured(model: object, *, lengths: list[int], **rest: object) -> Recall:
        asked.extend(lengths)
        cells = [RecallCell("needle", n, 192, 1, 0, 1 / n, 0, 2 / n, 0.5) for n in lengths]
        cells[-1] = replace(cells[-1], tokens=cells[-1].teacher_tokens or 0)
        return Recall(tuple(cells), 0, 0.1, 0.9, 1, 1)

    monkeypatch.setattr("studies.linearized_llm.recipes.evaluate_recall", measured)
    plan = make_plan(tmp_path / "out", data=[str(tmp_path / "book.txt")])
    shape = plan.config
    found = {}
    for positions, lengths in ((400, [200, 400]), (1600, [200, 400, 800, 1600])):
        vars(plan)["config"] = replace(shape, max_positions=positions)
        asked.clear()
        found = Recipes(plan)._recall(None, None, (), 400)  # type: ignore[arg-type]
        assert asked == lengths
        assert (found["far_relative_recall"] is None) == (positions == 400)
    # beyond 400: (1/800 + 2/1600) of (2/800 + 2/1600)
    assert found["far_relative_recall"] == pytest.approx(2 / 3)


def test_a_recipe_stands_where_it_says_something_about_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the end " * 400)
    data = [str(tmp_path / "book.txt")]

    def rows(config: DecoderConfig) -> set[str]:
        plan = make_plan(tmp_path / "out", data=data)
        vars(plan)["config"] = config
        return {cell.row for cell in Recipes(plan).cells()}

    small = make_plan(tmp_path / "out").config
    shape = {name: getattr(small, name) for name in ("vocab_size", "width", "heads", "kv_heads")}
    deep = DecoderConfig(**shape, layers=8, head_width=64, mlp_width=64, max_positions=4096)
    few, many = rows(small), rows(deep)
    assert few < many
    assert {"linspec, two softmax layers, 128 rows", "linspec, 1,024 exact rows"} <= many - few
    # a teacher that was trained on recall texts is linearized on them: other cells
    plain, asking = (
        {
            cell.key
            for cell in Recipes(make_plan(tmp_path / "out", data=data, recall_share=share)).cells()
        }
        for share in (0.0, 0.5)
    )
    assert not plain & asking
