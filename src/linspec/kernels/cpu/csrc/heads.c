/* What all Medusa heads guess, in one call: what they see of some sequences, through the
 * blocks of every head and the output layer, to the likeliest tokens.
 *
 * Features lie head by head, [heads][rows][width]: the rows of a head's layers are then side by
 * side, and so are all rows of an output layer that all heads share. Threads wait as in step.c. */
#include <string.h>

#include "kernels.h"

typedef struct {
    const ls_heads *h;
    const ls_guess *g;
    float *seen, *x, *projected; /* what first blocks read; features; what first layers give */
    float *logits;
    char *packed;
} guess;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static int all_rows(const ls_guess *g) { return g->heads * g->rows; }

/* output layers that are asked, and the rows of each */
static int outputs(const ls_heads *h, const ls_guess *g) { return h->shared ? 1 : g->heads; }

static size_t packed_bytes(const ls_heads *h, const ls_guess *g) {
    size_t heads = (size_t)g->heads, layers = (size_t)outputs(h, g);
    size_t n = layers * ls_packed_bytes(h->out[0], all_rows(g) / outputs(h, g));
    n = larger(n, heads * ls_packed_bytes(h->first[0], g->rows));
    return h->back ? larger(n, heads * ls_packed_bytes(h->back[0], g->rows)) : n;
}

/* Bytes of workspace that `ls_heads_guess` needs. */
LS_API int64_t ls_heads_workspace(const ls_heads *h, const ls_guess *g) {
    size_t rows = (size_t)all_rows(g);
    size_t floats = ls_up64(rows * h->seen) + ls_up64(rows * h->width) + ls_up64(rows * h->inner) +
                    ls_up64(rows * h->vocabulary);
    return (int64_t)(floats * sizeof(float) + packed_bytes(h, g));
}

/* y (+)= x W^T of `groups` layers of one shape, each for its own `rows` rows. A thread packs the rows that
 * it last wrote as one of ls_share(groups * rows). */
static void multiply(const guess *s, const ls_linear *const *layers, int groups, int rows,
                     const float *x, float *y, int add, int thread, int threads) {
    const ls_linear *one = layers[0];
    size_t bytes = ls_packed_bytes(one, rows);
    int all = groups * rows, tiles = ls_tile_count(one);
    for (int i = ls_share(all, thread, threads); i < ls_share(all, thread + 1, threads); i++) {
        int group = i / rows, row = i % rows;
        ls_packed_rows to = ls_packed_at(one, rows, s->packed + (size_t)group * bytes);
        ls_pack_rows(one, &to, row, row + 1, x + (size_t)group * rows * one->inputs, one->inputs);
    }
    ls_barrier(threads);
    ls_pieces p = ls_pieces_of(groups * tiles, ls_piece_tiles(one, rows), thread, threads);
    while (ls_take(&p))
        for (int at = p.first, next; at < p.last; at = next) {
            int group = at / tiles, begin = group * tiles;
            next = p.last < begin + tiles ? p.last : begin + tiles;
            ls_packed_rows from = ls_packed_at(one, rows, s->packed + (size_t)group * bytes);
            ls_multiply_tiles(layers[group], &from, at - begin, next - begin,
                              y + (size_t)group * rows * one->outputs, one->outputs, add);
        }
    ls_barrier(threads);
}

/* x += W2 silu(W1 x + b), or x += silu(W1 x + b) */
static void block(const guess *s, int number, int thread, int threads) {
    const ls_heads *h = s->h;
    size_t at = (size_t)number * h->heads, inner = (size_t)h->inner;
    const float *from = number ? s->x : s->seen;
    multiply(s, h->first + at, s->g->heads, s->g->rows, from, s->projected, 0, thread, threads);
    int all = all_rows(s->g), last = ls_share(all, thread + 1, threads);
    for (int i = ls_share(all, thread, threads); i < last; i++) {
        float *line = s->projected + (size_t)i * inner, *x = s->x + (size_t)i * inner;
        ls_current()->activate(LS_SILU, line, NULL, h->inner, line);
        for (size_t k = 0; !h->back && k < inner; k++) x[k] += line[k];
    }
    if (h->back)
        multiply(s, h->back + at, s->g->heads, s->g->rows, s->projected, s->x, 1, thread, threads);
}

/* Indices of the `top` largest of x, largest first, lower ones first among equals. */
void ls_top_k(const float *x, int count, int top, int32_t *to) {
    int have = 0;
    for (int i = 0; i < count; i++) {
        if (have == top && !(x[i] > x[to[top - 1]])) continue;
        int at = have < top ? have++ : top - 1;
        for (; at > 0 && x[i] > x[to[at - 1]]; at--) to[at] = to[at - 1];
        to[at] = i;
    }
}

static void guess_body(void *context, int thread, int threads) {
    const guess *s = context;
    const ls_heads *h = s->h;
    const ls_guess *g = s->g;
    int all = all_rows(g), first = ls_share(all, thread, threads);
    int last = ls_share(all, thread + 1, threads);
    for (int i = first; i < last; i++) {
        const float *line = g->hidden[i % g->rows];
        memcpy(s->seen + (size_t)i * h->seen, line, (size_t)h->seen * sizeof *line);
        memcpy(s->x + (size_t)i * h->width, line, (size_t)h->width * sizeof *line);
    }
    for (int i = 0; i < h->blocks; i++) block(s, i, thread, threads);
    multiply(s, h->out, outputs(h, g), all / outputs(h, g), s->x, s->logits, 0, thread, threads);
    for (int i = first; i < last; i++) {
        int head = i / g->rows, row = i % g->rows;
        ls_top_k(s->logits + (size_t)i * h->vocabulary, h->vocabulary, g->top,
                 g->tokens + ((size_t)row * g->heads + head) * g->top);
    }
}

/* workspace has `ls_heads_workspace` bytes and is 64-byte aligned. */
LS_API void ls_heads_guess(const ls_heads *h, const ls_guess *g, void *workspace, int32_t threads) {
    size_t rows = (size_t)all_rows(g);
    guess s = {.h = h, .g = g, .seen = workspace};
    s.x = s.seen + ls_up64(rows * h->seen);
    s.projected = s.x + ls_up64(rows * h->width);
    s.logits = s.projected + ls_up64(rows * h->inner);
    s.packed = (char *)(s.logits + ls_up64(rows * h->vocabulary));
    ls_parallel(guess_body, &s, threads, LS_SPIN_STEP);
}
