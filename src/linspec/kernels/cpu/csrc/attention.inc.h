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

/* scores of up to BLOCK rows; -inf behind `count`, which weighs nothing in either kind of weights */
INLINE void score_rows(const float *q, const float *keys, const int32_t *rows, int count, int width,
                       float scale, vf *scores) {
    for (int first = 0; first < BLOCK; first += 16) {
        vf sums[16];
        int n = count - first < 16 ? (count - first > 0 ? count - first : 0) : 16;
        for (int i = 0; i < n; i++)
            sums[i] = products(q, keys + (size_t)rows[first + i] * width, width);
        for (int i = n; i < 16; i++) sums[i] = vf_all(-__builtin_inff());
        scores[first / 16] = sum_each(sums) * vf_all(scale);
    }
}

/* out = out * keep + sum of weight * value row */
INLINE void add_values(const float *weights, const float *values, const int32_t *rows, int count,
                       int width, int chunk, float keep, float *out) {
    vf sums[4];
    for (int c = 0; c < chunk; c++) sums[c] = vf_load(out + 16 * c) * vf_all(keep);
    for (int i = 0; i < count; i++) {
        const float *row = values + (size_t)rows[i] * width;
        for (int c = 0; c < chunk; c++)
            sums[c] = LS_FMA(vf_all(weights[i]), vf_load(row + 16 * c), sums[c]);
    }
    for (int c = 0; c < chunk; c++) vf_store(out + 16 * c, sums[c]);
}

INLINE void add_values_part(const float *weights, const float *values, const int32_t *rows,
                            int count, int width, int part, float keep, float *out) {
    vf sum = vf_load_part(out, part) * vf_all(keep);
    for (int i = 0; i < count; i++)
        sum = LS_FMA(vf_all(weights[i]), vf_load_part(values + (size_t)rows[i] * width, part), sum);
    vf_store_part(out, sum, part);
}

INLINE void add_all_values(const float *weights, const float *values, const int32_t *rows,
                           int count, int width, float keep, float *out) {
    int c = 0;
    for (; c + 64 <= width; c += 64)
        add_values(weights, values + c, rows, count, width, 4, keep, out + c);
    for (; c + 16 <= width; c += 16)
        add_values(weights, values + c, rows, count, width, 1, keep, out + c);
    if (c < width)
        add_values_part(weights, values + c, rows, count, width, width - c, keep, out + c);
}

/* what the softmax of one query over the rows so far needs to go on */
typedef struct {
    float top, sum;
} running;

INLINE void softmax_block(const ls_mixer *m, const float *keys, const float *values,
                          const int32_t *rows, int count, const float *q, running *state,
                          float *out) {
    vf scores[BLOCK / 16];
    float weights[BLOCK], before[16];
    score_rows(q, keys, rows, count, m->width, 1.0f / __builtin_sqrtf((float)m->width), scores);
    float top = vf_top(vf_max(vf_max(scores[0], scores[1]), vf_max(scores[2], scores[3])));
    if (!(top > state->top)) top = state->top;
    vf total = vf_all(0.0f);
    for (int i = 0; i < BLOCK / 16; i++) {
        vf e = vf_exp(scores[i] - vf_all(top));
        vf_store(weights + 16 * i, e);
        total += e;
    }
    vf_store(before, vf_exp(vf_all(state->top - top)));
    state->sum = state->sum * before[0] + vf_sum(total);
    state->top = top;
    add_all_values(weights, values, rows, count, m->width, before[0], out);
}

INLINE void squares_block(const ls_mixer *m, const float *keys, const float *values,
                          const int32_t *rows, int count, const float *q, float *out) {
    vf scores[BLOCK / 16];
    float weights[BLOCK];
    score_rows(q, keys, rows, count, m->width, 1.0f, scores);
    for (int i = 0; i < BLOCK / 16; i++) {
        vf positive = vf_max(scores[i], vf_all(0.0f));
        vf_store(weights + 16 * i, positive * positive);
    }
    add_all_values(weights, values, rows, count, m->width, 1.0f, out);
}

/* a node's place among the rows: how many it sees, its staged ancestors, the first within reach */
typedef struct {
    int32_t count, first;
    uint8_t ancestors[64];
} view;
_Static_assert(sizeof(view) + sizeof(running) <= LS_MIX_FLOATS * sizeof(float), "scratch");

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

/* the rows within reach; out starts at zero */
static void mix_near(const ls_mixer *m, const float *keys, const float *values, const view *views,
                     running *states, const float *q, int64_t q_stride, float *out,
                     int64_t out_stride) {
    int repeats = m->heads / m->kv_heads, most = 0;
    for (int n = 0; n < m->nodes; n++)
        if (views[n].count - views[n].first > most) most = views[n].count - views[n].first;
    /* blocks outside: the rows of one stay in the nearest cache for all queries */
    for (int begin = 0; begin < most; begin += BLOCK)
        for (int n = 0; n < m->nodes; n++) {
            int from = views[n].first + begin, count = views[n].count - from;
            int32_t rows[BLOCK];
            if (count > BLOCK) count = BLOCK;
            for (int i = 0; i < count; i++) rows[i] = row_at(m, views + n, from + i);
            for (int r = 0; r < repeats && count > 0; r++) {
                const float *query = q + n * q_stride + r * m->width;
                float *o = out + n * out_stride + r * m->width;
                if (m->squares)
                    squares_block(m, keys, values, rows, count, query, o);
                else
                    softmax_block(m, keys, values, rows, count, query, states + n * repeats + r, o);
            }
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
    view *views = (view *)scratch;
    running *states = (running *)(views + m->nodes);
    q += head * columns;
    out += head * columns;
    for (int n = 0; n < m->nodes; n++) {
        look(m, n, views + n);
        memset(out + n * out_stride, 0, sizeof(float) * (size_t)columns);
    }
    for (int i = 0; i < m->nodes * repeats; i++) states[i] = (running){-__builtin_inff(), 0.0f};
    mix_near(m, keys, values, views, states, q, q_stride, out, out_stride);
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
