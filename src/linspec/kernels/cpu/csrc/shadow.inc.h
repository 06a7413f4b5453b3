/* Closed segments whose keys are products of thin matrices, under one softmax with the span (ShadowKV). Part of every
 * isa_*.c.
 *
 * A node reads first all outliers, then the chunks whose landmarks have the greatest shares for a query of the kv head, of
 * equal ones the first, and then the rows within its span. Keys of chunks are made and turned to their positions as they are
 * read, a few segments at a time, once for all nodes that select them; each node then reads those that it selects, whatever
 * the others do. All keys meet queries as floats. Those are rounded where rows are codes, as they would be to meet codes. */

/* what is past of some nodes, of one kv head; the rest lies in scratch */
typedef struct {
    const ls_mixer *m;
    const ls_past *past;
    int each, chunks, most; /* chunks of a segment, of all, and how many of them a node selects */
    int stride;             /* from the scores of a query to those of the next one, whole sixteens */
    float *scores;          /* [queries][stride] */
    int32_t *lists;         /* [nodes][most]: the chunks that each selects, in ascending order */
    int32_t *places;        /* [chunks]: among those whose keys are made; -1: not there */
    float *keys;            /* [ls_rebuilt_chunks][chunk][whole sixteens] */
    int segment;            /* whose right factor is ready: */
    const float *right;     /* [rank][whole sixteens] */
    float *right_space, *left_space; /* as large, and [BLOCK][whole sixteens of the rank] */
    float *gathered;        /* a block of keys, then of values as they are kept */
} shadow;

/* a state of rows of `width` features */
static ls_mixer rows_of_width(const ls_mixer *m, int width, int bytes) {
    ls_mixer rows = *m;
    rows.width = width;
    rows.row_bytes = rows.value_bytes = bytes;
    rows.paged = rows.staged = 0;
    return rows;
}

/* ---- what is selected */

/* The products of all landmarks with the queries. */
static void score_landmarks(const shadow *s, block b, const query *queries, int count) {
    ls_mixer marks = rows_of_width(s->m, s->m->width, s->m->value_bytes);
    marks.committed = s->chunks;
    b.m = &marks;
    b.keys = s->past->landmarks + (int64_t)s->m->past_head * s->chunks * marks.row_bytes;
    b.values = NULL;
    for (int from = 0; from < s->chunks; from += BLOCK) {
        begin_block(&b, from, count);
        for (int first = 0, n; first < count; first += n, b.rows.fresh = 0) {
            float scores[LS_QUERIES][BLOCK];
            n = next_of(count - first);
            score_queries(&b, queries + first, n, scores);
            for (int j = 0; j < n; j++)
                memcpy(s->scores + (int64_t)(first + j) * s->stride + from, scores[j], sizeof(float) * (size_t)b.shared);
        }
    }
}

/* of `count` numbers, whole sixteens, the logarithm of the sum of their exponentials */
static float log_of_sum(const float *x, int count) {
    vl most = vl_set1(-__builtin_inff()), total[LS_PARTS];
    for (int i = 0; i < count; i += LS_LANES) most = vl_max(vl_load(x + i), most);
    float max = vl_largest(most);
    UNROLL(LS_PARTS, h) total[h] = vl_set1(0.0f);
    for (int i = 0; i < count; i += 16)
        UNROLL(LS_PARTS, h) total[h] += vl_exp(vl_load(x + i + h * LS_LANES) - vl_set1(max));
    return max + __builtin_logf(vl_sum(vl_folded(total)));
}

/* The scores of a query become logarithms of the shares of landmarks; outliers have none. */
static void to_shares(const shadow *s, float *scores) {
    const ls_mixer *m = s->m;
    int count = s->past->segments * m->outliers;
    const int32_t *outliers = s->past->outliers + (int64_t)m->past_head * count;
    for (int i = 0; i < s->chunks; i++) scores[i] *= m->score_scale;
    for (int i = s->chunks; i < s->stride; i++) scores[i] = -__builtin_inff();
    for (int i = 0; i < count; i++) scores[outliers[i]] = -__builtin_inff();
    float all = log_of_sum(scores, s->stride);
    for (int i = 0; i < s->stride; i++) scores[i] -= all;
}

static void select_chunks(const shadow *s, int nodes) {
    int repeats = s->m->heads / s->m->kv_heads;
    for (int n = 0; n < nodes; n++) {
        float *best = s->scores + (int64_t)n * repeats * s->stride;
        for (int r = 0; r < repeats; r++) {
            float *shares = best + (int64_t)r * s->stride;
            to_shares(s, shares);
            for (int i = 0; i < s->stride; i += LS_LANES) vl_store(best + i, vl_max(vl_load(shares + i), vl_load(best + i)));
        }
        ls_greatest(best, s->chunks, s->most, s->lists + (int64_t)n * s->most);
    }
}

/* ---- keys */

