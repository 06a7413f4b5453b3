/* LeanAttention: the blocks of all inputs and kv heads are one line of work, cut evenly among the threads.
 *
 * Caches of one step have very different lengths, and there may be fewer of them than threads. So shares of the line
 * end in the middle of an *item*, one kv head of one input, and even of a chunk. A share is handed out in pieces of a
 * chunk at most, so that a thread that is late leaves some of its own to the others. A piece that begins a chunk puts
 * its blocks together as it goes. One that begins inside has to wait for those before it, so it keeps the
 * partial sums of each of its blocks apart. In the end all meet in the order of merge.inc.h, which no cut changes.
 *
 * Where an even share would save less than its two barriers cost, each thread reads whole items: the same sums. */
#include <string.h>

#include "step.h"

#ifndef LS_LONG_SHARE
#define LS_LONG_SHARE 64 /* blocks of a share, beside which barriers do not count */
#endif
#ifndef LS_SAVED_BLOCKS
#define LS_SAVED_BLOCKS 4 /* of the slowest thread, which take longer than the barriers */
#endif
#define APART_BYTES (4 << 20) /* of partial sums that one cut keeps apart at most */
#define APART_BLOCKS (LS_CHUNK_BLOCKS - 1)

/* ---- the line */

LS_API int32_t ls_cut_line(const int32_t *blocks, int32_t items, int32_t threads, int32_t whole, ls_piece *pieces,
                           int32_t *begins) {
    int64_t all = 0, at = 0, end = 0;
    int n = 0, share = -1;
    for (int i = 0; i < items; i++) all += blocks[i];
    for (int item = 0; item < items; item++)
        for (int first = 0, count; first < blocks[item]; first += count, at += count) {
            while (at >= end && share < threads - 1) {
                begins[++share] = n;
                end = all * (share + 1) / threads;
            }
            count = LS_CHUNK_BLOCKS - first % LS_CHUNK_BLOCKS;
            if (count > blocks[item] - first) count = blocks[item] - first;
            if (!whole && count > end - at) count = (int)(end - at);
            pieces[n++] = (ls_piece){item, first, count, 0};
        }
    while (share < threads) begins[++share] = n;
    return n;
}

static int item_blocks(const ls_decoder *d, const ls_batch *b, const ls_layer *l, int item) {
    const ls_step_input *in = b->input + item / d->kv_heads;
    const ls_mixer_part *p = l->part + l->part_of[item % d->kv_heads];
    int64_t rows = (int64_t)in->committed[p->state] + in->staged;
    if (p->summed || p->chosen || p->chunk || (p->positions && !p->selects)) return 1; /* see ls_reads_whole */
    if (p->budget && ls_closing_groups(rows, p->group, p->span)) return 1; /* and groups that close */
    return ls_kept_blocks(p->budget) + ls_blocks_within(rows, p->window, p->group, p->span);
}

/* floats of the partial sums of an item over whichever rows */
static size_t item_floats(const ls_decoder *d, const ls_batch *b, int item) {
    size_t queries = (size_t)b->input[item / d->kv_heads].nodes * (size_t)(d->heads / d->kv_heads);
    return queries * (size_t)(ls_up16(d->head_width) + 2);
}

ls_line ls_line_of(const ls_decoder *d, const ls_batch *b, int threads) {
    ls_line line = {.items = b->inputs * d->kv_heads, .threads = threads};
    size_t apart = 0;
    for (int i = 0; i < d->layers; i++) {
        size_t floats = 0;
        int chunks = 0;
        for (int k = 0; k < line.items; k++) {
            int some = ls_chunk_count(item_blocks(d, b, d->layer + i, k));
            chunks += some;
            floats += (size_t)some * item_floats(d, b, k);
        }
        if (floats > line.floats) line.floats = floats;
        if (chunks > line.pieces) line.pieces = chunks;
    }
    for (int k = 0; k < line.items; k++)
        if (item_floats(d, b, k) > apart) apart = item_floats(d, b, k);
    apart *= APART_BLOCKS;
    line.whole = apart * sizeof(float) > APART_BYTES;
    line.pieces += threads - 1;
    line.all_floats = line.floats + (line.whole ? 0 : apart * (size_t)(threads - 1));
    return line;
}

size_t ls_line_bytes(const ls_line *line) {
    size_t numbers = (size_t)(2 * line->items + line->threads + 2);
    return ls_up64((size_t)line->pieces * sizeof *line->piece) + ls_up64(numbers * sizeof *line->blocks);
}

void ls_place_line(ls_line *line, void *memory) {
    line->piece = memory;
    line->blocks = (int32_t *)((char *)memory + ls_up64((size_t)line->pieces * sizeof *line->piece));
    line->first_piece = line->blocks + line->items;
    line->begins = line->first_piece + line->items + 1;
}

