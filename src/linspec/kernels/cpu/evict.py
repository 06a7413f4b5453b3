"""Which rows of closed groups stay, in C, as steps in one call decide it for groups that close on a path.

plan = AttentionPlan(group=64, budget=512, asked=64)
if why_not(kept, keys, values) is None:
    kept = evict(plan, kept, keys, values, scale=0.125)
"""

from __future__ import annotations

from ctypes import POINTER, byref, c_int32
from typing import Any

import torch

from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.structs import MAX_HEAD_WIDTH, EvictionStruct
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.step_plan import AttentionPlan


def why_not(*tensors: torch.Tensor) -> str | None:
    """Why torch has to do it with these rows; None if the library can."""
    if torch.compiler.is_compiling():
        return "torch traces what is computed"
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in tensors):
        return "rows are not float32 on a CPU"
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return "gradients are asked for"
    found = load()
    return found.reason if found.library is None else None


def evict(
    plan: AttentionPlan,
    kept: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    cap: float = 0.0,
) -> torch.Tensor:
    """Rows [.., B, 2 K + 1] that are kept once the groups of keys [.., C, (1 + r) K] and values [.., C, K]
    have closed, behind what was `kept`; only where `why_not` has no reason.

    Keys have the queries of their r query heads behind them; C is a multiple of the plan's group.
    """
    width = values.shape[-1]
    assert keys.shape[-2] % plan.group == 0 and kept.shape[-2] == plan.budget
    assert width <= MAX_HEAD_WIDTH and kept.shape[-1] == 2 * width + 1
    # the C side has addresses only
    kept = kept.detach().clone(memory_format=torch.contiguous_format)
    keys, values = keys.detach().contiguous(), values.detach().contiguous()
    struct = EvictionStruct(
        heads=kept.shape[:-2].numel(),
        repeats=keys.shape[-1] // width - 1,
        width=width,
        rows=keys.shape[-2],
        group=plan.group,
        budget=plan.budget,
        asked=plan.asked,
        pool=plan.pool,
        score_factor=scale * width**0.5,
        score_cap=cap,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        kept=kept.data_ptr(),
    )
    _function()(byref(struct), native_threads())
    return kept


def _function() -> Any:
    library = load().library
    assert library is not None, "why_not has a reason"
    library.ls_evict.restype = None
    library.ls_evict.argtypes = [POINTER(EvictionStruct), c_int32]
    return library.ls_evict
