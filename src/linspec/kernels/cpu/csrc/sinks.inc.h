/* The first rows of a text, which nodes see from everywhere. Part of every isa_*.c.
 *
 * They are blocks of their own ahead of the others, for every node that does not reach them as near rows. While
 * their group is open or within the span they are the first rows of the slot; then they lie in `sink_rows`. Either
 * way they are read in the same order, so that a node gets the same bits. */

/* the sinks out of `sink_rows`, keys and then values side by side in `to` */
static void unpack_sinks(const ls_mixer *m, block *b, float *to) {
    size_t width = (size_t)m->width, size = (size_t)m->sinks * width;
    for (int i = 0; i < m->sinks; i++) {
        const float *row = m->sink_rows + (size_t)i * (2 * width + 1);
        memcpy(to + (size_t)i * width, row, width * sizeof *to);
        memcpy(to + size + (size_t)i * width, row + width, width * sizeof *to);
    }
    b->keys = (const char *)to;
    b->values = (const char *)(to + size);
}

/* scratch: ls_attend_scratch_bytes(m), with the queries at its beginning */
static void attend_sinks(const ls_mixer *m, block b, query *queries, void *scratch) {
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats, kept_apart = m->sink_rows != NULL;
    const visible_rows *near = queries->visible;
    visible_rows sinks[LS_MAX_NODES];
    /* there are no rows behind the sinks, which queries could share */
    ls_mixer all = *m;
    if (kept_apart || all.committed > m->sinks) all.committed = m->sinks;
    b.m = &all;
    if (kept_apart) {
        size_t bytes = sizeof(float) * 2 * (size_t)m->sinks * (size_t)m->width;
        unpack_sinks(m, &b, (float *)((char *)scratch + ls_attend_scratch_bytes(m) - bytes));
    }
    for (int n = 0; n < m->nodes; n++) {
        sinks[n] = near[n];
        sinks[n].first = 0;
        if (kept_apart || sinks[n].count > m->sinks) sinks[n].count = m->sinks;
    }
    for (int i = 0; i < count; i++) queries[i].visible = sinks + i / repeats;
    for (int begin = 0; begin < m->sinks; begin += BLOCK)
        for (int n = 0, last; n < m->nodes; n = last) {
            int far = kept_apart || near[n].first > 0;
            for (last = n + 1; last < m->nodes; last++)
                if ((kept_apart || near[last].first > 0) != far) break;
            if (far) attend_rows(&b, queries + n * repeats, (last - n) * repeats, begin);
        }
    for (int i = 0; i < count; i++) queries[i].visible = near + i / repeats;
}
