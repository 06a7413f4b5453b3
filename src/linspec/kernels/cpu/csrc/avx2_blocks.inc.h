/* What tiles of blocks need of 256-bit registers, beside the dot product. */
#define LS_SLICES 1
#define LS_BLOCKS_AHEAD 2048

INLINE bb block_lookup(const uint8_t *levels, bb codes) {
    __m128i table = _mm_loadu_si128((const __m128i *)levels);
    return (bb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
}

INLINE bf block_halves(const uint8_t *p) {
    return (bf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE bf block_bytes(const uint8_t *p) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    return (bf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

INLINE bf block_fma(bf a, bf b, bf c) {
    return (bf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#include "block_tiles.inc.h"
