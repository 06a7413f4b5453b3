/* Softmax attention of the new nodes of one slot, over one kv head. Part of every isa_*.c.
 *
 * A node sees rows in the order of their positions: the committed ones, then its own ancestors among
 * the staged ones. Sums are made in blocks of BLOCK such rows, counted along this order and not by
 * the place in the buffer. So a node of a tree gets, to the last bit, what it would have got after
 * its ancestors had been committed. */

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

/* scores of up to BLOCK rows; -inf behind `count` */
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

INLINE void attend_block(const ls_attend *a, const float *keys, const float *values,
                         const int32_t *rows, int count, const float *q, running *state,
                         float *out) {
    vf scores[BLOCK / 16];
    float weights[BLOCK];
    score_rows(q, keys, rows, count, a->width, 1.0f / __builtin_sqrtf((float)a->width), scores);
    vf most = vf_max(vf_max(scores[0], scores[1]), vf_max(scores[2], scores[3]));
    float top = vf_top(most);
    if (!(top > state->top)) top = state->top;
    vf total = vf_all(0.0f);
    for (int i = 0; i < BLOCK / 16; i++) {
        vf e = vf_exp(scores[i] - vf_all(top));
        vf_store(weights + 16 * i, e);
        total += e;
    }
    float before[16];
    vf_store(before, vf_exp(vf_all(state->top - top)));
    state->sum = state->sum * before[0] + vf_sum(total);
    state->top = top;
    add_all_values(weights, values, rows, count, a->width, before[0], out);
}

/* rows that a node sees, in the order of their positions; returns how many */
static int visible_rows(const ls_attend *a, int node, int32_t *rows) {
    uint64_t seen = a->ancestors[node];
    int total = a->base + __builtin_popcountll(seen);
    int first = a->window && total > a->window ? total - a->window : 0;
    int count = 0;
    for (int i = first; i < a->base; i++) rows[count++] = i;
    int skip = first > a->base ? first - a->base : 0;
    for (int i = 0; i < a->staged; i++)
        if (seen >> i & 1 && skip-- <= 0) rows[count++] = a->base + i;
    return count;
}

static void attend(const ls_attend *a, int head, const float *q, int64_t q_stride, float *out,
                   int64_t out_stride, float *scratch) {
    int repeats = a->heads / a->kv_heads, reach = a->base + a->staged;
    const float *keys = a->keys + head * a->kv_stride, *values = a->values + head * a->kv_stride;
    int32_t *rows = (int32_t *)scratch, *counts = rows + (size_t)a->nodes * reach;
    running *states = (running *)(counts + a->nodes);
    int most = 0;
    for (int n = 0; n < a->nodes; n++) {
        counts[n] = visible_rows(a, a->staged - a->nodes + n, rows + (size_t)n * reach);
        if (counts[n] > most) most = counts[n];
    }
    int first_column = head * repeats * a->width;
    for (int n = 0; n < a->nodes; n++)
        memset(out + n * out_stride + first_column, 0, sizeof(float) * repeats * a->width);
    for (int i = 0; i < a->nodes * repeats; i++) states[i] = (running){-__builtin_inff(), 0.0f};
    /* blocks outside: the rows of one stay in the nearest cache for all queries */
    for (int begin = 0; begin < most; begin += BLOCK)
        for (int n = 0; n < a->nodes; n++) {
            int count = counts[n] - begin < BLOCK ? counts[n] - begin : BLOCK;
            if (count <= 0) continue;
            for (int r = 0; r < repeats; r++) {
                int column = first_column + r * a->width;
                attend_block(a, keys, values, rows + (size_t)n * reach + begin, count,
                             q + n * q_stride + column, states + n * repeats + r,
                             out + n * out_stride + column);
            }
        }
    for (int n = 0; n < a->nodes; n++)
        for (int r = 0; r < repeats; r++) {
            float *o = out + n * out_stride + first_column + r * a->width;
            float scale = 1.0f / states[n * repeats + r].sum;
            for (int i = 0; i < a->width; i++) o[i] *= scale;
        }
}
