/* A whole decode step in one call: embedding, every block, the final norm and the output layer.
 *
 * All threads run the same code and wait for each other at barriers; between two of them each works on its share of
 * rows, of kv heads or of the tiles of a layer. */
#include <string.h>

#include "step.h"

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t packed_bytes(const ls_decoder *d, int rows) {
    size_t n = ls_packed_bytes(d->head, rows);
    for (int i = 0; i < d->layers; i++) {
        const ls_layer *l = d->layer + i;
        const ls_linear *all[] = {l->qkv, l->out, l->gate_up, l->down};
        for (int k = 0; k < 4; k++) n = larger(n, ls_packed_bytes(all[k], rows));
    }
    return ls_up64(n);
}

static size_t projected_width(const ls_decoder *d) {
    return larger((size_t)(d->heads + 2 * d->kv_heads) * d->head_width, (size_t)2 * d->mlp_width);
}

static size_t row_floats(const ls_decoder *d) {
    return ls_up64(d->width) + ls_up64(projected_width(d)) + ls_up64((size_t)d->heads * d->head_width);
}

ls_mixer ls_mixer_of(const ls_decoder *d, const ls_layer *l, const ls_step_input *in) {
    int64_t slot = (int64_t)in->slot * d->kv_heads, width = d->head_width;
    return (ls_mixer){
        .heads = d->heads, .kv_heads = d->kv_heads, .width = d->head_width,
        .committed = in->committed[l->state], .staged = in->staged, .nodes = in->nodes,
        .window = l->window, .group = l->group, .span = l->span, .squared_relu = l->squared_relu,
        .taps = l->taps, .alpha = l->alpha, .conv_weights = l->conv_weights,
        .row_kind = l->row_kind, .row_bytes = l->row_bytes,
        .key_stride = l->key_stride, .value_stride = l->value_stride,
        .keys = l->keys + slot * l->key_stride,
        .values = l->values + slot * l->value_stride + (int64_t)l->conv_history * l->row_bytes,
        .sums = l->sums ? l->sums + slot * width * width : NULL,
        .ancestors = in->ancestors,
    };
}

/* floats of partial sums of the inputs before `input` */
static size_t partials_before(const ls_decoder *d, const ls_layer *l, const ls_batch *b, int input) {
    size_t floats = 0;
    for (int i = 0; i < input; i++) {
        ls_mixer m = ls_mixer_of(d, l, b->input + i);
        floats += (size_t)m.kv_heads * (size_t)ls_chunk_count(&m) * ls_partial_floats(&m);
    }
    return floats;
}

/* floats of partial sums of the layer that has most */
static size_t partial_floats(const ls_decoder *d, const ls_batch *b) {
    size_t floats = 0;
    if (b->chained) return ls_up64(ls_prompt_floats(d, b));
    for (int i = 0; i < d->layers; i++)
        floats = larger(floats, partials_before(d, d->layer + i, b, b->inputs));
    return ls_up64(floats);
}

/* Bytes of workspace that a step needs. */
LS_API int64_t ls_step_workspace(const ls_decoder *d, const ls_batch *b) {
    int rows = b->rows > b->outputs ? b->rows : b->outputs;
    size_t floats = row_floats(d) * (size_t)rows + partial_floats(d, b);
    return (int64_t)(floats * sizeof(float) + packed_bytes(d, rows));
}

static void embed(const ls_run *s, int first, int last) {
    const ls_decoder *d = s->d;
    for (int row = first; row < last; row++) {
        size_t at = (size_t)s->b->tokens[row] * d->width;
        float *x = s->x + (size_t)row * d->width;
        if (d->embedding_kind == LS_BLOCKS) {
            ls_block_row(d->embedding, d->width, s->b->tokens[row], x);
            continue;
        }
        if (d->embedding_kind == LS_F32) {
            memcpy(x, (const float *)d->embedding + at, (size_t)d->width * sizeof *x);
            continue;
        }
        for (int i = 0; i < d->width; i++) {
            uint32_t bits = (uint32_t)((const uint16_t *)d->embedding)[at + i] << 16;
            memcpy(x + i, &bits, sizeof bits);
        }
    }
}

/* halves are paired as in Llama checkpoints; the sign of the halves is part of `sines` */
static void rotate(float *x, const float *cosines, const float *sines, int width) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] + high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

/* q or k of one node and head, from projection to feature */
static void feature(const ls_run *s, const ls_layer *l, int row, const float *norm, float *x) {
    const ls_decoder *d = s->d;
    const ls_ops *ops = ls_current();
    size_t at = (size_t)s->b->positions[row] * d->head_width;
    if (norm) ops->rms_norm(x, norm, d->eps, d->head_width, x);
    rotate(x, s->b->cosines + at, s->b->sines + at, d->head_width);
    if (l->squared_relu) ops->normalize(x, d->head_width);
}

