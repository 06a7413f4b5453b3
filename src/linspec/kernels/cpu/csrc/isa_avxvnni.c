/* AVX2 with the 256-bit dot product of recent client processors. */
#include "kernels.h"
#ifdef LS_HAVE_AVXVNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define LS_DOT_FLIP 0x80808080
#include "fma256.h"
#define LS_REGISTER 32
#include "vector.h"
#include "row_ops.inc.h"
#include "block_row_ops.inc.h"

/* The instruction wants unsigned times signed, which is how codes lie. In assembly, or GCC 12 copies
 * and spills sums. */
INLINE __m256i unsigned_dot(__m256i sum, __m256i codes, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
}
#define DOT unsigned_dot
#define INT8_CODES(bytes) (bytes)
#define INT8_START(offset) (offset)
#define INT8_DOT unsigned_dot
#define INT4_START _mm256_set1_epi32
#define INT4_ADD unsigned_dot
#define INT4_TOTAL(sum, offset) (sum)
#include "avx2_tiles.inc.h"
#include "mixer.inc.h"

#define LS_SIGNED(format) 0
INLINE bf block_dot(int format, const bb *w, int quads, const int8_t *x, int stride,
                    int32_t start) {
    (void)format;
    __m256i sum = _mm256_set1_epi32(start);
    for (int q = 0; q < quads; q++)
        sum = _mm256_dpbusd_avx_epi32(sum, (__m256i)w[q], broadcast4(x + q * stride * 4));
    return (bf)_mm256_cvtepi32_ps(sum);
}
#include "avx2_blocks.inc.h"

const ls_ops ls_ops_avxvnni = LS_OPS("avx2-vnni");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
