"""Packed heads: what trained heads compute, in one call, with any weights, on disk and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.load_quantized import load_for, quantize_model
from linspec.decoding.step import FINAL
from linspec.decoding.tree import Budget
from linspec.drafters import DrafterContext, make_drafter, packed
from linspec.drafters import found as finding
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.found import shipped_drafter
from linspec.drafters.heads import Heads, HeadsConfig, MedusaHeads
from linspec.drafters.medusa import Medusa
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import HEADS
from linspec.errors import DrafterError
from linspec.kernels import selector
from linspec.kernels.cpu import step
from linspec.kernels.cpu.library import Found, load
from linspec.kernels.cpu.threads import torch_on_one_thread
from linspec.models import native_linear
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import PackedLinear, Quantizer, fused_linear, integer_bits

WIDTH, VOCAB = 48, 70
CONFIG = DecoderConfig(
    vocab_size=VOCAB, width=WIDTH, layers=1, heads=2, kv_heads=1, head_width=24, mlp_width=40
)
SHAPE = HeadsConfig(width=WIDTH, vocab_size=VOCAB, heads=3)
SHAPES = [
    pytest.param(
        replace(SHAPE, blocks=blocks, hidden=hidden, shared_head=shared),
        id=f"{blocks}-{hidden}-{'shared' if shared else 'own'}",
    )
    for blocks, hidden in ((1, 0), (2, 0), (1, 33), (2, 40))
    for shared in (True, False)
]
SHAPES += [
    pytest.param(replace(SHAPE, rooted=True), id="rooted"),
    pytest.param(replace(SHAPE, rooted=True, blocks=2, hidden=33), id="rooted-2-33"),
    pytest.param(replace(SHAPE, vocabulary=21), id="few-tokens"),
    pytest.param(replace(SHAPE, vocabulary=21, rooted=True, shared_head=False), id="few-own"),
]
ROOTS = [5, 0, 69, 12, 33, 5, 6, 7, 8]
RATES = [[0.5, 0.2, 0.1], [0.4, 0.1], [0.3]]

native = pytest.mark.skipif(load().library is None, reason=load().reason)


def make_model() -> Decoder:
    generator = torch.Generator().manual_seed(0)
    model = Decoder(CONFIG).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def trained(shape: HeadsConfig, model: Decoder) -> MedusaHeads:
    """Heads that compute something, for a target that is prepared here."""
    generator = torch.Generator().manual_seed(1)
    drafted = torch.randperm(VOCAB, generator=generator)[: shape.vocabulary].sort().values.int()
    heads = MedusaHeads(shape, model, RATES, drafted)
    for weight in heads.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    heads.bind(model.to_inference())
    return heads.requires_grad_(False)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def hidden(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_packed_heads_compute_what_trained_heads_do(shape: HeadsConfig, bits: int | None) -> None:
    heads = trained(shape, make_model())
    h = heads.seen(hidden(5), torch.tensor(ROOTS[:5]))
    made = PackedHeads.of(heads, Quantizer(bits, {}) if bits else fused_linear)
    # up to five layers round weights and inputs: to 8 bits each by less than a hundredth, to 4 by a tenth
    near = {None: 1e-5, 8: 0.03, 4: 0.3}[bits]
    assert distance(made.features(h), heads.features(h)) < near
    # a shared output layer of floats is copied in 8 bits
    assert distance(made(h), heads(h)) < max(near, 0.03 if shape.shared_head else 0)


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_call_guesses_what_the_layers_say(shape: HeadsConfig, bits: int | None) -> None:
    made = PackedHeads.of(
        trained(shape, make_model()), Quantizer(bits, {}) if bits else fused_linear
    )
    h, roots = hidden(4), ROOTS[:4]
    found = torch.tensor(made.guess(list(h), roots, 3, 6)).view(4, 3, 6)
    logits = made(made.seen(h, torch.tensor(roots)))
    if made.drafted is not None:
        # of tokens that are not drafted there is no logit
        ids = made.drafted.long()
        logits = torch.full((4, 3, VOCAB), -9e9).index_copy(2, ids, logits)
    # another silu may move an 8-bit code by one
    near = (1e-4 if bits is None and not shape.shared_head else 0.02) * float(
        logits[logits > -9e8].std()
    )
    torch.testing.assert_close(
        logits.gather(-1, found), logits.topk(6).values, rtol=0, atol=max(near, 1e-5)
    )
    assert all(len(set(row)) == 6 for head in found.tolist() for row in head)


@native
def test_rows_heads_and_ranks_are_guessed_alike_alone_and_together() -> None:
    made = PackedHeads.of(trained(SHAPE, make_model()), Quantizer(8, {}))
    rows = list(hidden(9))
    together = torch.tensor(made.guess(rows, ROOTS, 3, 5)).view(9, 3, 5)
    for row, root, whole in zip(rows, ROOTS, together, strict=True):
        assert made.guess([row], [root], 2, 3) == [whole[:2, :3].flatten().tolist()]
    with torch_on_one_thread():
        assert made.guess(rows, ROOTS, 3, 5) == together.flatten(1).tolist()


@pytest.mark.parametrize("bits", [None, 8])
def test_without_the_library_torch_guesses(
    bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(SHAPE, shared_head=False, hidden=40)
    made = PackedHeads.of(trained(shape, make_model()), Quantizer(bits or 8, {}))
    rows = list(hidden(3))
    expected = made.guess(rows, ROOTS[:3], 3, 1)
    for module in (packed, native_linear):
        monkeypatch.setattr(module, "load", lambda: Found(None, "torch", "a test"))
    monkeypatch.setattr(packed, "HeadsCall", None)
    assert made.guess(rows, ROOTS[:3], 3, 1) == expected


def test_smaller_trees_ask_less_of_the_heads_and_are_prefixes() -> None:
    class Counted(MedusaHeads):
        asked: list[tuple[int, int]]

        def guess(self, hidden, roots, heads, top):  # type: ignore[no-untyped-def]
            self.asked.append((heads, top))
            return super().guess(hidden, roots, heads, top)

    heads = Counted(SHAPE, make_model(), RATES)
    heads.asked = []
    drafter, row = Medusa(heads), SimpleNamespace(hidden={FINAL: hidden(1)}, root=7, follow=())
    trees = [drafter.propose([row], [Budget.of(n)])[0] for n in (1, 2, 3, 63)]  # type: ignore[list-item]
    assert heads.asked[0] == (1, 1) and heads.asked[-1] == (3, 3)
    for tree in trees:
        assert tree.tokens == trees[-1].tokens[: len(tree)]
        assert tree.parents == trees[-1].parents[: len(tree)]
    # a shallow tree asks fewer heads, and each as often as a deep one
    (flat,) = drafter.propose([row], [Budget(63, 1)])  # type: ignore[list-item]
    assert heads.asked[-1] == (1, len(RATES[0]))
    assert flat.shape.children[0] == tuple(range(1, 1 + len(RATES[0])))
    assert drafter.expected(Budget(63, 1)) == pytest.approx(sum(RATES[0]))


def test_heads_that_were_never_calibrated_are_refused() -> None:
    with pytest.raises(DrafterError, match="never calibrated"):
        Medusa(MedusaHeads(SHAPE, make_model()))


# ---- on disk


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model()
    heads = MedusaHeads(replace(SHAPE, shared_head=False, hidden=33), model, RATES)
    generator = torch.Generator().manual_seed(1)
    for weight in heads.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    return save_drafter(heads, model, tmp_path_factory.mktemp("plain") / "medusa", dtype=None)


def quantized(plain: Path, out: Path, bits: int) -> tuple[PackedHeads, Path]:
    model = make_model()
    heads = HEADS.load(plain, model)
    assert isinstance(heads, MedusaHeads)
    heads.bind(model.to_inference())
    made = PackedHeads.of(heads, Quantizer(bits, {}))
    return made, HEADS.save(made, model, out / "packed", bits, {"loss": 1.0})


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_heads_load_exactly_and_mapped(plain: Path, tmp_path: Path, bits: int) -> None:
    made, folder = quantized(plain, tmp_path, bits)
    loaded = HEADS.load(folder, make_model())
    assert isinstance(loaded, PackedHeads) and loaded.accuracies == RATES
    assert torch.equal(loaded(hidden(3)), made(hidden(3)))
    weights = [tensor for tensor in loaded.state_dict().values() if tensor.dtype == torch.uint8]
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights}) == 1
    assert json.loads((folder / "drafter.json").read_text())["loss"] == 1.0


def test_ids_of_drafted_tokens_survive_every_form(tmp_path: Path) -> None:
    model, ids = make_model(), torch.arange(3, 24, dtype=torch.int32) * 3
    shape = replace(SHAPE, vocabulary=21, rooted=True)
    heads = MedusaHeads(shape, model, RATES, ids)
    plain = save_drafter(heads, model, tmp_path / "plain")
    assert torch.equal(HEADS.load(plain, model).drafted, ids)
    made = PackedHeads.of(heads, Quantizer(8, {}))
    packed = HEADS.save(made, model, tmp_path / "packed", 8, {})
    assert torch.equal(HEADS.load(packed, make_model()).drafted, ids)


def test_drafted_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    model = make_model()
    ids = torch.tensor([1, VOCAB], dtype=torch.int32)
    heads = MedusaHeads(replace(SHAPE, vocabulary=2), model, RATES, ids)
    folder = save_drafter(heads, model, tmp_path / "plain")
    with pytest.raises(DrafterError, match=r"not all in 0\.\.69; copy"):
        HEADS.load(folder, model)


def test_heads_can_be_of_several_targets(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    shutil.copytree(plain, folder)
    data = json.loads((folder / "drafter.json").read_text())
    data["target"] = ["0123", data["target"]]
    (folder / "drafter.json").write_text(json.dumps(data))
    assert HEADS.load(folder, make_model()).accuracies == RATES
    data["target"] = ["0123", 7]
    (folder / "drafter.json").write_text(json.dumps(data))
    with pytest.raises(DrafterError, match="another model"):
        HEADS.load(folder, make_model())


def test_heads_that_come_with_linspec_are_found_by_their_target(
    monkeypatch: pytest.MonkeyPatch, plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "embedded" / "drafters" / "medusa" / "some")
    assert shipped_drafter("medusa", make_model()) is None
    monkeypatch.setattr(finding.importlib.resources, "files", lambda package: tmp_path)
    assert (
        shipped_drafter("medusa", make_model())
        == tmp_path / "embedded" / "drafters" / "medusa" / "some"
    )
    made = make_drafter("medusa", DrafterContext(make_model()))
    assert isinstance(made, Medusa)


def test_heads_keep_the_bits_they_were_saved_with(plain: Path, tmp_path: Path) -> None:
    _, folder = quantized(plain, tmp_path, 4)
    drafter = make_drafter(f"medusa:{folder}", DrafterContext(make_model()))
    assert isinstance(drafter, Medusa) and isinstance(drafter.heads, PackedHeads)
    assert integer_bits(drafter.heads.outputs[0]) == 4


@native
@pytest.mark.parametrize(("bits", "expected"), [(None, 8), (8, 8), (4, 4)])
def test_plain_heads_get_the_bits_of_their_target(
    plain: Path, bits: int | None, expected: int
) -> None:
    model = make_model()
    if bits:
        quantize_model(model, bits, {})
    drafter = make_drafter(f"medusa:{plain}", DrafterContext(model))
    assert isinstance(drafter, Medusa) and isinstance(drafter.heads, PackedHeads)
    assert integer_bits(drafter.heads.outputs[0]) == expected


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "drafter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    path = folder / "drafter.safetensors"
    path.write_bytes(path.read_bytes()[:-70])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "missing or damaged"),
        (lambda d: (d / "drafter.safetensors").unlink(), "missing or damaged"),
        (lambda d: rewrite(d, blocks=2), "lacks blocks.1.back.0.packed"),
        (lambda d: rewrite(d, quantization={"format": 7, "bits": 8}), "format 7, this linspec"),
        (lambda d: rewrite(d, quantization={"format": 1, "bits": 3}), "3 bits; known: 8 and 4"),
        (
            lambda d: rewrite(d, quantization={"format": 1, "bits": 4}),
            "what no such model has: blocks.0.back.0.scales",
        ),
        (lambda d: rewrite(d, quantization=None), "format None"),
        (lambda d: rewrite(d, target="other"), "trained for another model"),
        (lambda d: rewrite(d, accuracies=[[0.001] * 71]), "71 guesses but has only 70 tokens"),
    ],
)
def test_damaged_or_foreign_packed_heads(
    plain: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _, folder = quantized(plain, tmp_path, 8)
    damage(folder)
    with pytest.raises(DrafterError, match=message):
        HEADS.load(folder, make_model())


def test_a_prepared_model_still_knows_its_heads(plain: Path) -> None:
    """It once had no weights to be known by: a second drafter for one model was an AttributeError."""
    model = make_model()
    for _ in range(2):
        drafter = make_drafter(f"medusa:{plain}", DrafterContext(model))
        assert isinstance(drafter, Medusa)


def test_making_a_drafter_once_prepared_the_target(plain: Path) -> None:
    model = make_model()
    before = {name: id(part) for name, part in model.named_modules()}
    drafter = make_drafter(f"medusa:{plain}", DrafterContext(model))
    assert isinstance(drafter, Medusa)
    assert not model.is_inference and model.head.weight.requires_grad
    assert {name: id(part) for name, part in model.named_modules()} == before
    # heads that share the output layer use the one that the target has when they draft
    assert drafter.heads.target_head is model.head
    model.to_inference()
    assert drafter.heads.target_head is model.head


@pytest.mark.parametrize("shared", [True, False])
def test_heads_guess_alike_before_and_after_their_target_is_prepared(
    shared: bool, tmp_path: Path
) -> None:
    model = make_model()
    heads = MedusaHeads(replace(SHAPE, shared_head=shared), model, RATES)
    generator = torch.Generator().manual_seed(1)
    for weight in heads.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    folder = save_drafter(heads, model, tmp_path / "medusa", dtype=None)
    early, late = make_model(), make_model().to_inference()
    first = make_drafter(f"medusa:{folder}", DrafterContext(early))
    early.to_inference()
    second = make_drafter(f"medusa:{folder}", DrafterContext(late))
    assert isinstance(first, Medusa) and isinstance(second, Medusa)
    rows = list(hidden(3))
    assert type(first.heads) is type(second.heads)
    assert first.heads.guess(rows, ROOTS[: len(rows)], 3, 4) == second.heads.guess(
        rows, ROOTS[: len(rows)], 3, 4
    )


def test_without_the_library_a_second_drafter_was_once_refused(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (packed, native_linear, selector, step):
        monkeypatch.setattr(module, "load", lambda: Found(None, "torch", "a test"))
    model = make_model()
    known = fingerprint(model)
    assert isinstance(model.to_inference().head, PackedLinear)
    assert fingerprint(model) == known
    for _ in range(2):
        drafter = make_drafter(f"medusa:{plain}", DrafterContext(model))
        assert isinstance(drafter, Medusa) and isinstance(drafter.heads, MedusaHeads)
        assert len(drafter.heads.guess(list(hidden(2)), ROOTS[:2], 3, 2)) == 2


def test_shared_heads_copied_for_drafts_are_not_saved(tmp_path: Path) -> None:
    model = make_model()
    made: Heads = PackedHeads.of(trained(SHAPE, model), Quantizer(8, {}))
    made(hidden(1))
    assert not [name for name in made.state_dict() if not name.startswith("blocks.")]


def test_draft_models_get_the_bits_of_their_target() -> None:
    drafter = make_drafter("student:embedded-aug", DrafterContext(load_for("embedded-softmax", 8)))
    assert isinstance(drafter, DraftModel)
    assert integer_bits(drafter.model.head) == 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_plain_heads_have_the_weights_that_packed_ones_stand_for(
    shape: HeadsConfig, bits: int
) -> None:
    heads = trained(shape, make_model())
    packed = PackedHeads.of(heads, Quantizer(bits, {}))
    plain = packed.plain()
    for name, weight in heads.state_dict().items():
        # of rows with values around .2, in steps of 1/127 or 1/7 of the largest
        far = (plain.state_dict()[name] - weight).abs().max()
        assert far < {8: 0.01, 4: 0.13}[bits], name
    seen = heads.seen(torch.randn(4, WIDTH), torch.tensor(ROOTS[:4]))
    # a CPU rounds inputs too
    difference = (packed(seen) - plain(seen)).abs().max()
    assert difference < 0.1 * plain(seen).abs().max()


def test_packed_heads_are_plain_on_other_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they come with the package; only a CPU has the kernels for packed ones."""
    model = make_model()
    heads = trained(SHAPE, model)
    HEADS.pack(heads, model, tmp_path / "heads", 8, {})
    assert isinstance(HEADS.load(tmp_path / "heads", model), PackedHeads)
    monkeypatch.setattr(Decoder, "device", property(lambda self: torch.device("meta")))
    found = HEADS.load(tmp_path / "heads", model)
    assert isinstance(found, MedusaHeads)
    assert {weight.device.type for weight in found.parameters()} == {"meta"}
    assert Medusa(found).follow is not None
