/* AVX-512 with VNNI: one instruction multiplies 64 codes by 64 codes. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#include <immintrin.h>

#define LS_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LS_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define LS_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define LS_FLOAT_ROWS 8
#define LS_LANES 16
#define LS_QUERIES 4
#define LS_LANES_FMA(a, b, c) LS_FMA(a, b, c)
#define LS_LANES_MAX(a, b) ((vl)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define LS_LANES_MIN(a, b) ((vl)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define LS_LANES_WORDS(p) ((vli)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define LS_LANES_BYTES(p) ((vli)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define LS_LANES_CODES(p) \
    ((vl)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))))
#define LS_LANES_HALF(p) ((vl)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define LS_REGISTER 64
#include "vector.h"
#include "row_ops.inc.h"
#include "block_row_ops.inc.h"
#include "float_tiles.inc.h"

/* Unrolled before registers are given out, or the sums would live in memory. */
#define EACH_OF(n) _Pragma("GCC unroll 8") for (int r = 0; r < (n); r++)
#define EACH_ROW EACH_OF(rows)
#define EACH_QUAD _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++)

/* Lines are prefetched this many bytes ahead. While eight rows use a line few others
 * are read, so the distance, not the number of loads in flight, has to cover the memory's latency. */
#define AHEAD 8192

INLINE __m512i broadcast4(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm512_set1_epi32(bits);
}

/* sum + four products per lane. In assembly: around the intrinsic GCC 12 copies every sum twice. */
INLINE __m512i dot(__m512i sum, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

INLINE void int8_rows(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads, int rows,
                      float *out) {
    __m512i low[LS_ROWS], high[LS_ROWS];
    EACH_ROW low[r] = high[r] = _mm512_set1_epi32(offsets[r]);
    for (int q = 0; q < quads; q++, w += 128, x += 4 * rows) {
        _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
        EACH_ROW {
            __m512i input = broadcast4(x + 4 * r);
            low[r] = dot(low[r], w0, input);
            high[r] = dot(high[r], w1, input);
        }
    }
    EACH_ROW {
        _mm512_storeu_ps(out + r * LS_TILE, _mm512_cvtepi32_ps(low[r]));
        _mm512_storeu_ps(out + r * LS_TILE + 16, _mm512_cvtepi32_ps(high[r]));
    }
}

INLINE __m512 scales_at(const uint8_t *p) {
    __m256i half = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* All channels of a group for rows first .. first + part - 1: sums += scale * (codes . x). Four rows at
 * once, so that every input that was spread serves both halves and everything stays in registers. */
INLINE void int4_part(const uint8_t *w, const int8_t *x, const int32_t *offsets, int rows, int first,
                      int part, __m512 *low, __m512 *high) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i dots[4][2];
    EACH_OF(part) dots[r][0] = dots[r][1] = _mm512_set1_epi32(offsets[first + r]);
    EACH_QUAD {
        __m512i a = _mm512_loadu_si512(w + 64 + q * 128), b = _mm512_loadu_si512(w + 128 + q * 128);
        __m512i a0 = _mm512_and_si512(a, nibble), b0 = _mm512_and_si512(b, nibble);
        __m512i a1 = _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble);
        __m512i b1 = _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble);
        EACH_OF(part) {
            __m512i input = broadcast4(x + (q * rows + first + r) * 4);
            dots[r][0] = dot(dots[r][0], a0, input);
            dots[r][1] = dot(dots[r][1], b0, input);
        }
        EACH_OF(part) {
            __m512i input = broadcast4(x + ((q + 4) * rows + first + r) * 4);
            dots[r][0] = dot(dots[r][0], a1, input);
            dots[r][1] = dot(dots[r][1], b1, input);
        }
    }
    __m512 s0 = scales_at(w), s1 = scales_at(w + 32);
    EACH_OF(part) {
        low[first + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][0]), s0, low[first + r]);
        high[first + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][1]), s1, high[first + r]);
    }
}

INLINE void int4_rows(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    __m512 low[LS_ROWS], high[LS_ROWS];
    EACH_ROW low[r] = high[r] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, w += LS_INT4_BYTES, x += 32 * rows, offsets += rows) {
        for (int line = 0; line < LS_INT4_BYTES; line += 64)
            _mm_prefetch((const char *)w + AHEAD + line, _MM_HINT_T0);
        int4_part(w, x, offsets, rows, 0, rows < 4 ? rows : 4, low, high);
        if (rows > 4) int4_part(w, x, offsets, rows, 4, rows - 4, low, high);
    }
    EACH_ROW {
        _mm512_storeu_ps(out + r * LS_TILE, low[r]);
        _mm512_storeu_ps(out + r * LS_TILE + 16, high[r]);
    }
}

/* constants, so that the sums stay in registers */
#define BY_ROWS(form, ...)                    \
    switch (rows) {                           \
        case 1: form(__VA_ARGS__, 1, out); break; \
        case 2: form(__VA_ARGS__, 2, out); break; \
        case 3: form(__VA_ARGS__, 3, out); break; \
        case 4: form(__VA_ARGS__, 4, out); break; \
        case 5: form(__VA_ARGS__, 5, out); break; \
        case 6: form(__VA_ARGS__, 6, out); break; \
        case 7: form(__VA_ARGS__, 7, out); break; \
        case 8: form(__VA_ARGS__, 8, out); break; \
    }

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out) {
    BY_ROWS(int8_rows, w, x, offsets, quads)
}

static void int4_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    BY_ROWS(int4_rows, w, x, offsets, groups)
}

/* codes of keys are unsigned */
#define LS_DOT_FLIP 0x80808080
#define LS_DOT(sum, keys, q) ((vli)dot((__m512i)(sum), (__m512i)(keys), (__m512i)(q)))
#include "mixer.inc.h"

#define LS_SLICES 2 /* every input that was spread serves all channels */
#define LS_BLOCKS_AHEAD AHEAD
#define LS_SIGNED(format) 0

INLINE bf block_dot(int format, const bb *w, int quads, const int8_t *x, int stride,
                    int32_t start) {
    (void)format;
    __m512i sum = _mm512_set1_epi32(start);
    for (int q = 0; q < quads; q++) sum = dot(sum, (__m512i)w[q], broadcast4(x + q * stride * 4));
    return (bf)_mm512_cvtepi32_ps(sum);
}

INLINE bb block_lookup(const uint8_t *levels, bb codes) {
    __m128i table = _mm_loadu_si128((const __m128i *)levels);
    return (bb)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
}

INLINE bf block_halves(const uint8_t *p) {
    return (bf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE bf block_bytes(const uint8_t *p) {
    return (bf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

INLINE bf block_fma(bf a, bf b, bf c) {
    return (bf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#include "block_tiles.inc.h"

const ls_ops ls_ops_avx512 = LS_OPS("avx512-vnni");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
