/* What the new nodes of one slot read from the rows within their reach, over one kv head. Part of
 * every isa_*.c.
 *
 * A node sees rows in the order of their positions: the committed ones, then its own ancestors among
 * the staged ones. Row i of this order has position i, counted from the slot's origin. Sums over rows
 * are made in blocks of BLOCK rows along this order, and blocks in chunks of LS_CHUNK, whatever the
 * place in the buffer. So a node of a tree gets, to the last bit, what it would have got after its
 * ancestors had been committed. All nodes that see the same committed rows meet them together: a long
 * cache is read once for a whole tree. */

#define BLOCK 64

/* a node's place among the rows: how many it sees, its staged ancestors, the first within reach */
typedef struct {
    int32_t count, first;
    uint8_t ancestors[64];
} view;

/* what the softmax of one query over the rows so far needs to go on */
typedef struct {
    float top, sum;
} running;

/* One query of one node, its output and its softmax. Codes and what follows: of queries that meet
 * coded rows. What is computed for one query, and in which order, does not depend on the others. */
typedef struct {
    const float *q;
    float *out;
    running *state;
    const view *sees;
    int8_t *codes;
    int32_t offset;
    float scale;
} asker;
_Static_assert(sizeof(view) + sizeof(asker) <= LS_MIX_FLOATS * sizeof(float), "scratch");
#define QUERIES 4 /* that meet a row at once */
/* unrolled before registers are given out */
#define EACH_ASKER _Pragma("GCC unroll 4") for (int a = 0; a < count; a++)
#define EACH_KEY _Pragma("GCC unroll 4") for (int k = 0; k < rows; k++)

/* Rows `from`.. of a kv head that some askers see: `shared` committed ones and then their own. news:
 * nobody has met them yet, so those of the next block should be asked for. */
typedef struct {
    const ls_mixer *m;
    const char *keys, *values;
    int from, shared, news;
} block;

static void look(const ls_mixer *m, int node, view *v) {
    uint64_t seen = m->ancestors[m->staged - m->nodes + node];
    v->count = m->base;
    for (; seen; seen &= seen - 1)
        v->ancestors[v->count++ - m->base] = (uint8_t)__builtin_ctzll(seen);
    int64_t first = 0;
    if (m->window) first = v->count - m->window;
    if (m->group) first = ((v->count - 1) / m->group - (m->span - 1)) * m->group;
    v->first = first > 0 ? (int32_t)first : 0;
}

/* place in the buffer of the row at `position`, which may be negative for values */
INLINE int row_at(const ls_mixer *m, const view *v, int position) {
    return position < m->base ? position : m->base + v->ancestors[position - m->base];
}

/* The rows of a block that only this asker sees: their places; returns how many. */
INLINE int own_rows(const block *b, const asker *a, int32_t *places) {
    int begin = b->from + b->shared, end = b->from + BLOCK;
    if (a->sees->count < end) end = a->sees->count;
    for (int i = begin; i < end; i++) places[i - begin] = row_at(b->m, a->sees, i);
    return end > begin ? end - begin : 0;
}

