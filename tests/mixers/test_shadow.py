"""The mixer that keeps a shadow of what is past: its invariants, and values in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from helpers import assert_close, full_logits, random_tokens, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from linspec import LLM, SamplingParams
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, StateError
from linspec.mixers.config import MixerConfig
from linspec.mixers.ops.low_rank import factors
from linspec.mixers.shadow import Shadow
from linspec.models.decoder import Decoder
from linspec.models.sparse import with_sparse_attention
from linspec.state.offload import OffloadFile
from linspec.state.sequence_states import SequenceStates
from linspec.state.shadow import ShadowState

SEGMENT, CHUNK = 8, 2
TEXT = random_tokens(61)
# four chunks of a segment; the keys of both heads have rank 8
EVERYTHING = {"rank": 8, "budget": 1000, "chunk": CHUNK, "outliers": 1}
LITTLE = {"rank": 3, "budget": 6, "chunk": CHUNK, "outliers": 1}


def made(options: dict[str, Any], **switches: Any) -> Decoder:
    mixer = MixerConfig(name="shadow", group=SEGMENT, span=2, options=options)
    return tiny_model(mixer, mixer, **switches)


def read(model: Decoder, state: SequenceStates, ids: list[int], slot: int = 0) -> torch.Tensor:
    logits = model.step([StepInput(slot, ids)], state).logits
    state.commit(slot, range(len(ids)))
    return logits


def shadow_of(state: SequenceStates) -> ShadowState:
    part = state.parts[0]
    assert isinstance(part, ShadowState)
    return part


# ---- invariants


@pytest.mark.parametrize("switches", [{}, {"positions": "learned"}, {"kv_heads": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_full_rank_and_budget_it_is_full_attention(
    switches: dict[str, Any], dtype: torch.dtype
) -> None:
    """Card invariant 1."""
    model = made(EVERYTHING, dtype=dtype, **switches)
    plain = tiny_model("softmax", "softmax", taps=0, dtype=dtype, **switches)
    plain.load_state_dict(model.state_dict())
    atol = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(full_logits(model, [TEXT]), full_logits(plain, [TEXT]), atol)
    found, expected = (read(each, each.new_state(), TEXT) for each in (model, plain))
    assert_close(found, expected, atol)


@given(
    text=st.lists(st.integers(0, 30), min_size=1, max_size=70),
    cuts=st.lists(st.integers(1, 30), max_size=6),
)
def test_a_text_in_any_pieces_is_the_text_as_a_whole(text: list[int], cuts: list[int]) -> None:
    """As one prompt, and as chains, short ones and long, across borders of segments."""
    model = made(LITTLE)
    state, parts, at = model.new_state(), [], 0
    for cut in [*cuts, len(text)]:
        if at < len(text):
            parts.append(read(model, state, text[at : at + cut]))
            at += cut
    assert_close(torch.cat(parts), read(model, model.new_state(), text))


def test_nodes_of_trees_across_borders_read_what_their_path_reads() -> None:
    model = made(LITTLE)
    parents = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5, 8, 10, 11]
    tokens = [3 * node % 31 for node in range(len(parents))]
    for length in (13, 15, 16, 39):
        state = model.new_state(2)
        read(model, state, TEXT[:length], 0)
        read(model, state, TEXT[: length - 5], 1)
        inputs = [StepInput(0, tokens, parents), StepInput(1, [5])]
        logits = model.step(inputs, state).logits
        path = [0, 1, 3, 4, 6, 7, 8, 10, 11, 12]
        chain = [tokens[node] for node in path]
        expected = read(model, model.new_state(), [*TEXT[:length], *chain])[length:]
        assert_close(logits[path], expected)
        state.commit(0, path)
        again = model.step([StepInput(0, [7])], state).logits
        text = [*TEXT[:length], *chain, 7]
        assert_close(again, read(model, model.new_state(), text)[-1:])


def test_what_is_read_is_near_and_outliers_and_as_many_chunks_as_the_budget_has() -> None:
    """Card invariant 2: no position twice."""
    model = made(LITTLE)
    state = model.new_state()
    read(model, state, TEXT)
    mixer, past = model.layers[0].mixer, shadow_of(state).past[0][0]
    assert isinstance(mixer, Shadow)
    segments = (len(TEXT) // SEGMENT + 1) - 2
    assert past.segments == segments and past.chunks == segments * SEGMENT // CHUNK
    assert shadow_of(state).held(0) == len(TEXT) - segments * SEGMENT
    q = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    marks = mixer.select(q, past)
    assert marks.sum(-1).eq(LITTLE["budget"] // CHUNK).all()
    assert past.outliers.shape == (2, segments)
    for head in range(2):
        assert len(set(past.outliers[head].tolist())) == segments
        assert not marks[head][:, past.outliers[head]].any()


def test_outliers_are_the_chunks_that_their_mean_says_least_of() -> None:
    mixer = made(LITTLE).layers[0].mixer
    assert isinstance(mixer, Shadow)
    keys = torch.ones(2, SEGMENT, 8, dtype=torch.float64)
    keys[0, 5, :4] = -keys[0, 5, :4]
    keys[1, 2, :3] = 0
    (past,) = mixer.nothing_closed(keys[None])
    past = mixer.fold(past, keys, torch.randn(2, SEGMENT, 4, dtype=torch.float64))
    assert past.outliers.tolist() == [[2], [1]]


@pytest.mark.parametrize("chunks", [[0, 3, 9], list(range(20))])
def test_keys_of_full_rank_are_rebuilt_as_they_were(chunks: list[int]) -> None:
    """Card invariant 3, a few of them and most."""
    model = made(EVERYTHING)
    plain = tiny_model("softmax", "softmax", taps=0)
    plain.load_state_dict(model.state_dict())
    state, other = model.new_state(), plain.new_state()
    read(model, state, TEXT)
    read(plain, other, TEXT)
    mixer, past = model.layers[0].mixer, shadow_of(state).past[0][0]
    assert isinstance(mixer, Shadow)
    rebuilt = mixer.rebuilt(past, torch.tensor([chunks, chunks]), torch.float64)
    whole = other.parts[0].keys[0, 0].unflatten(1, (-1, CHUNK))
    assert_close(rebuilt, whole[:, chunks].flatten(1, 2))


@pytest.mark.parametrize("length", [5, 40])
def test_factors_are_the_nearest_of_their_rank(length: int) -> None:
    keys = torch.randn(2, length, 4, dtype=torch.float64)
    rows = keys.transpose(0, 1).flatten(1)
    values = torch.linalg.svdvals(rows)
    for rank in (1, 3, 5):
        left, right = factors(keys, rank)
        assert left.shape == (length, rank) and right.shape == (2, rank, 4)
        rest = keys - left @ right
        torch.testing.assert_close(rest.square().sum(), values[rank:].square().sum())


@pytest.mark.parametrize("kv", ["int8", "float16"])
def test_codes_are_read_alike_in_pieces_and_as_a_whole(kv: str) -> None:
    model = made(LITTLE, dtype=torch.float32)
    whole = read(model, model.new_state(1, kv), TEXT)
    state = model.new_state(1, kv)
    parts = [read(model, state, TEXT[first : first + 7]) for first in range(0, len(TEXT), 7)]
    # a code may round the other way
    near = ((torch.cat(parts) - whole).abs() <= 1e-3).all(-1).float().mean()
    assert near >= 0.9


def test_greedy_output_with_a_drafter_is_that_without() -> None:
    model, params = tiny_model("softmax", taps=0), SamplingParams(max_tokens=30)
    spec = f"shadow:group={SEGMENT},rank=3,budget=4,chunk=2"
    plain, drafted = (
        LLM(model, tokenizer=tiny_tokenizer(), attention=spec, drafter=drafter)
        for drafter in ("none", "prompt-lookup")
    )
    expected, found = (each.generate([TEXT], params)[0].token_ids for each in (plain, drafted))
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 3}, "not made of chunks of 3"),
        ({"rank": 9}, "rank is 9, and the keys of a segment have at most 8"),
        ({"outliers": 5}, "a segment has 4 chunks"),
        ({"budget": -1}, "budget"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made({**LITTLE, **options})


# ---- values in a file


def test_values_in_a_file_change_nothing_but_the_memory(tmp_path: Path) -> None:
    """Card invariant 4: rows that are read are those that are selected."""
    model = made(LITTLE)
    apart, within = model.new_state(2, offload=tmp_path), model.new_state(2)
    for state in (apart, within):
        read(model, state, TEXT)
        state.fork(0, 1)
    file = shadow_of(apart).file
    assert file is not None and not list(tmp_path.iterdir())
    before = file.rows_read
    found, expected = (model.step([StepInput(1, [3])], s).logits for s in (apart, within))
    assert torch.equal(found, expected)
    # of two layers and two KV heads
    assert file.rows_read - before == 2 * 2 * LITTLE["budget"] // CHUNK
    values = shadow_of(within).past[0][0].chunks * CHUNK * 2 * 4 * 8
    assert apart.bytes(0) == within.bytes(0) - 2 * values


def test_snapshots_share_regions_and_who_is_last_frees_them(tmp_path: Path) -> None:
    model = made(LITTLE)
    state = model.new_state(2, offload=tmp_path)
    file = shadow_of(state).file
    assert file is not None
    read(model, state, TEXT)
    free, copy = len(file._free), state.snapshot(0)
    state.restore(1, copy)
    expected = model.step([StepInput(1, [3])], state).logits
    assert len(file._free) == free
    state.reset(0)
    state.drop(1)
    assert torch.equal(model.step([StepInput(1, [3])], state).logits, expected)
    state.reset(1)
    assert len(file._free) == free
    del copy
    assert len(file._free) > free


def test_a_snapshot_of_another_state_is_refused(tmp_path: Path) -> None:
    model = made(LITTLE)
    state, other = model.new_state(offload=tmp_path), model.new_state(offload=tmp_path)
    read(model, state, TEXT)
    with pytest.raises(StateError, match="shares its segments with the state that it is from"):
        other.restore(0, state.snapshot(0))


def test_a_file_that_something_cut_is_a_named_error(tmp_path: Path) -> None:
    model = made(LITTLE)
    state = model.new_state(offload=tmp_path)
    read(model, state, TEXT)
    file = shadow_of(state).file
    assert file is not None
    os.truncate(file._file.fileno(), 100)
    with pytest.raises(StateError, match="has 100 bytes and was made with"):
        model.step([StepInput(0, [3])], state)


def test_a_full_disk_is_a_named_error_and_leaves_the_slot_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(LITTLE)
    state = model.new_state(offload=tmp_path)
    read(model, state, TEXT[:40])
    past = [layer[0] for layer in shadow_of(state).past]
    writes = []

    def full(fd: int, data: memoryview, at: int) -> int:
        writes.append(at)
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, at)

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr("linspec.state.offload.os.pwrite", full)
        # the last tokens of a segment: only the commit closes another
        model.step([StepInput(0, TEXT[40:48])], state)
        with pytest.raises(StateError, match=r"do not fit into .*No space left on device"):
            state.commit(0, range(8))
    assert [layer[0] for layer in shadow_of(state).past] == past
    state.reset(0)
    assert_close(read(model, state, TEXT), read(model, model.new_state(), TEXT))


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="where no file can be made"):
        made(LITTLE).new_state(offload=tmp_path / name)


def test_a_model_with_nothing_to_offload_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has anything to offload"):
        tiny_model("softmax").new_state(offload=tmp_path)


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from linspec.state.offload import OffloadFile\n"
        "file = OffloadFile(Path(sys.argv[1]), 64, 16)\n"
        "region = file.put(torch.zeros(4, 16, dtype=torch.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())


def test_rows_of_a_file_are_those_that_were_put(tmp_path: Path) -> None:
    file = OffloadFile(tmp_path, 4 * 16, 16)
    rows = [torch.randint(0, 256, (4, 16), dtype=torch.uint8) for _ in range(150)]
    regions = [file.put(each) for each in rows]
    numbers = torch.tensor([[0, 5, 599], [598, 7, 7]])
    assert torch.equal(file.read(regions, numbers), torch.cat(rows)[numbers])
    assert torch.equal(
        file.read_ahead(regions[3:], numbers[:, 1]).result(), torch.cat(rows[3:])[[5, 7]]
    )
    first = regions.pop(0).number
    assert file.put(rows[0]).number == first


def test_a_taken_over_model_says_what_it_is() -> None:
    model = with_sparse_attention(tiny_model("softmax", taps=0), "shadow:rank=3,group=8,chunk=2")
    assert {each.name for each in model.config.mixers} == {"shadow"}
    again = replace(model.config.mixers[0])
    assert again.own_options(type(model.layers[0].mixer.options)).rank == 3


@pytest.mark.parametrize("stored", [False, True])
def test_a_prefix_cache_has_what_is_past_and_no_file_of_it(tmp_path: Path, stored: bool) -> None:
    """What is past is shared, so only memory can have it: a store on disk leaves it out."""
    model = tiny_model("softmax", taps=0)
    settings: dict[str, Any] = {"attention": f"shadow:group={SEGMENT},rank=3,budget=4,chunk=2"}
    cached = {"prefix_cache": "10MB", "prefix_store": tmp_path if stored else None}
    text, params = [*TEXT, *TEXT, *TEXT], SamplingParams(max_tokens=8)
    plain = LLM(model, tokenizer=tiny_tokenizer(), **settings)
    expected = plain.generate([[*text, 3]], params)[0].token_ids
    for _ in range(2):
        llm = LLM(model, tokenizer=tiny_tokenizer(), **settings, **cached)
        first = llm.generate([text], params)[0]
        again = llm.generate([[*text, 3]], params)[0]
        assert first.cached_tokens == 0 and again.cached_tokens > 0
        assert again.token_ids == expected
        cache = llm.engine.prefix_cache
        assert cache is not None
        cache.flush()