/* a row of keys or values as the state keeps it */
static void store_row(const ls_mixer *m, const float *x, char *to) {
    if (m->row_kind == LS_F32) {
        memcpy(to, x, (size_t)m->row_bytes);
        return;
    }
    if (m->row_kind != LS_INT8) {
        ls_current()->narrow_row(x, m->width, m->row_kind, (uint16_t *)to);
        return;
    }
    int8_t codes[LS_MAX_HEAD_WIDTH];
    int32_t offset;
    int padded = (m->width + 31) & ~31;
    float scale = ls_current()->quantize_row(x, m->width, padded, 1, 0, codes, &offset);
    memcpy(to, codes, (size_t)m->row_bytes - sizeof scale);
    memcpy(to + m->row_bytes - sizeof scale, &scale, sizeof scale);
}

void ls_stage(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_decoder *d = s->d;
    const ls_step_input *in = s->b->input + input;
    ls_mixer m = ls_mixer_of(d, l, in);
    int width = d->head_width, repeats = d->heads / d->kv_heads;
    size_t stride = (size_t)(d->heads + 2 * d->kv_heads) * width;
    int64_t at = (int64_t)in->slot * d->kv_heads + head;
    int64_t row = (int64_t)(m.committed + in->staged - in->nodes) * l->row_bytes;
    char *keys = l->keys + at * l->key_stride + row;
    char *values = l->values + at * l->value_stride + (int64_t)l->conv_history * l->row_bytes + row;
    for (int n = 0; n < in->nodes; n++) {
        float *line = s->projected + (size_t)(in->first + n) * stride;
        float *k = line + (size_t)(d->heads + head) * width;
        for (int r = 0; r < repeats; r++)
            feature(s, l, in->first + n, l->q_norm, line + (size_t)(head * repeats + r) * width);
        feature(s, l, in->first + n, l->k_norm, k);
        store_row(&m, k, keys + (int64_t)n * l->row_bytes);
        store_row(&m, k + (size_t)d->kv_heads * width, values + (int64_t)n * l->row_bytes);
    }
}

/* One chunk of one kv head of one input. */
static void attend_one_chunk(const ls_run *s, const ls_layer *l, int input, int head, int chunk) {
    const ls_decoder *d = s->d;
    const ls_step_input *in = s->b->input + input;
    ls_mixer m = ls_mixer_of(d, l, in);
    int64_t stride = (int64_t)(d->heads + 2 * d->kv_heads) * d->head_width;
    size_t at = ((size_t)head * (size_t)ls_chunk_count(&m) + (size_t)chunk) * ls_partial_floats(&m);
    ls_current()->attend_chunk(&m, head, chunk, s->projected + in->first * stride, stride,
                               s->partials + partials_before(d, l, s->b, input) + at,
                               ls_scratch(ls_attend_scratch_bytes(&m)));
}

/* All of one kv head of one input, once its chunks are done. */
static void combine(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_decoder *d = s->d;
    const ls_step_input *in = s->b->input + input;
    ls_mixer m = ls_mixer_of(d, l, in);
    int64_t q_stride = (int64_t)(d->heads + 2 * d->kv_heads) * d->head_width;
    int64_t out_stride = (int64_t)d->heads * d->head_width;
    int chunks = ls_chunk_count(&m);
    size_t at = (size_t)head * (size_t)chunks * ls_partial_floats(&m);
    ls_current()->combine(&m, head, chunks, s->projected + in->first * q_stride, q_stride,
                          s->partials + partials_before(d, l, s->b, input) + at,
                          s->attended + in->first * out_stride, out_stride,
                          ls_scratch(ls_attend_scratch_bytes(&m)));
}

static int chunks_of(const ls_run *s, const ls_layer *l, int input) {
    ls_mixer m = ls_mixer_of(s->d, l, s->b->input + input);
    return ls_chunk_count(&m);
}

/* The chunks first .. last - 1 of those of all inputs and heads. */
static void attend_chunks(const ls_run *s, const ls_layer *l, int first, int last) {
    for (int input = 0, begin = 0; input < s->b->inputs; input++) {
        int chunks = chunks_of(s, l, input), end = begin + chunks * s->d->kv_heads;
        for (int i = first > begin ? first : begin; i < last && i < end; i++)
            attend_one_chunk(s, l, input, (i - begin) / chunks, (i - begin) % chunks);
        begin = end;
    }
}

/* Every mixer of a layer; ends without a barrier. */
static void mix_inputs(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int heads = s->d->kv_heads, items = s->b->inputs * heads, pieces = 0;
    int first = ls_share(items, thread, threads), last = ls_share(items, thread + 1, threads);
    for (int input = 0; input < s->b->inputs; input++) pieces += heads * chunks_of(s, l, input);
    for (int i = first; i < last; i++) {
        ls_stage(s, l, i / heads, i % heads);
        if (pieces == items) attend_one_chunk(s, l, i / heads, i % heads, 0);
    }
    if (pieces > items) {
        ls_barrier(threads);
        /* in small pieces: how long a cache is does not matter */
        for (ls_pieces p = ls_pieces_of(pieces, 1, thread, threads); ls_take(&p);)
            attend_chunks(s, l, p.first, p.last);
        ls_barrier(threads);
    }
    for (int i = first; i < last; i++) combine(s, l, i / heads, i % heads);
}

