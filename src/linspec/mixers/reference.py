"""The specification of every mixer: plain torch, one sequence, a loop over time.

    out = reference(mixer, x, angles)    # [T, D]; what mixer(x[None], rope)[0] must equal

Straight from the equations: nothing is fast, and nothing is shared with the fast forms. Loops that belong to
one op stand beside its fast form in `ops/`, those of sparse attention in `reference_sparse.py`.
`REFERENCES` has one function for each registered mixer, for a single head: q, k [T, K] and
v [T, V] -> [T, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from linspec.errors import ConfigError
from linspec.mixers.base import Mixer
from linspec.mixers.ops.convolution import convolve_reference
from linspec.mixers.ops.decayed import decayed_reference
from linspec.mixers.ops.delta import delta_reference
from linspec.mixers.reference_head import Head, softmax_over
from linspec.mixers.reference_sparse import delta, h2o, pages, shadow, snapkv

# divisions by a norm, or by a sum of weights, that may be zero
EPSILON = 1e-6


# which positions t reads
Seen = Callable[[int], range]
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Head], torch.Tensor]
LinearForm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Head, Seen], torch.Tensor]


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """o_t = sum over s <= t of exp(q_t·k_s / sqrt(K)) v_s, divided by the sum of the weights."""
    return softmax_over(q, k, v, lambda t, s: True)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over the last `window` tokens, the current one included."""
    return softmax_over(q, k, v, lambda t, s: t - s < head.config.window)


