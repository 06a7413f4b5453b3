/* Sums that fade, row by row: S = a S + k u. Part of every isa_*.c.
 *
 * Each node has sums of its own, made from those of its parent: what a node reads depends on its path alone. */

/* log(1 + z) for 0 <= z <= 1, by the series of artanh */
INLINE vf log_1_plus(vf z) {
    vf w = z / (vf_set1(2.0f) + z), square = w * w, p = vf_set1(1.0f / 13);
    p = LS_FMA(p, square, vf_set1(1.0f / 11));
    p = LS_FMA(p, square, vf_set1(1.0f / 9));
    p = LS_FMA(p, square, vf_set1(1.0f / 7));
    p = LS_FMA(p, square, vf_set1(1.0f / 5));
    p = LS_FMA(p, square, vf_set1(1.0f / 3));
    return vf_set1(2.0f) * LS_FMA(p * square, w, w);
}

/* log(sigmoid(x)) / 16 */
static void log_decays(float *x, int count) {
    for (int i = 0; i < count; i += 16) {
        vf v = first_of(x + i, count - i);
        vf log = vf_min(v, vf_set1(0.0f)) - log_1_plus(vf_exp(-vf_abs(v)));
        store_first(x + i, log * vf_set1(1.0f / 16), count - i);
    }
}

/* see ls_ops */
static void gates_of(const ls_mixer *m, const float *k, float *gates) {
    const ls_summed *f = m->form;
    for (int e = 0; e < f->gates; e++) {
        float sum = 0.0f;
        for (int i = 0; f->gate_map && i < m->width; i++) sum += k[i] * m->gate_map[i * f->gates + e];
        gates[e] = (f->gate_map ? sum : k[e] * m->gate_scale[e]) + m->gate_bias[e];
    }
    log_decays(gates, decay_columns(f));
    if (f->delta) {
        float e = vf_exp(vf_set1(-gates[f->gates - 1]))[0];
        gates[f->gates - 1] = 1.0f / (1.0f + e);
    }
}

/* y = y a + u b */
static void fade_and_add(float *y, float a, const float *u, float b, int width) {
    for (int i = 0; i < width; i += 16) {
        vf faded = first_of(y + i, width - i) * vf_set1(a);
        store_first(y + i, LS_FMA(vf_set1(b), first_of(u + i, width - i), faded), width - i);
    }
}

/* one row written into the sums [width][width] */
static void write_row(const ls_mixer *m, int row, float *sums) {
    const ls_summed *f = m->form;
    const float *key = key_row(m, row), *value = (const float *)(m->values + (int64_t)row * m->value_bytes);
    int width = m->width, columns = decay_columns(f);
    float features[LS_MAX_HEAD_WIDTH], decays[LS_MAX_HEAD_WIDTH], u[LS_MAX_HEAD_WIDTH];
    features_of(m, NULL, key, 0, features);
    exp_row(key + width, 0.0f, columns, decays);
    if (!f->delta) {
        for (int i = 0; i < width; i++)
            fade_and_add(sums + (size_t)i * width, decays[columns > 1 ? i : 0], value, features[i], width);
        return;
    }
    memset(u, 0, sizeof *u * (size_t)width);
    accumulator to = {u, features, ADD, 0, 0};
    source lines = {.rows = sums, .stride = (int64_t)sizeof *sums * width, .kind = LS_F32, .count = width, .width = width};
    accumulate(&lines, &to, 1);
    for (int i = 0; i < width; i++) u[i] = key[width + f->gates - 1] * (value[i] - decays[0] * u[i]);
    for (int i = 0; i < width; i++)
        fade_and_add(sums + (size_t)i * width, decays[0], u, features[i], width);
}

/* scratch: sums of every staged row, and of the committed ones */
static void read_fading(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride,
                        float *scratch) {
    int repeats = m->heads / m->kv_heads, width = m->width, first = m->staged - m->nodes;
    size_t size = (size_t)width * (size_t)width;
    float features[LS_MAX_HEAD_WIDTH];
    memcpy(scratch, m->sums, sizeof *scratch * size);
    for (int row = m->summed; row < m->committed; row++) write_row(m, row, scratch);
    for (int i = 0; i < m->staged; i++) {
        uint64_t above = m->ancestors[i] & ~((uint64_t)1 << i);
        float *sums = scratch + (size_t)(i + 1) * size;
        memcpy(sums, above ? scratch + (size_t)(64 - __builtin_clzll(above)) * size : scratch,
               sizeof *sums * size);
        write_row(m, m->committed + i, sums);
        for (int r = 0; i >= first && r < repeats; r++) {
            int64_t n = i - first;
            float *at = out + n * out_stride + r * width;
            query_features(m, r, q + n * q_stride + r * width, features);
            memset(at, 0, sizeof *at * (size_t)width);
            accumulator to = {at, features, ADD, 0, 0};
            source lines = {.rows = sums, .stride = (int64_t)sizeof *sums * width, .kind = LS_F32, .count = width, .width = width};
            accumulate(&lines, &to, 1);
        }
    }
}

/* see ls_ops */
static void read_summed(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride,
                        void *scratch) {
    int through = m->form->fades && m->form->exact == LS_WEIGHT_NONE;
    if (m->form->kept_groups)
        read_compressed(m, q, q_stride, out, out_stride, scratch);
    else
        (through ? read_fading : read_listed)(m, q, q_stride, out, out_stride, scratch);
    for (int n = 0; m->taps && n < m->nodes; n++) {
        visible_rows v;
        find_visible(m, n, &v);
        convolve_node(m, 0, n, &v, out + n * out_stride, scratch);
    }
}

/* see ls_ops */
static void fold_summed(const ls_mixer *m, int first, int last, float *sums, void *scratch) {
    int columns = m->width + m->form->ones;
    float *features = scratch;
    if (m->form->kept_groups) {
        fold_compressed(m, first, last, sums);
        return;
    }
    for (int row = first; row < last; row++) {
        if (m->form->fades) {
            write_row(m, row, sums);
            continue;
        }
        const float *value = (const float *)(m->values + (int64_t)row * m->value_bytes);
        features_of(m, m->key_map, key_row(m, row), 0, features);
        for (int i = 0; i < m->form->features; i++)
            fade_and_add(sums + (size_t)i * columns, 1.0f, value, features[i], columns);
    }
}
