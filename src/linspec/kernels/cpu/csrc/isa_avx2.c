/* AVX2 without dot product instructions. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "fma256.h"
#define LS_FLOAT_ROWS 2
#include "vector.h"
#include "row_ops.inc.h"
#include "float_tiles.inc.h"

/* |w| times x with w's sign: pairs of products stay below 2^15 as all codes are within -127..127 */
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#define DOT dot
#include "avx2_tiles.inc.h"
#include "mixer.inc.h"

const ls_ops ls_ops_avx2 = LS_OPS("avx2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
