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

/* sixteen codes as floats */
typedef int8_t ls_b16 __attribute__((vector_size(16)));
static inline __attribute__((always_inline)) ls_v16 ls_widen256(ls_b16 codes) {
    __m128i low = (__m128i)codes, high = _mm_srli_si128(low, 8);
    __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))};
    ls_v16 v;
    memcpy(&v, halves, sizeof v);
    return v;
}
#define LS_WIDEN(codes) ls_widen256(codes)
