"""The states of a model's layers, made by their mixers as the caller chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from linspec.errors import ConfigError
from linspec.kernels.gpu.choice import DeviceKernels
from linspec.state.contract import Makers, StateMaker, StateOptions
from linspec.state.registry import STATES
from linspec.state.sequence_states import SequenceStates


def new_states(
    makers: Sequence[Makers],
    slots: int,
    kv: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: Path | None = None,
    kernels: DeviceKernels | None = None,
) -> SequenceStates:
    """Empty states for up to `slots` sequences; kv: how caches keep their entries, a spec of STATES.

    offload: a directory for what states can have in files. kernels: see `StateOptions`.

    Entries of groups stay floats: they are few, and they are summed. Raises ConfigError for another kind
    of cache when there is none, and for a directory where no state has anything to put there.
    """
    STATES.read(kv)
    if kv != "float" and not keeps_cache(makers):
        raise ConfigError(
            f"no layer of this model keeps a softmax cache, so there is nothing to keep as {kv}; "
            "leave out kv_cache_dtype (--kv-cache-dtype)"
        )
    if offload is not None and not any(each.offloads for each in _flat(makers)):
        raise ConfigError(
            "no layer of this model has anything to offload; leave out offload (--offload), or choose "
            "attention='shadow' (--attention shadow)"
        )
    options = StateOptions(
        dtype=dtype, device=device, kv_cache=kv, offload=offload, kernels=kernels
    )
    return SequenceStates(makers, slots, options)


def keeps_cache(makers: Sequence[Makers]) -> bool:
    """Whether any of `makers` has a cache, which can be kept in several ways."""
    return any(maker.keeps_cache for maker in _flat(makers))


def _flat(makers: Sequence[Makers]) -> Iterator[StateMaker]:
    for each in makers:
        if isinstance(each, tuple):
            yield from _flat(each)
        else:
            yield each