#define FOLD(n, how) \
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) \
        v[i] = SHUFFLE(v[2 * i], v[2 * i + 1], how##_0) + SHUFFLE(v[2 * i], v[2 * i + 1], how##_1)

/* lane i of the result is the sum of v[i], added up as in vf_sum */
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

/* have the keys of the next block ready */
INLINE void fetch_keys(const float *key, int rows, int width) {
    EACH_KEY
        for (int c = 0; c < width; c += 64)
            fetch((const char *)(key + (size_t)(k + BLOCK) * width), c, 0);
}

/* Products of `rows` neighbouring keys with some queries, a vector of partial sums each: in the order of
 * `products`. */
INLINE void products_each(const asker *askers, int count, const float *key, int rows, int width,
                          vf sums[][16], int place) {
    vf s[QUERIES][LS_KEYS];
    int i = 0;
    EACH_ASKER EACH_KEY s[a][k] = vf_all(0.0f);
    for (; i < width; i += 16) {
        int n = width - i;
        vf keys[LS_KEYS];
        EACH_KEY {
            const float *at = key + (size_t)k * width + i;
            keys[k] = n < 16 ? vf_load_part(at, n) : vf_load(at);
        }
        EACH_ASKER {
            const float *at = askers[a].q + i;
            vf q = n < 16 ? vf_load_part(at, n) : vf_load(at);
            EACH_KEY s[a][k] = LS_FMA(q, keys[k], s[a][k]);
        }
    }
    EACH_ASKER EACH_KEY sums[a][place + k] = s[a][k];
}

/* Products of the queries with the rows of a block; -inf behind the last row that is seen. */
INLINE void score_floats(const block *b, const asker *askers, int count, float scores[][BLOCK]) {
    int width = b->m->width;
    for (int first = 0; first < BLOCK; first += 16) {
        vf sums[QUERIES][16];
        int n = b->shared - first < 16 ? (b->shared > first ? b->shared - first : 0) : 16;
        const float *keys = (const float *)b->keys + (size_t)(b->from + first) * width;
        int i = 0;
        for (; i + LS_KEYS <= n; i += LS_KEYS) {
            if (b->news) fetch_keys(keys + (size_t)i * width, LS_KEYS, width);
            products_each(askers, count, keys + (size_t)i * width, LS_KEYS, width, sums, i);
        }
        for (; i < n; i++) products_each(askers, count, keys + (size_t)i * width, 1, width, sums, i);
        for (int a = 0; a < count; a++) {
            for (int i = n; i < 16; i++) sums[a][i] = vf_all(-__builtin_inff());
            vf_store(scores[a] + first, sum_each(sums[a]));
        }
    }
    for (int a = 0; a < count; a++) {
        int32_t places[BLOCK];
        int own = own_rows(b, askers + a, places);
        for (int i = 0; i < own; i++) {
            const char *key = b->keys + (size_t)places[i] * b->m->row_bytes;
            scores[a][b->shared + i] = vf_sum(products(askers[a].q, (const float *)key, width));
        }
    }
}

/* scores to softmax weights, in place; returns the factor on what was summed before */
INLINE float soften(float *scores, float scale, running *state) {
    vf s[BLOCK / 16], total = vf_all(0.0f), most = vf_all(-__builtin_inff());
    for (int i = 0; i < BLOCK / 16; i++) {
        s[i] = vf_load(scores + 16 * i) * vf_all(scale);
        most = vf_max(s[i], most);
    }
    float top = vf_top(most);
    if (!(top > state->top)) top = state->top;
    vf before = vf_exp(vf_all(state->top - top));
    for (int i = 0; i < BLOCK / 16; i++) {
        vf e = vf_exp(s[i] - vf_all(top));
        vf_store(scores + 16 * i, e);
        total += e;
    }
    state->sum = state->sum * before[0] + vf_sum(total);
    state->top = top;
    return before[0];
}

/* scores to squares of what is positive, in place; -inf weighs nothing either way */
INLINE void square(float *scores) {
    for (int i = 0; i < BLOCK; i += 16) {
        vf positive = vf_max(vf_load(scores + i), vf_all(0.0f));
        vf_store(scores + i, positive * positive);
    }
}

/* Turn scores into weights and add the rows of a block to the askers' outputs. */
INLINE void weigh(const block *b, const asker *askers, int count, float weights[][BLOCK],
                  const float *scales) {
    const ls_mixer *m = b->m;
    taker takers[LS_ROWS];
    for (int a = 0; a < count; a++) {
        float keep = 1.0f, scale = m->coded ? askers[a].scale : 1.0f;
        if (m->squares)
            square(weights[a]);
        else
            keep = soften(weights[a], scale / __builtin_sqrtf((float)m->width), askers[a].state);
        for (int i = 0; scales && i < BLOCK; i += 16)
            vf_store(weights[a] + i, vf_load(weights[a] + i) * vf_load(scales + i));
        takers[a] = (taker){askers[a].out, weights[a], keep};
    }
    const char *rows = b->values + (int64_t)b->from * m->row_bytes;
    source together = {rows, NULL, m->row_bytes, b->shared, m->width, m->coded,
                       b->news ? (int64_t)BLOCK * m->row_bytes : 0};
    take(&together, takers, count);
    for (int a = 0; a < count; a++) {
        int32_t places[BLOCK];
        int own = own_rows(b, askers + a, places);
        if (!own) continue;
        for (int i = 0; m->coded && i < own; i++)
            weights[a][b->shared + i] *= coded_scale(b->values, places[i], m);
        source apart = {b->values, places, m->row_bytes, own, m->width, m->coded, 0};
        takers[a] = (taker){askers[a].out, weights[a] + b->shared, 1.0f};
        take(&apart, takers + a, 1);
    }
}

INLINE void meet_floats(const block *b, const asker *askers, int count) {
    float scores[QUERIES][BLOCK];
    score_floats(b, askers, count, scores);
    weigh(b, askers, count, scores, NULL);
}

static void meet_codes(const block *b, const asker *askers, int count);

/* up to QUERIES askers (LS_ROWS of codes); constants, so that their sums stay in registers */
static void meet(const block *b, const asker *askers, int count) {
    if (b->m->coded) {
        meet_codes(b, askers, count);
        return;
    }
    if (count == QUERIES) {
        meet_floats(b, askers, QUERIES);
        return;
    }
    for (int a = 0; a < count; a++) meet_floats(b, askers + a, 1);
}

/* The rows begin.. of what is within reach, for askers that all reach back to the same first row. */
static void meet_all(block *b, const asker *askers, int count, int begin) {
    int most = b->m->coded ? LS_ROWS : QUERIES, n = 0;
    asker batch[LS_ROWS];
    b->from = askers->sees->first + begin;
    b->shared = b->m->base - b->from;
    if (b->shared > BLOCK) b->shared = BLOCK;
    if (b->shared < 0) b->shared = 0;
    b->news = 1;
    for (int a = 0; a < count; a++) {
        if (askers[a].sees->count > b->from) batch[n++] = askers[a];
        if (n == most || (n && a == count - 1)) {
            meet(b, batch, n);
            n = b->news = 0;
        }
    }
}

/* everything that `near` needs to know of the queries, in `scratch` */
static asker *ask(const ls_mixer *m, int head, const float *q, int64_t q_stride, float *partial,
                  void *scratch) {
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats, padded = (m->width + 31) & ~31;
    asker *askers = scratch;
    view *views = (view *)(askers + count);
    int8_t *codes = (int8_t *)(views + m->nodes);
    running *states = (running *)(partial + (size_t)count * m->width);
    for (int n = 0; n < m->nodes; n++) look(m, n, views + n);
    memset(partial, 0, sizeof(float) * (size_t)count * m->width);
    for (int i = 0; i < count; i++) {
        int n = i / repeats;
        states[i] = (running){-__builtin_inff(), 0.0f};
        askers[i] = (asker){.q = q + n * q_stride + (head * repeats + i % repeats) * m->width,
                            .out = partial + (size_t)i * m->width, .state = states + i,
                            .sees = views + n, .codes = codes + (size_t)i * padded};
        if (m->coded)
            askers[i].scale = put_codes(askers[i].q, m->width, padded, 1, 0, askers[i].codes,
                                        &askers[i].offset);
    }
    return askers;
}

/* see ls_ops */
static void mix_near(const ls_mixer *m, int head, int chunk, const float *q, int64_t q_stride,
                     float *partial, void *scratch) {
    int repeats = m->heads / m->kv_heads, most = 0;
    asker *askers = ask(m, head, q, q_stride, partial, scratch);
    block b = {m, m->keys + head * m->key_stride, m->values + head * m->value_stride, 0, 0, 1};
    for (int n = 0; n < m->nodes; n++) {
        const view *v = askers[n * repeats].sees;
        if (v->count - v->first > most) most = v->count - v->first;
    }
    int begin = chunk * LS_CHUNK, end = most < begin + LS_CHUNK ? most : begin + LS_CHUNK;
    for (; begin < end; begin += BLOCK)
        for (int n = 0, last; n < m->nodes; n = last) {
            int first = askers[n * repeats].sees->first;
            for (last = n + 1; last < m->nodes; last++)
                if (askers[last * repeats].sees->first != first) break;
            meet_all(&b, askers + n * repeats, (last - n) * repeats, begin);
        }
}