def streaming(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over s within reach of t and over the first `sinks` tokens."""
    return softmax_over(q, k, v, lambda t, s: s >= head.first(t) or s < head.config.sinks)


def by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """`softmax` where the KV head is one of `exact_heads`, else `streaming`."""
    form = softmax if head.shared in head.config.exact_heads else streaming
    return form(q, k, v, head)


def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """o_t = sum over s <= t within reach of relu(q̂_t·k̂_s)² v_s, where x̂ = x / ‖x‖.

    Within reach are t's own group and the span - 1 groups before it.
    """
    if head.config.kernel == "softmax":
        return softmax_over(q, k, v, lambda t, s: s >= head.first(t))
    q, k = _unit(q), _unit(k)
    out = []
    for t in range(len(q)):
        o = torch.zeros_like(v[0])
        for s in range(head.first(t), t + 1):
            o = o + (q[t] @ k[s]).relu() ** 2 * v[s]
        out.append(o)
    return torch.stack(out)


def global_(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """o_t = α q̂_t S, S the sum of k̂_s v_sᵀ over all s before those within reach of t."""
    q, k = _unit(q), _unit(k)
    out = []
    for t in range(len(q)):
        state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
        for s in range(head.first(t)):
            state = state + torch.outer(k[s], v[s])
        out.append(head.own("alpha") * (q[t] @ state))
    return torch.stack(out)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """`local` plus `global`. The convolution that makes it `aug` is added for every mixer alike."""
    return local(q, k, v, head) + global_(q, k, v, head)


def arranged(own: LinearForm) -> Form:
    """`own` over all tokens; with another kernel, that kernel within reach plus α · `own` beyond."""

    def form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
        if head.config.kernel == "own":
            return own(q, k, v, head, lambda t: range(t + 1))
        beyond = own(q, k, v, head, lambda t: range(head.first(t)))
        return local(q, k, v, head) + head.own("alpha") * beyond

    return form


def relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen) -> torch.Tensor:
    """φ(q_t) S_t / (φ(q_t)·z_t + ε): S_t sums φ(k_s) v_sᵀ, z_t sums φ(k_s), φ = relu."""
    return _normalized(q.relu(), k.relu(), v, seen)


def hedgehog(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen
) -> torch.Tensor:
    """Softmax weights within reach and exp(γ) φ(q)·φ(k) beyond, under one denominator.

    φ(x) = [softmax(W x), softmax(-W x)]; exponents are taken relative to the largest within reach.
    """
    out = []
    for t in range(len(q)):
        near = [s for s in seen(t) if s >= head.first(t)]
        scores = {s: q[t] @ k[s] / math.sqrt(q.shape[1]) for s in near}
        wanted = _two_sided(head.own("query_map")[head.query] @ q[t])
        o, total = torch.zeros_like(v[0]), torch.full_like(v[0, 0], EPSILON)
        for s in seen(t):
            if s in scores:
                weight = (scores[s] - torch.stack(list(scores.values())).max()).exp()
            else:
                found = _two_sided(head.own("key_map")[head.shared] @ k[s])
                weight = head.own("gamma")[head.query].exp() * (wanted @ found)
            o, total = o + weight * v[s], total + weight
        out.append(o / total)
    return torch.stack(out)


def performer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen
) -> torch.Tensor:
    """As `relu` with φ(x) = (exp(w_i·y - ‖y‖²/2 [- the largest, for queries]) + 1e-4) / sqrt(m)."""
    w = head.own("projection")

    def exponents(x: torch.Tensor) -> torch.Tensor:
        y = x / x.shape[1] ** 0.25
        return y @ w.T - y.square().sum(1, keepdim=True) / 2

    largest = exponents(q).max(1, keepdim=True).values
    q, k = (exponents(q) - largest).exp() + 1e-4, exponents(k).exp() + 1e-4
    return _normalized(q / math.sqrt(len(w)), k / math.sqrt(len(w)), v, seen)


def rfa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen) -> torch.Tensor:
    """Weights mean_i cos(w_i·(q̂ - k̂)), divided by their sum or by 0.1."""
    w, q, k = head.own("projection"), _unit(q), _unit(k)
    out = []
    for t in range(len(q)):
        o, total = torch.zeros_like(v[0]), torch.zeros_like(v[0, 0])
        for s in seen(t):
            weight = (w @ (q[t] - k[s])).cos().mean()
            o, total = o + weight * v[s], total + weight
        out.append(o / total.clamp_min(0.1))
    return torch.stack(out)


def transnormer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen
) -> torch.Tensor:
    """gain · RMSNorm(Σ φ(q)·φ(k) v), φ = 1 + elu."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    o = _weighted(v, seen, lambda t, s: q[t] @ k[s])
    return _rms_norm(o, head.own("gain"), EPSILON)


def yoso(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen) -> torch.Tensor:
    """Σ f(q̂·k̂) v / ‖…‖, f(x) = (1 - acos(x)/π)⁸ within reach, its series to x² beyond."""
    q, k = _unit(q), _unit(k)

    def weight(t: int, s: int) -> torch.Tensor:
        x = q[t] @ k[s]
        if s >= head.first(t):
            return (1 - x.clamp(-0.999, 0.999).acos() / math.pi) ** 8
        return 1 / 256 + x / (16 * math.pi) + 7 * x**2 / (16 * math.pi**2)

    return _unit(_weighted(v, seen, weight))


def linformer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over s within reach and over E K_g, F V_g of the last M groups g before it."""
    key_map, value_map = head.own("key_map"), head.own("value_map")
    size = key_map.shape[1]
    keep = head.config.keep or 16
    out = []
    for t in range(len(q)):
        keys, values = [k[head.first(t) : t + 1]], [v[head.first(t) : t + 1]]
        newest = head.first(t) // size
        for g in range(max(0, newest - keep), newest):
            keys.append(key_map @ k[g * size : (g + 1) * size])
            values.append(value_map @ v[g * size : (g + 1) * size])
        weights = (torch.cat(keys) @ q[t] / math.sqrt(q.shape[1])).softmax(0)
        out.append(weights @ torch.cat(values))
    return torch.stack(out)


def linformer_both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head) -> torch.Tensor:
    """Softmax over the rows E K_g, F V_g of all groups g; a row's share must begin before the end."""
    key_map, value_map = head.own("key_map"), head.own("value_map")
    count, size = key_map.shape
    keys, values = [], []
    for start in range(0, len(k), size):
        near_k, near_v = k[start : start + size], v[start : start + size]
        for row in range(count):
            if math.ceil(row * size / count) < len(near_k):
                keys.append(key_map[row, : len(near_k)] @ near_k)
                values.append(value_map[row, : len(near_v)] @ near_v)
    weights = (q @ torch.stack(keys).T / math.sqrt(q.shape[1])).softmax(1)
    return weights @ torch.stack(values)


def gla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen) -> torch.Tensor:
    """S_t = diag(a_t) S_{t-1} + φ(k_t) v_tᵀ, o_t = φ(q_t) S_t; φ = softmax.

    a_t = sigmoid(scale · k_t + bias)^(1/16), from keys before rotation.
    """
    gate = head.unrotated * head.own("gate_scale")[head.shared] + head.own("gate_bias")[head.shared]
    return decayed_reference(q.softmax(1), k.softmax(1), v, gate.sigmoid() ** (1 / 16), seen)


