/* Closed segments of low rank: every kind of row, a tree of which some nodes see one segment more closed. Part of proof.c. */

enum { SEGMENT = 536, RANK = 19, TURNED = 6, STATE_HEADS = 2 };
static const int shadow_kinds[] = {LS_F32, LS_BF16, LS_F16, LS_INT8, LS_INT4};

/* what is past with `segments`, as a whole and in the first of them */
typedef struct {
    case_of c;
    ls_past past[2];
    char *left, *right[2], *landmarks[2], *outlier_keys[2], *outlier_values[2], *values;
    const char *mapped;
    int32_t *outliers[2], *regions;
    float *cosines, *sines;
} shadow_case;

/* tensors of `segments`, those that do not just get longer */
static void past_of(shadow_case *s, int at, int segments) {
    const ls_mixer *m = &s->c.m;
    int chunks = segments * SEGMENT / m->chunk, odd = segments * m->outliers, width = m->width, kind = m->row_kind;
    s->right[at] = some_rows(kind, width, (size_t)(segments * STATE_HEADS * RANK), RANDOM);
    s->landmarks[at] = some_rows(kind, width, (size_t)(STATE_HEADS * chunks), RANDOM);
    s->outlier_keys[at] = some_rows(kind, width, (size_t)(STATE_HEADS * odd * m->chunk), RANDOM);
    s->outlier_values[at] = some_rows(kind, width, (size_t)(STATE_HEADS * odd * m->chunk), RANDOM);
    s->outliers[at] = need(sizeof(int32_t) * (size_t)(STATE_HEADS * odd));
    for (int i = 0; i < STATE_HEADS * odd; i++) {
        int segment = i % odd / m->outliers, each = SEGMENT / m->chunk;
        s->outliers[at][i] = segment * each + (int)((size_t)(i % odd % m->outliers) * 3 + next() % 2) % each;
    }
    s->past[at] = (ls_past){.segments = segments, .outliers = s->outliers[at], .regions = s->regions, .left = s->left,
                            .right = s->right[at], .landmarks = s->landmarks[at], .outlier_keys = s->outlier_keys[at],
                            .outlier_values = s->outlier_values[at], .values = &s->mapped};
}

static void fill_shadow(shadow_case *s, int kind, int width, int chunk, int segments, int marked) {
    size_t rows = (size_t)((segments + 1) * SEGMENT);
    *s = (shadow_case){.c = make_case(kind, width, 0, SEGMENT, 0, TAPS, RANDOM)};
    ls_mixer *m = &s->c.m;
    free(s->c.keys);
    s->c.keys = some_rows(kind, 2 * width, BASE + NODES, RANDOM);
    m->sums = NULL, m->heads = QUERY_HEADS / KV, m->kv_heads = 1;
    m->keys = s->c.keys, m->row_bytes = row_bytes(kind, 2 * width);
    m->rank = RANK, m->chunk = chunk, m->outliers = 2, m->marked = marked;
    m->past_heads = STATE_HEADS, m->past_head = 1, m->left_bytes = row_bytes(kind, RANK);
    m->turned = width < TURNED ? 0 : TURNED;
    s->cosines = m->turned ? floats(rows * TURNED) : NULL, s->sines = m->turned ? floats(rows * TURNED) : NULL;
    m->cosines = s->cosines, m->sines = s->sines;
    s->left = some_rows(kind, RANK, rows, RANDOM);
    s->values = some_rows(kind, width, rows * STATE_HEADS, RANDOM);
    s->mapped = s->values;
    s->regions = need(sizeof(int32_t) * (size_t)(segments + 1));
    for (int i = 0; i <= segments; i++) s->regions[i] = segments - i;
    past_of(s, 0, segments), past_of(s, 1, segments + 1);
    m->past = s->past;
}

static void free_shadow(shadow_case *s) {
    for (int i = 0; i < 2; i++) {
        free(s->right[i]), free(s->landmarks[i]), free(s->outlier_keys[i]), free(s->outlier_values[i]);
        free(s->outliers[i]);
    }
    free(s->left), free(s->values), free(s->regions), free(s->cosines), free(s->sines);
    free_case(&s->c);
}

static float *attended_past(const ls_ops *ops, const ls_mixer *m, const float *q) {
    int stride = m->heads * m->width;
    float *sum = need(ls_partial_floats(m) * sizeof *sum), *out = need(sizeof *out * (size_t)(m->nodes * stride));
    void *scratch = need(ls_shadow_scratch_bytes(m));
    ops->attend_shadow(m, q, stride, sum, scratch);
    ops->end_attention(m, 0, q, stride, sum, out, stride, scratch);
    free(sum), free(scratch);
    return out;
}

/* Every set as plain C; a node of the tree as alone. */
static void shadows(int kind, int width, int chunk, int segments, int marked) {
    shadow_case s;
    fill_shadow(&s, kind, width, chunk, segments, marked);
    size_t each = (size_t)(s.c.m.heads * width), bytes = sizeof(float) * NODES * each;
    float *one = attended_past(plain, &s.c.m, s.c.q), *other = attended_past(ls_current(), &s.c.m, s.c.q);
    expect(memcmp(one, other, bytes) == 0, "closed segments", kind, width, chunk, segments);
    for (int node = 0; node < NODES; node++) {
        ls_mixer m = s.c.m;
        m.nodes = 1, m.staged = node + 1;
        float *alone = attended_past(ls_current(), &m, s.c.q + node * each);
        expect(!memcmp(alone, other + node * each, each * sizeof *alone), "alone", kind, width, chunk, node);
        free(alone);
    }
    free(one), free(other);
    free_shadow(&s);
}

