/* What sixteen lanes are on 256-bit registers. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* a * b + c with one rounding */
typedef float ls_v16 __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) ls_v16 ls_fma256(ls_v16 a, ls_v16 b, ls_v16 c) {
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof a);
    memcpy(y, &b, sizeof b);
    memcpy(z, &c, sizeof c);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, sizeof c);
    return c;
}
#define LS_FMA(a, b, c) ls_fma256(a, b, c)

/* what eight lanes are, see lanes.h */
#define LS_LANES 8
#define LS_LANES_FMA(a, b, c) ((vl)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define LS_LANES_MAX(a, b) ((vl)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define LS_LANES_MIN(a, b) ((vl)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define LS_LANES_HALF(p) ((vl)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
/* where compilers do badly what they are not told to do */
#define LS_LANES_WORDS(p) ((vli)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define LS_LANES_BYTES(p) ((vli)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define LS_LANES_CODES(p) \
    ((vl)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))
/* DOT is of the including file, which may want codes of keys unsigned; see isa_avx512.c */
#ifndef LS_DOT_FLIP
#define LS_DOT_FLIP 0
#endif
#define LS_DOT(sum, keys, q) ((vli)DOT((__m256i)(sum), (__m256i)(keys), (__m256i)(q)))
