/* Far keys as they are rebuilt from their changes (DeltaLLM). Part of every isa_*.c.
 *
 * The first key of a group is whole. Of each later one a component counts where it differs by more than the threshold
 * from the key rebuilt for the row ahead of it; elsewhere it is that of this key. The cache has whole keys: a block of
 * them is rebuilt as it is read, once for all queries. Values that pass through here are compared and never computed
 * with, so a key does not depend on where reading begins. Ahead of a staged row is that of its parent. */

/* some neighbouring features of `count` keys behind the rebuilt key `last`, the first at position `from` */
INLINE void rebuild_features(const ls_mixer *m, int from, int count, int parts, float *keys, float *last) {
    int padded = ls_up16(m->width), place = from % (int)m->far_group;
    vl before[4], most = vl_set1(m->threshold);
    UNROLL(parts, c) before[c] = vl_load(last + c * LS_LANES);
    for (int i = 0; i < count; i++, keys += padded, place++) {
        if (place == m->far_group) place = 0;
        UNROLL(parts, c) {
            vl key = vl_load(keys + c * LS_LANES), change = key - before[c];
            vli counts = (vli)(change > most) | (vli)(change < -most);
            before[c] = place ? vl_select(counts, key, before[c]) : key;
            vl_store(keys + c * LS_LANES, before[c]);
        }
    }
    UNROLL(parts, c) vl_store(last + c * LS_LANES, before[c]);
}

/* Keys [count][whole sixteens] from position `from` on, in place; last: the rebuilt key ahead of them, then the last
 * of them. */
static void rebuild(const ls_mixer *m, int from, int count, float *keys, float *last) {
    int padded = ls_up16(m->width), c = 0;
    for (; c + 4 * LS_LANES <= padded; c += 4 * LS_LANES) rebuild_features(m, from, count, 4, keys + c, last + c);
    for (; c < padded; c += LS_LANES) rebuild_features(m, from, count, 1, keys + c, last + c);
}

/* The rebuilt key ahead of position `from` in `last`, if its group goes on there; space: a page of keys. */
static void rebuild_ahead(const ls_mixer *m, const char *keys, int from, float *space, float *last) {
    int begin = from - from % (int)m->far_group;
    for (int count; begin < from; begin += count) {
        count = LS_PAGE - begin % LS_PAGE;
        if (count > from - begin) count = from - begin;
        widen_keys(m, key_address(m, keys, begin), count, 0, space);
        rebuild(m, begin, count, space, last);
    }
}

/* The staged keys, each behind that of its parent; last: the rebuilt key of the last committed row. */
static void rebuild_staged(const ls_mixer *m, const char *keys, float *space, const float *last) {
    int padded = ls_up16(m->width);
    widen_keys(m, key_address(m, keys, m->committed), m->staged, 0, space);
    for (int i = 0; i < m->staged; i++) {
        float before[LS_MAX_HEAD_WIDTH];
        uint64_t ancestors = m->ancestors[i] & ~(1ull << i);
        const float *parent = ancestors ? space + (63 - __builtin_clzll(ancestors)) * padded : last;
        memcpy(before, parent, sizeof *before * (size_t)padded);
        rebuild(m, m->committed + __builtin_popcountll(ancestors), 1, space + i * padded, before);
    }
}

/* Of all nodes, the fewest and the most rows that are far for one. */
static void find_far(block *b, const query *queries) {
    const ls_mixer *m = b->m;
    int repeats = m->heads / m->kv_heads;
    b->least_far = b->most_far = queries->visible->far;
    for (int n = 1; n < m->nodes; n++) {
        int far = queries[n * repeats].visible->far;
        if (far < b->least_far) b->least_far = far;
        if (far > b->most_far) b->most_far = far;
    }
}

/* Make the far keys of the present block ready, and the far staged ones, where there are any. */
static void begin_rebuilt(block *b, int then) {
    const ls_mixer *m = b->m;
    int from = b->from, count = b->most_far - from < b->shared ? b->most_far - from : b->shared;
    float *space = b->space + 2 * ls_block_floats(m), *staged = space + BLOCK * ls_up16(m->width);
    float *last = staged + BLOCK * ls_up16(m->width);
    b->rebuilt.count = count > 0 ? count : 0;
    b->whole = b->least_far < from + b->shared;
    if (count > 0) {
        if (b->rebuilt_to != from) rebuild_ahead(m, b->keys, from, space, last);
        int64_t ahead = bytes_ahead(m, b->keys, from, then);
        widen_keys(m, key_address(m, b->keys, from), count, ahead, space);
        rebuild(m, from, count, space, last);
        use_keys(m, space, count, &b->rebuilt);
        b->rebuilt_to = from + count;
    }
    if (!b->any_own || b->most_far <= m->committed || b->rebuilt_staged.count) return;
    if (b->rebuilt_to != m->committed) rebuild_ahead(m, b->keys, m->committed, staged, last);
    rebuild_staged(m, b->keys, staged, last);
    use_keys(m, staged, m->staged, &b->rebuilt_staged);
}

/* As score_rows, over the rows of a block that all see: far ones by their rebuilt keys. */
INLINE void score_shared(const block *b, const query *queries, int count, float scores[][BLOCK]) {
    const ls_mixer *m = b->m;
    float far[LS_QUERIES][BLOCK];
    if (b->whole) score_rows(m, &b->rows, queries, count, scores);
    if (!b->rebuilt.count) return;
    score_floats(&b->rebuilt, queries, count, ls_up16(m->width), LS_F32, far);
    for (int j = 0; j < count; j++) {
        int some = queries[j].visible->far - b->from;
        if (some > b->rebuilt.count) some = b->rebuilt.count;
        for (int i = 0; i < some; i++) scores[j][i] = far[j][i];
    }
}

/* Behind these the scores of the rows that each query sees alone; own: how many, indices: which of the staged ones. */
INLINE void score_own(const block *b, const query *queries, int count, int32_t indices[][BLOCK], int *own,
                      float scores[][BLOCK]) {
    const ls_mixer *m = b->m;
    float staged[LS_QUERIES][BLOCK], far[LS_QUERIES][BLOCK];
    int any_far = b->rebuilt_staged.count;
    score_rows(m, &b->staged, queries, count, staged);
    if (any_far) score_floats(&b->rebuilt_staged, queries, count, ls_up16(m->width), LS_F32, far);
    for (int j = 0; j < count; j++) {
        int some = any_far ? queries[j].visible->far - b->from - b->shared : 0;
        own[j] = own_rows(b, queries + j, indices[j]);
        for (int i = 0; i < own[j]; i++)
            scores[j][b->shared + i] = i < some ? far[j][indices[j][i]] : staged[j][indices[j][i]];
    }
}