/* ---- floats, everything selected, in double */

typedef struct {
    double most, all, *sum;
} exact_softmax;

static void take_row(exact_softmax *to, const float *q, const double *key, const float *value, int width) {
    double score = 0.0, scale;
    for (int c = 0; c < width; c++) score += (double)q[c] * key[c];
    score /= sqrt((double)width);
    double most = score > to->most ? score : to->most;
    scale = exp(to->most - most);
    for (int c = 0; c < width; c++) to->sum[c] = to->sum[c] * scale + exp(score - most) * (double)value[c];
    to->all = to->all * scale + exp(score - most), to->most = most;
}

static void take_plain(exact_softmax *to, const float *q, const float *key, const float *value, int width) {
    double exact[LS_MAX_HEAD_WIDTH];
    for (int c = 0; c < width; c++) exact[c] = (double)key[c];
    take_row(to, q, exact, value, width);
}

static void take_rebuilt(exact_softmax *to, const shadow_case *s, const ls_past *past, const float *q, int row) {
    const ls_mixer *m = &s->c.m;
    int width = m->width, segment = row / SEGMENT, half = m->turned / 2;
    const float *left = (const float *)past->left + (size_t)row * RANK;
    const float *right = (const float *)past->right + (size_t)((segment * STATE_HEADS + 1) * RANK) * (size_t)width;
    size_t place = (size_t)((s->regions[segment] * STATE_HEADS + 1) * SEGMENT + row % SEGMENT);
    const float *cosines = m->cosines + row * m->turned, *sines = m->sines + row * m->turned;
    double key[LS_MAX_HEAD_WIDTH] = {0}, turned[LS_MAX_HEAD_WIDTH];
    for (int r = 0; r < RANK; r++)
        for (int c = 0; c < width; c++) key[c] += (double)left[r] * (double)right[r * width + c];
    for (int c = 0; c < width; c++)
        turned[c] = c >= m->turned ? key[c]
                                   : key[c] * (double)cosines[c] + key[c < half ? c + half : c - half] * (double)sines[c];
    take_row(to, q, turned, (const float *)s->values + place * (size_t)width, width);
}

static void shadow_in_double(int width, int chunk) {
    shadow_case s;
    fill_shadow(&s, LS_F32, width, chunk, 2, 1000);
    ls_mixer *m = &s.c.m;
    m->taps = 0;
    float *out = attended_past(ls_current(), m, s.c.q);
    for (int node = 0, far = 0; node < NODES; node++, far = 0) {
        int count = BASE + __builtin_popcountll(tree[node]), first = ((count - 1) / SEGMENT - 1) * SEGMENT;
        const ls_past *past = s.past + (first > 0);
        int odd = past->segments * m->outliers, rows = odd * chunk;
        for (int r = 0; r < m->heads; r++) {
            const float *q = s.c.q + (size_t)((node * m->heads + r) * width);
            double sum[LS_MAX_HEAD_WIDTH] = {0};
            exact_softmax to = {-1e30, 0.0, sum};
            for (int i = 0; i < rows; i++)
                take_plain(&to, q, (const float *)past->outlier_keys + (size_t)(rows + i) * (size_t)width,
                           (const float *)past->outlier_values + (size_t)(rows + i) * (size_t)width, width);
            for (int row = 0; row < past->segments * SEGMENT; row++) {
                int is_odd = 0;
                for (int i = 0; i < odd; i++) is_odd |= past->outliers[odd + i] == row / chunk;
                if (!is_odd) take_rebuilt(&to, &s, past, q, row);
            }
            for (int i = first; i < count; i++) {
                size_t row = (size_t)path_row(node, i);
                take_plain(&to, q, (const float *)m->keys + row * 2 * (size_t)width, (const float *)m->values + row * (size_t)width, width);
            }
            for (int c = 0; c < width; c++)
                far += fabs(sum[c] / to.all - (double)out[(node * m->heads + r) * width + c]) > 1e-4;
        }
        expect(far == 0, "closed segments in double", width, chunk, node, far);
    }
    free(out);
    free_shadow(&s);
}

static void all_shadows(void) {
    const int widths[] = {2, 30, 64};
    for (int i = 0; i < 3; i++) {
        shadow_in_double(widths[i], i ? 8 : 67);
        for (size_t kind = 0; kind < sizeof shadow_kinds / sizeof *shadow_kinds; kind++) {
            shadows(shadow_kinds[kind], widths[i], 8, 1, 37);
            shadows(shadow_kinds[kind], widths[i], 67, 2, 3);
        }
    }
    shadows(LS_F32, 30, 4, LS_REBUILT / SEGMENT + 1, 100);
    shadows(LS_F32, 30, 8, 1, 0);
}
