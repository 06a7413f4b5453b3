/* The first rows of a text, which nodes see from everywhere. Part of every isa_*.c.
 *
 * They are blocks of their own ahead of the others, for every node that does not reach them as near rows. While
 * their group is open or within the span they are the first rows of the slot; then they lie in `sink_rows`, in the
 * same format. Either way they are read in the same order, so that a node gets the same bits. */

/* `b` as attend_blocks begins with it; its space is free again afterwards */
static void attend_sinks(const ls_mixer *m, block b, query *queries) {
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats, kept_apart = m->sink_rows != NULL;
    const visible_rows *near = queries->visible;
    visible_rows sinks[LS_MAX_NODES];
    ls_mixer all = *m;
    b.m = &all;
    /* there are no rows behind the sinks, which queries could share */
    if (kept_apart || m->committed >= m->sinks) all.committed = m->sinks, all.staged = 0;
    if (kept_apart) {
        b.keys = m->sink_rows;
        b.values = m->sink_rows + (int64_t)m->sinks * m->row_bytes;
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
