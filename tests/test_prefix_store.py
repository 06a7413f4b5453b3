"""States on disk: what one process kept, the next one finds; what is damaged or foreign is never used."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from test_prefix_cache import SHORT, ask, output, run

from linspec import LLM
from linspec.decoding.request import Request
from linspec.engine import prefix_store
from linspec.engine.budget import PIECE
from linspec.engine.engine import Engine
from linspec.engine.prefix_cache import PrefixCache, PrefixOptions
from linspec.errors import CheckpointError, ConfigError
from linspec.models.decoder import Decoder
from linspec.verifiers import LosslessVerifier

MIXERS = ("softmax", "aug", "by-head", "window")


def engine_of(
    model: Decoder,
    store: Path | None,
    *,
    budget: int = 10**9,
    limit: int = 10**9,
    kv: str = "float",
) -> Engine:
    options = PrefixOptions(bytes=budget, stride=PIECE, least=2, store=store, store_bytes=limit)
    return Engine(
        model, verifier=LosslessVerifier(), slots=2, prefix_cache=options, kv_cache_dtype=kv
    )


def cache_of(engine: Engine) -> PrefixCache:
    assert engine.prefix_cache is not None and engine.prefix_cache.store is not None
    return engine.prefix_cache


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def kept(model: Decoder, folder: Path, prompt: Sequence[int], **settings: Any) -> list[int]:
    """The tokens of a prompt whose state an engine wrote to `folder`."""
    engine = engine_of(model, folder, **settings)
    tokens = ask(engine, prompt).tokens
    cache_of(engine).flush()
    return tokens


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_next_process_finds_what_was_written(mixer: str, tmp_path: Path) -> None:
    model = tiny_model(mixer)
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    assert files(tmp_path) and not any(path.stat().st_mode & 0o077 for path in tmp_path.iterdir())
    later, turn = engine_of(model, tmp_path), tokens + random_tokens(9, seed=2)
    found, plain = ask(later, turn), ask(engine_of(model, None), turn)
    assert found.cached_tokens == len(tokens) - 1
    assert output(found) == output(plain)
    assert cache_of(later).counters.stored_hits == 1
    # the second time it is in memory
    assert ask(later, turn).cached_tokens >= len(tokens) - 1
    assert cache_of(later).counters.stored_hits == 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_leaves_the_memory_comes_back(mixer: str, tmp_path: Path) -> None:
    model, rng = tiny_model(mixer), random.Random(4)
    texts = [random_tokens(PIECE + 30, seed=n) for n in range(4)]
    plain = [output(ask(engine_of(model, None), text)) for text in texts]
    engine = engine_of(model, tmp_path, budget=6000)
    for which in [*range(4), *(rng.randrange(4) for _ in range(8))]:
        assert output(ask(engine, texts[which])) == plain[which]
        cache_of(engine).store.wait()  # type: ignore[union-attr]
        assert cache_of(engine).bytes <= 6000
    counters = cache_of(engine).counters
    assert counters.evictions and counters.stored_hits and counters.hits >= 8


def test_tenants_share_no_files(tmp_path: Path) -> None:
    model, prompt = tiny_model("aug"), tuple(random_tokens(2 * PIECE, seed=1))
    engine = engine_of(model, tmp_path)
    run(engine, Request(prompt, SHORT, tenant="a"))
    cache_of(engine).flush()
    later = engine_of(model, tmp_path)
    lengths = [run(later, Request(prompt, SHORT, tenant=name))[0].cached_tokens for name in "ba"]
    assert lengths[0] == 0 and lengths[1] > 0


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def made_empty(path: Path) -> None:
    path.write_bytes(b"")


def turned_over(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def other_numbers(path: Path) -> None:
    """Of the right form, so that nothing but a checksum tells."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x11
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, made_empty, turned_over, other_numbers])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_damaged_file_is_skipped_with_a_warning(
    mixer: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(mixer)
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    # with sums one for the border too
    assert len(files(tmp_path)) == (1 if mixer == "softmax" else 2)
    for file in files(tmp_path):
        damage(file)
    later = engine_of(model, tmp_path)
    found = ask(later, [*tokens, 1, 2])
    assert found.cached_tokens == 0
    assert output(found) == output(ask(engine_of(model, None), [*tokens, 1, 2]))
    # once each
    assert caplog.text.count("was skipped, it cannot be read") == len(files(tmp_path))
    # and it is written again
    ask(later, tokens[: PIECE + 20])
    cache_of(later).flush()
    assert ask(engine_of(model, tmp_path), [*tokens, 1, 2]).cached_tokens >= len(tokens) - 1


def test_a_file_under_the_name_of_another_text_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("aug")
    places = [tmp_path / "one", tmp_path / "two"]
    texts = [kept(model, place, random_tokens(40, seed=n)) for n, place in enumerate(places)]
    (mine,), (other,) = map(files, places)
    mine.write_bytes(other.read_bytes())
    assert ask(engine_of(model, places[0]), [*texts[0], 1]).cached_tokens == 0
    assert "holds another text" in caplog.text


def test_a_file_of_another_model_gave_its_states_to_who_renamed_it(tmp_path: Path) -> None:
    """The same text, read by other weights."""
    one, two = tiny_model("softmax"), tiny_model("softmax", seed=1)
    text = kept(one, tmp_path / "one", random_tokens(PIECE + 9, seed=1))
    kept(two, tmp_path / "two", text)
    (file,), (foreign,) = files(tmp_path / "one"), files(tmp_path / "two")
    file.write_bytes(foreign.read_bytes())
    found = ask(engine_of(one, tmp_path / "one"), [*text, 1])
    assert output(found) == output(ask(engine_of(one, None), [*text, 1]))
    assert not found.cached_tokens


@pytest.mark.parametrize("mixer", ["softmax", "aug", "window"])
@pytest.mark.parametrize("change", [made_empty, other_numbers])
def test_a_file_that_was_cut_while_its_state_was_in_use_ended_the_process(
    mixer: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    model = tiny_model(mixer)
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    later, turn = engine_of(model, tmp_path), [*tokens, 1, 2]
    assert ask(later, turn).cached_tokens
    for file in files(tmp_path):
        change(file)
    found = ask(later, turn)
    assert output(found) == output(ask(engine_of(model, None), turn)) and found.cached_tokens


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_pipe_or_link_under_the_name_of_a_file_was_waited_for(
    mixer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(mixer)
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    store = files(tmp_path)[0].parent
    for number, make in enumerate([os.mkfifo, os.mkdir, partial(os.symlink, "/nowhere")]):
        make(store / f"{PIECE}-{number:032x}.safetensors")
    engine = engine_of(model, tmp_path)
    assert caplog.text.count("is no file of a prefix store and is left alone") == 3
    # one that takes the place of a file later
    for file in files(tmp_path):
        file.unlink()
        os.mkfifo(file)
    found = ask(engine, [*tokens, 1])
    assert output(found) == output(ask(engine_of(model, None), [*tokens, 1]))
    assert not found.cached_tokens


def test_what_a_killed_server_was_writing_stayed_for_ever(tmp_path: Path) -> None:
    model = tiny_model("aug")
    kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    store = files(tmp_path)[0].parent
    left = store / f".{PIECE}-{1:032x}.safetensors.writing-{2:032x}"
    held = store / f".{PIECE}-{1:032x}.safetensors.writing-{3:032x}"
    left.write_bytes(b"half")
    with held.open("wb") as file:
        # of a server that still writes
        fcntl.flock(file, fcntl.LOCK_EX)
        engine_of(model, tmp_path)
    assert held.exists() and not left.exists()


def test_a_file_that_another_server_removed_came_back_empty(tmp_path: Path) -> None:
    model = tiny_model("aug")
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    engine = engine_of(model, tmp_path)
    load = prefix_store.unpack

    def removed(*given: Any) -> Any:
        for file in files(tmp_path):
            file.unlink()
        return load(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_store, "unpack", removed)
        assert ask(engine, [*tokens, 1]).cached_tokens
    assert not files(tmp_path)


def test_damaged_files_counted_for_nothing_and_filled_the_disk(tmp_path: Path) -> None:
    model = tiny_model("aug")
    tokens = kept(model, tmp_path, random_tokens(PIECE + 20, seed=1))
    for file in files(tmp_path):
        other_numbers(file)
    size = max(file.stat().st_size for file in files(tmp_path))
    engine = engine_of(model, tmp_path, limit=3 * size)
    store = cache_of(engine).store
    assert store is not None and not ask(engine, [*tokens, 1]).cached_tokens
    assert store.bytes == sum(file.stat().st_size for file in files(tmp_path))
    for seed in range(2, 6):
        ask(engine, random_tokens(PIECE + 20, seed=seed))
        cache_of(engine).flush()
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 3 * size


def test_models_and_kinds_of_caches_have_files_of_their_own(tmp_path: Path) -> None:
    prompt = random_tokens(PIECE, seed=1)
    tokens = kept(tiny_model("softmax"), tmp_path, prompt)
    others = [
        (tiny_model("softmax", seed=1), "float"),
        (tiny_model("softmax", dtype=torch.float32), "float"),
        (tiny_model("softmax"), "int8"),
        (tiny_model("local"), "float"),
    ]
    for model, kv in others:
        assert ask(engine_of(model, tmp_path, kv=kv), [*tokens, 1]).cached_tokens == 0
    assert ask(engine_of(tiny_model("softmax"), tmp_path), [*tokens, 1]).cached_tokens > 0


def test_foreign_files_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("aug")
    tokens = kept(model, tmp_path, random_tokens(40, seed=1))
    foreign = files(tmp_path)[0].parent / "notes.txt"
    foreign.write_text("mine")
    assert ask(engine_of(model, tmp_path, limit=1), [*tokens, 1]).cached_tokens > 0
    assert "notes.txt is no file of a prefix store" in caplog.text
    assert foreign.read_text() == "mine"


def test_a_full_disk_loses_the_entry_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, prompt = tiny_model("aug"), random_tokens(PIECE + 3, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("linspec.utils.files._make_aside", full)
        tokens = kept(model, tmp_path, prompt)
    # once, though there were two texts: a log must not fill as well
    assert caplog.text.count("was not added") == 1
    assert tokens[len(prompt) :] == output(ask(engine_of(model, None), prompt))
    assert "No space left on device" in caplog.text and not files(tmp_path)
    # when there is space again
    kept(model, tmp_path, prompt)
    assert ask(engine_of(model, tmp_path), [*tokens, 1]).cached_tokens == len(tokens) - 1


def test_files_stay_within_the_limit_and_the_oldest_go(tmp_path: Path) -> None:
    model = tiny_model("softmax")
    kept(model, tmp_path / "one", random_tokens(PIECE + 20, seed=9))
    size = files(tmp_path / "one")[0].stat().st_size
    texts = []
    for seed in range(5):
        limit = 3 * size + size // 2
        texts.append(
            kept(model, tmp_path / "all", random_tokens(PIECE + 20, seed=seed), limit=limit)
        )
        assert sum(path.stat().st_size for path in files(tmp_path / "all")) <= limit
    engine = engine_of(model, tmp_path / "all")
    # the index of what was removed is gone too
    known = [ask(engine, [*text, 1]).cached_tokens > PIECE for text in texts]
    assert known == [False, False, True, True, True]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="prefix store .* cannot be used"):
        engine_of(tiny_model("aug"), tmp_path / "file")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_store_without_a_name_filled_the_present_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="must name a directory of its own"):
        LLM("embedded-softmax", prefix_cache="1MB", prefix_store=name)


def test_a_slow_disk_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store.PrefixStore, "_start", lambda self: None)
    engine = engine_of(tiny_model("softmax"), tmp_path, budget=3000)
    for seed in range(30):
        ask(engine, random_tokens(40, seed=seed))
    store = cache_of(engine).store
    assert store is not None and store._queue.qsize() <= prefix_store._WAITING
