/* Tiles for AVX2, with or without VNNI. An *octet* is eight neighbouring channels of a tile, whose
 * weights for four inputs fill a register. Sixteen registers hold eight sums: two rows of a whole
 * tile, four rows of half of it, or eight rows of an octet. So a tile is read in panels that stay in the
 * first cache while every part of the rows and of the channels takes its turn.
 *
 * The including file defines, for the codes of an octet:
 * INT8_CODES   what is made of its bytes once for all rows
 * INT8_START   the sum to begin with, from what unsigned codes add too much, negated
 * INT8_DOT     sum + four products of each channel
 * INT4_ADD     sum of pairs or fours + products of codes 0..15; up to eight of them
 * INT4_START, INT4_TOTAL   the same for a group: the first sum, and its product as integers */
#define EACH_OF(n, i) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define PANEL_BYTES 8192 /* of weights, as much again of the next, and the rows: half of a first cache */

/* constants, so that the sums stay in registers */
#define BY_ROWS(form, ...)                           \
    switch (rows) {                                  \
        case 1: form(__VA_ARGS__, 1); break;         \
        case 2: form(__VA_ARGS__, 2); break;         \
        case 3: form(__VA_ARGS__, 3); break;         \
        case 4: form(__VA_ARGS__, 4); break;         \
        case 5: form(__VA_ARGS__, 5); break;         \
        case 6: form(__VA_ARGS__, 6); break;         \
        case 7: form(__VA_ARGS__, 7); break;         \
        case 8: form(__VA_ARGS__, 8); break;         \
    }

INLINE __m256i load32(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

INLINE __m256i broadcast4(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm256_set1_epi32(bits);
}

/* ---- int8 */

/* `octets` octets of `rows` rows over a panel; sums [rows of block][32] as integers */
INLINE void int8_part(const uint8_t *w, const int8_t *x, int quads, int stride, int rows, int octets,
                      const uint8_t *ahead, int step, int32_t *sums) {
    __m256i s[8][4];
    EACH_OF(rows, r)
        EACH_OF(octets, o) s[r][o] = load32(sums + r * LS_TILE + 8 * o);
    for (int q = 0; q < quads; q++, w += 128, x += 4 * stride, ahead += step) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
        if (step > 64) _mm_prefetch((const char *)ahead + 64, _MM_HINT_T0);
        EACH_OF(octets, o) {
            __m256i codes = INT8_CODES(load32(w + 32 * o));
            EACH_OF(rows, r) s[r][o] = INT8_DOT(s[r][o], codes, broadcast4(x + 4 * r));
        }
    }
    EACH_OF(rows, r)
        EACH_OF(octets, o) _mm256_storeu_si256((__m256i *)(sums + r * LS_TILE + 8 * o), s[r][o]);
}

/* all of a panel: the parts share its prefetches */
INLINE void int8_panel(const uint8_t *w, const int8_t *x, int quads, int32_t *sums, int rows) {
    const int octets = rows < 3 ? 4 : rows < 5 ? 2 : 1, parts = 4 / octets, step = 128 / parts;
    for (int i = 0; i < parts; i++)
        int8_part(w + 32 * octets * i, x, quads, rows, rows, octets,
                  w + PANEL_BYTES + (size_t)i * quads * step, step, sums + 8 * octets * i);
}

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out) {
    int32_t *sums = (int32_t *)out;
    for (int i = 0; i < rows * LS_TILE; i++) sums[i] = INT8_START(offsets[i / LS_TILE]);
    for (int done = 0, n; done < quads; done += n, w += 128 * n, x += (size_t)n * 4 * rows) {
        n = quads - done < PANEL_BYTES / 128 ? quads - done : PANEL_BYTES / 128;
        BY_ROWS(int8_panel, w, x, n, sums)
    }
    for (int i = 0; i < rows * LS_TILE; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtepi32_ps(load32(sums + i)));
}

/* ---- int4 */

INLINE __m256 scales_at(const uint8_t *p) {
    __m128i half = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Two octets of `rows` rows of one group: sums += scale * (codes . x). Codes stay as they are: eight
 * pairs of products of codes up to 15 stay below 2^15, a ninth would not. */
INLINE void int4_part(const uint8_t *w, const uint8_t *scales, const int8_t *x,
                      const int32_t *offsets, int stride, int rows, float *sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i s[4][2];
    EACH_OF(rows, r) s[r][0] = s[r][1] = INT4_START(offsets[r]);
    EACH_OF(4, q) {
        EACH_OF(2, o) {
            __m256i both = load32(w + 128 * q + 32 * o);
            __m256i low = _mm256_and_si256(both, nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
            EACH_OF(rows, r) {
                s[r][o] = INT4_ADD(s[r][o], low, broadcast4(x + (q * stride + r) * 4));
                s[r][o] = INT4_ADD(s[r][o], high, broadcast4(x + ((q + 4) * stride + r) * 4));
            }
        }
    }
    EACH_OF(2, o) {
        __m256 scale = scales_at(scales + 16 * o);
        EACH_OF(rows, r) {
            float *at = sums + r * LS_TILE + 8 * o;
            __m256 dot = _mm256_cvtepi32_ps(INT4_TOTAL(s[r][o], offsets[r]));
            _mm256_storeu_ps(at, _mm256_fmadd_ps(dot, scale, _mm256_loadu_ps(at)));
        }
    }
}

INLINE void int4_rows(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      float *out, int rows) {
    for (int i = 0; i < rows * LS_TILE; i++) out[i] = 0.0f;
    for (int g = 0; g < groups; g++, w += LS_INT4_BYTES, x += 32 * rows, offsets += rows) {
        for (int line = 0; line < LS_INT4_BYTES; line += 64)
            _mm_prefetch((const char *)w + PANEL_BYTES + line, _MM_HINT_T0);
        for (int o = 0; o < 4; o += 2) {
            const uint8_t *codes = w + 64 + 32 * o, *scales = w + 16 * o;
            float *to = out + 8 * o;
            int4_part(codes, scales, x, offsets, rows, rows < 4 ? rows : 4, to);
            if (rows > 4)
                int4_part(codes, scales, x + 16, offsets + 4, rows, rows - 4, to + 4 * LS_TILE);
        }
    }
}

static void int4_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    BY_ROWS(int4_rows, w, x, offsets, groups, out)
}

#include "avx2_floats.inc.h"
