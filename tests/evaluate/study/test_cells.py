"""Cells that are really measured, as small as they can be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir
from helpers import random_tokens, tiny_config
from test_study import SIZE

from linspec.config import MixerConfig
from linspec.evaluate.study import make_plan, study
from linspec.evaluate.study.recipes import RECIPES, Recipes
from linspec.evaluate.study.speculation import TREE_NODES, _tree
from linspec.evaluate.study.table import Results
from linspec.evaluate.study.training import stop_leaking
from linspec.evaluate.study.variants import variant
from linspec.mixers import MIXERS
from linspec.models.decoder import Decoder

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
    plan = make_plan(tmp_path / "out", teacher=teacher, data=data, size=SIZE, mixers=["local"])
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
    plan = make_plan(
        tmp_path / "out", teacher=teacher, data=[str(book)], size=SIZE, mixers=["local"]
    )
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
    assert len({cell.key for cell in cells}) == len(cells) == len(RECIPES) * plan.seeds
    control, ours = cells[0], next(cell for cell in cells if cell.row == "linspec")
    done = [(cell, table.measure(cell, tmp_path / cell.key)) for cell in (control, ours)]
    assert done[1][1]["state_bytes"] > done[0][1]["state_bytes"] == 0
    shown = table.section(Results(done)).grids[0]
    assert next(line for line in shown.rows if line[0] == control.row)[2] == "+0.0%"
    assert next(line for line in shown.rows if line[0].startswith("Liger"))[1] == "–"
