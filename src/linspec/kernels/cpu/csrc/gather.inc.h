/* What a node reads in the end: its chunks put together, closed groups, the convolution. Part of every
 * isa_*.c. */

/* Add the sums of a later chunk to those of all before it. */
static void join(const ls_mixer *m, float *out, running *state, const float *more,
                 const running *later) {
    float mine = 1.0f, its = 1.0f;
    if (!m->squares) {
        if (later->sum == 0.0f) return; /* its rows are behind this node */
        float top = state->top > later->top ? state->top : later->top;
        mine = vf_exp(vf_all(state->top - top))[0];
        its = vf_exp(vf_all(later->top - top))[0];
        *state = (running){top, state->sum * mine + later->sum * its};
    }
    for (int i = 0; i < m->width; i++) out[i] = out[i] * mine + more[i] * its;
}

/* rows of groups that close on the way to this node */
static void mix_closing(const ls_mixer *m, const float *keys, const float *values, const view *v,
                        const float *query, float *out) {
    float key[512];
    for (int i = m->closed; i < v->first; i++) {
        int64_t row = row_at(m, v, i);
        memcpy(key, keys + row * m->width, sizeof(float) * (size_t)m->width);
        if (!m->squares) unit(key, m->width);
        float weight = vf_sum(products(query, key, m->width));
        for (int c = 0; c < m->width; c++) out[c] += weight * values[row * m->width + c];
    }
}

/* see ls_ops: TAKERS lines of the sums at a time, each of which takes a column of the keys */
static void mix_fold(const ls_mixer *m, int head, int first, int last, float *sums) {
    const float *keys = (const float *)(m->keys + head * m->key_stride);
    const float *values = (const float *)(m->values + head * m->value_stride);
    for (int64_t row = first; row < last; row += BLOCK) {
        int count = last - row < BLOCK ? (int)(last - row) : BLOCK;
        const float *key = keys + row * m->width;
        float scales[BLOCK], columns[TAKERS][BLOCK];
        for (int i = 0; i < count; i++) scales[i] = m->squares ? 1.0f : to_unit(key + i * m->width, m->width);
        source rows = {(const char *)(values + row * m->width), NULL, m->row_bytes, count, m->width, 0, 0};
        for (int line = 0, lines; line < m->width; line += lines) {
            taker takers[TAKERS] = {{0}};
            lines = m->width - line < TAKERS ? m->width - line : TAKERS;
            for (int t = 0; t < lines; t++) {
                for (int i = 0; i < count; i++)
                    columns[t][i] = key[(int64_t)i * m->width + line + t] * scales[i];
                takers[t] = (taker){sums + (int64_t)(line + t) * m->width, columns[t], 1.0f};
            }
            take(&rows, takers, lines);
        }
    }
}

/* the sums over closed groups, for up to TAKERS queries at once */
static void mix_closed(const ls_mixer *m, int head, const view *const *views, const float *const *q,
                       float *const *out, int count) {
    float queries[TAKERS][512];
    taker takers[TAKERS] = {{0}};
    const float *keys = (const float *)(m->keys + head * m->key_stride);
    const float *values = (const float *)(m->values + head * m->value_stride);
    for (int t = 0; t < count; t++) {
        memcpy(queries[t], q[t], sizeof(float) * (size_t)m->width);
        if (!m->squares) unit(queries[t], m->width);
        for (int i = 0; i < m->width; i++) queries[t][i] *= m->alpha;
        takers[t] = (taker){out[t], queries[t], 1.0f};
    }
    int64_t bytes = (int64_t)m->width * (int64_t)sizeof(float);
    const char *rows = (const char *)m->sums + head * m->width * bytes;
    source sums = {rows, NULL, bytes, m->width, m->width, 0, 0};
    take(&sums, takers, count);
    for (int t = 0; t < count; t++) mix_closing(m, keys, values, views[t], queries[t], out[t]);
}

/* causal convolution over the values of a node and its nearest ancestors, for its heads */
static void mix_taps(const ls_mixer *m, int head, const view *v, float *out) {
    int repeats = m->heads / m->kv_heads;
    const char *values = m->values + head * m->value_stride;
    for (int first = 0; first < m->taps; first += BLOCK) {
        int32_t places[BLOCK];
        float weights[BLOCK];
        int count = m->taps - first < BLOCK ? m->taps - first : BLOCK;
        for (int i = 0; i < count; i++) places[i] = row_at(m, v, v->count - 1 - first - i);
        source rows = {values, places, m->row_bytes, count, m->width, m->coded, 0};
        for (int r = 0; r < repeats; r++) {
            const float *kernel = m->kernel + (int64_t)(head * repeats + r) * m->taps + first;
            for (int i = 0; i < count; i++)
                weights[i] = kernel[i] * (m->coded ? coded_scale(values, places[i], m) : 1.0f);
            taker one = {out + r * m->width, weights, 1.0f};
            take(&rows, &one, 1);
        }
    }
}

static void finish_query(const ls_mixer *m, int query, int queries, int chunks, float *partials,
                         float *out) {
    size_t size = (size_t)queries * (size_t)(m->width + 2);
    float *sum = partials + (size_t)query * m->width;
    running *state = (running *)(partials + (size_t)queries * m->width) + query;
    for (int c = 1; c < chunks; c++) join(m, sum, state, sum + c * size, (running *)((float *)state + c * size));
    float scale = m->squares ? 1.0f : 1.0f / state->sum;
    for (int i = 0; i < m->width; i++) out[i] = sum[i] * scale;
}

/* see ls_ops */
static void mix_gather(const ls_mixer *m, int head, int chunks, const float *q, int64_t q_stride,
                       float *partials, float *out, int64_t out_stride, void *scratch) {
    int repeats = m->heads / m->kv_heads, queries = m->nodes * repeats, waiting = 0;
    view *views = scratch;
    const view *whose[TAKERS];
    const float *asked[TAKERS];
    float *to[TAKERS];
    for (int n = 0; n < m->nodes; n++) look(m, n, views + n);
    for (int i = 0; i < queries; i++) {
        int n = i / repeats, column = (head * repeats + i % repeats) * m->width;
        float *at = out + n * out_stride + column;
        finish_query(m, i, queries, chunks, partials, at);
        if (!m->sums) continue;
        whose[waiting] = views + n, asked[waiting] = q + n * q_stride + column, to[waiting++] = at;
        if (waiting == TAKERS || i == queries - 1) {
            mix_closed(m, head, whose, asked, to, waiting);
            waiting = 0;
        }
    }
    for (int n = 0; m->taps && n < m->nodes; n++)
        mix_taps(m, head, views + n, out + n * out_stride + head * repeats * m->width);
}
