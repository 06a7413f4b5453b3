/* Mixers over a prompt: the feeds of the step are one sequence, cut into pieces of up to 64 nodes.
 *
 * All pieces stage their rows before one of them reads, so that a piece finds those before it among
 * its committed rows. What closes between them is summed up in `partials`, one set of sums for each piece
 * but the first. A node gets the bits that it would get if the pieces came one by one, unless groups
 * close: their rows are then added up in another order. */
#include <string.h>

#include "step.h"

static size_t sum_floats(const ls_decoder *d) {
    return (size_t)d->kv_heads * (size_t)d->head_width * (size_t)d->head_width;
}

/* A piece has 64 nodes at most, whose partial sums are each thread's own. */
size_t ls_chain_floats(const ls_decoder *d, const ls_batch *b) {
    for (int i = 0; i < d->layers; i++)
        if (d->layer[i].sums) return (size_t)(b->feeds - 1) * sum_floats(d);
    return 0;
}

/* the mixer of a piece, with the sums as they are when its first node comes */
static ls_mixer piece_of(const ls_run *s, const ls_layer *l, int piece) {
    ls_mixer m = ls_mixer_of(s->d, l, s->b->feed + piece);
    if (!m.sums || piece == 0) return m;
    int64_t closed = (m.base / m.group - (m.span - 1)) * m.group;
    m.closed = closed > 0 ? (int32_t)closed : 0;
    m.sums = s->partials + (size_t)(piece - 1) * sum_floats(s->d);
    return m;
}

/* The sums of one kv head, piece by piece. */
static void close_groups(const ls_run *s, const ls_layer *l, int head) {
    size_t size = (size_t)s->d->head_width * (size_t)s->d->head_width;
    for (int piece = 1; piece < s->b->feeds; piece++) {
        ls_mixer before = piece_of(s, l, piece - 1), m = piece_of(s, l, piece);
        float *sums = s->partials + (size_t)(piece - 1) * sum_floats(s->d) + head * size;
        memcpy(sums, before.sums + head * size, size * sizeof *sums);
        ls_current()->fold(&m, head, before.closed, m.closed, sums);
    }
}

/* All that one piece reads in one kv head. */
static void mix_piece(const ls_run *s, const ls_layer *l, int piece, int head) {
    const ls_ops *ops = ls_current();
    ls_mixer m = piece_of(s, l, piece);
    int chunks = ls_mix_chunks(&m);
    int64_t in = (int64_t)(s->d->heads + 2 * s->d->kv_heads) * s->d->head_width;
    int64_t out = (int64_t)s->d->heads * s->d->head_width, first = s->b->feed[piece].first;
    size_t part = ls_mix_partial(&m), floats = ls_up64(part * (size_t)chunks);
    float *partials = ls_scratch(floats * sizeof *partials + ls_mix_scratch(&m));
    const float *q = s->wide + first * in;
    for (int c = 0; c < chunks; c++)
        ops->near(&m, head, c, q, in, partials + c * part, partials + floats);
    ops->gather(&m, head, chunks, q, in, partials, s->mixed + first * out, out, partials + floats);
}

void ls_mix_chain(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int heads = s->d->kv_heads, items = s->b->feeds * heads;
    for (int i = thread; i < items; i += threads) ls_stage(s, l, i / heads, i % heads);
    ls_barrier(threads);
    if (l->sums) {
        for (int head = thread; head < heads; head += threads) close_groups(s, l, head);
        ls_barrier(threads);
    }
    /* in turns: later pieces have more to read */
    for (int i = thread; i < items; i += threads) mix_piece(s, l, i / heads, i % heads);
}
