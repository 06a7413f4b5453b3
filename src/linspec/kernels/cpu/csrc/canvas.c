/* Mixers of groups over a canvas, whose nodes overwrite: what they read before and behind them.
 *
 * A node sees the groups within its span to either side row by row, and one sum over all others. Sums cannot be
 * overwritten, so every group of a canvas has one of its own, which lies beside the rows. A step makes those again
 * whose rows have changed, once it asks for them. It adds them up for every group that has nodes: from the first one
 * on, and from the last one back. So what a node gets depends on the rows of its slot and on nothing else. */
#include <string.h>

#include "step.h"

/* The groups of one kv head of a slot: their sums [count][size], and of how many rows each is. line: a row of features. */
typedef struct {
    ls_mixer m;
    float *sums, *line;
    int32_t *rows;
    size_t size;
    int count;
} canvas;

/* Groups first .. last - 1 of `all`. */
typedef struct {
    int first, last, all;
} near_groups;

/* What a node of `group` sees row by row; where it sees no row, all groups are in its sum. */
static near_groups near_of(const ls_mixer *m, int64_t group) {
    int64_t all = (m->committed + m->group - 1) / m->group, first = group - (m->span - 1), last = group + m->span;
    if (m->form && m->form->exact == LS_WEIGHT_NONE) first = last = all;
    return (near_groups){first > 0 ? (int)first : 0, (int)(last < all ? last : all), (int)all};
}

/* ---- where the sums are that nodes of a group read */

size_t ls_far_floats(const ls_decoder *d, const ls_batch *b) {
    int64_t most = 0;
    for (int k = 0; k < d->layers * d->kv_heads; k++) {
        const ls_layer *l = d->layer + k / d->kv_heads;
        const ls_mixer_part *p = l->part + l->part_of[k % d->kv_heads];
        for (int i = 0; p->group_sums && i < b->inputs; i++) {
            int64_t floats = (b->input[i].committed[p->state] + p->group - 1) / p->group * p->sum_floats;
            if (floats > most) most = floats;
        }
    }
    return (size_t)most;
}

/* how many slots have inputs before this one; those of a slot follow each other */
static int slots_before(const ls_batch *b, int input) {
    int slots = 0;
    for (int i = 1; i <= input; i++) slots += b->input[i].slot != b->input[i - 1].slot;
    return slots;
}

size_t ls_canvas_floats(const ls_decoder *d, const ls_batch *b) {
    return (size_t)(slots_before(b, b->inputs - 1) + 1) * (size_t)d->kv_heads * ls_far_floats(d, b);
}

/* of one kv head: [groups][sum_floats] */
static float *far_sums(const ls_run *s, int input, int head) {
    size_t number = (size_t)slots_before(s->b, input) * (size_t)s->d->kv_heads + (size_t)head;
    return s->partials + number * s->far_floats;
}

/* ---- sums */

/* Take note of the rows of a slot that the step has written: those of its own nodes, and those that others have left there. */
static void forget_written(const canvas *c, const ls_batch *b, int slot) {
    for (int i = 0; i < b->inputs; i++) {
        const ls_step_input *in = b->input + i;
        for (int n = 0; n < in->nodes; n++) {
            int written = in->slot == slot;
            for (int k = 0; in->carried && k < in->carried[n]; k++) written |= in->behind[k] == slot;
            if (written) c->rows[in->overwritten[n] / c->m.group] = 0;
        }
    }
}

/* the sum of one group, made again if it is not of the rows that it has now */
static const float *group_sum(const canvas *c, int group) {
    const ls_mixer *m = &c->m;
    float *sums = c->sums + (size_t)group * c->size;
    int first = group * (int)m->group, last = first + (int)m->group;
    if (last > m->committed) last = m->committed;
    if (c->rows[group] == last - first) return sums;
    memset(sums, 0, c->size * sizeof *sums);
    if (m->form)
        ls_current()->fold_summed(m, first, last, sums, c->line);
    else
        ls_current()->fold(m, 0, first, last, sums);
    c->rows[group] = last - first;
    return sums;
}

static void add_to(float *to, const float *more, size_t size) {
    for (size_t i = 0; i < size; i++) to[i] += more[i];
}

