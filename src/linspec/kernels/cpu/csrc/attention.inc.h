/* What the new nodes of one slot read from its rows, over one kv head. Part of every isa_*.c.
 *
 * A node sees rows in the order of their positions: the committed ones, then its own ancestors among
 * the staged ones. Row i of this order has position i, counted from the slot's origin. Sums over rows
 * are made in blocks of BLOCK rows along this order, whatever the place in the buffer. So a node of a
 * tree gets, to the last bit, what it would have got after its ancestors had been committed. */

#define BLOCK 64

#define FOLD(n, how) \
    for (int i = 0; i < n; i++) \
        v[i] = SHUFFLE(v[2 * i], v[2 * i + 1], how##_0) + SHUFFLE(v[2 * i], v[2 * i + 1], how##_1)

/* lane i of the result is the sum of v[i] */
INLINE vf sum_each(vf *v) {
    FOLD(8, HALVES);
    FOLD(4, QUARTERS);
    FOLD(2, PAIRS);
    FOLD(1, SINGLE);
    return v[0];
}

INLINE vf products(const float *a, const float *b, int width) {
    vf sum = vf_all(0.0f);
    int whole = width & ~15;
    for (int i = 0; i < whole; i += 16) sum = LS_FMA(vf_load(a + i), vf_load(b + i), sum);
    if (whole < width)
        sum = LS_FMA(vf_load_part(a + whole, width - whole), vf_load_part(b + whole, width - whole),
                     sum);
    return sum;
}

/* what the softmax of one query over the rows so far needs to go on */
typedef struct {
    float top, sum;
} running;

/* One query, its output and its softmax. Up to QUERIES of them meet the same rows at once: every row
 * is then loaded once for all. What is computed for one, and in which order, stays the same. */
typedef struct {
    const float *q;
    float *out;
    running *state;
} asker;
#define QUERIES 4

/* scores of up to BLOCK rows; -inf behind `count`, which weighs nothing in either kind of weights */
INLINE void score_rows(const asker *askers, int askers_count, const float *keys,
                       const int32_t *rows, int count, int width, float scale,
                       vf scores[][BLOCK / 16]) {
    for (int first = 0; first < BLOCK; first += 16) {
        vf sums[QUERIES][16];
        int n = count - first < 16 ? (count - first > 0 ? count - first : 0) : 16;
        for (int i = 0; i < n; i++) {
            const float *key = keys + (size_t)rows[first + i] * width;
            for (int a = 0; a < askers_count; a++) sums[a][i] = products(askers[a].q, key, width);
        }
        for (int a = 0; a < askers_count; a++) {
            for (int i = n; i < 16; i++) sums[a][i] = vf_all(-__builtin_inff());
            scores[a][first / 16] = sum_each(sums[a]) * vf_all(scale);
        }
    }
}

/* unrolled before registers are given out */
#define EACH_ASKER _Pragma("GCC unroll 4") for (int a = 0; a < askers_count; a++)
#define EACH_CHUNK _Pragma("GCC unroll 4") for (int c = 0; c < chunk; c++)

/* out = out * keep + sum of weight * value row, for 16 * chunk features from `column` on */
INLINE void add_values(const asker *askers, int askers_count, float weights[][BLOCK],
                       const float *keep, const float *values, const int32_t *rows, int count,
                       int width, int column, int chunk) {
    vf sums[QUERIES][4];
    EACH_ASKER
        EACH_CHUNK
            sums[a][c] = vf_load(askers[a].out + column + 16 * c) * vf_all(keep[a]);
    for (int i = 0; i < count; i++) {
        const float *row = values + (size_t)rows[i] * width + column;
        EACH_CHUNK {
            vf value = vf_load(row + 16 * c);
            EACH_ASKER
                sums[a][c] = LS_FMA(vf_all(weights[a][i]), value, sums[a][c]);
        }
    }
    EACH_ASKER
        EACH_CHUNK vf_store(askers[a].out + column + 16 * c, sums[a][c]);
}

INLINE void add_values_part(const asker *asked, const float *weights, float keep,
                            const float *values, const int32_t *rows, int count, int width,
                            int column) {
    int part = width - column;
    vf sum = vf_load_part(asked->out + column, part) * vf_all(keep);
    for (int i = 0; i < count; i++)
        sum = LS_FMA(vf_all(weights[i]),
                     vf_load_part(values + (size_t)rows[i] * width + column, part), sum);
    vf_store_part(asked->out + column, sum, part);
}

INLINE void add_all_values(const asker *askers, int askers_count, float weights[][BLOCK],
                           const float *keep, const float *values, const int32_t *rows, int count,
                           int width) {
    int c = 0;
    for (; c + 64 <= width; c += 64)
        add_values(askers, askers_count, weights, keep, values, rows, count, width, c, 4);
    for (; c + 16 <= width; c += 16)
        add_values(askers, askers_count, weights, keep, values, rows, count, width, c, 1);
    for (int a = 0; a < askers_count && c < width; a++)
        add_values_part(askers + a, weights[a], keep[a], values, rows, count, width, c);
}

/* softmax weights of a block; returns the factor on what was summed before it */
INLINE float soften(const vf *scores, running *state, float *weights) {
    float top = vf_top(vf_max(vf_max(scores[0], scores[1]), vf_max(scores[2], scores[3])));
    if (!(top > state->top)) top = state->top;
    vf total = vf_all(0.0f), before = vf_exp(vf_all(state->top - top));
    for (int i = 0; i < BLOCK / 16; i++) {
        vf e = vf_exp(scores[i] - vf_all(top));
        vf_store(weights + 16 * i, e);
        total += e;
    }
    state->sum = state->sum * before[0] + vf_sum(total);
    state->top = top;
    return before[0];
}

INLINE float square(const vf *scores, float *weights) {
    for (int i = 0; i < BLOCK / 16; i++) {
        vf positive = vf_max(scores[i], vf_all(0.0f));
        vf_store(weights + 16 * i, positive * positive);
    }
    return 1.0f;
}

INLINE void meet(const ls_mixer *m, const asker *askers, int askers_count, const float *keys,
                 const float *values, const int32_t *rows, int count) {
    vf scores[QUERIES][BLOCK / 16];
    float weights[QUERIES][BLOCK], keep[QUERIES];
    float scale = m->squares ? 1.0f : 1.0f / __builtin_sqrtf((float)m->width);
    score_rows(askers, askers_count, keys, rows, count, m->width, scale, scores);
    for (int a = 0; a < askers_count; a++)
        keep[a] = m->squares ? square(scores[a], weights[a])
                             : soften(scores[a], askers[a].state, weights[a]);
    add_all_values(askers, askers_count, weights, keep, values, rows, count, m->width);
}

static void meet_four(const ls_mixer *m, const asker *askers, const float *keys,
                      const float *values, const int32_t *rows, int count) {
    meet(m, askers, QUERIES, keys, values, rows, count);
}

static void meet_one(const ls_mixer *m, const asker *askers, const float *keys, const float *values,
                     const int32_t *rows, int count) {
    meet(m, askers, 1, keys, values, rows, count);
}

/* any number of queries over the same block of rows */
static void meet_all(const ls_mixer *m, const asker *askers, int askers_count, const float *keys,
                     const float *values, const int32_t *rows, int count) {
    for (; askers_count >= QUERIES; askers += QUERIES, askers_count -= QUERIES)
        meet_four(m, askers, keys, values, rows, count);
    for (; askers_count > 0; askers++, askers_count--)
        meet_one(m, askers, keys, values, rows, count);
}

/* a node's place among the rows: how many it sees, its staged ancestors, the first within reach */
typedef struct {
    int32_t count, first;
    uint8_t ancestors[64];
} view;
_Static_assert(sizeof(view) + sizeof(running) + sizeof(asker) <= LS_MIX_FLOATS * sizeof(float), "scratch");

static void look(const ls_mixer *m, int node, view *v) {
    uint64_t seen = m->ancestors[m->staged - m->nodes + node];
    v->count = m->base;
    for (; seen; seen &= seen - 1)
        v->ancestors[v->count++ - m->base] = (uint8_t)__builtin_ctzll(seen);
    v->first = 0;
    if (m->window) v->first = v->count - m->window;
    if (m->group) v->first = ((v->count - 1) / m->group - (m->span - 1)) * m->group;
    if (v->first < 0) v->first = 0;
}

/* place in the buffer of the row at `position`, which may be negative for values */
INLINE int row_at(const ls_mixer *m, const view *v, int position) {
    return position < m->base ? position : m->base + v->ancestors[position - m->base];
}

/* places of the rows begin .. begin + count - 1 that a node sees; returns count, at most BLOCK */
INLINE int block_rows(const ls_mixer *m, const view *v, int begin, int32_t *rows) {
    int from = v->first + begin, count = v->count - from < BLOCK ? v->count - from : BLOCK;
    for (int i = 0; i < count; i++) rows[i] = row_at(m, v, from + i);
    return count;
}

/* How many nodes from `node` on see the same rows in this block: all committed, from the same one on. */
static int same_block(const ls_mixer *m, const view *views, int node, int begin) {
    int first = views[node].first, last = node + 1;
    if (first + begin + BLOCK <= m->base)
        while (last < m->nodes && views[last].first == first) last++;
    return last - node;
}

/* The rows within reach; what the askers' outputs hold at first is zero. */
static void mix_near(const ls_mixer *m, const float *keys, const float *values, const view *views,
                     const asker *askers) {
    int repeats = m->heads / m->kv_heads, most = 0;
    for (int n = 0; n < m->nodes; n++)
        if (views[n].count - views[n].first > most) most = views[n].count - views[n].first;
    /* blocks outside: the rows of one stay in the nearest cache for all queries */
    for (int begin = 0; begin < most; begin += BLOCK)
        for (int n = 0; n < m->nodes;) {
            int32_t rows[BLOCK];
            int count = block_rows(m, views + n, begin, rows);
            int nodes = same_block(m, views, n, begin);
            if (count > 0)
                meet_all(m, askers + n * repeats, nodes * repeats, keys, values, rows, count);
            n += nodes;
        }
}

/* out += factor * row */
INLINE void add_row(float factor, const float *row, int width, float *out) {
    for (int i = 0; i < width; i++) out[i] += factor * row[i];
}

/* closed groups: their sum, and rows of groups that close on the way to this node */
static void mix_closed(const ls_mixer *m, int head, const float *keys, const float *values,
                       const view *v, const float *q, float *out) {
    float query[512], key[512];
    size_t bytes = sizeof(float) * (size_t)m->width;
    memcpy(query, q, bytes);
    if (!m->squares) unit(query, m->width);
    const float *sums = m->sums + (size_t)head * m->width * m->width;
    for (int i = 0; i < m->width; i++)
        add_row(m->alpha * query[i], sums + (size_t)i * m->width, m->width, out);
    for (int i = 0; i < v->first; i++) {
        int row = row_at(m, v, i);
        memcpy(key, keys + (size_t)row * m->width, bytes);
        if (!m->squares) unit(key, m->width);
        float weight = m->alpha * vf_sum(products(query, key, m->width));
        add_row(weight, values + (size_t)row * m->width, m->width, out);
    }
}

/* causal convolution over the values of a node and its nearest ancestors */
static void mix_taps(const ls_mixer *m, const float *kernel, const float *values, const view *v,
                     float *out) {
    for (int j = 0; j < m->taps; j++) {
        int64_t row = row_at(m, v, v->count - 1 - j);
        add_row(kernel[j], values + row * m->width, m->width, out);
    }
}

static void mix(const ls_mixer *m, int head, const float *q, int64_t q_stride, float *out,
                int64_t out_stride, float *scratch) {
    int repeats = m->heads / m->kv_heads, columns = repeats * m->width;
    const float *keys = m->keys + head * m->key_stride;
    const float *values = m->values + head * m->value_stride;
    asker *askers = (asker *)scratch;
    running *states = (running *)(askers + m->nodes * repeats);
    view *views = (view *)(states + m->nodes * repeats);
    q += head * columns;
    out += head * columns;
    for (int n = 0; n < m->nodes; n++) {
        look(m, n, views + n);
        memset(out + n * out_stride, 0, sizeof(float) * (size_t)columns);
    }
    for (int i = 0; i < m->nodes * repeats; i++) {
        int64_t n = i / repeats, column = (int64_t)(i % repeats) * m->width;
        states[i] = (running){-__builtin_inff(), 0.0f};
        askers[i] = (asker){q + n * q_stride + column, out + n * out_stride + column, states + i};
    }
    mix_near(m, keys, values, views, askers);
    for (int n = 0; n < m->nodes; n++)
        for (int r = 0; r < repeats; r++) {
            float *o = out + n * out_stride + r * m->width;
            float scale = m->squares ? 1.0f : 1.0f / states[n * repeats + r].sum;
            for (int i = 0; i < m->width; i++) o[i] *= scale;
            if (m->sums)
                mix_closed(m, head, keys, values, views + n, q + n * q_stride + r * m->width, o);
            if (m->taps)
                mix_taps(m, m->kernel + (head * repeats + r) * m->taps, values, views + n, o);
        }
}
