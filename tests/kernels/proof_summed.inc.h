/* Mixers of sums: every set against plain C, to the bit, and fading sums against a loop over time in double. */

/* the second and the third node stand beside each other behind the first */
enum { SUM_ROWS = 70, SUM_NODES = 3, SUM_HEADS = 3, SUM_GROUP = 24 };

static ls_summed form_of(int width, int map, int exact, int end, int together) {
    int shared = map == LS_MAP_POSITIVE || map == LS_MAP_PHASES, rows = shared ? width + 3 : map == LS_MAP_TWO_SIDED ? width : 0;
    int features = map == LS_MAP_TWO_SIDED || map == LS_MAP_PHASES ? 2 * rows : rows ? rows : width;
    if (map == LS_MAP_SERIES) features = 1 + width * (2 + width / 2);
    return (ls_summed){.map = map, .map_rows = rows, .map_shared = shared, .exact = exact,
                       .features = features, .end = end,
                       .together = together, .ones = end == LS_END_QUOTIENT || end == LS_END_BOUNDED, .floor = 1e-6f};
}

static ls_summed fading(int width, int delta, int exact) {
    return (ls_summed){.map = delta ? LS_MAP_UNIT : LS_MAP_SOFTMAX, .features = width, .together = !exact,
                       .exact = exact, .fades = 1, .delta = delta, .gates = delta ? 2 : width};
}

/* reads and folds with every set; the outputs of this one are left in `out` */
static void summed_pair(ls_mixer *m, const float *q, size_t sums_size, float *out) {
    const uint64_t ancestors[SUM_NODES] = {1, 3, 5};
    size_t outputs = (size_t)(SUM_NODES * SUM_HEADS * m->width);
    float *each[2], *sums[2];
    m->ancestors = ancestors;
    for (int i = 0; i < 2; i++) {
        const ls_ops *ops = i ? ls_current() : plain;
        each[i] = need(outputs * sizeof(float));
        void *scratch = need(ls_summed_scratch_bytes(m));
        ops->read_summed(m, q, SUM_HEADS * m->width, each[i], SUM_HEADS * m->width, scratch);
        sums[i] = copy(m->sums, sums_size);
        float *line = need((size_t)m->form->features * sizeof(float));
        ops->fold_summed(m, 0, SUM_ROWS - 1, sums[i], line);
        free(scratch), free(line);
    }
    expect(!memcmp(each[0], each[1], outputs * sizeof(float)), "sums read", m->width, m->form->map, m->form->exact, 0);
    expect(!memcmp(sums[0], sums[1], sums_size * sizeof(float)), "sums folded", m->width, m->form->map, 0, 0);
    memcpy(out, each[1], outputs * sizeof(float));
    for (int i = 0; i < 2; i++) free(each[i]), free(sums[i]);
}

/* what the second node reads, by the equations */
static void fading_in_double(const ls_mixer *m, const float *q, const float *out) {
    int w = m->width, gates = m->form->gates, delta = m->form->delta;
    double *s = need(sizeof *s * (size_t)(w * w)), *k = need(sizeof *k * (size_t)w), far = 0;
    for (int i = 0; i < w * w; i++) s[i] = (double)m->sums[i];
    for (int row = 0; row < SUM_ROWS + 2; row++) {
        const float *key = (const float *)m->keys + row * (w + gates);
        const float *v = (const float *)m->values + row * w;
        double total = 0;
        for (int i = 0; i < w; i++) total += delta ? (double)key[i] * (double)key[i] : exp((double)key[i]);
        for (int i = 0; i < w; i++) k[i] = delta ? (double)key[i] / sqrt(total) : exp((double)key[i]) / total;
        for (int i = 0; i < w * w; i++) s[i] *= exp((double)key[w + (delta ? 0 : i / w)]);
        for (int c = 0; c < w; c++) {
            double u = (double)v[c], known = 0;
            for (int i = 0; delta && i < w; i++) known += k[i] * s[i * w + c];
            if (delta) u = (double)key[w + 1] * (u - known);
            for (int i = 0; i < w; i++) s[i * w + c] += k[i] * u;
        }
    }
    const float *at = q + SUM_HEADS * w;
    double total = 0;
    for (int i = 0; i < w; i++) total += delta ? (double)at[i] * (double)at[i] : exp((double)at[i]);
    for (int c = 0; c < w; c++) {
        double o = 0;
        for (int i = 0; i < w; i++)
            o += (delta ? (double)at[i] / sqrt(total) : exp((double)at[i]) / total) * s[i * w + c];
        far = fmax(far, fabs(o - (double)out[SUM_HEADS * w + c]));
    }
    expect(far < 1e-4, "fading sums in double", w, delta, (int)(far * 1e6), 0);
    free(s), free(k);
}