/* For every group that is `asked`, the sum of all groups that its nodes do not see row by row; so_far: one sum. */
static void add_up(const canvas *c, const uint8_t *asked, float *so_far, float *far) {
    size_t size = c->size, bytes = size * sizeof *far;
    memset(so_far, 0, bytes);
    for (int group = 0, next = 0; group < c->count; group++) {
        if (!asked[group]) continue;
        for (int first = near_of(&c->m, group).first; next < first; next++) add_to(so_far, group_sum(c, next), size);
        memcpy(far + (size_t)group * size, so_far, bytes);
    }
    memset(so_far, 0, bytes);
    for (int group = c->count - 1, next = c->count - 1; group >= 0; group--) {
        if (!asked[group]) continue;
        for (int last = near_of(&c->m, group).last; next >= last; next--) add_to(so_far, group_sum(c, next), size);
        add_to(far + (size_t)group * size, so_far, size);
    }
}

/* The sums that the nodes of one slot read in a kv head; input: the first one of the slot. */
static void sum_canvas(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_batch *b = s->b;
    const ls_step_input *in = b->input + input;
    const ls_mixer_part *p = l->part + l->part_of[head];
    int64_t at = ((int64_t)in->slot * p->kv_heads + l->place[head]) * p->group_room;
    canvas c = {.m = ls_mixer_of(s->d, l, in, head), .sums = p->group_sums + at * p->sum_floats,
                .rows = p->group_rows + at, .size = (size_t)p->sum_floats};
    size_t features = p->summed ? (size_t)p->summed->features : 0;
    c.count = near_of(&c.m, 0).all;
    float *so_far = ls_scratch((c.size + features) * sizeof *so_far + (size_t)c.count);
    uint8_t *asked = (uint8_t *)(so_far + c.size + features);
    c.line = so_far + c.size;
    memset(asked, 0, (size_t)c.count);
    forget_written(&c, b, in->slot);
    for (int i = input; i < b->inputs && b->input[i].slot == in->slot; i++)
        for (int n = 0; n < b->input[i].nodes; n++) asked[b->input[i].overwritten[n] / p->group] = 1;
    add_up(&c, asked, so_far, far_sums(s, input, head));
}

void ls_sum_canvases(const ls_run *s, const ls_layer *l, int thread, int threads) {
    const ls_batch *b = s->b;
    int heads = s->d->kv_heads, number = 0;
    for (int i = 0; i < b->inputs; i++) {
        if (i && b->input[i].slot == b->input[i - 1].slot) continue;
        for (int head = 0; head < heads; head++)
            if (l->part[l->part_of[head]].group_sums && number++ % threads == thread) sum_canvas(s, l, i, head);
    }
}

/* ---- what nodes read */

/* The nodes of one group: a mixer over the rows of the near groups alone, and the sum of the others. */
static ls_mixer near_mixer(ls_mixer m, int first_node, int nodes, const float *far, int64_t sum_floats) {
    int64_t group = m.overwritten[first_node] / m.group;
    near_groups near = near_of(&m, group);
    int64_t first = near.first * m.group, last = near.last * m.group;
    if (first > m.committed) first = m.committed;
    if (last > m.committed) last = m.committed;
    m.sums = far ? far + group * sum_floats : NULL;
    m.overwritten += first_node;
    m.nodes = nodes;
    m.ahead = (int32_t)first;
    m.behind = (int32_t)(m.committed - last);
    m.committed = (int32_t)(last - first);
    m.keys += first * m.row_bytes;
    m.values += first * m.value_bytes;
    m.group = m.summed = 0;
    return m;
}

void ls_read_canvas(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_step_input *in = s->b->input + input;
    const ls_mixer_part *p = l->part + l->part_of[head];
    ls_mixer all = ls_mixer_of(s->d, l, in, head);
    int64_t q_stride = ls_projected_stride(s->d), out_stride = (int64_t)s->d->heads * s->d->head_width;
    int64_t column = ls_query_column(s->d, head);
    const float *q = s->projected + in->first * q_stride + column, *far = p->group_sums ? far_sums(s, input, head) : NULL;
    float *out = s->attended + in->first * out_stride + column;
    for (int n = 0, last; n < in->nodes; n = last) {
        for (last = n + 1; last < in->nodes; last++)
            if (in->overwritten[last] / p->group != in->overwritten[n] / p->group) break;
        ls_mixer m = near_mixer(all, n, last - n, far, p->sum_floats);
        ls_attend_whole(&m, q + n * q_stride, q_stride, out + n * out_stride, out_stride);
    }
}
