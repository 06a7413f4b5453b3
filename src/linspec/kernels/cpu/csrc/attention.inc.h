/* What the new nodes of one slot read from the rows that they attend to exactly, over one kv head.
 * Part of every isa_*.c.
 *
 * A node sees rows in the order of their positions: the committed ones, then its own ancestors among
 * the staged ones. Row i of this order has position i, counted from the slot's base position. Sums
 * over rows are made in blocks of BLOCK rows along this order, and blocks in chunks of LS_CHUNK,
 * whatever the place in the buffer. So a node of a tree gets, to the last bit, what it would have got after its
 * ancestors had been committed. All nodes that see the same committed rows read them together: a long
 * cache is read once for a whole tree. */

#define BLOCK 64

/* the rows that a node sees: how many, the first of them, which staged rows are its ancestors */
typedef struct {
    int32_t count, first;
    uint8_t ancestors[LS_MAX_NODES];
} visible_rows;

/* the softmax of one query over the rows so far: the largest score, the sum of exponentials */
typedef struct {
    float max, sum;
} softmax_state;

/* One query of one node, its output and its softmax. `codes` and what follows: for quantized rows.
 * What is computed for one query, and in which order, does not depend on the others. */
typedef struct {
    const float *q;
    float *out;
    softmax_state *state;
    const visible_rows *visible;
    int8_t *codes;
    int32_t offset;
    float scale;
} query;
_Static_assert(sizeof(visible_rows) + sizeof(query) <= LS_QUERY_FLOATS * sizeof(float), "scratch");
#define MAX_QUERIES 4 /* that share a load of a row */
/* unrolled before registers are given out */
#define EACH_QUERY _Pragma("GCC unroll 4") for (int j = 0; j < count; j++)
#define EACH_KEY _Pragma("GCC unroll 4") for (int k = 0; k < rows; k++)

/* Rows `from`.. of a kv head that some queries see: `shared` committed ones and then their own.
 * first_touch: the first queries to read this block prefetch the next one. */
typedef struct {
    const ls_mixer *m;
    const char *keys, *values;
    int from, shared, first_touch;
} block;

static void find_visible(const ls_mixer *m, int node, visible_rows *v) {
    uint64_t seen = m->ancestors[m->staged - m->nodes + node];
    v->count = m->committed;
    for (; seen; seen &= seen - 1)
        v->ancestors[v->count++ - m->committed] = (uint8_t)__builtin_ctzll(seen);
    int64_t first = 0;
    if (m->window) first = v->count - m->window;
    if (m->group) first = ((v->count - 1) / m->group - (m->span - 1)) * m->group;
    v->first = first > 0 ? (int32_t)first : 0;
}

/* index in the buffer of the row at `position`, which may be negative for values */
INLINE int row_at(const ls_mixer *m, const visible_rows *v, int position) {
    return position < m->committed ? position : m->committed + v->ancestors[position - m->committed];
}

/* The rows of a block that this query alone sees: their indices; returns how many. */
INLINE int own_rows(const block *b, const query *q, int32_t *indices) {
    int begin = b->from + b->shared, end = b->from + BLOCK;
    if (q->visible->count < end) end = q->visible->count;
    for (int i = begin; i < end; i++) indices[i - begin] = row_at(b->m, q->visible, i);
    return end > begin ? end - begin : 0;
}

