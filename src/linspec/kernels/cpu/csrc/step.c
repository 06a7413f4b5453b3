/* A whole decode step in one call: embedding, every block, the final norm and the output layer.
 *
 * All threads run the same code and wait for each other at barriers; between two of them each works on its share of
 * rows, of kv heads or of the tiles of a layer. */
#include <string.h>

#include "step.h"

#define MANY_ROWS 32 /* a layer of so many takes much longer than asking for threads */

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t packed_bytes(const ls_decoder *d, int rows) {
    size_t n = ls_packed_bytes(d->head, rows);
    for (int i = 0; i < d->layers; i++) {
        const ls_layer *l = d->layer + i;
        const ls_linear *all[] = {l->qkv, l->out, l->up, l->down};
        for (int k = 0; k < 4; k++)
            if (all[k]) n = larger(n, ls_packed_bytes(all[k], rows));
    }
    return ls_up64(n);
}

static size_t projected_width(const ls_decoder *d) {
    size_t mlp = (size_t)(d->gated ? 2 : 1) * (size_t)d->mlp_width;
    return larger((size_t)(d->heads + 2 * d->kv_heads) * d->head_width, mlp);
}

/* outputs of mixers, and of layers that do not end in the residual */
static size_t attended_width(const ls_decoder *d) {
    return larger((size_t)d->heads * d->head_width, (size_t)d->width);
}

static size_t row_floats(const ls_decoder *d) {
    return ls_up64(d->width) + ls_up64(projected_width(d)) + ls_up64(attended_width(d));
}

static const float *rows_of(const float *table, int64_t place, int64_t size) {
    return table ? table + place * size : NULL;
}

ls_mixer ls_mixer_of(const ls_decoder *d, const ls_layer *l, const ls_step_input *in, int head) {
    const ls_mixer_part *p = l->part + l->part_of[head];
    int64_t at = (int64_t)in->slot * p->kv_heads + l->place[head];
    int repeats = d->heads / d->kv_heads;
    const float *sums = p->sums ? p->sums + at * p->sum_floats : NULL;
    const ls_summed *f = p->summed;
    int64_t place = l->place[head], matrix = f && !f->map_shared ? (int64_t)f->map_rows * d->head_width : 0;
    /* the last number says that they have left the rows; a cache without sums lets none go */
    int sinks_left = p->sinks && sums && sums[p->sum_floats - 1] > 0.0f;
    int32_t committed = in->committed[p->state];
    /* what forgets its rows sees none before those of the first new node */
    int64_t unseen = f && !sums ? (committed / p->group - (p->span - 1)) * p->group : 0;
    int32_t paged = p->pages ? p->paged[in->slot] : 0;
    return (ls_mixer){
        .heads = repeats, .kv_heads = 1, .width = d->head_width,
        .committed = committed, .staged = in->staged, .nodes = in->nodes,
        .window = p->window, .group = p->group, .span = p->span, .far_group = p->far_group, .far_span = p->far_span,
        .rebuilt = p->rebuilt, .threshold = p->threshold, .positions = p->positions, .selects = p->selects,
        .squared_relu = p->squared_relu,
        .score_factor = d->score_factor,
        .score_scale = d->score_factor / __builtin_sqrtf((float)d->head_width), .score_cap = d->score_cap,
        .summed = unseen > 0 ? (int32_t)unseen : 0, .taps = l->taps, .alpha = p->alpha,
        .bias = rows_of(p->bias, place * repeats, p->bias_distances), .bias_distances = p->bias_distances,
        .conv_weights = l->taps ? l->conv_weights + (int64_t)head * repeats * l->taps : NULL,
        .row_kind = p->row_kind, .row_bytes = p->row_bytes,
        .keys = p->keys + at * p->key_stride,
        .values = p->values + at * p->value_stride + (int64_t)p->conv_history * p->value_bytes,
        .paged = paged, .pages = paged ? p->pages[in->slot] : NULL,
        .page_keys = p->page_keys + place * LS_PAGE * p->row_bytes,
        .page_values = p->page_values + place * LS_PAGE * p->value_bytes,
        .value_bytes = p->value_bytes, .form = f,
        .query_map = f ? rows_of(f->query_map, place * repeats, matrix) : NULL,
        .key_map = f ? rows_of(f->key_map, place, matrix) : NULL,
        .query_factors = f ? rows_of(f->query_factors, place * repeats, 1) : NULL,
        .gate_map = f ? rows_of(f->gate_map, place, (int64_t)d->head_width * f->gates) : NULL,
        .gate_scale = f ? rows_of(f->gate_scale, place, d->head_width) : NULL,
        .gate_bias = f ? rows_of(f->gate_bias, place, f->gates) : NULL,
        .sums = p->sinks || p->budget ? NULL : sums, .sinks = p->sinks, .sink_rows = sinks_left ? (const char *)sums : NULL,
        .ancestors = in->ancestors, .overwritten = in->overwritten, .chosen = p->chosen, .coded = p->coded,
        .judge = p->chosen ? p->judge + at * p->judge_stride : NULL,
        .rank = p->rank, .chunk = p->chunk, .outliers = p->outliers, .marked = p->marked, .left_bytes = p->left_bytes,
        .past_heads = p->kv_heads, .past_head = l->place[head], .past = p->chunk ? p->past + 2 * (int64_t)in->slot : NULL,
        .budget = p->budget, .asked = p->asked, .pool = p->pool, .kept = p->budget ? sums : NULL,
    };
}

