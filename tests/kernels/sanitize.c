/* Layers and mixers of odd sizes on buffers that have exactly the size they need. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

int32_t ls_use_isa(const char *name);
int64_t ls_linear_workspace(const ls_linear *layer, int32_t rows);
void ls_linear_forward(const ls_linear *layer, const float *x, int64_t x_stride, int32_t rows,
                       float *y, int64_t y_stride, void *workspace, int32_t threads);

static float *floats(size_t n) {
    float *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (float)(i * 7919 % 101) / 50 - 1;
    return p;
}

static void linear(int kind, int outputs, int inputs, int rows) {
    int tiles = (outputs + 31) / 32, padded = (inputs + 31) / 32 * 32;
    size_t bytes[] = {(size_t)tiles * inputs * 128, (size_t)tiles * inputs * 64,
                      (size_t)tiles * padded * 32, (size_t)tiles * (padded / 32) * LS_INT4_BYTES};
    void *weights = calloc(1, bytes[kind]);
    float *scales = floats((size_t)tiles * 32), *bias = floats(outputs);
    float *x = floats((size_t)rows * inputs), *y = floats((size_t)rows * outputs);
    ls_linear layer = {kind, inputs, outputs, padded, weights, kind == LS_INT8 ? scales : NULL, bias};
    size_t space = ((size_t)ls_linear_workspace(&layer, rows) + 63) / 64 * 64;
    void *workspace = aligned_alloc(64, space);
    ls_linear_forward(&layer, x, inputs, rows, y, outputs, workspace, 2);
    free(weights), free(scales), free(bias), free(x), free(y), free(workspace);
}

static void mixer(int width, int squares, int group, int window, int coded) {
    enum { NODES = 5, BASE = 1070, HEADS = 6, KV = 2, TAPS = 3 };
    const uint64_t ancestors[NODES] = {1, 3, 5, 11, 21};
    int64_t rows = BASE + NODES, lead = TAPS - 1;
    int row_bytes = coded ? (width + 3) / 4 * 4 + 4 : 4 * width;
    /* any bytes are codes and finite scales */
    char *keys = (char *)floats((size_t)(KV * rows * row_bytes / 4));
    char *values = (char *)floats((size_t)(KV * (lead + rows) * row_bytes / 4));
    float *sums = floats((size_t)(KV * width * width)), *kernel = floats(HEADS * TAPS);
    float *q = floats((size_t)(NODES * HEADS * width)), *out = floats((size_t)(NODES * HEADS * width));
    ls_mixer m = {.heads = HEADS, .kv_heads = KV, .width = width, .base = BASE, .staged = NODES,
                  .nodes = NODES, .window = window, .group = group, .span = 2, .squares = squares,
                  .taps = TAPS, .alpha = 0.5f, .kernel = kernel, .coded = coded,
                  .row_bytes = row_bytes, .key_stride = rows * row_bytes,
                  .value_stride = (lead + rows) * row_bytes, .keys = keys,
                  .values = values + lead * row_bytes, .sums = group ? sums : NULL,
                  .ancestors = ancestors};
    int chunks = ls_mix_chunks(&m);
    float *partials = malloc(chunks * ls_mix_partial(&m) * sizeof(float));
    void *scratch = malloc(ls_mix_scratch(&m));
    for (int head = 0; head < KV; head++) {
        for (int c = 0; c < chunks; c++)
            ls_current()->near(&m, head, c, q, HEADS * width, partials + c * ls_mix_partial(&m), scratch);
        ls_current()->gather(&m, head, chunks, q, HEADS * width, partials, out, HEADS * width, scratch);
    }
    free(keys), free(values), free(sums), free(kernel), free(q), free(out), free(partials), free(scratch);
}

int main(void) {
    if (!ls_use_isa("portable")) return 1;
    for (int kind = LS_F32; kind <= LS_INT4; kind++)
        for (int rows = 1; rows <= 17; rows += 4) {
            linear(kind, 1, 1, rows);
            linear(kind, 45, 70, rows);
            linear(kind, 64, 96, rows);
        }
    for (int squares = 0; squares < 2; squares++) {
        mixer(24, squares, 16, 0, 0);
        mixer(64, squares, 0, 9, 0);
        mixer(80, squares, 0, 0, 0);
    }
    mixer(22, 0, 0, 0, 1);
    mixer(80, 0, 0, 0, 1);
    mixer(64, 0, 0, 9, 1);
    return 0;
}
