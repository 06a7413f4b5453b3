/* The end of a mixer: what the rows of a node have given, the sums of closed groups, the convolution.
 * Part of every isa_*.c. */

INLINE vf dot_lanes(const float *a, const float *b, int width) {
    vf sum = vf_set1(0.0f);
    int whole = width & ~15;
    for (int i = 0; i < whole; i += 16) sum = LS_FMA(vf_load(a + i), vf_load(b + i), sum);
    if (whole < width)
        sum = LS_FMA(vf_load_part(a + whole, width - whole), vf_load_part(b + whole, width - whole),
                     sum);
    return sum;
}

/* rows of groups that close on the path to this node */
static void add_closing_rows(const ls_mixer *m, const float *keys, const float *values,
                             const visible_rows *v, const float *features, float *out) {
    float key[LS_MAX_HEAD_WIDTH];
    for (int i = m->summed; i < v->first; i++) {
        int64_t row = row_at(m, v, i);
        memcpy(key, keys + row * m->width, sizeof(float) * (size_t)m->width);
        if (!m->squared_relu) normalize(key, m->width);
        float weight = vf_sum(dot_lanes(features, key, m->width));
        for (int c = 0; c < m->width; c++) out[c] += weight * values[row * m->width + c];
    }
}

/* see ls_ops: a few lines of the sums at a time, each with a column of the keys as weights */
static void fold_rows(const ls_mixer *m, int head, int first, int last, float *sums) {
    const float *keys = (const float *)(m->keys + head * m->key_stride);
    const float *values = (const float *)(m->values + head * m->value_stride);
    for (int64_t row = first; row < last; row += BLOCK) {
        int count = last - row < BLOCK ? (int)(last - row) : BLOCK;
        const float *key = keys + row * m->width;
        float scales[BLOCK], columns[MAX_ACCUMULATORS][BLOCK];
        for (int i = 0; i < count; i++)
            scales[i] = m->squared_relu ? 1.0f : inverse_length(key + i * m->width, m->width);
        source rows = {values + row * m->width, NULL, m->row_bytes, LS_F32, count, m->width, NULL, 0};
        for (int line = 0, lines; line < m->width; line += lines) {
            accumulator to[MAX_ACCUMULATORS] = {{0}};
            lines = m->width - line < MAX_ACCUMULATORS ? m->width - line : MAX_ACCUMULATORS;
            for (int t = 0; t < lines; t++) {
                for (int i = 0; i < count; i++)
                    columns[t][i] = key[(int64_t)i * m->width + line + t] * scales[i];
                to[t] = (accumulator){sums + (int64_t)(line + t) * m->width, columns[t], ADD, 0, 0};
            }
            accumulate(&rows, to, lines);
        }
    }
}

/* the sums over closed groups, for up to MAX_ACCUMULATORS queries at once */
static void add_closed_sums(const ls_mixer *m, int head, const visible_rows *const *visible,
                            const float *const *q, float *const *out, int count) {
    float features[MAX_ACCUMULATORS][LS_MAX_HEAD_WIDTH];
    accumulator to[MAX_ACCUMULATORS] = {{0}};
    const float *keys = (const float *)(m->keys + head * m->key_stride);
    const float *values = (const float *)(m->values + head * m->value_stride);
    for (int t = 0; t < count; t++) {
        memcpy(features[t], q[t], sizeof(float) * (size_t)m->width);
        if (!m->squared_relu) normalize(features[t], m->width);
        for (int i = 0; i < m->width; i++) features[t][i] *= m->alpha;
        to[t] = (accumulator){out[t], features[t], ADD, 0, 0};
    }
    int64_t bytes = m->width * (int64_t)sizeof(float);
    source sums = {m->sums + (int64_t)head * m->width * m->width, NULL, bytes, LS_F32, m->width, m->width, NULL, 0};
    accumulate(&sums, to, count);
    for (int t = 0; t < count; t++)
        add_closing_rows(m, keys, values, visible[t], features[t], out[t]);
}

