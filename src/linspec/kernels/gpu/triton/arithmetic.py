"""What kernels with equal bits share: how they round, and the product of two tiles, with sums in float32."""

from __future__ import annotations

import triton
import triton.language as tl

# options of a launch: products and sums fused at will would round in two ways in two places
UNFUSED = {"enable_fp_fusion": False}
# as mixers have it: a shorter vector is divided by this
NORM_FLOOR = tl.constexpr(1e-6)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies bfloat16 as if it were whole numbers."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b, both of one dtype. WIDE: they are made float32 first, in which products of bfloat16 are exact."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
