"""The kinds of KV caches by name: what `kv_cache_dtype` can be.

A registered class is called with (spec, layers, slots, options), and with its own options if it has any. Its
`entries` say how entries lie in memory, also in windows, whose arrangement it does not change.
"""

from __future__ import annotations

import torch

from linspec.errors import ConfigError
from linspec.state.contract import EntryState, StateOptions
from linspec.state.entries import EntryFormat, EntrySpec
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.options import read_spec
from linspec.utils.registry import Registry

# as the checkpoint has it, which who loads it knows; and a name of the kind 'float', as a model computes
_FLOATS = ("auto", "float32")

STATES: Registry[EntryState] = Registry("KV cache", "linspec.states")


def new_cache(spec: EntrySpec, layers: int, slots: int, options: StateOptions) -> EntryState:
    """An empty cache of the kind that the options name, growing with the sequence."""
    return STATES.build(options.kv_cache, spec, layers, slots, options)


def entry_format(options: StateOptions) -> EntryFormat:
    """How entries lie in memory in the kind of cache that the options name."""
    return STATES.read(options.kv_cache)[0].value.entries


def kv_of(name: str, old: str | None = None) -> str:
    """The spec of STATES that a `kv_cache_dtype` stands for, or an `old` setting given instead of it.

    'auto' stays: `checkpoints/dtype.py` knows what it is for a model.
    Raises ConfigError for an unknown one.
    """
    if old is not None and name not in ("auto", old):
        raise ConfigError(
            f"kv_cache_dtype is {shown(repr(name))} and kv, its old name, is {shown(repr(old))}; leave "
            "out kv"
        )
    name = name if old is None else old
    names = (*_FLOATS, *(each for each in STATES.names() if each != "float"))
    kind = read_spec(name)[0] if isinstance(name, str) else ""
    if kind not in ("float", *names):
        raise ConfigError(
            f"kv_cache_dtype must be one of {', '.join(names)}, got {shown(repr(name))}"
            f"{did_you_mean(name, names)}"
        )
    if name in _FLOATS:
        return "float" if name == "float32" else name
    STATES.read(name)
    return name


def check_held(name: str, dtype: torch.dtype) -> None:
    """Raise ConfigError where a cache of floats was named and the model computes in others."""
    if name == "float32" and dtype != torch.float32:
        raise ConfigError(
            f"this model computes in {dtype}, and so are its caches kept: use kv_cache_dtype='auto' or "
            "'int8', or dtype='float32'"
        )
