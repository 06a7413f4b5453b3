"""The border for tensors: those read from a file are checked here before a kernel or a model sees them.

    check_tensors(found, expected, path)           # names, shapes, dtypes; finite scales, norms, biases
    check_finite(name, tensor, path)               # every value of one tensor

What a kernel reads by address is exactly of the dtype that it takes: other bytes there would be read as
numbers, or past their end. Elsewhere floats of any width are floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from linspec.errors import CheckpointError, LinspecError
from linspec.utils.messages import shown

# the size up to which values are read when a model is loaded: norms, biases, scales, taps. A check of
# all weights would read a mapped file that is otherwise read when it is needed
SMALL = 2**16
AGAIN = "copy or download it again, or save the model again"


def check_tensors(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    path: Path,
    *,
    exact: bool = True,
    error: type[LinspecError] = CheckpointError,
) -> None:
    """Raise `error` unless `found` has the names, shapes and dtypes of `expected`, and finite values.

    exact: dtypes must be equal; otherwise floats may be of any width. Values are looked at where a tensor
    is small, which scales and norms are.
    """
    _check_names(found.keys(), expected.keys(), path, error)
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise error(
                f"{path}: {shown(name)} has shape {list(tensor.shape)}, its configuration asks for "
                f"{list(wanted.shape)}; the two are of different models"
            )
        check_dtype(name, tensor.dtype, wanted.dtype, path, exact=exact, error=error)
        if tensor.numel() <= SMALL or name.endswith(".scales"):
            check_finite(name, tensor, path, error)
        if name.endswith(".scales") and bool((tensor < 0).any()):
            raise error(f"{path}: {shown(name)} has scales below 0; {AGAIN}")


def _check_names(
    found: Iterable[str], expected: Iterable[str], path: Path, error: type[LinspecError]
) -> None:
    have, want = set(found), set(expected)
    for names, what in ((want - have, "lacks"), (have - want, "has what no such model has:")):
        if names:
            some = ", ".join(shown(name) for name in sorted(names)[:4])
            raise error(
                f"{path} {what} {some}{', ...' if len(names) > 4 else ''} ({len(names)} tensors); "
                "it is damaged, or it and its configuration are of different models"
            )


def check_dtype(
    name: str,
    found: torch.dtype,
    wanted: torch.dtype,
    path: Path,
    *,
    exact: bool = False,
    error: type[LinspecError] = CheckpointError,
) -> None:
    """Raise `error` unless a tensor of dtype `found` can stand where `wanted` is expected."""
    if found == wanted or (
        not exact and found.is_floating_point and wanted.is_floating_point and found.itemsize > 1
    ):
        return
    raise error(
        f"{path}: {shown(name)} has numbers of type {_name(found)} where {_name(wanted)} belong; {AGAIN}"
    )


def check_finite(
    name: str, tensor: torch.Tensor, path: object, error: type[LinspecError] = CheckpointError
) -> None:
    """Raise `error` if a tensor of floats holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return
    # one pass without a copy: a mask of what is finite would need memory again
    low, high = torch.aminmax(tensor.detach())
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        raise error(f"{path}: {shown(name)} holds NaN or infinity: it is damaged; {AGAIN}")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` at an address that its numbers may have; a file can place it anywhere when it is mapped."""
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
