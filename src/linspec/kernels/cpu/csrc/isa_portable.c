/* Plain C: the specification of the kernels, and what runs where nothing better fits. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* a * b + c in sixteen lanes with one rounding, as all other sets have it: the same bits everywhere. */
typedef float ls_v16 __attribute__((vector_size(64)));
#if defined(__aarch64__) || defined(__FP_FAST_FMAF)
static inline __attribute__((always_inline)) ls_v16 ls_fma(ls_v16 a, ls_v16 b, ls_v16 c) {
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#else
typedef double ls_d16 __attribute__((vector_size(128)));
typedef int64_t ls_l16 __attribute__((vector_size(128)));
/* Without the instruction: the product is exact in double, and a sum rounded to odd there can be
 * rounded once more (Boldo & Melquiond 2008). */
static inline __attribute__((always_inline)) ls_v16 ls_fma(ls_v16 a, ls_v16 b, ls_v16 c) {
    ls_d16 product = __builtin_convertvector(a, ls_d16) * __builtin_convertvector(b, ls_d16);
    ls_d16 third = __builtin_convertvector(c, ls_d16), sum = product + third;
    ls_d16 part = sum - product, rest = (product - (sum - part)) + (third - part);
    ls_l16 bits, above = rest > 0, below = rest < 0, positive = sum > 0;
    memcpy(&bits, &sum, sizeof bits);
    ls_l16 inexact_and_even = (above | below) & ((bits & 1) - 1);
    /* one unit away from zero or towards it; a mask that holds is -1 */
    bits += inexact_and_even & (1 + 2 * (above ^ positive));
    memcpy(&sum, &bits, sizeof sum);
    return __builtin_convertvector(sum, ls_v16);
}
#endif
#define LS_FMA(a, b, c) ls_fma(a, b, c)
#define LS_FLOAT_ROWS 2
#include "vector.h"
#include "row_ops.inc.h"
#include "block_row_ops.inc.h"
#include "float_tiles.inc.h"

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < LS_TILE; c++) {
            int32_t sum = offsets[r];
            for (int q = 0; q < quads; q++)
                for (int i = 0; i < 4; i++)
                    sum += w[(q * LS_TILE + c) * 4 + i] * x[(q * rows + r) * 4 + i];
            out[r * LS_TILE + c] = (float)sum;
        }
}

INLINE float bf16_at(const uint8_t *scales, int c) {
    uint16_t half;
    memcpy(&half, scales + 2 * c, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static int32_t int4_group(const uint8_t *codes, const int8_t *x, int rows, int c) {
    int32_t sum = 0;
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++) {
            uint8_t both = codes[(q * LS_TILE + c) * 4 + i];
            sum += (both & 15) * x[q * rows * 4 + i] + (both >> 4) * x[(q + 4) * rows * 4 + i];
        }
    return sum;
}

static void int4_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < LS_TILE; c++) {
            float sum = 0.0f;
            for (int g = 0; g < groups; g++) {
                const uint8_t *at = w + (size_t)g * LS_INT4_BYTES;
                int32_t dot = int4_group(at + 64, x + (g * 8 * rows + r) * 4, rows, c);
                /* fused like the vector forms, or the last bit would differ */
                sum = fmaf((float)(dot + offsets[g * rows + r]), bf16_at(at, c), sum);
            }
            out[r * LS_TILE + c] = sum;
        }
}

/* sum + four products of signed codes in each lane */
INLINE vli lanes_dot(vli sum, vli keys, vli q) {
    for (int shift = 24; shift >= 0; shift -= 8) sum += (keys << shift >> 24) * (q << shift >> 24);
    return sum;
}
#define LS_DOT_FLIP 0
#define LS_DOT(sum, keys, q) lanes_dot(sum, keys, q)
#include "mixer.inc.h"

/* what inputs first .. last - 1 of a group give, all products and their sum being exact */
static float block_dot(int format, const uint8_t *codes, const int8_t *x, int rows, int c, int first,
                       int last) {
    int32_t sum = 0;
    for (int k = first; k < last; k++)
        sum += (ls_block_code(format, codes, c, k) - ls_block_offset(format)) *
               x[k / 4 * rows * 4 + k % 4];
    return (float)sum;
}

static void block_tile(int format, const uint8_t *w, const ls_block_rows *x, int groups, int rows,
                       float *out) {
    int parts = format == LS_Q6_K ? 2 : 1, inputs = LS_GROUP / parts;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < LS_TILE; c++) {
            float sum = 0.0f;
            for (int g = 0; g < groups; g++) {
                const uint8_t *header, *group = ls_block_at(format, w, g, &header);
                const uint8_t *codes = group + (ls_block_is_k(format) ? 2 * LS_TILE : 0);
                const float *scales = x->scales + (size_t)g * LS_BLOCK_SCALES * rows + r;
                const int8_t *from = x->codes + ((size_t)g * 8 * rows + r) * 4;
                for (int k = 0; k < LS_GROUP; k += inputs)
                    sum = fmaf(block_dot(format, codes, from, rows, c, k, k + inputs),
                               ls_block_scale(format, header, group, c, k) * scales[0], sum);
                if (ls_block_has_minima(format))
                    sum = fmaf(ls_block_minimum(format, header, group, c), scales[rows], sum);
            }
            out[r * LS_TILE + c] = sum;
        }
}

const ls_ops ls_ops_portable = LS_OPS("portable");
