/* Positions that a node selects for later layers, and attention to those and to the span (TidalDecode). Part of every
 * isa_*.c.
 *
 * A far row counts by the greatest product of its key with a query of the node. Those that count most are selected, of
 * equal ones the first, by all query heads of a kv head alike, and whatever else is in the step. A list is how many they
 * are and then their positions, in ascending order. */

/* some queries (a constant) over a block: scores as they are, without the scale of a query */
INLINE void score_some(const block *b, const query *queries, int count, float scores[][BLOCK]) {
    int32_t indices[LS_QUERIES][BLOCK];
    int own[LS_QUERIES];
    score_shared(b, queries, count, scores);
    if (b->any_own) score_own(b, queries, count, indices, own, scores);
}

static void score_queries(const block *b, const query *queries, int count, float scores[][BLOCK]) {
    switch (count) {
        case 1: score_some(b, queries, 1, scores); break;
        case 2: score_some(b, queries, 2, scores); break;
        case 3: score_some(b, queries, 3, scores); break;
#if LS_QUERIES > 3
        case 4: score_some(b, queries, 4, scores); break;
#endif
    }
}

/* The greatest products of the queries of a node with `count` rows of a block. */
static void best_products(const block *b, const query *queries, int count, float *to) {
    float scores[LS_QUERIES][BLOCK];
    for (int i = 0; i < count; i++) to[i] = -__builtin_inff();
    for (int n, left = b->m->heads / b->m->kv_heads; left; left -= n, queries += n) {
        n = next_of(left);
        score_queries(b, queries, n, scores);
        for (int j = 0; j < n; j++) {
            float scale = has_codes(b->m) ? queries[j].scale : 1.0f;
            for (int i = 0; i < count; i++) {
                float product = scores[j][i] * scale;
                if (product > to[i]) to[i] = product;
            }
        }
    }
}

/* see ls_ops */
static void select_positions(const ls_mixer *m, const float *q, int64_t q_stride, void *scratch) {
    int repeats = m->heads / m->kv_heads, rows = m->committed + m->staged, most = 0, seeing = 0;
    float *space = (float *)ls_up64((uintptr_t)scratch), *plain = space + ls_read_floats(m);
    query *queries = (query *)(plain + ls_query_count(m) * (size_t)ls_up16(m->width));
    float *judged = (float *)((char *)queries + sizeof(float) * LS_QUERY_FLOATS * ls_query_count(m));
    prepare_queries(m, 0, q, q_stride, queries, plain);
    block b = {.m = m, .keys = m->keys, .space = space};
    for (int n = 0; n < m->nodes; n++)
        if (queries[n * repeats].visible->far > most) most = queries[n * repeats].visible->far;
    for (int from = 0; from < most; from += BLOCK, seeing = 0) {
        for (int n = 0; n < m->nodes; n++) seeing += queries[n * repeats].visible->far > from ? repeats : 0;
        begin_block(&b, from, seeing);
        for (int n = 0; n < m->nodes; n++) {
            int count = queries[n * repeats].visible->far - from;
            if (count > 0)
                best_products(&b, queries + n * repeats, count < BLOCK ? count : BLOCK, judged + (int64_t)n * rows + from);
            b.rows.fresh = 0;
        }
    }
    for (int n = 0; n < m->nodes; n++) {
        int32_t *list = m->lists + n * m->list_stride;
        *list = ls_greatest(judged + (int64_t)n * rows, queries[n * repeats].visible->far, m->positions, list + 1);
    }
}

/* Rows from place `at` on of those that a node reads, in the order of their positions, one behind the other; returns how
 * many. */
static int gather_rows(const ls_mixer *m, const visible_rows *v, const int32_t *list, int at, char *keys, char *values) {
    int count = list[0] + v->count - v->far - at;
    if (count > BLOCK) count = BLOCK;
    for (int i = 0; i < count; i++, keys += m->row_bytes, values += m->value_bytes) {
        int position = at + i < list[0] ? list[1 + at + i] : v->far + at + i - list[0], row = row_at(m, v, position);
        memcpy(keys, key_address(m, m->keys, row), (size_t)m->row_bytes);
        memcpy(values, value_address(m, m->values, row), (size_t)m->value_bytes);
    }
    return count;
}

/* see ls_ops */
static void attend_listed(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, void *scratch) {
    int repeats = m->heads / m->kv_heads, n;
    float *space = (float *)ls_up64((uintptr_t)scratch), *plain = space + ls_read_floats(m);
    query *queries = (query *)(plain + ls_query_count(m) * (size_t)ls_up16(m->width));
    char *keys = (char *)queries + sizeof(float) * LS_QUERY_FLOATS * ls_query_count(m), *values = keys + BLOCK * m->row_bytes;
    ls_mixer gathered = *m;
    gathered.paged = 0;
    block b = {.m = m, .whole = 1};
    prepare_queries(m, 0, q, q_stride, queries, plain);
    begin_partial(m, partial, queries);
    for (int node = 0; node < m->nodes; node++, queries += repeats)
        for (int at = 0;; at += BLOCK) {
            b.shared = gather_rows(m, queries->visible, m->lists + node * m->list_stride, at, keys, values);
            if (b.shared <= 0) break;
            read_rows(&gathered, keys, values, 0, b.shared, 0, repeats <= 3 * LS_QUERIES, space, &b.rows);
            b.rows.fresh = 0;
            for (int first = 0; first < repeats; first += n) {
                n = next_of(repeats - first);
                attend_queries(&b, queries + first, n);
            }
        }
}