/* causal convolution over the values of a node and its nearest ancestors, for its heads; space: a block of rows */
static void add_convolution(const ls_mixer *m, int head, const visible_rows *v, float *out, float *space) {
    int repeats = m->heads / m->kv_heads, padded = ls_up16(m->width);
    const char *values = m->values + head * m->value_stride;
    for (int first = 0; first < m->taps; first += BLOCK) {
        float scales[BLOCK], weights[BLOCK];
        int count = m->taps - first < BLOCK ? m->taps - first : BLOCK;
        for (int i = 0; i < count; i++) {
            const char *row = value_address(m, values, row_at(m, v, v->count - 1 - first - i));
            widen_rows(m, row, m->value_bytes, 1, 0, space + i * padded);
            scales[i] = m->row_kind == LS_INT8 ? row_scale(row, m->value_bytes) : 1.0f;
        }
        source rows = {space, NULL, padded * (int64_t)sizeof *space, LS_F32, count, m->width, NULL, 0};
        for (int r = 0; r < repeats; r++) {
            const float *taps = m->conv_weights + (int64_t)(head * repeats + r) * m->taps + first;
            for (int i = 0; i < count; i++) weights[i] = taps[i] * scales[i];
            accumulator one = {out + r * m->width, weights, ADD, 0, 0};
            accumulate(&rows, &one, 1);
        }
    }
}

/* the same over the values around a node that overwrites, the middle tap on its own: the first tap is for the last row */
static void add_centred_convolution(const ls_mixer *m, int head, int node, float *out, float *space) {
    int repeats = m->heads / m->kv_heads, padded = ls_up16(m->width), in_place = m->row_kind == LS_F32;
    int last = m->overwritten[node] - m->ahead + m->taps / 2, missing = last - (m->committed + m->behind - 1);
    int end = last + m->ahead + 1 < m->taps ? last + m->ahead + 1 : m->taps;
    const char *values = m->values + head * m->value_stride;
    for (int first = missing > 0 ? missing : 0; first < end; first += BLOCK) {
        int count = end - first < BLOCK ? end - first : BLOCK;
        const char *rows = value_address(m, values, last - first);
        int64_t bytes = m->value_bytes;
        for (int i = 0; i < count && !in_place; i++) widen_rows(m, rows - i * bytes, m->value_bytes, 1, 0, space + i * padded);
        source from = {in_place ? rows : (const char *)space, NULL, in_place ? -bytes : padded * (int64_t)sizeof *space,
                       LS_F32, count, m->width, NULL, 0};
        for (int r = 0; r < repeats; r++) {
            accumulator one = {out + r * m->width, m->conv_weights + (int64_t)(head * repeats + r) * m->taps + first, ADD, 0, 0};
            accumulate(&from, &one, 1);
        }
    }
}

/* the convolution of one node */
static void convolve_node(const ls_mixer *m, int head, int node, const visible_rows *v, float *out, float *space) {
    if (m->overwritten)
        add_centred_convolution(m, head, node, out, space);
    else
        add_convolution(m, head, v, out, space);
}

/* One query: its output from its sum over all exact rows. */
INLINE void end_query(const ls_mixer *m, const float *sum, const softmax_state *state, float *out) {
    float scale = m->squared_relu ? 1.0f : 1.0f / state->sum;
    for (int i = 0; i < m->width; i++) out[i] = sum[i] * scale;
}

/* see ls_ops */
static void end_attention(const ls_mixer *m, int head, const float *q, int64_t q_stride, float *partial, float *out,
                          int64_t out_stride, void *scratch) {
    int repeats = m->heads / m->kv_heads, queries = m->nodes * repeats, pending = 0;
    float *space = scratch;
    visible_rows *visible = (visible_rows *)(space + ls_block_floats(m));
    const visible_rows *seen[MAX_ACCUMULATORS];
    const float *q_at[MAX_ACCUMULATORS];
    float *out_at[MAX_ACCUMULATORS];
    for (int n = 0; n < m->nodes; n++) find_visible(m, n, visible + n);
    for (int i = 0; i < queries; i++) {
        int n = i / repeats, column = (head * repeats + i % repeats) * m->width;
        float *at = out + n * out_stride + column;
        end_query(m, partial + (size_t)i * ls_up16(m->width), states_of(m, partial) + i, at);
        if (!m->sums) continue;
        seen[pending] = visible + n;
        q_at[pending] = q + n * q_stride + column;
        out_at[pending++] = at;
        if (pending == MAX_ACCUMULATORS || i == queries - 1) {
            add_closed_sums(m, head, seen, q_at, out_at, pending);
            pending = 0;
        }
    }
    for (int n = 0; m->taps && n < m->nodes; n++)
        convolve_node(m, head, n, visible + n, out + n * out_stride + head * repeats * m->width, space);
}
