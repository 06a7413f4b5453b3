"""The picture of `benchmarks.long_context`: needles found against the bytes of cache that a step reads.

    python -m benchmarks.long_context_plot results.jsonl --out docs/results/long-context.png

One panel a length. A filled mark stands at the bytes that a step reads, a hollow one at those that are held.
Bytes are counted, not measured: a state of each mixer is filled with so many tokens, a head at a time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_context import WAYS, Way, kept
from linspec.checkpoints.delta import exact_heads
from linspec.checkpoints.hub import load_config
from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import read_exact
from linspec.mixers.paged import PagesOptions
from linspec.mixers.specs import make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.lserve import is_lserve, lserve_options
from linspec.models.sparse import sparse_mixer
from linspec.state.registry import kv_of

Parts = list[tuple[int, MixerConfig]]
# ways whose bytes hang on what is read are left out
_UNCOUNTED = ("delta", "tidal")
_COLOURS = (
    *("#2467d1", "#bc4c00", "#e08a3c", "#7a3300", "#8250df", "#c297ff"),
    *("#57606a", "#9a6700", "#c2185b", "#1a7f37", "#56d364"),
)
_MARKERS = "osD^v"


def parts_of(way: Way) -> Parts:
    """KV heads of the model by the mixer that they have: how many, and which."""
    config = load_config(way.model)
    total = config.layers * config.kv_heads
    plain = MixerConfig() if way.attention is None else None
    if way.attention is not None and is_lserve(way.attention):
        options = lserve_options(way.attention)
        wanted = read_exact(options.exact, config)
        count = wanted if isinstance(wanted, int) else sum(map(len, wanted))
        pages = make_mixer(f"pages:budget={options.budget}")
        return [(count, pages), (total - count, options.streaming)]
    exact = plain or sparse_mixer(str(way.attention))
    others = [mixer for mixer in config.mixers if mixer.name not in ("softmax", "by-head")]
    count = exact_heads(config)
    return [(count, exact)] + ([(total - count, others[0])] if others else [])


@functools.cache
def held_bytes(mixer: MixerConfig, kv: str, length: int, width: int) -> int:
    """Bytes of the state of one KV head behind `length` tokens."""
    config = DecoderConfig(
        vocab_size=2,
        width=width,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=width,
        mlp_width=width,
        max_positions=length,
        mixers=(mixer,),
    )
    model = Decoder(config).eval().to_inference()
    state = model.new_state(1, kv if model.keeps_cache else "float")
    model.step([StepInput(0, [1] * length)], state)
    state.commit(0, range(length))
    return state.bytes(0)


def read_bytes(mixer: MixerConfig, kv: str, length: int, width: int) -> int:
    """Bytes of it that the next token reads: all, but of `pages` their bounds and what is selected."""
    held = held_bytes(mixer, kv, length, width)
    if mixer.name != "pages":
        return held
    row = held_bytes(MixerConfig(), kv, length, width) // length
    rows = mixer.own_options(PagesOptions).budget + mixer.span * mixer.group
    return min(length, rows) * row + held - length * row


def points(rows: dict[tuple[str, int, str], dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """By way: its share of found needles, and megabytes held and read."""
    found = []
    for (name, at, kind), row in rows.items():
        way = WAYS[name]
        if at != length or kind != "quality" or name.startswith(_UNCOUNTED):
            continue
        kv = kv_of("float32" if way.kv == "auto" else way.kv)
        width = load_config(way.model).head_width
        held, read = (
            sum(count * each(mixer, kv, length, width) for count, mixer in parts_of(way)) / 1e6
            for each in (held_bytes, read_bytes)
        )
        share = 100 * row["needles_1"] / row["asked_1"]
        found.append({"way": name, "share": share, "held": held, "read": read})
    return found


def draw(rows: dict[tuple[str, int, str], dict[str, Any]], lengths: Sequence[int]) -> Any:
    """The figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(3.9 * len(lengths) + 2.2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    seen: dict[str, Any] = {}
    for axes, length in zip(panels, lengths, strict=True):
        axes.set_title(f"{length:,} tokens", loc="left", fontsize=11)
        for each in points(rows, length):
            at = list(WAYS).index(each["way"])
            look = {"color": _COLOURS[at % len(_COLOURS)], "marker": _MARKERS[at % len(_MARKERS)]}
            share = each["share"]
            axes.plot([each["read"], each["held"]], [share] * 2, color=look["color"], lw=0.8)
            axes.plot(each["held"], share, mfc="none", ms=7, linestyle="", **look)
            seen[each["way"]] = axes.plot(each["read"], share, ms=7, linestyle="", **look)[0]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB of cache (filled: read by a step, hollow: held)")
        axes.set_ylim(-6, 106)
        axes.margins(x=0.1)
        axes.grid(color="#d8dee4", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("one needle found, %")
    names = [name for name in WAYS if name in seen]
    figure.legend([seen[n] for n in names], names, loc="outside right center", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what benchmarks.long_context wrote")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096])
    options = parser.parse_args()
    draw(kept(options.results), options.lengths).savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