/* Cut the line of a layer, and give every piece a place for its partial sums. */
static void plan_line(const ls_run *s, const ls_layer *l, int threads) {
    const ls_line *line = &s->line;
    size_t whole = 0, apart = line->floats;
    for (int i = 0; i < line->items; i++) line->blocks[i] = item_blocks(s->d, s->b, l, i);
    int n = ls_cut_line(line->blocks, line->items, threads, line->whole, line->piece, line->begins), item = 0;
    for (int i = 0; i < n; i++) {
        ls_piece *p = line->piece + i;
        size_t floats = item_floats(s->d, s->b, p->item), *at = p->first % LS_CHUNK_BLOCKS ? &apart : &whole;
        p->at = (int64_t)*at;
        *at += at == &apart ? floats * (size_t)p->count : floats;
        if (p->first == 0) line->first_piece[item++] = i;
    }
    line->first_piece[item] = n;
}

/* Whether the line saves more than its barriers cost, by the blocks of the thread that has most whole items. */
static int is_worth_it(const ls_run *s, const ls_layer *l, int threads) {
    int items = s->line.items;
    int64_t all = 0, most = 0;
    for (int thread = 0; thread < threads; thread++) {
        int64_t own = 0;
        for (int i = ls_share(items, thread, threads); i < ls_share(items, thread + 1, threads); i++)
            own += item_blocks(s->d, s->b, l, i);
        all += own;
        if (own > most) most = own;
    }
    int64_t even = (all + threads - 1) / threads;
    return threads > 1 && (even >= LS_LONG_SHARE || most - even >= LS_SAVED_BLOCKS);
}

/* ---- items */

/* the mixer of an item, its queries, where its outputs go, and from one node to the next of both */
typedef struct {
    ls_mixer m;
    const float *q;
    float *out;
    int64_t stride, out_stride;
} reader;

static reader reader_of(const ls_run *s, const ls_layer *l, int item) {
    const ls_decoder *d = s->d;
    const ls_step_input *in = s->b->input + item / d->kv_heads;
    int head = item % d->kv_heads;
    int64_t stride = ls_projected_stride(d), out_stride = (int64_t)d->heads * d->head_width;
    int64_t column = ls_query_column(d, head);
    reader r = {ls_mixer_of(d, l, in, head), s->projected + in->first * stride + column,
                s->attended + in->first * out_stride + column, stride, out_stride};
    ls_place_lists(s, in, head, &r.m);
    ls_place_turns(s, l, &r.m);
    return r;
}

/* what later layers read, where they read what this one selects */
static void select_for_later(const ls_mixer *m, const float *q, int64_t q_stride) {
    if (m->selects) ls_current()->select_positions(m, q, q_stride, ls_scratch(ls_positions_scratch_bytes(m)));
}

/* All blocks of an item, chunk by chunk; space: room for two partial sums, then ls_attend_scratch_bytes */
static void attend_chunks(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride, float *space) {
    const ls_ops *ops = ls_current();
    float *sum = space, *chunk = sum + ls_up64(ls_partial_floats(m));
    void *scratch = chunk + ls_up64(ls_partial_floats(m));
    int blocks = ls_block_count(m);
    for (int first = 0; first < blocks; first += LS_CHUNK_BLOCKS) {
        int count = blocks - first < LS_CHUNK_BLOCKS ? blocks - first : LS_CHUNK_BLOCKS;
        ops->attend(m, 0, first, count, 0, q, q_stride, first ? chunk : sum, scratch);
        if (first) ops->merge(m, sum, chunk);
    }
    ops->end_attention(m, 0, q, q_stride, sum, out, out_stride, scratch);
    select_for_later(m, q, q_stride);
}

/* how many groups evict rows on the way to a node */
static int closing_groups(const ls_mixer *m) {
    return m->budget ? ls_closing_groups((int64_t)m->committed + m->staged - m->summed, m->group, m->span) : 0;
}

/* Nodes side by side that close the same groups read together: as if no others were behind them. */
static void attend_closing(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride) {
    size_t floats = ls_up64(ls_partial_floats(m)), closing = (size_t)closing_groups(m);
    size_t attending = ls_up64(2 * floats * sizeof *out + ls_attend_scratch_bytes(m)), kept = closing * ls_kept_floats(m);
    size_t paths = closing * (size_t)m->group;
    char *space = ls_scratch(attending + (kept + ls_close_floats(m) + paths) * sizeof *out);
    ls_closings c = {.kept = (float *)(space + attending)};
    c.scratch = c.kept + kept;
    c.paths = (int32_t *)(c.scratch + ls_close_floats(m));
    memset(c.paths, -1, paths * sizeof *c.paths);
    for (int n = 0, last; n < m->nodes; n = last) {
        ls_mixer some = *m;
        some.kept = ls_current()->close_on_path(m, n, &last, &c);
        some.staged = m->staged - (m->nodes - last);
        some.nodes = last - n;
        attend_chunks(&some, q + n * q_stride, q_stride, out + n * out_stride, out_stride, (float *)space);
    }
}