/* `count` rows of a factor as floats, whole sixteens of features: where they are, or in `space` */
static const float *factor_rows(const ls_mixer *m, const char *rows, int width, int bytes, int count, float *space) {
    ls_mixer factor = rows_of_width(m, width, bytes);
    if (m->row_kind == LS_F32 && width % 16 == 0) return (const float *)rows;
    for (int i = 0, n; i < count; i += n) {
        n = count - i < BLOCK ? count - i : BLOCK;
        widen_keys(&factor, rows + (int64_t)i * bytes, n, 0, space + (int64_t)i * ls_up16(width));
    }
    return space;
}

/* Keys of `count` rows from row `first` of all segments on, which are of one. */
static void rebuild_rows(shadow *s, int first, int count, float *to) {
    const ls_mixer *m = s->m;
    int segment = first / (int)m->group, padded = ls_up16(m->width), rank = ls_up16(m->rank);
    accumulator keys[BLOCK];
    if (segment != s->segment) {
        int64_t row = ((int64_t)segment * m->past_heads + m->past_head) * m->rank;
        s->right = factor_rows(m, s->past->right + row * m->value_bytes, m->width, m->value_bytes, m->rank, s->right_space);
        s->segment = segment;
    }
    const char *rows = s->past->left + (int64_t)first * m->left_bytes;
    const float *left = factor_rows(m, rows, m->rank, m->left_bytes, count, s->left_space);
    for (int i = 0; i < count; i++) keys[i] = (accumulator){to + i * padded, left + i * rank, BEGIN, 0, 0};
    source right = {.rows = s->right, .stride = padded * (int64_t)sizeof *to, .kind = LS_F32, .count = m->rank, .width = padded};
    accumulate(&right, keys, count);
    for (int i = 0; i < count && m->turned; i++) {
        int64_t at = (int64_t)(first + i) * m->turned;
        ls_turn(to + i * padded, m->cosines + at, m->sines + at, m->turned);
    }
}

/* Make the keys of the chunks first .. last - 1 that some node selects; from, to: where these are in its list. */
static void rebuild_chunks(shadow *s, int nodes, int first, int last, const int32_t *from, const int32_t *to) {
    int chunk = s->m->chunk, made = 0;
    for (int i = first; i < last; i++) s->places[i] = -1;
    for (int n = 0; n < nodes; n++)
        for (int i = from[n]; i < to[n]; i++) s->places[s->lists[(int64_t)n * s->most + i]] = 0;
    for (int i = first; i < last; i++) {
        if (s->places[i] < 0) continue;
        float *keys = s->keys + (int64_t)made * chunk * ls_up16(s->m->width);
        for (int row = 0, n; row < chunk; row += n) {
            n = chunk - row < BLOCK ? chunk - row : BLOCK;
            rebuild_rows(s, i * chunk + row, n, keys + row * ls_up16(s->m->width));
        }
        s->places[i] = made++;
    }
}

/* ---- reading */

/* where the values of a chunk begin */
INLINE const char *chunk_values(const shadow *s, int chunk) {
    const ls_mixer *m = s->m;
    int64_t segment = chunk / s->each, place = s->past->regions ? s->past->regions[segment] : segment;
    int64_t row = (place * m->past_heads + m->past_head) * m->group + (int64_t)(chunk % s->each) * m->chunk;
    return *s->past->values + row * m->value_bytes;
}

/* Rows from place `at` on of those of some chunks, one behind the other: values as they are kept, and keys, which may lie so
 * already. Returns the keys. */
static const float *gather_chunks(const shadow *s, const int32_t *list, int at, int count) {
    const ls_mixer *m = s->m;
    int padded = ls_up16(m->width), chunk = m->chunk, begin = at / chunk, end = (at + count - 1) / chunk;
    int in_place = s->places[list[end]] - s->places[list[begin]] == end - begin;
    float *keys = s->gathered;
    char *values = (char *)(keys + BLOCK * padded);
    for (int i = at, n; i < at + count; i += n, keys += n * padded, values += (int64_t)n * m->value_bytes) {
        int row = i % chunk, left = at + count - i, one = list[i / chunk];
        n = chunk - row < left ? chunk - row : left;
        memcpy(values, chunk_values(s, one) + (int64_t)row * m->value_bytes, (size_t)n * (size_t)m->value_bytes);
        if (in_place) continue;
        memcpy(keys, s->keys + ((int64_t)s->places[one] * chunk + row) * padded, sizeof *keys * (size_t)(n * padded));
    }
    return in_place ? s->keys + ((int64_t)s->places[list[begin]] * chunk + at % chunk) * padded : s->gathered;
}

/* The queries of a node over some chunks, whose keys are there. */
static void attend_some_chunks(const shadow *s, block *b, const query *queries, const int32_t *list, int chunks) {
    const ls_mixer *m = s->m;
    int repeats = m->heads / m->kv_heads, rows = chunks * m->chunk;
    ls_mixer gathered = rows_of_width(m, m->width, m->value_bytes);
    const char *values = (const char *)(s->gathered + BLOCK * ls_up16(m->width));
    for (int at = 0; at < rows; at += BLOCK) {
        b->shared = rows - at < BLOCK ? rows - at : BLOCK;
        use_keys(m, gather_chunks(s, list, at, b->shared), b->shared, &b->rows);
        read_values(&gathered, values, 0, b->shared, 0, repeats <= 3 * LS_QUERIES, b->space, &b->rows);
        for (int first = 0, n; first < repeats; first += n) {
            n = next_of(repeats - first);
            attend_queries(b, queries + first, n);
        }
    }
}