/* numbers of all lists of positions */
static size_t list_room(const ls_decoder *d, const ls_batch *b) {
    return ls_up64((size_t)b->rows * (size_t)d->kv_heads * (size_t)ls_list_numbers(d, b));
}

/* floats that mixers have for themselves */
static size_t mixer_floats(const ls_decoder *d, const ls_batch *b, const ls_line *line) {
    return ls_up64(b->chained ? ls_prompt_floats(d, b) : line->all_floats);
}

/* Bytes of workspace that a step needs. */
LS_API int64_t ls_step_workspace(const ls_decoder *d, const ls_batch *b, int32_t threads) {
    int rows = b->rows > b->outputs ? b->rows : b->outputs;
    ls_line line = ls_line_of(d, b, threads);
    size_t floats = row_floats(d) * (size_t)rows + mixer_floats(d, b, &line) + list_room(d, b);
    return (int64_t)(floats * sizeof(float) + ls_line_bytes(&line) + packed_bytes(d, rows));
}

/* the embedding of one token */
static void embed_row(const ls_decoder *d, int32_t token, float *x) {
    size_t at = (size_t)token * d->width;
    if (d->embedding_kind == LS_BLOCKS) {
        ls_block_row(d->embedding, d->width, token, x);
        return;
    }
    if (d->embedding_kind == LS_F32) {
        memcpy(x, (const float *)d->embedding + at, (size_t)d->width * sizeof *x);
        return;
    }
    for (int i = 0; i < d->width; i++) {
        uint32_t bits = (uint32_t)((const uint16_t *)d->embedding)[at + i] << 16;
        memcpy(x + i, &bits, sizeof bits);
    }
}

static void embed(const ls_run *s, int first, int last) {
    const ls_decoder *d = s->d;
    for (int row = first; row < last; row++) {
        float *x = s->x + (size_t)row * d->width;
        const float *given = s->b->given ? s->b->given[row] : NULL;
        if (given) memcpy(x, given, (size_t)d->width * sizeof *x);
        else embed_row(d, s->b->tokens[row], x);
        for (int i = 0; d->embedding_scale != 1.0f && i < d->width; i++) x[i] *= d->embedding_scale;
        if (!d->position_rows) continue;
        const float *place = d->position_rows + (size_t)s->b->positions[row] * d->width;
        for (int i = 0; i < d->width; i++) x[i] += place[i];
    }
}

ls_packed_rows ls_pack_inputs(const ls_run *s, const ls_linear *layer, const ls_norm *norm, const float *x,
                              int rows, int thread, int threads) {
    ls_packed_rows to = ls_packed_at(layer, rows, s->packed);
    int first = ls_share(rows, thread, threads), last = ls_share(rows, thread + 1, threads);
    if (!norm) {
        ls_pack_rows(layer, &to, first, last, x, layer->inputs);
        return to;
    }
    float *line = ls_scratch((size_t)layer->inputs * sizeof(float));
    for (int row = first; row < last; row++) {
        ls_apply_norm(norm, 0, x + (size_t)row * layer->inputs, s->d->eps, layer->inputs, line);
        ls_pack_rows(layer, &to, row, row + 1, line, 0);
    }
    return to;
}

/* What the first layer of a mixer reads; where tokens have a norm, each row is the embedding of its token and
 * then the state that was given for it. */
static ls_packed_rows pack_mixer_inputs(const ls_run *s, const ls_layer *l, int thread, int threads) {
    const ls_decoder *d = s->d;
    int rows = s->b->rows, width = d->width;
    if (!d->token_norm) return ls_pack_inputs(s, l->qkv, l->mixer_norm, s->x, rows, thread, threads);
    ls_packed_rows to = ls_packed_at(l->qkv, rows, s->packed);
    float *line = ls_scratch((size_t)l->qkv->inputs * sizeof(float));
    for (int row = ls_share(rows, thread, threads); row < ls_share(rows, thread + 1, threads); row++) {
        embed_row(d, s->b->tokens[row], line);
        ls_apply_norm(d->token_norm, 0, line, d->eps, width, line);
        ls_apply_norm(l->mixer_norm, 0, s->x + (size_t)row * width, d->eps, width, line + width);
        ls_pack_rows(l->qkv, &to, row, row + 1, line, 0);
    }
    return to;
}

