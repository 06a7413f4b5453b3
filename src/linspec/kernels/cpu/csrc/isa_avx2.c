/* AVX2 without dot product instructions. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "fma256.h"
#define LS_REGISTER 32
#include "vector.h"
#include "row_ops.inc.h"
#include "block_row_ops.inc.h"

/* Signed codes: |w| times x with w's sign. Unsigned ones would overflow the sum of a pair,
 * 128 times 127 cannot. The sum is in assembly, or GCC 12 copies and spills sums. */
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    pairs = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(pairs));
    return sum;
}
#define DOT dot
INLINE __m256i int4_add(__m256i sum, __m256i codes, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(codes, x);
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
    return sum;
}
INLINE __m256i int4_total(__m256i pairs, int32_t offset) {
    __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_add_epi32(sum, _mm256_set1_epi32(offset));
}
#define INT8_CODES(bytes) _mm256_xor_si256(bytes, _mm256_set1_epi8(-128))
#define INT8_START(offset) ((void)(offset), 0)
#define INT8_DOT dot
#define INT4_START(offset) _mm256_setzero_si256()
#define INT4_ADD int4_add
#define INT4_TOTAL int4_total
#include "avx2_tiles.inc.h"
#include "mixer.inc.h"

/* codes of 8 bits, and those that a table gives */
#define LS_SIGNED(format) (ls_block_offset(format) == 128)

/* Pairs of products of codes without sign are added up in 16 bits, as often as these can hold it:
 * 15 * 127 * 2 * 8, 31 * 127 * 2 * 4 and 63 * 127 * 2 * 2 are below 2^15. */
INLINE bf block_dot(int format, const bb *w, int quads, const int8_t *x, int stride,
                    int32_t start) {
    const __m256i ones = _mm256_set1_epi16(1);
    int bits = ls_block_bits(format), most = bits == 4 ? 8 : bits == 5 ? 4 : 2;
    __m256i sum = _mm256_set1_epi32(start), pairs = _mm256_setzero_si256();
    for (int q = 0; q < quads; q++) {
        __m256i input = broadcast4(x + q * stride * 4);
        if (LS_SIGNED(format)) {
            sum = dot(sum, (__m256i)w[q], input);
            continue;
        }
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)w[q], input));
        if ((q + 1) % most) continue;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
        pairs = _mm256_setzero_si256();
    }
    return (bf)_mm256_cvtepi32_ps(sum);
}
#include "avx2_blocks.inc.h"

const ls_ops ls_ops_avx2 = LS_OPS("avx2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