void ls_attend_whole(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride) {
    const ls_ops *ops = ls_current();
    if (m->form) {
        ops->read_summed(m, q, q_stride, out, out_stride, ls_scratch(ls_summed_scratch_bytes(m)));
        return;
    }
    size_t floats = ls_up64(ls_partial_floats(m));
    if (closing_groups(m)) {
        attend_closing(m, q, q_stride, out, out_stride);
        return;
    }
    if (m->chosen) {
        float *sum = ls_scratch(2 * floats * sizeof *sum + ls_select_scratch_bytes(m)), *rest = sum + 2 * floats;
        ops->attend_selected(m, q, q_stride, sum, sum + floats, rest);
        ops->end_attention(m, 0, q, q_stride, sum, out, out_stride, rest);
        return;
    }
    if (ls_reads_lists(m)) {
        float *sum = ls_scratch(floats * sizeof *sum + ls_positions_scratch_bytes(m));
        ops->attend_listed(m, q, q_stride, sum, sum + floats);
        ops->end_attention(m, 0, q, q_stride, sum, out, out_stride, sum + floats);
        return;
    }
    if (m->chunk) {
        float *sum = ls_scratch(floats * sizeof *sum + ls_shadow_scratch_bytes(m));
        ops->attend_shadow(m, q, q_stride, sum, sum + floats);
        ops->end_attention(m, 0, q, q_stride, sum, out, out_stride, sum + floats);
        return;
    }
    attend_chunks(m, q, q_stride, out, out_stride, ls_scratch(2 * floats * sizeof *out + ls_attend_scratch_bytes(m)));
}

/* whether an item is read as a whole, see item_blocks */
static int is_whole(const ls_mixer *m) { return ls_reads_whole(m) || closing_groups(m); }

static void attend_piece(const ls_run *s, const ls_layer *l, const ls_piece *p) {
    reader r = reader_of(s, l, p->item);
    if (is_whole(&r.m))
        ls_attend_whole(&r.m, r.q, r.stride, r.out, r.out_stride);
    else
        ls_current()->attend(&r.m, 0, p->first, p->count, p->first % LS_CHUNK_BLOCKS != 0, r.q, r.stride,
                             s->partials + p->at, ls_scratch(ls_attend_scratch_bytes(&r.m)));
}

/* One item, once all pieces are done. */
static void meet(const ls_run *s, const ls_layer *l, int item) {
    reader r = reader_of(s, l, item);
    if (is_whole(&r.m)) return;
    const ls_ops *ops = ls_current();
    const ls_piece *p = s->line.piece + s->line.first_piece[item], *end = s->line.piece + s->line.first_piece[item + 1];
    size_t floats = ls_partial_floats(&r.m);
    float *sum = s->partials + p->at, *chunk = sum;
    for (p++; p < end; p++) {
        float *more = s->partials + p->at;
        if (p->first % LS_CHUNK_BLOCKS == 0) {
            if (chunk != sum) ops->merge(&r.m, sum, chunk);
            chunk = more;
            continue;
        }
        for (int i = 0; i < p->count; i++) ops->merge(&r.m, chunk, more + (size_t)i * floats);
    }
    if (chunk != sum) ops->merge(&r.m, sum, chunk);
    ops->end_attention(&r.m, 0, r.q, r.stride, sum, r.out, r.out_stride, ls_scratch(ls_attend_scratch_bytes(&r.m)));
    select_for_later(&r.m, r.q, r.stride);
}

void ls_mix_inputs(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int heads = s->d->kv_heads, items = s->line.items, along_line = is_worth_it(s, l, threads);
    int first = ls_share(items, thread, threads), last = ls_share(items, thread + 1, threads);
    for (int i = first; i < last; i++) {
        ls_stage(s, l, i / heads, i % heads);
        ls_keep_judge(s, l, i / heads, i % heads);
    }
    if (along_line) {
        if (thread == 0) plan_line(s, l, threads);
        ls_barrier(threads);
        for (ls_pieces p = ls_pieces_from(s->line.begins, 1, thread, threads); ls_take(&p);)
            attend_piece(s, l, s->line.piece + p.first);
        ls_barrier(threads);
    }
    for (int i = first; i < last; i++) {
        if (along_line) {
            meet(s, l, i);
            continue;
        }
        reader r = reader_of(s, l, i);
        ls_attend_whole(&r.m, r.q, r.stride, r.out, r.out_stride);
    }
}
