"""Models whose weights stay in the blocks of their GGUF file: every value, every form, every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import IDS, tiny
from test_gguf_model import FAMILIES, IDS_OF_A_TEXT

from linspec import LLM, SamplingParams
from linspec.checkpoints.fingerprint import full_fingerprint
from linspec.checkpoints.gguf.blocks import StoredRows, kept_whole
from linspec.checkpoints.gguf.model import load_gguf, plan_gguf
from linspec.checkpoints.gguf.reader import read_gguf
from linspec.checkpoints.hub import load_model
from linspec.decoding.step import StepInput
from linspec.errors import CheckpointError
from linspec.kernels.cpu.library import load
from linspec.models.block_embedding import BlockEmbedding
from linspec.models.decoder import Decoder
from linspec.models.native_linear import NativeLinear
from linspec.quantization.blocks import BLOCK_FORMATS

Q8_0 = BLOCK_FORMATS["Q8_0"]
pytestmark = pytest.mark.skipif(load().library is None, reason=load().reason)


def kept(path: Path) -> Decoder:
    return load_gguf(path, torch.float32, keep_blocks=True)


def layers(model: Decoder) -> dict[str, NativeLinear]:
    modules = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in modules if isinstance(m, NativeLinear)}
    return {name: m for name, m in found.items() if not name.startswith("embed.")}


def same_values(path: Path) -> Decoder:
    """The model in blocks, whose matrices are bit for bit those of the model in floats."""
    model, plain = kept(path), load_model(path).to_inference()
    expected = layers(plain)
    assert layers(model).keys() == expected.keys()
    for name, layer in layers(model).items():
        assert layer.formats, name
        assert torch.equal(layer.weight, expected[name].weight), name
        assert (layer.bias is None) == (expected[name].bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, expected[name].bias)
    assert torch.equal(model.embed.weight, plain.embed.weight)
    # so what was found out about one form of the model is known of all
    forms = model, plain, load_model(path)
    assert len({full_fingerprint(form) for form in forms}) == 1
    # codes of inputs round, and nothing else does
    logits, exact = model(IDS_OF_A_TEXT), plain(IDS_OF_A_TEXT)
    assert float((logits - exact).norm()) < 0.05 * float(exact.norm())
    return model


def by_steps(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    state = model.new_state()
    rows = []
    for token in ids[0].tolist():
        rows.append(model.step([StepInput(0, [token])], state).logits)
        state.commit(0, [0])
    return torch.cat(rows)


@pytest.mark.crossed(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K"])
def test_every_family_keeps_its_blocks(family: str, kind: str, tmp_path: Path) -> None:
    model = same_values(tiny(family, tmp_path / "m.gguf", kind)[1])
    # sums of attention are rounded otherwise, which can move a code of an input by one
    steps, whole = by_steps(model, IDS_OF_A_TEXT), model(IDS_OF_A_TEXT)[0]
    assert float((steps - whole).norm()) < 0.02 * float(whole.norm())


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_every_format_is_kept_in_one_call(kind: str, tmp_path: Path) -> None:
    model = same_values(tiny("llama", tmp_path / "m.gguf", kind)[1])
    assert model.native is not None
    assert isinstance(model.embed, BlockEmbedding)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_lies_in_memory_once(tied: bool, tmp_path: Path) -> None:
    model = kept(tiny("llama", tmp_path / "m.gguf", "Q8_0", tie_word_embeddings=tied)[1])
    table = model.embed
    assert isinstance(table, BlockEmbedding)
    assert (table.layer is model.head) is tied


@pytest.mark.parametrize("kind", sorted(set(IDS) - set(BLOCK_FORMATS)))
def test_what_has_no_such_blocks_becomes_floats(kind: str, tmp_path: Path) -> None:
    model = kept(tiny("llama", tmp_path / "m.gguf", kind)[1])
    assert not model.is_inference
    assert model.embed.weight.dtype == torch.float32


def test_what_is_multiplied_as_one_matrix_is_all_blocks_or_all_floats(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q8_0")[1]
    names = ("q", "k", "v", "o")
    rows = {f"mixer.{name}.weight": StoredRows(name, Q8_0, torch.arange(1), 32) for name in names}
    assert kept_whole(rows, rows, ()) == rows
    assert kept_whole(rows, rows, ["mixer.v.weight"]).keys() == {"mixer.o.weight"}
    assert kept_whole(rows, {*rows, "mlp.up.weight"}, ["mlp.up.weight"]) == rows
    # a tensor of the file that two of ours are rows of
    fused = rows | {"mlp.down.weight": StoredRows("q", Q8_0, torch.arange(1), 32)}
    assert kept_whole(fused, fused, ["mlp.down.weight"]).keys() == {"mixer.o.weight"}
    part = {name: each for name, each in rows.items() if name != "mixer.k.weight"}
    assert kept_whole(part, rows, ()).keys() == {"mixer.o.weight"}
    floats = {name for name in read_gguf(path).tensors if "norm" in name}
    assert set(plan_gguf(path, keep_blocks=True).as_floats) == floats


def test_blocks_are_for_float32(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q8_0")[1]
    assert not load_gguf(path, torch.bfloat16, keep_blocks=True).is_inference


def test_a_damaged_scale_is_named(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q8_0")[1]
    content = bytearray(path.read_bytes())
    # the scale of the last block of the file
    content[-34:-32] = b"\x00\x7c"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        kept(path)


def test_generation_keeps_blocks_unless_floats_are_asked_for(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q4_0")[1]
    kinds = {}
    for dtype in (None, "auto", "float32"):
        llm = LLM(path, dtype=dtype)
        kinds[dtype] = llm.model.kernels
        assert llm.generate("ab", SamplingParams(max_tokens=4))
    assert kinds[None] == kinds["auto"] != kinds["float32"]
    assert "Q4_0" in kinds[None]


def test_drafts_change_no_token(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q4_K")[1]
    params = SamplingParams(max_tokens=24)
    plain = LLM(path).generate("abababab", params)[0]
    drafted = LLM(path, drafter="prompt-lookup", policy=4).generate("abababab", params)[0]
    assert drafted.token_ids == plain.token_ids
