/* What the new nodes of one slot read from the rows that they attend to exactly, over one kv head.
 * Part of every isa_*.c.
 *
 * A node sees rows in the order of their positions: the committed ones, then its own ancestors among
 * the staged ones. Row i of this order has position i, counted from the slot's base position. Sums
 * over rows are made in blocks of BLOCK rows along this order, whatever the place in the buffer, and put together as
 * merge.inc.h says. So a node of a tree gets, to the last bit, what it would have got after its
 * ancestors had been committed. All nodes that see the same committed rows read them together: a long
 * cache is read once for a whole tree. */

/* All that one kv head of one slot has, and the rows of the present block: `shared` committed ones from `from` on,
 * which all its queries see, and then each query's own among the staged ones. */
typedef struct {
    const ls_mixer *m;
    const char *keys, *values;
    int from, shared, any_own;
    int then; /* where the block begins that is read next; 0: behind this one */
    row_block rows, staged;
    int whole, least_far, most_far, rebuilt_to; /* whether some query reads whole keys; see rebuilt.inc.h */
    row_block rebuilt, rebuilt_staged;          /* their keys alone */
    float *space;  /* of `rows`, then of `staged`, then of what is rebuilt */
    float *turned; /* the first queries of a run, as many.inc.h wants them */
    const query *turned_of;
    int turned_count;
} block;

/* The rows of a block that this query alone sees: their indices among the staged ones; returns how many. */
INLINE int own_rows(const block *b, const query *q, int32_t *indices) {
    int begin = b->from + b->shared, end = b->from + BLOCK;
    if (q->visible->count < end) end = q->visible->count;
    for (int i = begin; i < end; i++) indices[i - begin] = q->visible->ancestors[i - b->m->committed];
    return end > begin ? end - begin : 0;
}

#include "rebuilt.inc.h"

/* to scores, or weights, of `count` rows from position `from` on */
static void add_bias(const ls_mixer *m, const float *bias, int position, int from, int count, float *scores) {
    for (int i = 0; i < count; i++) {
        int distance = position - from - i;
        scores[i] += bias[distance < m->bias_distances ? distance : m->bias_distances - 1];
    }
}

/* what a score is multiplied by */
INLINE float score_scale(const ls_mixer *m, const query *q) {
    return (has_codes(m) ? q->scale : 1.0f) * m->score_factor / __builtin_sqrtf((float)m->width);
}

/* Turn the scores of a query, of `count` rows from position `from` on, into weights; returns their softmax. */
INLINE softmax_state to_weights(const ls_mixer *m, const query *q, int from, int count, float *scores) {
    for (int i = count; i < BLOCK; i++) scores[i] = -__builtin_inff();
    if (m->squared_relu) {
        square(scores);
        if (m->bias) add_bias(m, q->bias, q->visible->count - 1, from, count, scores);
        return (softmax_state){0};
    }
    float scale = score_scale(m, q);
    if (m->score_cap > 0.0f) {
        cap_scores(scores, scale, m->score_cap);
        scale = 1.0f;
    }
    if (m->bias) {
        for (int i = 0; i < BLOCK; i += LS_LANES) vl_store(scores + i, vl_load(scores + i) * vl_set1(scale));
        add_bias(m, q->bias, q->visible->count - 1, from, count, scores);
        scale = 1.0f;
    }
    return to_exponentials(scores, scale);
}

INLINE void add_own_values(const block *b, const int32_t *indices, int own, float *weights, float *sum) {
    const row_block *staged = &b->staged;
    for (int i = 0; b->m->row_kind == LS_INT8 && i < own; i++) weights[i] *= staged->value_scales[indices[i]];
    source apart = {staged->values, indices, staged->value_stride, staged->value_kind, own, ls_up16(b->m->width), NULL, 0};
    accumulator one = {sum, weights, ADD, 0, 0};
    accumulate(&apart, &one, 1);
}

/* Some queries over a block; their number is a constant, so that their sums stay in registers. */
INLINE void attend_some(const block *b, const query *queries, int count) {
    const ls_mixer *m = b->m;
    float scores[LS_QUERIES][BLOCK], weights[LS_QUERIES][BLOCK];
    int32_t indices[LS_QUERIES][BLOCK];
    int own[LS_QUERIES] = {0};
    float sums[LS_QUERIES][LS_MAX_HEAD_WIDTH];
    joint joints[LS_QUERIES];
    accumulator to[LS_QUERIES];
    score_shared(b, queries, count, scores);
    if (b->any_own) score_own(b, queries, count, indices, own, scores);
    for (int j = 0; j < count; j++) {
        softmax_state state = to_weights(m, queries + j, b->from, b->shared + own[j], scores[j]);
        joints[j] = join_states(m, queries[j].state, &state);
        for (int i = 0; m->row_kind == LS_INT8 && i < b->shared; i += LS_LANES)
            vl_store(weights[j] + i, vl_load(scores[j] + i) * vl_load(b->rows.value_scales + i));
        to[j] = (accumulator){queries[j].out, m->row_kind == LS_INT8 ? weights[j] : scores[j], joints[j].how,
                              joints[j].keep, joints[j].scale};
        /* more rows are to come */
        if (own[j]) to[j].out = sums[j], to[j].how = BEGIN;
    }
    source together = {b->rows.values, NULL, b->rows.value_stride, b->rows.value_kind, b->shared, ls_up16(m->width),
                       b->rows.fresh ? b->rows.ahead : NULL, m->value_bytes};
    accumulate(&together, to, count);
    for (int j = 0; j < count; j++) {
        if (!own[j]) continue;
        add_own_values(b, indices[j], own[j], scores[j] + b->shared, sums[j]);
        join_rows(m, queries[j].out, sums[j], joints[j]);
    }
}

