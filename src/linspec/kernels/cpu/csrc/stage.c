/* From the projections of a node to what the state keeps of it, and to what its queries read with. */
#include <string.h>

#include "step.h"

void ls_apply_norm(const ls_norm *n, int64_t at, const float *x, float eps, int width, float *y) {
    const ls_ops *ops = ls_current();
    if (n->centred)
        ops->layer_norm(x, n->weight + at, n->bias ? n->bias + at : NULL, eps, width, y);
    else
        ops->rms_norm(x, n->weight + at, eps, width, y);
}

/* norm of q or k of one node; head: among those of q, or of k */
static void norm_head(const ls_run *s, const ls_layer *l, int head, const ls_norm *norm, float *x) {
    if (norm && !l->whole_norms)
        ls_apply_norm(norm, (int64_t)head * l->norm_stride, x, s->d->eps, s->d->head_width, x);
}

/* q or k of one node, from its norm to its feature */
static void feature(const ls_run *s, const ls_layer *l, const ls_mixer_part *p, int row, float *x) {
    const ls_decoder *d = s->d;
    if (l->rotary >= 0) {
        int turned = d->turned[l->rotary];
        size_t at = (size_t)s->b->positions[row] * turned;
        ls_turn(x, s->b->cosines[l->rotary] + at, s->b->sines[l->rotary] + at, turned);
    }
    if (p->squared_relu) ls_current()->normalize(x, d->head_width);
    if (p->summed && p->summed->mapped) ls_current()->map(p->summed->map, x, d->head_width);
}

/* a row of keys or values as the state keeps it, in `bytes` */
static void store_row(const ls_mixer *m, const float *x, int width, int bytes, char *to) {
    if (m->row_kind == LS_F32) {
        memcpy(to, x, (size_t)bytes);
        return;
    }
    if (m->row_kind == LS_INT4) {
        ls_current()->pack_nibbles(x, width, (uint8_t *)to);
        return;
    }
    if (m->row_kind != LS_INT8) {
        ls_current()->narrow_row(x, width, m->row_kind, (uint16_t *)to);
        return;
    }
    int8_t codes[2 * LS_MAX_HEAD_WIDTH];
    int32_t offset;
    float scale = ls_current()->quantize_row(x, width, (width + 31) & ~31, 1, 0, codes, &offset);
    memcpy(to, codes, (size_t)bytes - sizeof scale);
    memcpy(to + bytes - sizeof scale, &scale, sizeof scale);
}

/* a row of keys that have themselves behind them, ahead of their rotation */
static void store_twice(const ls_mixer *m, const float *k, const float *plain, char *to) {
    float both[2 * LS_MAX_HEAD_WIDTH];
    memcpy(both, k, sizeof *both * (size_t)m->width);
    memcpy(both + m->width, plain, sizeof *both * (size_t)m->width);
    store_row(m, both, 2 * m->width, m->row_bytes, to);
}

/* rows of the state that sums are made of: a key with its gates, a value with its one */
static void store_summed(const ls_mixer *m, const float *k, const float *gates, const float *v, char *key,
                         char *value) {
    size_t bytes = (size_t)m->width * sizeof *k;
    float one = 1.0f;
    memcpy(key, k, bytes);
    memcpy(key + bytes, gates, (size_t)m->form->gates * sizeof *gates);
    memcpy(value, v, bytes);
    if (m->form->ones) memcpy(value + bytes, &one, sizeof one);
}

/* rows of groups that evict: a key with the queries of its token, a value */
static void store_asking(const ls_mixer *m, const float *k, const float *queries, const float *v, char *key, char *value) {
    size_t bytes = (size_t)m->width * sizeof *k;
    memcpy(key, k, bytes);
    memcpy(key + bytes, queries, (size_t)m->heads * bytes);
    memcpy(value, v, bytes);
}

void ls_stage(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_decoder *d = s->d;
    const ls_step_input *in = s->b->input + input;
    const ls_mixer_part *p = l->part + l->part_of[head];
    ls_mixer m = ls_mixer_of(d, l, in, head);
    int width = d->head_width, repeats = d->heads / d->kv_heads;
    int64_t at = (int64_t)in->slot * p->kv_heads + l->place[head];
    char *keys = p->keys + at * p->key_stride;
    char *values = p->values + at * p->value_stride + (int64_t)p->conv_history * p->value_bytes;
    for (int n = 0; n < in->nodes; n++) {
        int64_t row = in->overwritten ? in->overwritten[n] : (int64_t)m.committed + in->staged - in->nodes + n;
        row -= m.paged; /* who overwrites has no pages */
        char *key = keys + row * p->row_bytes, *value = values + row * p->value_bytes;
        float *line = s->projected + (in->first + n) * ls_projected_stride(d), beside[LS_MAX_HEAD_WIDTH + 1];
        float *k = line + (size_t)(d->heads + head) * width, *v = k + (size_t)d->kv_heads * width;
        for (int r = head * repeats; r < (head + 1) * repeats; r++) {
            norm_head(s, l, r, l->q_norm, line + (size_t)r * width);
            feature(s, l, p, in->first + n, line + (size_t)r * width);
        }
        norm_head(s, l, head, l->k_norm, k);
        if (m.form && m.form->gates) ls_current()->gates(&m, k, beside);
        if (m.chunk) memcpy(beside, k, sizeof *k * (size_t)width);
        feature(s, l, p, in->first + n, k);
        if (m.form) {
            store_summed(&m, k, beside, v, key, value);
        } else if (m.budget) {
            store_asking(&m, k, line + (size_t)(head * repeats) * width, v, key, value);
        } else {
            m.chunk ? store_twice(&m, k, beside, key) : store_row(&m, k, width, m.row_bytes, key);
            store_row(&m, v, width, m.value_bytes, value);
        }
        /* branches behind this one that leave the row as it is now */
        for (int b = 0; in->carried && b < in->carried[n]; b++) {
            int64_t ahead = ((int64_t)in->behind[b] - in->slot) * p->kv_heads;
            memcpy(key + ahead * p->key_stride, key, (size_t)p->row_bytes);
            memcpy(value + ahead * p->value_stride, value, (size_t)p->value_bytes);
        }
    }
}