static ls_packed_rows pack_activated(const ls_run *s, const ls_linear *down, int thread,
                                     int threads) {
    int width = s->d->mlp_width, rows = s->b->rows, gated = s->d->gated;
    ls_packed_rows to = ls_packed_at(down, rows, s->packed);
    float *line = ls_scratch((size_t)width * sizeof(float));
    for (int row = ls_share(rows, thread, threads); row < ls_share(rows, thread + 1, threads);
         row++) {
        const float *gate = s->projected + (size_t)row * (gated ? 2 : 1) * width;
        ls_current()->activate(s->d->activation, gate, gated ? gate + width : NULL, width, line);
        ls_pack_rows(down, &to, row, row + 1, line, 0);
    }
    return to;
}

void ls_multiply(const ls_linear *layer, const ls_packed_rows *x, float *y, int add, int thread, int threads) {
    ls_barrier(threads);
    ls_multiply_shared(layer, x, y, layer->outputs, add, thread, threads);
    ls_barrier(threads);
}

/* norms of q and k over all heads together */
static void norm_whole(const ls_run *s, const ls_layer *l, int thread, int threads) {
    const ls_decoder *d = s->d;
    int first = ls_share(s->b->rows, thread, threads), last = ls_share(s->b->rows, thread + 1, threads);
    int q_width = d->heads * d->head_width, k_width = d->kv_heads * d->head_width;
    for (int row = first; row < last; row++) {
        float *q = s->projected + row * ls_projected_stride(d), *k = q + q_width;
        ls_apply_norm(l->q_norm, 0, q, d->eps, q_width, q);
        ls_apply_norm(l->k_norm, 0, k, d->eps, k_width, k);
    }
    ls_barrier(threads);
}

/* Add what `add_to_residual` has set aside to the rows of this thread. */
static void add_aside(const ls_run *s, const ls_norm *norm, int thread, int threads) {
    const ls_decoder *d = s->d;
    int first = ls_share(s->b->rows, thread, threads), last = ls_share(s->b->rows, thread + 1, threads);
    for (int row = first; row < last; row++) {
        float *x = s->x + (size_t)row * d->width, *more = s->attended + (size_t)row * d->width;
        if (norm) ls_apply_norm(norm, 0, more, d->eps, d->width, more);
        for (int i = 0; i < d->width; i++) x[i] += more[i] * d->residual_scale;
    }
}

/* The end of a mixer or an MLP: its last layer, which adds to the residual. What has a norm or a factor
 * first, or has to wait, is set aside where mixers have had their outputs; returns whether it was. */
static int add_to_residual(const ls_run *s, const ls_linear *layer, const ls_packed_rows *x,
                           const ls_norm *norm, int wait, int thread, int threads) {
    int aside = norm || wait || s->d->residual_scale != 1.0f;
    ls_multiply(layer, x, aside ? s->attended : s->x, !aside, thread, threads);
    return aside;
}

/* The mixer of a block, where it is not left out. What an MLP that reads beside it has to wait for stays aside;
 * returns whether there is any. */
static int mix(const ls_run *s, const ls_layer *l, int thread, int threads) {
    const ls_batch *b = s->b;
    if (!l->qkv) return 0;
    ls_packed_rows x = pack_mixer_inputs(s, l, thread, threads);
    ls_multiply(l->qkv, &x, s->projected, 0, thread, threads);
    if (l->whole_norms) norm_whole(s, l, thread, threads);
    b->chained ? ls_mix_prompt(s, l, thread, threads) : ls_mix_inputs(s, l, thread, threads);
    ls_barrier(threads);
    x = ls_pack_inputs(s, l->out, NULL, s->attended, b->rows, thread, threads);
    int wait = l->parallel && l->up;
    int aside = add_to_residual(s, l->out, &x, l->mixer_out_norm, wait, thread, threads);
    if (!aside || wait) return wait;
    add_aside(s, l->mixer_out_norm, thread, threads);
    /* an MLP begins with the rows of its own thread */
    if (!l->up) ls_barrier(threads);
    return 0;
}