def gdn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: Head, seen: Seen) -> torch.Tensor:
    """S_t = a_t S_{t-1} + k̂_t u_tᵀ, u_t = b_t (v_t - a_t S_{t-1}ᵀ k̂_t), o_t = q̂_t S_t.

    a_t and b_t are sigmoids of projections of the key before rotation, a_t to the power 1/16.
    """
    gates = head.unrotated @ head.own("gate_map")[head.shared] + head.own("gate_bias")[head.shared]
    decay, rate = gates[:, 0].sigmoid() ** (1 / 16), gates[:, 1].sigmoid()
    return delta_reference(_unit(q), _unit(k), v, decay, rate, seen)


def _weighted(
    v: torch.Tensor, seen: Seen, weight: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Sum of weight(t, s) v_s over the s that t reads."""
    out = []
    for t in range(len(v)):
        o = torch.zeros_like(v[0])
        for s in seen(t):
            o = o + weight(t, s) * v[s]
        out.append(o)
    return torch.stack(out)


def _two_sided(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.exp() / x.exp().sum(), (-x).exp() / (-x).exp().sum()))


def _normalized(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Linear attention with a denominator, on features."""
    out = []
    for t in range(len(q)):
        state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype, device=v.device)
        total = torch.zeros_like(k[0])
        for s in seen(t):
            state, total = state + torch.outer(k[s], v[s]), total + k[s]
        out.append((q[t] @ state) / (q[t] @ total + EPSILON))
    return torch.stack(out)


REFERENCES: dict[str, Form] = {
    "softmax": softmax,
    "window": window,
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "pages": pages,
    "delta": delta,
    "shadow": shadow,
    "tidal": softmax,
    "by-head": by_head,
    "local": local,
    "global": global_,
    "grouped": grouped,
    "aug": grouped,
    "relu": arranged(relu),
    "hedgehog": arranged(hedgehog),
    "performer": arranged(performer),
    "rfa": arranged(rfa),
    "transnormer": arranged(transnormer),
    "yoso": arranged(yoso),
    "linformer": linformer,
    "gla": arranged(gla),
    "gdn": arranged(gdn),
}

# forms for encoders, where they are not the same equation without causality
BIDIRECTIONAL: dict[str, Form] = {"linformer": linformer_both}


def reference(mixer: Mixer, x: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
    """What `mixer` must compute for one sequence x [T, D]; angles [T, K/2] are the rotary ones.

    Raises ConfigError for a mixer that has no entry in `REFERENCES`.
    """
    name, causal = mixer.mixer.name, mixer.config.causal
    forms = REFERENCES if causal else BIDIRECTIONAL
    if name not in forms:
        raise ConfigError(f"mixer {name!r} has no reference; add one to mixers/reference.py")
    heads, repeats = [], mixer.heads // mixer.kv_heads
    for query in range(mixer.heads):
        shared = query // repeats
        group = range(shared * repeats, (shared + 1) * repeats)
        queries = [_project(mixer, x, each, shared)[0] for each in group]
        _, unrotated, v = _project(mixer, x, query, shared)
        k = unrotated
        if angles is not None:
            queries, k = [_turn(each, angles) for each in queries], _turn(k, angles)
        q = queries[query - group[0]]
        head = Head(
            mixer=mixer, query=query, shared=shared, unrotated=unrotated, sharing=tuple(queries)
        )
        o = forms[name](q, k, v, head)
        if mixer.mixer.taps:
            # centred in an encoder: as many taps ahead as behind
            ahead = 0 if causal else mixer.mixer.taps - 1
            later = torch.cat((v, v.new_zeros(ahead, v.shape[1])))
            o = o + convolve_reference(later, mixer.get_parameter("taps")[query])[ahead:]
        heads.append(o)
    return mixer.o(torch.cat(heads, dim=1))


def _project(
    mixer: Mixer, x: torch.Tensor, head: int, shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query of one head, and key and value of the head that it shares with others: [T, K] each."""
    width = mixer.head_width
    q = mixer.q(x)[:, head * width : (head + 1) * width]
    k = mixer.k(x)[:, shared * width : (shared + 1) * width]
    v = mixer.v(x)[:, shared * width : (shared + 1) * width]
    if mixer.config.qk_norm:
        q = _rms_norm(q, mixer.q_norm.weight, mixer.config.norm_eps)
        k = _rms_norm(k, mixer.k_norm.weight, mixer.config.norm_eps)
    return q, k, v


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPSILON)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Feature pair (i, i + K/2) as a complex number, turned by the angle of its position."""
    half = x.shape[1] // 2
    real, imaginary = x[:, :half], x[:, half:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=1)
