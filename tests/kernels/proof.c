/* The compiled kernels against plain references, and every instruction set of this processor against
 * plain C, bit for bit. Buffers have exactly the size they need, so that a sanitizer or an emulator sees
 * every step outside. Prints the sets that agree; says what differs and exits with 1 otherwise.
 *
 * cc -Isrc/linspec/kernels/cpu/csrc tests/kernels/proof.c src/linspec/kernels/cpu/csrc/{*}.c -lm -pthread */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

int32_t ls_use_isa(const char *name);
const char *ls_isa_at(int32_t i);
int64_t ls_linear_workspace(const ls_linear *layer, int32_t rows);
void ls_linear_forward(const ls_linear *layer, const float *x, int64_t x_stride, int32_t rows,
                       float *y, int64_t y_stride, void *workspace, int32_t threads);
int64_t ls_step_workspace(const ls_decoder *d, const ls_batch *b, int32_t threads);
void ls_step(const ls_decoder *d, const ls_batch *b, void *workspace, int32_t threads);
int64_t ls_heads_workspace(const ls_heads *h, const ls_guess *g);
int64_t ls_grow_workspace(const ls_decoder *d, const ls_growth *g, int32_t threads);
void ls_grow(const ls_decoder *d, const ls_growth *g, void *workspace, int32_t threads);
void ls_heads_guess(const ls_heads *h, const ls_guess *g, void *workspace, int32_t threads);

/* Codes of integer weights. Those of rows are then the largest there are, with the sign of the row: sums of products
 * are as large as they can become. MIXED: the signs of both change from one input to the next, together. */
enum { RANDOM, LOWEST, HIGHEST, MIXED, STYLES };
#define MOST_ROWS 17

static uint32_t seed;
static int failures;

static uint32_t next(void) {
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

static void *need(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) abort();
    return p;
}

/* in -1..1; of very different sizes, so that every addition rounds */
static float *floats(size_t n) {
    float *p = need(n * sizeof *p);
    for (size_t i = 0; i < n; i++)
        p[i] = ((float)next() / (1 << 23) - 1) * (next() % 5 ? 1.0f : 1e-3f);
    return p;
}

static uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(const void *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static void expect(int same, const char *what, int a, int b, int c, int d) {
    if (same) return;
    if (failures++ < 10)
        printf("%s: %s differs (%d, %d, %d, %d)\n", ls_current()->name, what, a, b, c, d);
}

/* ---- linear layers */

static size_t weight_bytes(int kind, int tiles, int inputs, int padded) {
    switch (kind) {
        case LS_F32: return (size_t)tiles * inputs * LS_TILE * 4;
        case LS_BF16: return (size_t)tiles * inputs * LS_TILE * 2;
        case LS_INT8: return (size_t)tiles * padded * LS_TILE;
        default: return (size_t)tiles * (padded / LS_GROUP) * LS_INT4_BYTES;
    }
}

/* byte i of weights: of an integer kind, where four inputs of a channel are neighbours */
static uint8_t some_code(int style, size_t i) {
    switch (style) {
        case RANDOM: return (uint8_t)next();
        case LOWEST: return 0;
        case HIGHEST: return 255;
        default: return i % 2 ? 255 : 0;
    }
}

static void *some_weights(int kind, int tiles, int inputs, int padded, int style) {
    size_t bytes = weight_bytes(kind, tiles, inputs, padded), count = bytes / (kind == LS_F32 ? 4 : 2);
    if (kind == LS_F32) return floats(count);
    uint8_t *w = need(bytes);
    float *f = floats(count);
    if (kind == LS_BF16)
        for (size_t i = 0; i < count; i++) ((uint16_t *)w)[i] = to_bf16(f[i]);
    for (size_t i = 0; kind >= LS_INT8 && i < bytes; i++) w[i] = some_code(style, i);
    for (size_t i = 0; kind == LS_INT4 && i < bytes; i += LS_INT4_BYTES)
        for (int c = 0; c < LS_TILE; c++) ((uint16_t *)(w + i))[c] = to_bf16(f[i / 32 + c]);
    free(f);
    return w;
}

/* int8 codes of one row of activations and its scale */
static float codes_of(const float *x, int inputs, int padded, int32_t *codes) {
    float most = 0;
    for (int k = 0; k < inputs; k++) most = fmaxf(most, fabsf(x[k]));
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    for (int k = 0; k < padded; k++) codes[k] = k < inputs ? (int32_t)rintf(x[k] * inverse) : 0;
    return most / 127.0f;
}

static int64_t int8_sum(const uint8_t *w, const int32_t *codes, int padded, int channel) {
    int64_t sum = 0;
    for (int k = 0; k < padded; k++)
        sum += (int64_t)codes[k] * (w[(k / 4 * LS_TILE + channel) * 4 + k % 4] - 128);
    return sum;
}

static float int4_sum(const uint8_t *w, const int32_t *codes, int padded, int channel) {
    float sum = 0;
    for (int g = 0; g < padded / LS_GROUP; g++, w += LS_INT4_BYTES, codes += LS_GROUP) {
        int64_t dot = 0;
        for (int k = 0; k < 16; k++) {
            uint8_t both = w[64 + (k / 4 * LS_TILE + channel) * 4 + k % 4];
            dot += (int64_t)codes[k] * ((both & 15) - 8) + (int64_t)codes[k + 16] * ((both >> 4) - 8);
        }
        sum = fmaf((float)dot, from_bf16(w + 2 * channel), sum);
    }
    return sum;
}

static float float_sum(const void *w, const float *x, int inputs, int channel, int half) {
    float sum = 0;
    for (int k = 0; k < inputs; k++) {
        size_t at = (size_t)k * LS_TILE + channel;
        sum = fmaf(half ? from_bf16((const uint16_t *)w + at) : ((const float *)w)[at], x[k], sum);
    }
    return sum;
}

static void reference(const ls_linear *l, const float *x, float *y) {
    int32_t *codes = need(sizeof *codes * (size_t)l->padded);
    float scale = codes_of(x, l->inputs, l->padded, codes);
    size_t tile_bytes = weight_bytes(l->kind, 1, l->inputs, l->padded);
    for (int n = 0; n < l->outputs; n++) {
        const uint8_t *w = (const uint8_t *)l->weights + (size_t)(n / LS_TILE) * tile_bytes;
        int c = n % LS_TILE;
        float sum;
        if (l->kind == LS_INT8)
            sum = (float)int8_sum(w, codes, l->padded, c) * scale * l->scales[n];
        else if (l->kind == LS_INT4)
            sum = int4_sum(w, codes, l->padded, c) * scale;
        else
            sum = float_sum(w, x, l->inputs, c, l->kind == LS_BF16);
        y[n] = sum + l->bias[n];
    }
    free(codes);
}

static void forward(const ls_linear *l, const float *x, int rows, float *y, int threads) {
    size_t space = ((size_t)ls_linear_workspace(l, rows) + 63) / 64 * 64;
    void *workspace = aligned_alloc(64, space);
    ls_linear_forward(l, x, l->inputs, rows, y, l->outputs, workspace, threads);
    free(workspace);
}

/* 1..17 rows of one layer, in one call, against the reference of every row */
static void linear(int kind, int outputs, int inputs, int style) {
    int tiles = (outputs + LS_TILE - 1) / LS_TILE;
    int padded = (inputs + LS_GROUP - 1) / LS_GROUP * LS_GROUP;
    void *weights = some_weights(kind, tiles, inputs, padded, style);
    float *scales = floats((size_t)tiles * LS_TILE), *bias = floats((size_t)outputs);
    float *x = floats((size_t)MOST_ROWS * inputs);
    for (int i = 0; style != RANDOM && i < MOST_ROWS * inputs; i++)
        x[i] = (i / inputs + (style == MIXED) * (i % inputs)) % 2 ? 1 : -1;
    float *expected = need(sizeof(float) * MOST_ROWS * (size_t)outputs);
    ls_linear l = {.kind = kind, .inputs = inputs, .outputs = outputs, .padded = padded,
                   .weights = weights, .scales = kind == LS_INT8 ? scales : NULL, .bias = bias};
    for (int row = 0; row < MOST_ROWS; row++)
        reference(&l, x + (size_t)row * inputs, expected + (size_t)row * outputs);
    for (int rows = 1; rows <= MOST_ROWS; rows++) {
        size_t bytes = sizeof(float) * (size_t)rows * outputs;
        /* of exactly this size, like x: a row too many would be seen */
        float *y = need(bytes), *some = need(sizeof(float) * (size_t)rows * inputs);
        memcpy(some, x, sizeof(float) * (size_t)rows * inputs);
        forward(&l, some, rows, y, 1 + rows % 2);
        expect(memcmp(y, expected, bytes) == 0, "linear layer", kind, outputs, inputs, rows);
        free(y), free(some);
    }
    free(weights), free(scales), free(bias), free(x), free(expected);
}

static void linears(void) {
    const int shapes[][2] = {{1, 1}, {31, 33}, {32, 32}, {45, 70}, {64, 96}, {65, 257}, {33, 611}};
    for (int kind = LS_F32; kind <= LS_INT4; kind++)
        for (int style = RANDOM; style < (kind >= LS_INT8 ? STYLES : LOWEST); style++)
            for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
                linear(kind, shapes[i][0], shapes[i][1], style);
}

/* ---- rows and mixers: what plain C gives, and the same from every other set */

static const ls_ops *plain;

static float *copy(const float *p, size_t n) {
    return memcpy(need(n * sizeof *p), p, n * sizeof *p);
}

static float *normed(const ls_ops *ops, const float *x, const float *weight, int width) {
    float *y = need(sizeof *y * (size_t)width);
    ops->rms_norm(x, weight, 1e-5f, width, y);
    return y;
}

#include "proof_rows.inc.h"

/* sums after rows have closed: as plain C has them, and near those in double */
static void fold(int width, int squared_relu) {
    enum { ROWS = 150, FIRST = 3, LAST = 141, HEAD = 1, KV = 2 };
    size_t size = (size_t)(width * width), row = (size_t)width;
    float *keys = floats(KV * ROWS * row), *values = floats(KV * ROWS * row), *start = floats(size);
    ls_mixer m = {.heads = KV, .kv_heads = KV, .width = width, .squared_relu = squared_relu,
                  .row_bytes = 4 * width, .key_stride = ROWS * 4 * width,
                  .value_stride = ROWS * 4 * width, .keys = (char *)keys, .values = (char *)values};
    float *sums[2];
    for (int i = 0; i < 2; i++) {
        sums[i] = need(size * sizeof(float));
        memcpy(sums[i], start, size * sizeof(float));
        (i ? ls_current() : plain)->fold(&m, HEAD, FIRST, LAST, sums[i]);
    }
    expect(memcmp(sums[0], sums[1], size * sizeof(float)) == 0, "fold", width, squared_relu, 0, 0);
    double *exact = need(size * sizeof(double));
    for (size_t i = 0; i < size; i++) exact[i] = (double)start[i];
    for (int r = FIRST; r < LAST; r++) {
        const float *k = keys + (HEAD * ROWS + r) * row, *v = values + (HEAD * ROWS + r) * row;
        double length = 0.0;
        for (int i = 0; i < width; i++) length += (double)k[i] * (double)k[i];
        double scale = squared_relu ? 1.0 : 1.0 / sqrt(length);
        for (size_t i = 0; i < size; i++) exact[i] += (double)k[i / row] * scale * (double)v[i % row];
    }
    int far = 0;
    for (size_t i = 0; i < size; i++) far += fabs(exact[i] - (double)sums[1][i]) > 1e-4;
    expect(far == 0, "fold in double", width, squared_relu, 0, 0);
    free(keys), free(values), free(start), free(sums[0]), free(sums[1]), free(exact);
}

#include "proof_attention.inc.h"
#include "proof_blocks.inc.h"
#include "proof_evicting.inc.h"
#include "proof_heads.inc.h"
#include "proof_lean.inc.h"
#include "proof_grow.inc.h"
#include "proof_pool.inc.h"
#include "proof_positions.inc.h"
#include "proof_rebuilt.inc.h"
#include "proof_select.inc.h"
#include "proof_shadow.inc.h"
#include "proof_summed.inc.h"
#include "proof_canvas.inc.h"

int main(void) {
    if (!ls_use_isa("portable")) return 1;
    plain = ls_current();
    pieces();
    for (int set = 0; ls_isa_at(set); set++) {
        if (!ls_use_isa(ls_isa_at(set))) return 1;
        seed = 1;
        linears();
        for (int width = 1; width <= 70; width++) rows_of_width(width);
        mixers();
        blocks();
        all_heads();
        all_lean();
        all_growth();
        all_positions();
        all_rebuilt();
        all_selected();
        all_shadows();
        all_summed();
        all_canvases();
        all_evicting();
        if (!failures) printf("%s\n", ls_current()->name);
    }
    return failures != 0;
}