void ls_run_block(const ls_run *s, const ls_layer *l, int thread, int threads) {
    int waits = mix(s, l, thread, threads);
    if (!l->up) return;
    ls_packed_rows x = ls_pack_inputs(s, l->up, l->mlp_norm, s->x, s->b->rows, thread, threads);
    if (waits) add_aside(s, l->mixer_out_norm, thread, threads);
    ls_multiply(l->up, &x, s->projected, 0, thread, threads);
    x = pack_activated(s, l->down, thread, threads);
    if (!add_to_residual(s, l->down, &x, l->mlp_out_norm, 0, thread, threads)) return;
    add_aside(s, l->mlp_out_norm, thread, threads);
    ls_barrier(threads);
}

/* Rows of what a layer puts out, for a caller that reads the layer `number`-th of those it asks for. */
static void hand_out(const ls_run *s, int number, int first, int last) {
    size_t width = (size_t)s->d->width, begin = (size_t)number * s->b->rows + first;
    memcpy(s->b->layer_states + begin * width, s->x + first * width, (last - first) * width * sizeof *s->x);
}

void ls_run_end(const ls_run *s, int thread, int threads) {
    const ls_decoder *d = s->d;
    const ls_batch *b = s->b;
    int last = ls_share(b->outputs, thread + 1, threads);
    for (int i = ls_share(b->outputs, thread, threads); i < last; i++) {
        float *to = b->hidden + (size_t)i * d->width;
        const float *x = s->x + (size_t)b->output_rows[i] * d->width;
        ls_apply_norm(d->final_norm, 0, x, d->eps, d->width, to);
        for (int k = 0; d->logit_scale != 1.0f && k < d->width; k++) to[k] *= d->logit_scale;
    }
    ls_packed_rows x = ls_pack_inputs(s, d->head, NULL, b->hidden, b->outputs, thread, threads);
    ls_multiply(d->head, &x, b->logits, 0, thread, threads);
    int from = ls_share(d->vocabulary, thread, threads), to = ls_share(d->vocabulary, thread + 1, threads);
    for (int i = 0; d->logit_cap > 0.0f && i < b->outputs; i++)
        ls_current()->cap(b->logits + (size_t)i * d->vocabulary + from, d->logit_cap, to - from);
}

/* Layers of a step that are one call of the pool. */
typedef struct {
    const ls_run *run;
    int first, last;
} some_layers;

/* Which of the layers whose rows a caller asked for this one is; -1 if none. */
static int asked_for(const ls_batch *b, int layer) {
    for (int i = 0; i < b->layers; i++)
        if (b->layer_numbers[i] == layer) return i;
    return -1;
}

static void layers_body(void *context, int thread, int threads) {
    const some_layers *part = context;
    const ls_run *s = part->run;
    int rows = s->b->rows;
    if (!part->first) embed(s, ls_share(rows, thread, threads), ls_share(rows, thread + 1, threads));
    for (int layer = part->first;; layer++) {
        /* who leaves has nothing more to read */
        if (!ls_goes_on(thread, &threads)) return;
        if (layer == part->last && layer < s->d->layers) return;
        int number = asked_for(s->b, layer - 1);
        if (number >= 0) hand_out(s, number, ls_share(rows, thread, threads), ls_share(rows, thread + 1, threads));
        if (layer == s->d->layers) return ls_run_end(s, thread, threads);
        ls_run_block(s, s->d->layer + layer, thread, threads);
    }
}

ls_run ls_run_at(const ls_decoder *d, const ls_batch *b, void *workspace, int threads) {
    ls_run s = {.d = d, .b = b, .line = ls_line_of(d, b, threads), .x = workspace};
    if (ls_over_pieces(b)) s.far_floats = ls_far_floats(d, b);
    s.projected = s.x + ls_up64(d->width) * (size_t)b->rows;
    s.attended = s.projected + ls_up64(projected_width(d)) * (size_t)b->rows;
    s.partials = s.attended + ls_up64(attended_width(d)) * (size_t)b->rows;
    s.lists = (int32_t *)(s.partials + mixer_floats(d, b, &s.line));
    s.list_numbers = ls_list_numbers(d, b);
    char *line = (char *)(s.lists + list_room(d, b));
    ls_place_line(&s.line, line);
    s.packed = line + ls_line_bytes(&s.line);
    return s;
}

/* One step; workspace has `ls_step_workspace` bytes for as many threads and is 64-byte aligned. */
LS_API void ls_step(const ls_decoder *d, const ls_batch *b, void *workspace, int32_t threads) {
    ls_run s = ls_run_at(d, b, workspace, threads);
    /* who left a call, or came too late, comes to the next: with many rows a layer alone is a long one */
    int most = b->rows < MANY_ROWS || d->layers == 0 ? d->layers : 1;
    int first = 0;
    do {
        int last = first + most < d->layers ? first + most : d->layers;
        some_layers part = {&s, first, last};
        ls_parallel(layers_body, &part, threads, LS_SPIN_STEP);
        first = last;
    } while (first < d->layers);
}