static void attend_outliers(const shadow *s, block b, query *queries, int count) {
    const visible_rows *near = queries->visible;
    ls_mixer rows = rows_of_width(s->m, s->m->width, s->m->value_bytes);
    rows.committed = s->past->segments * s->m->outliers * s->m->chunk;
    visible_rows all = {.count = rows.committed};
    int64_t at = (int64_t)s->m->past_head * rows.committed * rows.row_bytes;
    int repeats = s->m->heads / s->m->kv_heads;
    b.m = &rows, b.keys = s->past->outlier_keys + at, b.values = s->past->outlier_values + at;
    for (int i = 0; i < count; i++) queries[i].visible = &all;
    for (int begin = 0; begin < rows.committed; begin += BLOCK) attend_rows(&b, queries, count, begin);
    for (int i = 0; i < count; i++) queries[i].visible = near + i / repeats;
}

/* What nodes read of the past that they have in common. */
static void attend_past(shadow *s, block b, query *queries, int nodes) {
    const ls_mixer *m = s->m;
    int32_t from[LS_MAX_NODES] = {0}, to[LS_MAX_NODES];
    int repeats = m->heads / m->kv_heads, others;
    s->each = (int)m->group / m->chunk;
    s->chunks = s->past->segments * s->each;
    s->stride = ls_up16(s->chunks);
    s->segment = -1;
    others = s->chunks - s->past->segments * m->outliers;
    s->most = m->marked < others ? m->marked : others;
    attend_outliers(s, b, queries, nodes * repeats);
    if (!s->most) return;
    score_landmarks(s, b, queries, nodes * repeats);
    select_chunks(s, nodes);
    b.whole = 1;
    for (int first = 0, last; first < s->chunks; first = last) {
        last = first + ls_rebuilt_chunks(m) < s->chunks ? first + ls_rebuilt_chunks(m) : s->chunks;
        for (int n = 0; n < nodes; n++)
            for (to[n] = from[n]; to[n] < s->most && s->lists[(int64_t)n * s->most + to[n]] < last;) to[n]++;
        rebuild_chunks(s, nodes, first, last, from, to);
        for (int n = 0; n < nodes; n++)
            attend_some_chunks(s, &b, queries + n * repeats, s->lists + (int64_t)n * s->most + from[n], to[n] - from[n]);
        memcpy(from, to, sizeof *to * (size_t)nodes);
    }
}

/* queries as they would meet codes */
static void round_queries(const ls_mixer *m, float *plain) {
    int8_t codes[LS_MAX_HEAD_WIDTH];
    int32_t offset;
    for (size_t i = 0; i < ls_query_count(m); i++, plain += ls_up16(m->width)) {
        float scale = quantize_row(plain, m->width, (m->width + 31) & ~31, 1, 0, codes, &offset);
        for (int c = 0; c < m->width; c++) plain[c] = (float)codes[c] * scale;
    }
}

/* see ls_ops */
static void attend_shadow(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, void *scratch) {
    int repeats = m->heads / m->kv_heads, padded = ls_up16(m->width), chunks = ls_past_chunks(m);
    size_t floats = ls_query_count(m) * (size_t)padded;
    float *space = (float *)ls_up64((uintptr_t)scratch);
    float *turned = space + ls_read_floats(m), *plain = turned + floats;
    query *queries = (query *)(plain + floats);
    shadow s = {.m = m, .scores = (float *)((char *)queries + sizeof(float) * LS_QUERY_FLOATS * ls_query_count(m))};
    s.keys = s.scores + ls_query_count(m) * (size_t)ls_up16(chunks);
    s.right_space = s.keys + (size_t)ls_rebuilt_chunks(m) * (size_t)m->chunk * (size_t)padded;
    s.left_space = s.right_space + (size_t)m->rank * (size_t)padded;
    s.gathered = s.left_space + (size_t)BLOCK * (size_t)ls_up16(m->rank);
    s.places = (int32_t *)(s.gathered + BLOCK * padded + BLOCK * (size_t)m->value_bytes / sizeof(float));
    s.lists = s.places + chunks;
    prepare_queries(m, 0, q, q_stride, queries, plain);
    if (m->row_kind == LS_INT8 || m->row_kind == LS_INT4) round_queries(m, plain);
    begin_partial(m, partial, queries);
    block b = {.m = m, .keys = m->keys, .values = m->values, .space = space, .turned = turned};
    for (int n = 0, last; n < m->nodes; n = last) {
        int first = queries[n * repeats].visible->first;
        for (last = n + 1; last < m->nodes; last++)
            if (queries[last * repeats].visible->first != first) break;
        s.past = m->past + (first > 0);
        if (s.past->segments) attend_past(&s, b, queries + n * repeats, last - n);
    }
    for (int i = 0; i < ls_block_count(m); i++) attend_block(&b, queries, i * BLOCK);
}
