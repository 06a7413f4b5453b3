"""Compiles every kernel to machine code, for which Triton needs no GPU.

    python -m tests.kernels.gpu.compiled 80 90

Prints one line of JSON for each kernel and compute capability: the size of its code, and how it multiplies
matrices. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linspec.kernels.gpu.block_forms import FORMS
from linspec.kernels.gpu.triton import attention, blocks, convolution, few_rows, linear, recurrence
from linspec.kernels.gpu.triton.arithmetic import UNFUSED

TYPES = {
    **dict.fromkeys(["q", "keys", "values", "out", "x"], "*bf16"),
    **dict.fromkeys(["slots", "held", "bases", "counts"], "*i64"),
    **dict.fromkeys(["nodes", "depths"], "*i32"),
    **dict.fromkeys(["greatest_to", "total_to", "sums_to", "greatest_of", "total_of"], "*fp32"),
    **dict.fromkeys(["sums_of", "states", "bias"], "*fp32"),
    **dict.fromkeys(["scale", "cap"], "fp32"),
    **dict.fromkeys(["codes", "levels"], "*u8"),
    "halves": "*fp16",
}
HEADS = {"HEADS": 3, "REPEATS": 3, "K": 64, "V": 64, "KP": 64, "STAGED": 64}
TILES = {"VP": 64, "ROWS": 16, "EACH": 5, "KEYS": 64, "TILES": 4, "PART": 256, "WIDE": False}
WHOLE = {**HEADS, **TILES, "CAPPED": False, "WEIGHTS": 0, "UNIT": False}
WHOLE |= {"WINDOW": 0, "GROUP": 0, "SPAN": 1}
NEAR = {**WHOLE, "CAPPED": True, "WEIGHTS": 1, "UNIT": True, "WINDOW": 40, "GROUP": 64, "SPAN": 2}
PLAIN = {**HEADS, "COLUMNS": 32, "GATES": 0, "DELTA": False, "MAP": 1, "GROUP": 64, "SPAN": 2}
DELTA = {**PLAIN, "GATES": 1, "DELTA": True, "GROUP": 0}
CODES = {"ROWS": 16, "TILE": 32, "STEP": 64, "GROUP": 32, "LINE": 576, "PART": 256, "WIDE": False}
# kernel, constants, and types of its own
KERNELS: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (attention._parts, {**WHOLE, "bases": None}, {}),
    (attention._parts, NEAR, {}),
    (attention._parts, {**WHOLE, "WEIGHTS": 2}, {"keys": "*fp16", "values": "*fp16"}),
    (attention._merge, {**WHOLE, "bases": None, "kept": None, "SINKS": 0, "SP": 1}, {}),
    (attention._merge, {**WHOLE, "GROUP": 64, "SINKS": 4, "SP": 4}, {"kept": "*bf16"}),
    (recurrence._read, PLAIN, {}),
    (recurrence._read, {**PLAIN, "GATES": 64, "MAP": 2, "GROUP": 0}, {}),
    (recurrence._read, DELTA, {}),
    (recurrence._fold, DELTA, {"rows": "*i64"}),
    (convolution._convolve, {**HEADS, "RP": 4, "VP": 64}, {"values": "*bf16", "taps": "*fp32"}),
    (linear._int8, {**CODES, "bias": None}, {"scales": "*fp32"}),
    (linear._int4, CODES, {"scales": "*bf16"}),
    (few_rows._join, {"BLOCK": 1024}, {"sums": "*fp32"}),
    *(
        (
            blocks._blocks,
            {**blocks.sizes(form), "ROWS": 16, "PART": 256, "WIDE": False, **levels},
            {},
        )
        for form in FORMS.values()
        for levels in [{} if form.levels else {"levels": None}]
    ),
]


def compiled(kernel: Any, constants: dict[str, Any], own: dict[str, str], capability: int) -> Any:
    """One kernel as machine code for a compute capability."""
    names = kernel.arg_names
    given = {name: value for name, value in constants.items() if name in names}
    types = {name: own.get(name, TYPES.get(name, "i32")) for name in names}
    types.update(dict.fromkeys(given, "constexpr"))
    places = {(names.index(name),): value for name, value in given.items()}
    source = ASTSource(kernel, types, places)
    return build(source, target=GPUTarget("cuda", capability, 32), options=dict(UNFUSED))


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for kernel, constants, own in KERNELS:
            found = compiled(kernel, constants, own, capability)
            # instructions such as mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            products = set(re.findall(r"w?g?mma\S*\.m\d+n\d+k\d+\S*", found.asm["ptx"]))
            line = {
                "kernel": kernel.__name__,
                "capability": capability,
                "bytes": len(found.asm["cubin"]),
                "products": sorted(products),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
