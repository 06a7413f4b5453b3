/* Mixers over a prompt: the inputs of the step are one sequence, cut into pieces of up to LS_MAX_NODES. Long
 * runs of nodes that overwrite come in such pieces too, of several slots; nothing closes between those.
 *
 * All pieces stage their rows before one of them reads, so that a piece finds those before it among
 * its committed rows. What closes between them is summed up in `partials`, one set of sums for each piece
 * but the first. A node gets the bits that it would get if the pieces came one by one, unless groups
 * close: their rows are then added up in another order. */
#include <string.h>

#include "step.h"

/* floats of the sums of a kv head in the layer that has most; 0 without any */
static size_t sum_floats(const ls_decoder *d) {
    size_t most = 0;
    for (int i = 0; i < d->layers; i++)
        for (int head = 0; head < d->kv_heads; head++) {
            const ls_mixer_part *p = d->layer[i].part + d->layer[i].part_of[head];
            if (p->sums && !p->sinks && (size_t)p->sum_floats > most) most = (size_t)p->sum_floats;
        }
    return most;
}

/* A piece has LS_MAX_NODES nodes at most, whose partial sums are each thread's own. */
size_t ls_prompt_floats(const ls_decoder *d, const ls_batch *b) {
    if (ls_over_pieces(b)) return ls_canvas_floats(d, b);
    return (size_t)(b->inputs - 1) * (size_t)d->kv_heads * sum_floats(d);
}

/* where the sums of a kv head are kept as they are when the first node of a later piece comes */
static float *sums_before(const ls_run *s, int piece, int head) {
    return s->partials + ((size_t)(piece - 1) * (size_t)s->d->kv_heads + (size_t)head) * sum_floats(s->d);
}

/* rows whose groups have closed ahead of the one at `position` */
static int32_t summed_before(const ls_mixer *m, int32_t position) {
    int64_t summed = (position / m->group - (m->span - 1)) * m->group;
    return summed > 0 ? (int32_t)summed : 0;
}

/* the mixer of a kv head for a piece */
static ls_mixer piece_of(const ls_run *s, const ls_layer *l, int piece, int head) {
    ls_mixer m = ls_mixer_of(s->d, l, s->b->input + piece, head);
    if (m.budget && piece + 1 < s->b->inputs) {
        m.kept_next = sums_before(s, piece + 1, head);
        m.next_summed = summed_before(&m, m.committed + m.nodes);
    }
    if ((!m.sums && !m.kept) || piece == 0) return m;
    m.summed = summed_before(&m, m.committed);
    *(m.budget ? &m.kept : &m.sums) = sums_before(s, piece, head);
    return m;
}

/* The sums of one kv head, piece by piece. */
static void close_groups(const ls_run *s, const ls_layer *l, int head) {
    size_t size = (size_t)l->part[l->part_of[head]].sum_floats;
    for (int piece = 1; piece < s->b->inputs; piece++) {
        ls_mixer before = piece_of(s, l, piece - 1, head), m = piece_of(s, l, piece, head);
        if (!m.sums && !m.kept) return;
        float *sums = sums_before(s, piece, head);
        memcpy(sums, m.budget ? before.kept : before.sums, size * sizeof *sums);
        if (m.budget)
            ls_current()->close_groups(&m, before.summed, m.summed, sums, ls_scratch(ls_close_floats(&m) * sizeof *sums));
        else if (m.form)
            ls_current()->fold_summed(&m, before.summed, m.summed, sums,
                                      ls_scratch((size_t)m.form->features * sizeof *sums));
        else
            ls_current()->fold(&m, 0, before.summed, m.summed, sums);
    }
}

/* All that one piece reads in one kv head. */
static void attend_piece(const ls_run *s, const ls_layer *l, int piece, int head) {
    if (ls_over_pieces(s->b) && l->part[l->part_of[head]].group) {
        ls_read_canvas(s, l, piece, head);
        return;
    }
    ls_mixer m = piece_of(s, l, piece, head);
    ls_place_lists(s, s->b->input + piece, head, &m);
    ls_place_turns(s, l, &m);
    int64_t q_stride = ls_projected_stride(s->d), column = ls_query_column(s->d, head);
    int64_t out_stride = (int64_t)s->d->heads * s->d->head_width, first = s->b->input[piece].first;
    const float *q = s->projected + first * q_stride + column;
    float *out = s->attended + first * out_stride + column;
    ls_attend_whole(&m, q, q_stride, out, out_stride);
}

/* in turns */
static int is_mine(int item, int heads, int thread, int threads) {
    return (item + item / heads) % threads == thread;
}

void ls_mix_prompt(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int heads = s->d->kv_heads, items = s->b->inputs * heads;
    for (int i = 0; i < items; i++)
        if (is_mine(i, heads, thread, threads)) ls_stage(s, l, i / heads, i % heads);
    ls_barrier(threads);
    if (ls_any_selected(s, l)) {
        for (int i = 0; i < items; i++)
            if (is_mine(i, heads, thread, threads)) ls_keep_judge(s, l, i / heads, i % heads);
        ls_barrier(threads);
    }
    if (s->far_floats) {
        ls_sum_canvases(s, l, thread, threads);
        ls_barrier(threads);
    } else if (!ls_over_pieces(s->b) && ls_prompt_floats(s->d, s->b)) {
        for (int head = thread; head < heads; head += threads) close_groups(s, l, head);
        ls_barrier(threads);
    }
    /* the last ones, which have most to read, first */
    for (ls_pieces p = ls_pieces_of(items, 1, thread, threads); ls_take(&p);)
        for (int i = items - p.last; i < items - p.first; i++) attend_piece(s, l, i / heads, i % heads);
}