static void attend_queries(const block *b, const query *queries, int count) {
    switch (count) {
        case 1: attend_some(b, queries, 1); break;
        case 2: attend_some(b, queries, 2); break;
        case 3: attend_some(b, queries, 3); break;
#if LS_QUERIES > 3
        case 4: attend_some(b, queries, 4); break;
#endif
    }
}

#include "many.inc.h"

/* Make the rows of the block ready that begins at position `from`, for `seeing` queries. */
static void begin_block(block *b, int from, int seeing) {
    const ls_mixer *m = b->m;
    int left = m->committed - from, then = b->then ? b->then : from + BLOCK;
    b->from = from;
    b->shared = left < 0 ? 0 : left < BLOCK ? left : BLOCK;
    b->any_own = left < BLOCK && m->staged;
    b->whole = 1;
    if (m->rebuilt) begin_rebuilt(b, then);
    read_rows(m, b->whole ? b->keys : NULL, b->values, from, b->shared, then, seeing <= 3 * LS_QUERIES, b->space, &b->rows);
    /* once for all blocks that have staged rows */
    if (b->any_own && !b->staged.count)
        read_rows(m, b->keys, b->values, m->committed, m->staged, m->committed + BLOCK, 0,
                  b->space + ls_block_floats(m), &b->staged);
}

/* The block of rows begin.. behind the first one, for queries whose first row is the same. */
static void attend_rows(block *b, const query *queries, int count, int begin) {
    int from = queries->visible->first + begin, seeing = 0;
    for (int j = 0; j < count; j++) seeing += queries[j].visible->count > from;
    if (!seeing) return;
    begin_block(b, from, seeing);
    if (seeing == count) {
        int done = attend_many(b, queries, count);
        queries += done, seeing -= done;
    }
    query some[LS_QUERIES];
    for (int n = 0; seeing; queries++) {
        if (queries->visible->count > from) some[n++] = *queries;
        if (n < next_of(seeing)) continue;
        attend_queries(b, some, n);
        b->rows.fresh = 0;
        seeing -= n;
        n = 0;
    }
}

static void attend_sinks(const ls_mixer *m, block b, query *queries);
static void attend_kept(block *b, query *queries, int begin);

/* The queries of a kv head, and behind them what their nodes see; space: what the queries are. */
static void prepare_queries(const ls_mixer *m, int head, const float *q, int64_t q_stride, query *queries,
                            float *space) {
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats;
    int width = ls_up16(m->width), codes = (m->width + 31) & ~31;
    visible_rows *visible = (visible_rows *)(queries + count);
    for (int n = 0; n < m->nodes; n++) find_visible(m, n, visible + n);
    memset(space, 0, sizeof(float) * (size_t)count * width);
    for (int i = 0; i < count; i++, space += width) {
        const float *from = q + i / repeats * q_stride + (head * repeats + i % repeats) * m->width;
        queries[i] = (query){.q = space, .visible = visible + i / repeats,
                            .bias = m->bias ? m->bias + (int64_t)(i % repeats) * m->bias_distances : NULL, .codes = (int8_t *)space};
        /* ahead of the offsets of blocks, for which the floats leave room */
        queries[i].block_offsets = (int32_t *)(queries[i].codes + codes);
        if (met_kind(m) == LS_INT8)
            queries[i].scale = quantize_row(from, m->width, codes, 1, 0, queries[i].codes, &queries[i].offset);
        else if (met_kind(m) == LS_INT4)
            queries[i].scale = quantize_row(from, m->width, codes, 1, 1, queries[i].codes, queries[i].block_offsets);
        else
            memcpy(space, from, sizeof(float) * (size_t)m->width);
    }
}

/* From here on the queries add up what they read in `partial`. */
static void begin_partial(const ls_mixer *m, float *partial, query *queries) {
    empty_partial(m, partial);
    for (size_t i = 0; i < ls_query_count(m); i++) {
        queries[i].out = partial + i * (size_t)ls_up16(m->width);
        queries[i].state = states_of(m, partial) + i;
    }
}

/* The block whose rows begin at `begin` behind the first row of each node. */
static void attend_block(block *b, const query *queries, int begin) {
    const ls_mixer *m = b->m;
    int repeats = m->heads / m->kv_heads;
    for (int n = 0, last; n < m->nodes; n = last) {
        int first = queries[n * repeats].visible->first;
        for (last = n + 1; last < m->nodes; last++)
            if (queries[last * repeats].visible->first != first) break;
        attend_rows(b, queries + n * repeats, (last - n) * repeats, begin);
    }
}

/* see ls_ops */
static void attend_blocks(const ls_mixer *m, int head, int first, int count, int apart, const float *q,
                          int64_t q_stride, float *partial, void *scratch) {
    size_t floats = ls_query_count(m) * (size_t)ls_up16(m->width);
    float *space = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    float *turned = space + ls_read_floats(m), *plain = turned + floats;
    query *queries = (query *)(plain + floats);
    prepare_queries(m, head, q, q_stride, queries, plain);
    block b = {.m = m, .keys = m->keys + head * m->key_stride,
               .values = m->values + head * m->value_stride, .space = space, .turned = turned, .rebuilt_to = -1};
    if (m->rebuilt) find_far(&b, queries);
    begin_partial(m, partial, queries);
    if (m->sinks && first == 0) attend_sinks(m, b, queries);
    for (int i = first, kept = ls_kept_blocks(m->budget); i < first + count; i++) {
        if (apart && i > first) begin_partial(m, partial += ls_partial_floats(m), queries);
        if (i < kept)
            attend_kept(&b, queries, i * BLOCK);
        else
            attend_block(&b, queries, (i - kept) * BLOCK);
    }
}
