/* Mixers over a prompt: the inputs of the step are one sequence, cut into pieces of up to LS_MAX_NODES.
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

/* A piece has LS_MAX_NODES nodes at most, whose partial sums are each thread's own. */
size_t ls_prompt_floats(const ls_decoder *d, const ls_batch *b) {
    for (int i = 0; i < d->layers; i++)
        if (d->layer[i].sums) return (size_t)(b->inputs - 1) * sum_floats(d);
    return 0;
}

/* the mixer of a piece, with the sums as they are when its first node comes */
static ls_mixer piece_of(const ls_run *s, const ls_layer *l, int piece) {
    ls_mixer m = ls_mixer_of(s->d, l, s->b->input + piece);
    if (!m.sums || piece == 0) return m;
    int64_t summed = (m.committed / m.group - (m.span - 1)) * m.group;
    m.summed = summed > 0 ? (int32_t)summed : 0;
    m.sums = s->partials + (size_t)(piece - 1) * sum_floats(s->d);
    return m;
}

/* The sums of one kv head, piece by piece. */
static void close_groups(const ls_run *s, const ls_layer *l, int head) {
    size_t size = (size_t)s->d->head_width * (size_t)s->d->head_width;
    for (int piece = 1; piece < s->b->inputs; piece++) {
        ls_mixer before = piece_of(s, l, piece - 1), m = piece_of(s, l, piece);
        float *sums = s->partials + (size_t)(piece - 1) * sum_floats(s->d) + head * size;
        memcpy(sums, before.sums + head * size, size * sizeof *sums);
        ls_current()->fold(&m, head, before.summed, m.summed, sums);
    }
}

/* All that one piece reads in one kv head. */
static void attend_piece(const ls_run *s, const ls_layer *l, int piece, int head) {
    const ls_ops *ops = ls_current();
    ls_mixer m = piece_of(s, l, piece);
    int chunks = ls_chunk_count(&m);
    int64_t q_stride = (int64_t)(s->d->heads + 2 * s->d->kv_heads) * s->d->head_width;
    int64_t out_stride = (int64_t)s->d->heads * s->d->head_width, first = s->b->input[piece].first;
    size_t part = ls_partial_floats(&m), floats = ls_up64(part * (size_t)chunks);
    float *partials = ls_scratch(floats * sizeof *partials + ls_attend_scratch_bytes(&m));
    const float *q = s->projected + first * q_stride;
    for (int c = 0; c < chunks; c++)
        ops->attend_chunk(&m, head, c, q, q_stride, partials + c * part, partials + floats);
    ops->combine(&m, head, chunks, q, q_stride, partials, s->attended + first * out_stride,
                 out_stride, partials + floats);
}

void ls_mix_prompt(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int heads = s->d->kv_heads, items = s->b->inputs * heads;
    for (int i = thread; i < items; i += threads) ls_stage(s, l, i / heads, i % heads);
    ls_barrier(threads);
    if (l->sums) {
        for (int head = thread; head < heads; head += threads) close_groups(s, l, head);
        ls_barrier(threads);
    }
    /* in turns: later pieces have more to read */
    for (int i = thread; i < items; i += threads) attend_piece(s, l, i / heads, i % heads);
}
