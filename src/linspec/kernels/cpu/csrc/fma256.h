/* a * b + c in sixteen lanes with one rounding, on 256-bit registers. */
#include <immintrin.h>
#include <string.h>

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
