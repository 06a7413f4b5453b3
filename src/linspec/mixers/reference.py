"""The specification of every mixer: plain torch, one sequence, a loop over time.

    out = reference(mixer, x, angles)    # [T, D]; what mixer(x[None], rope)[0] must equal

Straight from the equations: nothing here is fast, and nothing is shared with the fast forms.
`REFERENCES` has one function for each registered mixer, for a single head: q, k [T, K] and
v [T, V] -> [T, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from linspec.errors import ConfigError
from linspec.mixers.base import Mixer

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mixer], torch.Tensor]

# divisions by a norm, or by a sum of weights, that may be zero
EPSILON = 1e-6


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """o_t = sum over s <= t of exp(q_t·k_s / sqrt(K)) v_s, divided by the sum of the weights."""
    return _softmax_over(q, k, v, lambda t, s: True)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """Softmax over the last `window` tokens, the current one included."""
    return _softmax_over(q, k, v, lambda t, s: t - s < mixer.mixer.window)


def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """o_t = sum over s <= t within reach of relu(q̂_t·k̂_s)² v_s, where x̂ = x / ‖x‖.

    Within reach are t's own group and the span - 1 groups before it.
    """
    if mixer.mixer.kernel == "softmax":
        return _softmax_over(q, k, v, lambda t, s: s >= _first(mixer, t))
    q, k = _unit(q), _unit(k)
    out = []
    for t in range(len(q)):
        o = torch.zeros_like(v[0])
        for s in range(_first(mixer, t), t + 1):
            o = o + (q[t] @ k[s]).relu() ** 2 * v[s]
        out.append(o)
    return torch.stack(out)


def global_(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """o_t = α q̂_t S, S the sum of k̂_s v_sᵀ over all s before those within reach of t."""
    q, k = _unit(q), _unit(k)
    out = []
    for t in range(len(q)):
        state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
        for s in range(_first(mixer, t)):
            state = state + torch.outer(k[s], v[s])
        out.append(mixer.get_parameter("alpha") * (q[t] @ state))
    return torch.stack(out)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """`local` plus `global`. The convolution that makes it `aug` is added for every mixer alike."""
    return local(q, k, v, mixer) + global_(q, k, v, mixer)


def relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """o_t = φ(q_t) S_t / (φ(q_t)·z_t + ε): S_t sums φ(k_s) v_sᵀ, z_t sums φ(k_s), φ = relu."""
    q, k = q.relu(), k.relu()
    out = []
    state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
    total = torch.zeros_like(k[0])
    for t in range(len(q)):
        state, total = state + torch.outer(k[t], v[t]), total + k[t]
        out.append((q[t] @ state) / (q[t] @ total + EPSILON))
    return torch.stack(out)


def convolution(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """y_t = sum over j < W of c_j v_{t-j}: v [T, V], taps [W]."""
    out = []
    for t in range(len(v)):
        y = torch.zeros_like(v[0])
        for j, tap in enumerate(taps):
            if t - j >= 0:
                y = y + tap * v[t - j]
        out.append(y)
    return torch.stack(out)


REFERENCES: dict[str, Head] = {
    "softmax": softmax,
    "window": window,
    "local": local,
    "global": global_,
    "grouped": grouped,
    "aug": grouped,
    "relu": relu,
}


def reference(mixer: Mixer, x: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
    """What `mixer` must compute for one sequence x [T, D]; angles [T, K/2] are the rotary ones.

    Raises ConfigError for a mixer that has no entry in `REFERENCES`.
    """
    name = mixer.mixer.name
    if name not in REFERENCES:
        raise ConfigError(f"mixer {name!r} has no reference; add one to mixers/reference.py")
    heads = []
    for head in range(mixer.heads):
        shared = head // (mixer.heads // mixer.kv_heads)
        q, k, v = _project(mixer, x, head, shared, angles)
        o = REFERENCES[name](q, k, v, mixer)
        if mixer.mixer.taps:
            o = o + convolution(v, mixer.get_parameter("taps")[head])
        heads.append(o)
    return mixer.o(torch.cat(heads, dim=1))


def _project(
    mixer: Mixer,
    x: torch.Tensor,
    head: int,
    shared: int,
    angles: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query of one head, and key and value of the head that it shares with others: [T, K] each."""
    width = mixer.head_width
    q = mixer.q(x)[:, head * width : (head + 1) * width]
    k = mixer.k(x)[:, shared * width : (shared + 1) * width]
    v = mixer.v(x)[:, shared * width : (shared + 1) * width]
    if mixer.config.qk_norm:
        q = _rms_norm(q, mixer.q_norm.weight, mixer.config.norm_eps)
        k = _rms_norm(k, mixer.k_norm.weight, mixer.config.norm_eps)
    if angles is not None:
        q, k = _turn(q, angles), _turn(k, angles)
    return q, k, v


def _first(mixer: Mixer, t: int) -> int:
    """The oldest position within reach of t."""
    return max(0, (t // mixer.mixer.group - mixer.mixer.span + 1) * mixer.mixer.group)


def _softmax_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: Callable[[int, int], bool]
) -> torch.Tensor:
    out = []
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if sees(t, s)]
        scores = torch.stack([q[t] @ k[s] / math.sqrt(q.shape[1]) for s in seen])
        weights = (scores - scores.max()).exp()
        out.append(weights @ v[seen] / weights.sum())
    return torch.stack(out)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt().clamp_min(EPSILON)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Feature pair (i, i + K/2) as a complex number, turned by the angle of its position."""
    half = x.shape[1] // 2
    real, imaginary = x[:, :half], x[:, half:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=1)