#define REDUCE_EACH(n, how) \
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) \
        v[i] = SHUFFLE(v[2 * i], v[2 * i + 1], how##_0) + SHUFFLE(v[2 * i], v[2 * i + 1], how##_1)

/* lane i of the result is the sum of v[i], added up as in vf_sum */
INLINE vf sum_lanes_each(vf *v) {
    REDUCE_EACH(8, HALVES);
    REDUCE_EACH(4, QUARTERS);
    REDUCE_EACH(2, PAIRS);
    REDUCE_EACH(1, SINGLE);
    return v[0];
}

INLINE vf dot_lanes(const float *a, const float *b, int width) {
    vf sum = vf_set1(0.0f);
    int whole = width & ~15;
    for (int i = 0; i < whole; i += 16) sum = LS_FMA(vf_load(a + i), vf_load(b + i), sum);
    if (whole < width)
        sum = LS_FMA(vf_load_part(a + whole, width - whole), vf_load_part(b + whole, width - whole),
                     sum);
    return sum;
}

/* of the next block */
INLINE void prefetch_keys(const float *key, int rows, int width) {
    EACH_KEY
        for (int c = 0; c < width; c += 64)
            prefetch((const char *)(key + (size_t)(k + BLOCK) * width), c, 0);
}

/* Dot products of `rows` neighbouring keys with some queries, sixteen partial sums each, in the order
 * of `dot_lanes`. */
INLINE void dot_lanes_each(const query *queries, int count, const float *key, int rows, int width,
                           vf sums[][16], int first) {
    vf s[MAX_QUERIES][LS_KEYS];
    int i = 0;
    EACH_QUERY EACH_KEY s[j][k] = vf_set1(0.0f);
    for (; i < width; i += 16) {
        int n = width - i;
        vf keys[LS_KEYS];
        EACH_KEY {
            const float *at = key + (size_t)k * width + i;
            keys[k] = n < 16 ? vf_load_part(at, n) : vf_load(at);
        }
        EACH_QUERY {
            const float *at = queries[j].q + i;
            vf q = n < 16 ? vf_load_part(at, n) : vf_load(at);
            EACH_KEY s[j][k] = LS_FMA(q, keys[k], s[j][k]);
        }
    }
    EACH_QUERY EACH_KEY sums[j][first + k] = s[j][k];
}

/* Dot products of the queries with the rows of a block; -inf behind the last row that is seen. */
INLINE void score_float(const block *b, const query *queries, int count, float scores[][BLOCK]) {
    int width = b->m->width;
    for (int first = 0; first < BLOCK; first += 16) {
        vf sums[MAX_QUERIES][16];
        int n = b->shared - first < 16 ? (b->shared > first ? b->shared - first : 0) : 16;
        const float *keys = (const float *)b->keys + (size_t)(b->from + first) * width;
        int i = 0;
        for (; i + LS_KEYS <= n; i += LS_KEYS) {
            if (b->first_touch) prefetch_keys(keys + (size_t)i * width, LS_KEYS, width);
            dot_lanes_each(queries, count, keys + (size_t)i * width, LS_KEYS, width, sums, i);
        }
        for (; i < n; i++)
            dot_lanes_each(queries, count, keys + (size_t)i * width, 1, width, sums, i);
        for (int j = 0; j < count; j++) {
            for (int i = n; i < 16; i++) sums[j][i] = vf_set1(-__builtin_inff());
            vf_store(scores[j] + first, sum_lanes_each(sums[j]));
        }
    }
    for (int j = 0; j < count; j++) {
        int32_t indices[BLOCK];
        int own = own_rows(b, queries + j, indices);
        for (int i = 0; i < own; i++) {
            const char *key = b->keys + (size_t)indices[i] * b->m->row_bytes;
            scores[j][b->shared + i] = vf_sum(dot_lanes(queries[j].q, (const float *)key, width));
        }
    }
}

/* scores to softmax weights, in place; returns the factor on what was accumulated before */
INLINE float softmax_update(float *scores, float scale, float cap, softmax_state *state) {
    vf s[BLOCK / 16], total = vf_set1(0.0f), most = vf_set1(-__builtin_inff());
    for (int i = 0; i < BLOCK / 16; i++) {
        s[i] = vf_load(scores + 16 * i) * vf_set1(scale);
        if (cap > 0.0f)
            s[i] = vf_select((vi)(s[i] > vf_set1(-__builtin_inff())), vf_capped(s[i], cap), s[i]);
        most = vf_max(s[i], most);
    }
    float max = vf_largest(most);
    if (!(max > state->max)) max = state->max;
    vf before = vf_exp(vf_set1(state->max - max));
    for (int i = 0; i < BLOCK / 16; i++) {
        vf e = vf_exp(s[i] - vf_set1(max));
        vf_store(scores + 16 * i, e);
        total += e;
    }
    state->sum = state->sum * before[0] + vf_sum(total);
    state->max = max;
    return before[0];
}

/* scores to squares of what is positive, in place; -inf weighs nothing either way */
INLINE void square(float *scores) {
    for (int i = 0; i < BLOCK; i += 16) {
        vf positive = vf_max(vf_load(scores + i), vf_set1(0.0f));
        vf_store(scores + i, positive * positive);
    }
}

/* Turn scores into weights and add the weighted values of a block to the queries' outputs. */
INLINE void apply_weights(const block *b, const query *queries, int count, float weights[][BLOCK],
                          const float *scales) {
    const ls_mixer *m = b->m;
    accumulator accumulators[LS_ROWS];
    for (int j = 0; j < count; j++) {
        float keep = 1.0f, scale = m->quantized ? queries[j].scale : 1.0f;
        if (m->squared_relu)
            square(weights[j]);
        else
            keep = softmax_update(weights[j], scale * m->score_scale, m->score_cap, queries[j].state);
        for (int i = 0; scales && i < BLOCK; i += 16)
            vf_store(weights[j] + i, vf_load(weights[j] + i) * vf_load(scales + i));
        accumulators[j] = (accumulator){queries[j].out, weights[j], keep};
    }
    const char *rows = b->values + (int64_t)b->from * m->row_bytes;
    source together = {rows, NULL, m->row_bytes, b->shared, m->width, m->quantized,
                       b->first_touch ? (int64_t)BLOCK * m->row_bytes : 0};
    accumulate(&together, accumulators, count);
    for (int j = 0; j < count; j++) {
        int32_t indices[BLOCK];
        int own = own_rows(b, queries + j, indices);
        if (!own) continue;
        for (int i = 0; m->quantized && i < own; i++)
            weights[j][b->shared + i] *= row_scale(b->values, indices[i], m);
        source apart = {b->values, indices, m->row_bytes, own, m->width, m->quantized, 0};
        accumulators[j] = (accumulator){queries[j].out, weights[j] + b->shared, 1.0f};
        accumulate(&apart, accumulators + j, 1);
    }
}

INLINE void attend_block_float(const block *b, const query *queries, int count) {
    float scores[MAX_QUERIES][BLOCK];
    score_float(b, queries, count, scores);
    apply_weights(b, queries, count, scores, NULL);
}

static void attend_block_int8(const block *b, const query *queries, int count);

/* Up to MAX_QUERIES queries (LS_ROWS of int8); constants, so that their sums stay in registers. */
static void attend_block(const block *b, const query *queries, int count) {
    if (b->m->quantized) {
        attend_block_int8(b, queries, count);
        return;
    }
    if (count == MAX_QUERIES) {
        attend_block_float(b, queries, MAX_QUERIES);
        return;
    }
    for (int j = 0; j < count; j++) attend_block_float(b, queries + j, 1);
}

/* The block of rows begin.. behind the first one, for queries whose first row is the same. */
static void attend_rows(block *b, const query *queries, int count, int begin) {
    int most = b->m->quantized ? LS_ROWS : MAX_QUERIES, n = 0;
    query batch[LS_ROWS];
    b->from = queries->visible->first + begin;
    b->shared = b->m->committed - b->from;
    if (b->shared > BLOCK) b->shared = BLOCK;
    if (b->shared < 0) b->shared = 0;
    b->first_touch = 1;
    for (int j = 0; j < count; j++) {
        if (queries[j].visible->count > b->from) batch[n++] = queries[j];
        if (n == most || (n && j == count - 1)) {
            attend_block(b, batch, n);
            n = b->first_touch = 0;
        }
    }
}

static void attend_sinks(const ls_mixer *m, block b, query *queries, void *scratch);

/* the queries of a kv head, laid out in `scratch` */
static query *prepare_queries(const ls_mixer *m, int head, const float *q, int64_t q_stride,
                              float *partial, void *scratch) {
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats, padded = (m->width + 31) & ~31;
    query *queries = scratch;
    visible_rows *visible = (visible_rows *)(queries + count);
    int8_t *codes = (int8_t *)(visible + m->nodes);
    softmax_state *states = (softmax_state *)(partial + (size_t)count * m->width);
    for (int n = 0; n < m->nodes; n++) find_visible(m, n, visible + n);
    memset(partial, 0, sizeof(float) * (size_t)count * m->width);
    for (int i = 0; i < count; i++) {
        int n = i / repeats;
        states[i] = (softmax_state){-__builtin_inff(), 0.0f};
        queries[i] = (query){.q = q + n * q_stride + (head * repeats + i % repeats) * m->width,
                            .out = partial + (size_t)i * m->width, .state = states + i,
                            .visible = visible + n, .codes = codes + (size_t)i * padded};
        if (m->quantized)
            queries[i].scale = quantize_row(queries[i].q, m->width, padded, 1, 0, queries[i].codes,
                                            &queries[i].offset);
    }
    return queries;
}

/* see ls_ops */
static void attend_chunk(const ls_mixer *m, int head, int chunk, const float *q, int64_t q_stride,
                         float *partial, void *scratch) {
    int repeats = m->heads / m->kv_heads, most = 0;
    query *queries = prepare_queries(m, head, q, q_stride, partial, scratch);
    block b = {m, m->keys + head * m->key_stride, m->values + head * m->value_stride, 0, 0, 1};
    for (int n = 0; n < m->nodes; n++) {
        const visible_rows *v = queries[n * repeats].visible;
        if (v->count - v->first > most) most = v->count - v->first;
    }
    if (m->sinks && chunk == 0) attend_sinks(m, b, queries, scratch);
    int begin = chunk * LS_CHUNK, end = most < begin + LS_CHUNK ? most : begin + LS_CHUNK;
    for (; begin < end; begin += BLOCK)
        for (int n = 0, last; n < m->nodes; n = last) {
            int first = queries[n * repeats].visible->first;
            for (last = n + 1; last < m->nodes; last++)
                if (queries[last * repeats].visible->first != first) break;
            attend_rows(&b, queries + n * repeats, (last - n) * repeats, begin);
        }
}
