"""Tiny random decoders, random trees and the slow way to the same logits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.state.grouped import GroupedSpec
from linspec.state.sequence_states import SequenceStates
from linspec.state.slots import StateSnapshot

VOCAB = 31
GROUP = 4
WINDOW = 5
TAPS = 3
SINKS = 2
# settings under which rows are evicted of a few groups already, and components change and do not
OWN: dict[str, dict[str, Any]] = {
    "h2o": {"budget": 5},
    "snapkv": {"budget": 5, "last": 2, "pool": 3},
    "delta": {"threshold": 0.7},
    # of two chunks of a segment one is an outlier, and of the others one is read; keys of full rank
    "shadow": {"rank": 4, "budget": 2, "chunk": 2, "outliers": 1},
}

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def mixer_config(name: str, taps: int | None = None, group: int = GROUP) -> MixerConfig:
    name, _, kernel = name.partition(":")
    if taps is None:
        taps = TAPS if name == "aug" else 0
    window = WINDOW if name == "window" else 0
    # small enough that old groups are forgotten
    rows: dict[str, Any] = {"features": 2, "keep": 2} if name == "linformer" else {}
    rows |= {"sinks": SINKS} if name in ("streaming", "by-head") else {}
    rows |= {"exact_heads": (0,)} if name == "by-head" else {}
    # of a few groups one is chosen, by pages of which it has several
    rows |= {"options": {"budget": group, "page": group // 2}} if name == "pages" else {}
    rows |= {"options": OWN[name]} if name in OWN else {}
    return MixerConfig(
        name=name, group=group, kernel=kernel or "own", taps=taps, window=window, **rows
    )


def tiny_config(
    *mixers: MixerConfig,
    kv_heads: int = 2,
    qk_norm: bool = False,
    positions: str = "rope",
    max_positions: int = 4096,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=VOCAB,
        width=16,
        layers=len(mixers),
        heads=4,
        kv_heads=kv_heads,
        head_width=4,
        mlp_width=16,
        mixers=mixers,
        qk_norm=qk_norm,
        positions=positions,
        max_positions=max_positions,
    )


def _has_groups(name: str) -> bool:
    """Whether there is such a mixer, and it sees its last groups exactly."""
    mixer = mixer_config(name)
    try:
        return isinstance(MIXERS[mixer.name](tiny_config(mixer), mixer).state_spec(), GroupedSpec)
    except ConfigError:
        return False


_NAMES = tuple(name for name in MIXERS.names() if not name.startswith("test"))
# "aug:softmax" is aug with the kernel softmax; every mixer in the grouped arrangement
EXACT = (*filter(_has_groups, (f"{name}:softmax" for name in _NAMES)), "relu:relu2")
MIXER_NAMES = (*_NAMES, *EXACT)
# some also without a convolution, and with one longer than a group: it is the same code for all
WITHOUT_TAPS = ("softmax", "window", "grouped", "relu")
LONG_TAPS = ("softmax", "window", "aug")
CASES = [
    *((name, TAPS) for name in MIXER_NAMES),
    *((name, 0) for name in WITHOUT_TAPS),
    *((name, GROUP + 3) for name in LONG_TAPS),
]


def tiny_model(
    *mixers: str | MixerConfig,
    taps: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **switches: object,
) -> Decoder:
    """A random decoder with one layer for each of `mixers`.

    If only one is named there are two layers of it, the second with a span of two groups.
    """
    named = [mixer_config(m, taps) if isinstance(m, str) else m for m in mixers]
    if len(named) == 1:
        named.append(replace(named[0], span=1 if named[0].name == "global" else 2))
    config = tiny_config(*named, **switches)  # type: ignore[arg-type]
    return randomise(Decoder(config), seed).to(device, dtype)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random: α and taps start at zero, and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
            parameter.copy_(noise * scale if parameter.dim() else noise.abs() + 0.3)
    return model.eval()


def random_tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def random_tree(
    rng: random.Random, nodes: int, *, reach: int | None = None, depth: int | None = None
) -> TokenTree:
    """Random topology; a small `reach` takes parents among the newest nodes, for deep trees."""
    parents, depths = [-1], [0]
    for node in range(1, nodes):
        parent = rng.randrange(0 if reach is None else max(0, node - reach), node)
        if depth is not None and depths[parent] >= depth:
            parent = parents[parent]
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return TokenTree(tuple(rng.randrange(VOCAB) for _ in parents), tuple(parents))


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12) -> TokenTree:
    nodes = draw(st.integers(1, max_nodes))
    reach = draw(st.sampled_from((1, 2, max_nodes)))
    return random_tree(random.Random(draw(st.integers(0, 2**20))), nodes, reach=reach)


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    return [tree.tokens[n] for n in tree.path_to(node)]


@torch.no_grad()
def full_logits(model: Decoder, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after each of `texts` by the full form, [len(texts), vocab]. None may be empty."""
    longest = max(map(len, texts))
    device = model.embed.weight.device
    # causal: what stands behind a text cannot change its logits
    ids = torch.tensor([[*t, *[0] * (longest - len(t))] for t in texts], device=device)
    ends = torch.tensor([len(t) - 1 for t in texts], device=device)
    return model(ids)[torch.arange(len(texts), device=device), ends]


def tree_logits(model: Decoder, prompt: Sequence[int], tree: TokenTree) -> torch.Tensor:
    """Logits of every node of `tree` by the full form along its path."""
    return full_logits(model, [[*prompt, *path_tokens(tree, n)] for n in range(len(tree))])


def feed(
    model: Decoder, state: SequenceStates, tokens: Sequence[int], slot: int = 0
) -> torch.Tensor:
    """Step and commit a chain (nothing if there are no tokens); its logits."""
    if not tokens:
        return torch.empty(0, VOCAB)
    logits = model.step([StepInput(slot, tokens)], state).logits
    state.commit(slot, range(len(tokens)))
    return logits


def prefilled(model: Decoder, *prompts: Sequence[int]) -> SequenceStates:
    """A state with one slot for each of `prompts`."""
    state = model.new_state(len(prompts))
    for slot, prompt in enumerate(prompts):
        feed(model, state, prompt, slot)
    return state


def remembered(
    model: Decoder, state: SequenceStates, slot: int = 0
) -> list[dict[str, torch.Tensor]]:
    """What `slot` remembers that matters: a window keeps up to `window` rows too many."""
    found = []
    for part, copy in zip(state.parts, state.snapshot(slot), strict=True):
        rows = copy.keys.shape[2]
        useful = min(rows, getattr(part.spec, "window", rows))
        conv_history = part.spec.conv_history
        found.append(
            {
                "length": torch.tensor(copy.length),
                "keys": copy.keys[:, :, rows - useful :],
                "values": copy.values[:, :, rows - useful : rows + conv_history],
                "sums": copy.sums if copy.sums is not None else torch.empty(0),
            }
        )
    return found


def assert_close(actual: object, expected: object, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_bytes(actual: Sequence[StateSnapshot], expected: Sequence[StateSnapshot]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a.length, a.base_position) == (b.length, b.base_position)
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
        assert (a.sums is None) == (b.sums is None)
        if a.sums is not None and b.sums is not None:
            assert torch.equal(a.sums, b.sums)


@contextmanager
def kill_before(update: int) -> Iterator[None]:
    """Training inside is killed before its update of the weights number `update`, counted from 0."""
    done = itertools.count()

    def count(*_: object) -> None:
        if next(done) == update:
            raise RuntimeError(f"killed before update {update}")

    handle = register_optimizer_step_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
