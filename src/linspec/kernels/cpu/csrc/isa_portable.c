/* Plain C: the specification of the integer kernels, and what runs where nothing better fits. */
#define LS_FMA(a, b, c) ((a) * (b) + (c))
#define LS_FLOAT_ROWS 2
#include <math.h>

#include "vector.h"
#include "rows.inc.h"
#include "floats.inc.h"
#include "mixing.inc.h"

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

const ls_ops ls_ops_portable = LS_OPS("portable");