static void summed(int width, ls_summed form) {
    int columns = width + form.ones, row = width + form.gates, rows = SUM_ROWS + SUM_NODES;
    size_t sums_size = (size_t)(form.features * columns);
    if (form.kept_groups) sums_size = (size_t)(form.kept_groups * form.kept_rows * (2 * width + 1));
    float *keys = floats((size_t)(rows * row)), *before = floats((size_t)((HISTORY + rows) * columns));
    float *values = before + HISTORY * columns, *conv_weights = floats(SUM_HEADS * TAPS), *sums = floats(sums_size);
    float *maps = floats((size_t)(SUM_HEADS * (form.map_rows + 1) * width)), *gain = floats((size_t)width);
    float *q = floats((size_t)(SUM_NODES * SUM_HEADS * width)), *out = floats((size_t)(SUM_NODES * SUM_HEADS * width));
    for (int i = 0; form.fades && i < rows * row; i++)
        if (i % row >= width) keys[i] = form.delta && i % row > width ? fabsf(keys[i]) : -fabsf(keys[i]) / 8;
    for (int i = 0; form.ones && i < rows; i++) values[i * columns + width] = 1;
    for (int i = 0; form.end == LS_END_QUOTIENT && i < (int)sums_size; i++) sums[i] = fabsf(sums[i]);
    float *row_maps = floats((size_t)(2 * form.kept_rows * SUM_GROUP)), *bias = floats(SUM_HEADS * 9);
    form.row_keys = row_maps;
    form.row_values = row_maps + form.kept_rows * SUM_GROUP;
    form.gain = gain;
    form.query_map = form.map_rows ? maps : NULL;
    ls_mixer m = {.heads = SUM_HEADS, .kv_heads = 1, .width = width, .committed = SUM_ROWS, .staged = SUM_NODES,
                  .nodes = SUM_NODES, .group = SUM_GROUP, .span = 2, .alpha = 0.5f, .score_scale = 0.3f, .score_cap = 2.0f,
                  .row_bytes = 4 * row, .value_bytes = 4 * columns, .keys = (char *)keys, .values = (char *)values,
                  .sums = sums, .form = &form, .query_map = maps, .key_map = maps};
    summed_pair(&m, q, sums_size, out);
    if (form.fades && !form.exact) fading_in_double(&m, q, out);
    m.taps = TAPS;
    m.conv_weights = conv_weights;
    m.bias = bias;
    m.bias_distances = 9;
    summed_pair(&m, q, sums_size, out);
    free(keys), free(before), free(conv_weights), free(sums), free(maps), free(gain), free(q), free(out);
    free(row_maps), free(bias);
}

static void gates(int width, int delta) {
    ls_summed form = fading(width, delta, LS_WEIGHT_NONE);
    float *k = floats((size_t)width), *map = floats((size_t)(width * 2)), *bias = floats((size_t)width + 2), *got[2];
    if (delta) form.gate_map = map; else form.gate_scale = map;
    ls_mixer m = {.width = width, .form = &form, .gate_map = map, .gate_scale = map, .gate_bias = bias};
    for (int i = 0; i < 2; i++) {
        got[i] = need(sizeof(float) * (size_t)form.gates);
        (i ? ls_current() : plain)->gates(&m, k, got[i]);
    }
    expect(!memcmp(got[0], got[1], sizeof(float) * (size_t)form.gates), "gates", width, delta, 0, 0);
    for (int i = 0; !delta && i < width; i++) {
        double x = (double)k[i] * (double)map[i] + (double)bias[i];
        expect(fabs(-log1p(exp(-x)) / 16 - (double)got[1][i]) < 1e-7, "gates in double", width, i, 0, 0);
    }
    free(k), free(map), free(bias), free(got[0]), free(got[1]);
}

static void all_summed(void) {
    const int widths[] = {2, 24, 33, 64};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        int width = widths[i];
        for (int map = LS_MAP_SAME; map <= LS_MAP_SERIES; map++)
            for (int exact = LS_WEIGHT_NONE; exact <= LS_WEIGHT_COLLISIONS; exact++) {
                int end = map == LS_MAP_SERIES ? LS_END_UNIT : exact == LS_WEIGHT_RELU2 ? LS_END_RMS : map == LS_MAP_PHASES ? LS_END_BOUNDED : map == LS_MAP_UNIT ? LS_END_PLAIN : LS_END_QUOTIENT;
                summed(width, form_of(width, map, exact, end, exact % 2));
            }
        for (int kept = 1; kept < 4; kept += 2)
            summed(width, (ls_summed){.kept_groups = kept, .kept_rows = 5, .exact = LS_WEIGHT_SOFTMAX});
        for (int delta = 0; delta < 2; delta++) {
            summed(width, fading(width, delta, LS_WEIGHT_NONE));
            summed(width, fading(width, delta, LS_WEIGHT_SOFTMAX));
            gates(width, delta);
        }
    }
}
