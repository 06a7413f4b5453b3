"""The delta rule: a token writes what its key does not return yet.

S_t = a_t S_{t-1} + k_t u_tᵀ,    u_t = b_t (v_t - a_t S_{t-1}ᵀ k_t)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from linspec.mixers.ops.products import decayed_products


def delta_writes(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rates: torch.Tensor,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The u of all tokens of a chunk or a tree as w - r S, S being the state before them: (w, r).

    k [..., C, K], v [..., C, V], rates b [..., C, 1]; decay [..., C, 1] is A, the sum of log a on the path;
    before [..., C, C] is true where the second token is a proper ancestor of the first. All u solve one
    triangular system.
    """
    known = rates * decayed_products(k.unsqueeze(-3), k, decay, decay, before).squeeze(-3)
    right = rates * torch.cat((v, decay.exp() * k), dim=-1)
    solved = torch.linalg.solve_triangular(known, right, upper=False, unitriangular=True)
    written, read = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    return written, read


def delta_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rates: torch.Tensor,
    seen: Callable[[int], range],
) -> torch.Tensor:
    """The equations, one token after the other: q, k [T, K], v [T, V], factors a and b [T] -> [T, V].

    seen(t): the tokens that t reads; all up to it fade the state.
    """
    out = []
    for t in range(len(q)):
        state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
        for s in range(t + 1):
            state = decay[s] * state
            if s in seen(t):
                state = state + torch.outer(k[s], rates[s] * (v[s] - k[s] @ state))
        out.append(q[t] @ state)
    return torch.stack(out)
