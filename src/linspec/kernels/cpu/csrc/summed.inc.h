/* Mixers of sums, see SummedPlan: what a node reads from the sums of features of closed groups, and from the rows that
 * are not in them. Part of every isa_*.c.
 *
 * Rows are taken in the order of their positions, one after the other, wherever they lie: a node of a tree gets the bits
 * that it would have got after its ancestors had been committed, unless a group closes in between. */

#define FEATURE_FLOOR 1e-4f /* positive random features are never 0 */
#define LOWEST_SCORE -1e4f  /* that is subtracted from others */

/* y = exp(x - less) */
static void exp_row(const float *x, float less, int width, float *y) {
    for (int i = 0; i < width; i += 16)
        store_first(y + i, vf_exp(first_of(x + i, width - i) - vf_set1(less)), width - i);
}

static float sum_row(const float *x, int width) {
    vf sum = vf_set1(0.0f);
    for (int i = 0; i < width; i += 16) sum += first_of(x + i, width - i);
    return vf_sum(sum);
}

static float largest_of(const float *x, int width) {
    float most = -__builtin_inff();
    for (int i = 0; i < width; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* y = softmax(x), or of -x; x may be y */
static void softmax_row(const float *x, float sign, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = sign * x[i];
    exp_row(y, largest_of(y, width), width, y);
    float scale = 1.0f / sum_row(y, width);
    for (int i = 0; i < width; i++) y[i] *= scale;
}

INLINE float dot_row(const float *a, const float *b, int width) { return vf_sum(dot_lanes(a, b, width)); }

static void elu_plus_1(float *x, int width) {
    for (int i = 0; i < width; i += 16) {
        vf v = first_of(x + i, width - i);
        store_first(x + i, vf_select((vi)(v > vf_set1(0.0f)), v + vf_set1(1.0f), vf_exp(v)), width - i);
    }
}

/* see ls_ops: maps that need no more than the row */
static void map_row(int map, float *x, int width) {
    if (map == LS_MAP_UNIT) normalize(x, width);
    if (map == LS_MAP_RELU)
        for (int i = 0; i < width; i++) x[i] = x[i] > 0.0f ? x[i] : 0.0f;
    if (map == LS_MAP_ELU_PLUS_1) elu_plus_1(x, width);
    if (map == LS_MAP_SOFTMAX) softmax_row(x, 1.0f, width, x);
}

/* sin(x), or cos(x), with an error of 3e-7 for |x| < 1000: x is an angle within a right one and n half turns */
static vf sine(vf x, int cosine) {
    vf quarter = vf_set1(cosine ? 0.5f : 0.0f);
    vi n = vf_round(LS_FMA(x, vf_set1(0.318309886f), -quarter));
    vf turns = __builtin_convertvector(n, vf) + quarter;
    vf r = LS_FMA(turns, vf_set1(-3.14159274f), x);
    r = LS_FMA(turns, vf_set1(8.74227766e-8f), r);
    vf square = r * r, p = vf_set1(1.60590438e-10f);
    p = LS_FMA(p, square, vf_set1(-2.50521084e-8f));
    p = LS_FMA(p, square, vf_set1(2.75573192e-6f));
    p = LS_FMA(p, square, vf_set1(-1.98412698e-4f));
    p = LS_FMA(p, square, vf_set1(8.33333333e-3f));
    p = LS_FMA(p, square, vf_set1(-0.166666667f));
    vf y = LS_FMA(p * square, r, r);
    return vf_select((vi)(((n + cosine) & 1) == 1), -y, y);
}

static void phase_features(const float *rows, int count, const float *x, int width, float *y) {
    float share = 1.0f / __builtin_sqrtf((float)count), scale = inverse_length(x, width);
    for (int i = 0; i < count; i++) y[i] = dot_row(rows + (size_t)i * width, x, width) * scale;
    for (int cosine = 1; cosine >= 0; cosine--)
        for (int i = 0; i < count; i += 16)
            store_first(y + cosine * count + i, sine(first_of(y + i, count - i), cosine) * vf_set1(share),
                        count - i);
}

static void two_sided_features(const float *rows, int count, const float *x, int width, float *y) {
    for (int i = 0; i < count; i++) y[i] = dot_row(rows + (size_t)i * width, x, width);
    softmax_row(y, -1.0f, count, y + count);
    softmax_row(y, 1.0f, count, y);
}

/* largest: of a query, whose exponents are taken from it */
static void positive_features(const float *rows, int count, const float *x, int width, int largest, float *y) {
    float scaled[LS_MAX_HEAD_WIDTH], root = __builtin_sqrtf((float)width);
    float factor = 1.0f / __builtin_sqrtf(root), share = 1.0f / __builtin_sqrtf((float)count);
    for (int i = 0; i < width; i++) scaled[i] = x[i] * factor;
    float half = dot_row(scaled, scaled, width) / 2;
    for (int i = 0; i < count; i++) y[i] = dot_row(rows + (size_t)i * width, scaled, width) - half;
    exp_row(y, largest ? largest_of(y, count) : 0.0f, count, y);
    for (int i = 0; i < count; i++) y[i] = (y[i] + FEATURE_FLOOR) * share;
}

/* Features whose products are a polynomial of the cosine x, a^2 + b^2 x + c^2 x^2: channel i times channel i + j for all i,
 * around the end, each pair once, and twice at half of an even width. */
static void series_features(const float *x, int width, float *y) {
    const float a = 0.0625f, b = 0.141047396f, c = 0.210542200f;
    int half = width / 2;
    float scale = inverse_length(x, width), unit[LS_MAX_HEAD_WIDTH];
    for (int i = 0; i < width; i++) unit[i] = x[i] * scale;
    *y++ = a;
    for (int i = 0; i < width; i++) *y++ = b * unit[i];
    for (int j = 0; j <= half; j++) {
        float share = j == 0 || 2 * j == width ? c : c * 1.41421356f;
        for (int i = 0; i < width; i++) *y++ = unit[i + j < width ? i + j : i + j - width] * unit[i] * share;
    }
}

/* features y of one row x; rows: the matrix of its head, where the map has one */
static void features_of(const ls_mixer *m, const float *rows, const float *x, int query, float *y) {
    const ls_summed *f = m->form;
    if (f->map == LS_MAP_TWO_SIDED) {
        two_sided_features(rows, f->map_rows, x, m->width, y);
    } else if (f->map == LS_MAP_PHASES) {
        phase_features(rows, f->map_rows, x, m->width, y);
    } else if (f->map == LS_MAP_POSITIVE) {
        positive_features(rows, f->map_rows, x, m->width, query, y);
    } else if (f->map == LS_MAP_SERIES) {
        series_features(x, m->width, y);
    } else {
        memcpy(y, x, sizeof *y * (size_t)m->width);
        if (!f->mapped) map_row(f->map, y, m->width);
    }
}

static void query_features(const ls_mixer *m, int r, const float *q, float *y) {
    const ls_summed *f = m->form;
    size_t size = f->map_shared ? 0 : (size_t)f->map_rows * (size_t)m->width;
    features_of(m, f->query_map ? m->query_map + (size_t)r * size : NULL, q, 1, y);
    for (int i = 0; f->query_factors && i < f->features; i++) y[i] *= m->query_factors[r];
}

INLINE const float *key_row(const ls_mixer *m, int row) {
    return (const float *)(m->keys + (int64_t)row * m->row_bytes);
}

/* columns of a key row that are logarithms of factors */
INLINE int decay_columns(const ls_summed *f) { return f->gates - f->delta; }

static void write_row(const ls_mixer *m, int row, float *sums);

/* The rows of one node: `count` places in the buffer in the order of positions, of which the first `closed` are of groups
 * that count as summed. features: of the keys from row m->summed on. */
typedef struct {
    const int32_t *indices;
    int count, closed;
    const float *features;
} row_list;

INLINE float feature_product(const ls_mixer *m, const row_list *rows, int i, const float *features) {
    int row = rows->indices[i];
    const float *key = m->form->mapped ? key_row(m, row)
                                       : rows->features + (size_t)(row - m->summed) * m->form->features;
    return dot_row(features, key, m->form->features);
}

/* asin(x) for |x| < 1, with an error of 1e-7 */
static vf arc_sine(vf x) {
    vf size = vf_abs(x), large = vf_set1(0.5f) - size * vf_set1(0.5f), root = large;
    for (int i = 0; i < 16; i++) root[i] = __builtin_sqrtf(large[i] > 0.0f ? large[i] : 0.0f);
    vi far = (vi)(size > vf_set1(0.5f));
    vf y = vf_select(far, root, size), square = vf_select(far, large, size * size), p = vf_set1(4.2163199048e-2f);
    p = LS_FMA(p, square, vf_set1(2.4181311049e-2f));
    p = LS_FMA(p, square, vf_set1(4.5470025998e-2f));
    p = LS_FMA(p, square, vf_set1(7.4953002686e-2f));
    p = LS_FMA(p, square, vf_set1(1.6666752422e-1f));
    y = LS_FMA(p * square, y, y);
    y = vf_select(far, vf_set1(1.57079633f) - vf_set1(2.0f) * y, y);
    return vf_select((vi)(x < vf_set1(0.0f)), -y, y);
}

/* (1 - acos(x) / pi)^8 of cosines, in place: the chance that eight hashes agree */
static void collide(float *x, int count) {
    for (int i = 0; i < count; i += 16) {
        vf cosine = vf_max(vf_min(first_of(x + i, count - i), vf_set1(0.999f)), vf_set1(-0.999f));
        vf p = LS_FMA(arc_sine(cosine), vf_set1(0.318309886f), vf_set1(0.5f));
        p = p * p;
        p = p * p;
        store_first(x + i, p * p, count - i);
    }
}

/* A query, its features, and where its output goes. line: 2 value rows and as many weights as there are rows. */
typedef struct {
    const float *q, *features, *bias;
    float *line, *out;
} reading;

/* weights of the rows within the span */
static void weigh_rows(const ls_mixer *m, const row_list *rows, const reading *of, float *weights) {
    const float *q = of->q, *features = of->features;
    int kind = m->form->exact, count = rows->count - rows->closed;
    int cosines = kind == LS_WEIGHT_RELU2 || kind == LS_WEIGHT_COLLISIONS;
    float unit[LS_MAX_HEAD_WIDTH], length = 1.0f;
    memcpy(unit, q, sizeof(float) * (size_t)m->width);
    if (cosines) normalize(unit, m->width);
    for (int i = 0; i < count; i++) {
        if (kind == LS_WEIGHT_PRODUCTS) {
            weights[i] = feature_product(m, rows, rows->closed + i, features);
            continue;
        }
        const float *key = key_row(m, rows->indices[rows->closed + i]);
        if (cosines) length = inverse_length(key, m->width);
        weights[i] = dot_row(unit, key, m->width) * length;
        if (!cosines) weights[i] *= m->score_scale;
    }
    if (kind == LS_WEIGHT_PRODUCTS) return;
    if (cosines) {
        for (int i = 0; kind == LS_WEIGHT_RELU2 && i < count; i++)
            weights[i] = weights[i] > 0.0f ? weights[i] * weights[i] : 0.0f;
        if (kind == LS_WEIGHT_COLLISIONS) collide(weights, count);
        if (of->bias) add_bias(m, of->bias, count - 1, 0, count, weights);
        return;
    }
    if (m->score_cap > 0.0f) cap_row(weights, m->score_cap, count);
    if (kind == LS_WEIGHT_SOFTMAX) {
        softmax_row(weights, 1.0f, count, weights);
    } else {
        float most = largest_of(weights, count);
        exp_row(weights, most > LOWEST_SCORE ? most : LOWEST_SCORE, count, weights);
    }
}

/* the last touch on a sum of values */
static void end_row(const ls_mixer *m, const float *x, float *y) {
    const ls_summed *f = m->form;
    if (f->end == LS_END_RMS) {
        rms_norm(x, f->gain, f->floor, m->width, y);
        return;
    }
    if (f->end == LS_END_UNIT) {
        memmove(y, x, sizeof *y * (size_t)m->width);
        normalize(y, m->width);
        return;
    }
    float divisor = 1.0f;
    if (f->end == LS_END_QUOTIENT) divisor = x[m->width] + f->floor;
    if (f->end == LS_END_BOUNDED) divisor = x[m->width] > f->floor ? x[m->width] : f->floor;
    for (int i = 0; i < m->width; i++) y[i] = x[i] / divisor;
}

/* From both sums of values of a query to its output. */
static void end_reading(const ls_mixer *m, const reading *of) {
    int columns = m->width + m->form->ones;
    float *summed = of->line, *exact = summed + columns;
    if (m->form->together) {
        for (int i = 0; i < columns; i++) exact[i] += m->alpha * summed[i];
        end_row(m, exact, of->out);
        return;
    }
    end_row(m, summed, summed);
    for (int i = 0; i < m->width; i++) of->out[i] = exact[i] + m->alpha * summed[i];
}

/* Up to MAX_ACCUMULATORS queries over the same rows. */
static void read_queries(const ls_mixer *m, const row_list *rows, const reading *some, int count) {
    const ls_summed *f = m->form;
    int columns = m->width + f->ones;
    accumulator summed[MAX_ACCUMULATORS], exact[MAX_ACCUMULATORS];
    for (int t = 0; t < count; t++) {
        memset(some[t].line, 0, sizeof(float) * 2 * (size_t)columns);
        summed[t] = (accumulator){some[t].line, some[t].features, ADD, 0, 0};
    }
    source sums = {.rows = m->sums, .stride = (int64_t)sizeof(float) * columns, .kind = LS_F32,
                   .count = m->sums ? f->features : 0, .width = columns};
    accumulate(&sums, summed, count);
    for (int t = 0; t < count; t++) {
        float *weights = some[t].line + 2 * columns;
        for (int i = 0; i < rows->closed; i++) weights[i] = feature_product(m, rows, i, some[t].features);
        summed[t].weights = weights;
        exact[t] = (accumulator){some[t].line + columns, weights, ADD, 0, 0};
    }
    source values = {.rows = m->values, .indices = rows->indices, .stride = m->value_bytes, .kind = LS_F32,
                     .count = rows->closed, .width = columns};
    accumulate(&values, summed, count);
    if (f->exact != LS_WEIGHT_NONE) {
        for (int t = 0; t < count; t++) weigh_rows(m, rows, some + t, some[t].line + 2 * columns);
        values.indices += rows->closed;
        values.count = rows->count - rows->closed;
        accumulate(&values, exact, count);
    }
    for (int t = 0; t < count; t++) end_reading(m, some + t);
}

/* features of the keys from row m->summed on, where they are asked for */
static void all_features(const ls_mixer *m, const visible_rows *visible, float *to) {
    int asked = m->form->exact == LS_WEIGHT_PRODUCTS, sums = m->sums && !m->form->fades;
    for (int n = 0; n < m->nodes; n++) asked |= visible[n].first > m->summed && sums;
    for (int row = m->summed; asked && !m->form->mapped && row < m->committed + m->staged; row++)
        features_of(m, m->key_map, key_row(m, row), 0, to + (size_t)(row - m->summed) * m->form->features);
}

/* Sums that fade: the closed rows become part of them, in `sums`, and the others fade them by `decays`. */
static void fade_by_rows(ls_mixer *m, row_list *rows, float *sums, float *decays) {
    int columns = decay_columns(m->form);
    if (rows->closed) {
        memcpy(sums, m->sums, sizeof *sums * (size_t)m->width * (size_t)m->width);
        for (int i = 0; i < rows->closed; i++) write_row(m, rows->indices[i], sums);
        m->sums = sums;
    }
    rows->indices += rows->closed;
    rows->count -= rows->closed;
    rows->closed = 0;
    memset(decays, 0, sizeof *decays * (size_t)columns);
    for (int i = 0; i < rows->count; i++)
        for (int c = 0; c < columns; c++) decays[c] += key_row(m, rows->indices[i])[m->width + c];
    exp_row(decays, 0.0f, columns, decays);
    for (int c = columns; c < m->width; c++) decays[c] = decays[0];
}

/* What nodes n .. last - 1 read, which see the same rows; space: see read_listed. */
static void read_nodes(ls_mixer m, row_list rows, int n, int last, const float *q, int64_t q_stride, float *out,
                       int64_t out_stride, float *space, float *own_sums) {
    int repeats = m.heads / m.kv_heads, count = (last - n) * repeats, features = m.form->features;
    size_t line = 2 * (size_t)(m.width + m.form->ones) + (size_t)rows.count;
    float decays[LS_MAX_HEAD_WIDTH];
    if (m.form->fades) fade_by_rows(&m, &rows, own_sums, decays);
    for (int i = 0, some; i < count; i += some) {
        reading of[MAX_ACCUMULATORS];
        some = next_of(count - i);
        for (int t = 0; t < some; t++) {
            int node = n + (i + t) / repeats, r = (i + t) % repeats;
            float *at = space + (size_t)t * ((size_t)features + line);
            of[t] = (reading){q + node * q_stride + r * m.width, at, m.bias ? m.bias + (int64_t)r * m.bias_distances : NULL,
                              at + features, out + node * out_stride + r * m.width};
            query_features(&m, r, of[t].q, at);
            for (int c = 0; m.form->fades && c < m.width; c++) at[c] *= decays[c];
        }
        read_queries(&m, &rows, of, some);
    }
}

/* how many nodes from n on see the same rows and have no sums of their own */
static int nodes_alike(const ls_mixer *m, const visible_rows *visible, int n) {
    const visible_rows *one = visible + n;
    int last = n + 1, own = one->count - m->committed;
    for (; last < m->nodes && !m->form->fades; last++) {
        const visible_rows *v = visible + last;
        if (v->count != one->count || v->first != one->first) break;
        if (own > 0 && memcmp(v->ancestors, one->ancestors, (size_t)own)) break;
    }
    return last - n;
}

/* scratch: features of keys; for each of MAX_ACCUMULATORS queries its features, 2 value rows and weights; places of rows;
 * sums that are a node's own */
static void read_listed(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride,
                        float *scratch) {
    size_t most = (size_t)(m->committed + m->staged - m->summed), features = (size_t)m->form->features;
    float *space = scratch + most * features;
    int32_t *indices = (int32_t *)(space + MAX_ACCUMULATORS * (features + 2 * ((size_t)m->width + 1) + most));
    visible_rows visible[LS_MAX_NODES];
    for (int n = 0; n < m->nodes; n++) find_visible(m, n, visible + n);
    all_features(m, visible, scratch);
    for (int n = 0, last; n < m->nodes; n = last) {
        const visible_rows *v = visible + n;
        last = n + nodes_alike(m, visible, n);
        /* where closed groups are forgotten, nothing is read of them */
        int begin = !m->sums && v->first > m->summed ? v->first : m->summed;
        row_list rows = {indices, v->count - begin, v->first > begin ? v->first - begin : 0, scratch};
        for (int i = 0; i < rows.count; i++) indices[i] = row_at(m, v, begin + i);
        read_nodes(*m, rows, n, last, q, q_stride, out, out_stride, space, (float *)(indices + most));
    }
}