/* Norm (null: none) and pack the rows of this thread for `layer`; returns the packed rows. */
static ls_packed_rows pack_inputs(const ls_run *s, const ls_linear *layer, const float *norm,
                                  const float *x, int rows, int thread, int threads) {
    ls_packed_rows to = ls_packed_at(layer, rows, s->packed);
    int first = ls_share(rows, thread, threads), last = ls_share(rows, thread + 1, threads);
    if (!norm) {
        ls_pack_rows(layer, &to, first, last, x, layer->inputs);
        return to;
    }
    float *line = ls_scratch((size_t)layer->inputs * sizeof(float));
    for (int row = first; row < last; row++) {
        ls_current()->rms_norm(x + (size_t)row * layer->inputs, norm, s->d->eps, layer->inputs, line);
        ls_pack_rows(layer, &to, row, row + 1, line, 0);
    }
    return to;
}

static ls_packed_rows pack_gated(const ls_run *s, const ls_linear *down, int thread, int threads) {
    int width = s->d->mlp_width, rows = s->b->rows;
    ls_packed_rows to = ls_packed_at(down, rows, s->packed);
    float *line = ls_scratch((size_t)width * sizeof(float));
    for (int row = ls_share(rows, thread, threads); row < ls_share(rows, thread + 1, threads);
         row++) {
        const float *gate = s->projected + (size_t)row * 2 * width;
        ls_current()->silu_mul(gate, gate + width, width, line);
        ls_pack_rows(down, &to, row, row + 1, line, 0);
    }
    return to;
}

/* Once all rows are packed: the tiles that this thread takes. Ends with a barrier. */
static void multiply(const ls_linear *layer, const ls_packed_rows *x, float *y, int add, int thread,
                     int threads) {
    ls_barrier(threads);
    ls_multiply_shared(layer, x, y, layer->outputs, add, thread, threads);
    ls_barrier(threads);
}

static void block(const ls_run *s, const ls_layer *l, int thread, int threads) {
    const ls_batch *b = s->b;
    ls_packed_rows x = pack_inputs(s, l->qkv, l->mixer_norm, s->x, b->rows, thread, threads);
    multiply(l->qkv, &x, s->projected, 0, thread, threads);
    b->chained ? ls_mix_prompt(s, l, thread, threads) : mix_inputs(s, l, thread, threads);
    ls_barrier(threads);
    x = pack_inputs(s, l->out, NULL, s->attended, b->rows, thread, threads);
    multiply(l->out, &x, s->x, 1, thread, threads);
    x = pack_inputs(s, l->gate_up, l->mlp_norm, s->x, b->rows, thread, threads);
    multiply(l->gate_up, &x, s->projected, 0, thread, threads);
    x = pack_gated(s, l->down, thread, threads);
    multiply(l->down, &x, s->x, 1, thread, threads);
}

static void step_body(void *context, int thread, int threads) {
    const ls_run *s = context;
    const ls_decoder *d = s->d;
    const ls_batch *b = s->b;
    embed(s, ls_share(b->rows, thread, threads), ls_share(b->rows, thread + 1, threads));
    for (int i = 0; i < d->layers; i++) block(s, d->layer + i, thread, threads);
    int last = ls_share(b->outputs, thread + 1, threads);
    for (int i = ls_share(b->outputs, thread, threads); i < last; i++)
        ls_current()->rms_norm(s->x + (size_t)b->output_rows[i] * d->width, d->final_norm, d->eps,
                               d->width, b->hidden + (size_t)i * d->width);
    ls_packed_rows x = pack_inputs(s, d->head, NULL, b->hidden, b->outputs, thread, threads);
    multiply(d->head, &x, b->logits, 0, thread, threads);
}

/* One step; workspace has `ls_step_workspace` bytes and is 64-byte aligned. */
LS_API void ls_step(const ls_decoder *d, const ls_batch *b, void *workspace, int32_t threads) {
    ls_run s = {.d = d, .b = b, .x = workspace};
    s.projected = s.x + ls_up64(d->width) * (size_t)b->rows;
    s.attended = s.projected + ls_up64(projected_width(d)) * (size_t)b->rows;
    s.partials = s.attended + ls_up64((size_t)d->heads * d->head_width) * (size_t)b->rows;
    s.packed = s.partials + partial_floats(d, b);
    ls_parallel(step_body, &s, threads, LS_SPIN_STEP);
}
