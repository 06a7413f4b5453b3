"""What a verb says beside its result: the setting that would have made it faster."""

from __future__ import annotations

from torch import nn

from linspec.kernels.step_plan import F32
from linspec.models.native_linear import NativeLinear

# fewer bytes are read so quickly that nobody would notice
_LARGE = 100_000_000


def on_weights(model: object) -> str | None:
    """What to say of a model whose tokens each read many bytes of floats; None of any other."""
    layers = model.modules() if isinstance(model, nn.Module) else ()
    native = (each for each in layers if isinstance(each, NativeLinear))
    floats = sum(each.packed.nbytes for each in native if each.kind == F32)
    if floats < _LARGE:
        return None
    return (
        f"each token reads {floats / 1e6:.0f} MB of float32 weights; with --quantize 8 it reads a quarter, "
        "and the values are rounded"
    )
